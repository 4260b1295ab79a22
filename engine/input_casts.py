"""fp32 inputs of a model that computes in bf16 or fp16: where they are cast, and what is never rounded.

The rule: a floating-point tensor is cast where torch would refuse to combine it with the low-precision parameters, and
nowhere else. Until then it keeps its values, so that labels, boxes and time steps that go through `forward` are used in
fp32: bf16 has 8 significant bits and would round 999, 1001 and 1002 to 1000.

* Layers of `torch.nn` that own parameters cast their inputs by a forward pre-hook. Batch norm, whose parameters stay
  fp32, takes low-precision inputs as they are.
* In the code of other modules, such as one that computes ``x @ self.weight``, the operation itself casts: a
  `TorchFunctionMode` that the module's forward runs in. Products are computed in the low precision, losses in the wider
  one. Buffers are left to `data_types.buffer_dtype`.

Both cost time for every layer or operation, so they are there only where they are needed. The first forwards of each
kind (see `_kind_of`) are watched: all of the model runs in the mode, which notes the modules that need it for
themselves, and hooks that never had to cast are removed. Hooks that had to, those of layers that have not run yet, and
all of them inside a compiled graph, where they cost nothing, stay.

DeepSpeed casts nothing in bf16, and in fp16 everything, labels included (`_cast_inputs_half` in runtime/engine.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from redline.device import map_tensors
from redline.errors import EngineError
from redline.log import log

__all__ = ["InputCasts", "explain_error"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not float8, which is for storage
_WATCHED_FORWARDS = 3  # of each kind, before casts that were not needed are given up


class InputCasts:
    """Casts the inputs of a model's layers to the dtype of their parameters, which is final; they may be sharded."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device_type: str) -> None:
        self._module = module
        self._dtype, self._device_type = dtype, device_type
        self._hooks: dict[nn.Module, tuple[_CastInputs, RemovableHandle]] = {}
        self._modes: dict[nn.Module, _ModeInForward] = {}
        self._watch = _CastOperands(dtype, device_type)
        self._num_forwards: dict[Any, int] = {}  # by kind
        self._watches_always = False
        self._add_hooks()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, with casts where they are needed."""
        kind = _kind_of(self._module, args, kwargs)
        count = self._num_forwards.get(kind, 0)
        depth = torch._C._len_torch_function_stack()
        try:
            if count < _WATCHED_FORWARDS:
                return self._call_watched(args, kwargs, kind, count)
            if self._watches_always:
                with self._watch:
                    return self._module(*args, **kwargs)
            return self._module(*args, **kwargs)
        except BaseException:  # an interrupt ends a forward without its hooks
            while torch._C._len_torch_function_stack() > depth:
                torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
            for mode in self._modes.values():
                mode.depth = 0
            self._num_forwards.clear()  # a layer whose hook was removed may have met another dtype after all
            raise

    def _call_watched(self, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Any, count: int) -> Any:
        if count == 0:
            self._add_hooks()
        self._watch.begin(self._module)
        try:
            with self._watch:
                outputs = self._module(*args, **kwargs)
        finally:
            found = self._watch.end()
        for module in found:
            # Before the backward, where activation checkpointing runs the module's forward again.
            self._modes[module] = _ModeInForward(module, _CastOperands(self._dtype, self._device_type))
        for name, operation in {type(module).__name__: operation for module, operation in found.items()}.items():
            log.info(
                "inputs: %s.forward combines fp32 and low-precision tensors in %s, and casts them every time; a cast "
                "in its code is faster, as in x.to(self.weight.dtype)", name, operation,
            )  # fmt: skip
        self._num_forwards[kind] = count + 1  # not reached by a forward that broke off
        if count + 1 == _WATCHED_FORWARDS:
            self._remove_hooks()
        # Compiled code was traced under the mode, and would be compiled again without it; there it costs nothing.
        self._watches_always |= self._watch.is_needed_everywhere or _has_compiled_parts(self._module)
        return outputs

    def _add_hooks(self) -> None:
        for each in self._module.modules():
            if each not in self._hooks and _casts_inputs(each):
                hook = _CastInputs(self._device_type)
                self._hooks[each] = (hook, each.register_forward_pre_hook(hook, with_kwargs=True))

    def _remove_hooks(self) -> None:
        for each, (hook, handle) in list(self._hooks.items()):
            if hook.ran and not hook.needed:
                handle.remove()
                del self._hooks[each]


# -- layers ---------------------------------------------------------------------------------------------


class _CastInputs:
    """Forward pre-hook that casts a layer's inputs to the dtype of its parameters.

    Knows nothing of the engine: a copy of the module, for an exponential moving average, say, has a working copy of it.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self.ran = False  # whether the layer has been called, outside of compiled graphs
        self.needed = False  # whether there was anything to cast

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        traced = torch.compiler.is_compiling()
        if not traced:
            self.ran = True
        dtype = _dtype_of(module)
        assert dtype is not None
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # most layers, without a walk
            new = (_cast(args[0], dtype),)
            unchanged = new[0] is args[0]
        else:
            # The walk reaches the pair of states of an LSTM. It returns what it was given if there is nothing to cast.
            new = _cast(args, dtype)
            kwargs, given = _cast(kwargs, dtype), kwargs
            unchanged = new is args and kwargs is given
        if unchanged or torch.is_autocast_enabled(self._device_type):  # which has casts of its own
            return None
        if not traced:
            self.needed = True
        return new, kwargs


def _casts_inputs(module: nn.Module) -> bool:
    """Whether it is a layer of torch's that owns parameters and computes in their dtype."""
    if isinstance(module, (nn.Embedding, torch.jit.ScriptModule)):
        return False
    statistics = getattr(module, "running_mean", None)
    if isinstance(statistics, Tensor) and statistics.dtype is torch.float32:
        return False
    forward = getattr(type(module), "forward", None)
    return getattr(forward, "__module__", "").startswith("torch.nn.modules.") and _dtype_of(module) is not None


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """Of the floating-point parameters that a layer owns; at ZeRO stage 3 right only while they are unsharded."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype in _FLOATS:
            return parameter.dtype
    if "parametrizations" in module._modules:  # `torch.nn.utils.parametrize` moves parameters there
        for parameter in module._modules["parametrizations"].parameters():  # type: ignore[union-attr]
            if parameter.dtype in _FLOATS:
                return parameter.dtype
    return None


def _has_compiled_parts(module: nn.Module) -> bool:
    return any(
        each._compiled_call_impl is not None or hasattr(each.forward, "_torchdynamo_orig_callable")
        for each in module.modules()
    )


# -- operations -----------------------------------------------------------------------------------------


class _ModeInForward:
    """Forward hooks that enter and leave a mode; like :class:`_CastInputs` they work in a copy of the module, too."""

    def __init__(self, module: nn.Module, mode: _CastOperands) -> None:
        self._mode = mode
        self.depth = 0
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self.depth += 1
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: Any) -> None:
        if self.depth:
            self.depth -= 1
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _CastOperands(TorchFunctionMode):
    """Casts the operands of operations that torch does not run on mixed dtypes."""

    def __init__(self, dtype: torch.dtype, device_type: str) -> None:
        super().__init__()
        self._dtype, self._device_type = dtype, device_type
        self._modules: dict[int, nn.Module] = {}
        self._buffers: set[int] = set()
        self._found: dict[nn.Module, str] = {}
        self.is_needed_everywhere = False  # whether an operation had to cast in no module's forward

    def begin(self, module: nn.Module) -> None:
        """Watch a forward of this module: note where casts are needed, and leave its buffers to torch.

        Buffers have the dtype that `data_types.buffer_dtype` gives them. Those of spectral norm and orthogonal
        parametrizations are not inputs, and matrix powers and inverses need more than 8 bits.
        """
        self._modules = {id(each): each for each in module.modules()}
        self._buffers = {id(buffer) for buffer in module.buffers()}

    def end(self) -> dict[nn.Module, str]:
        """The modules in whose own forward an operation had to cast, with its name."""
        found, self._found = self._found, {}
        self._modules, self._buffers = {}, set()
        return found

    def _note(self, func: Any) -> None:
        """Find the innermost module whose forward is running: its first argument, in the frames of the stack."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and code.co_argcount:
                module = self._modules.get(id(frame.f_locals.get(code.co_varnames[0])))
                if module is not None:
                    self._found.setdefault(module, getattr(func, "__name__", str(func)))
                    return
            frame = frame.f_back
        self.is_needed_everywhere = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        choose = _RULES.get(func)
        if choose is None:
            return func(*args, **kwargs)
        # A mask may be fp32 next to bf16, and should: its smallest number is minus infinity in fp16.
        num_operands = 3 if func is F.scaled_dot_product_attention else len(args)
        operands = {name: value for name, value in kwargs.items() if name != "attn_mask"}
        dtype = choose([tensor.dtype for tensor in _tensors_in((args[:num_operands], operands))], self._dtype)
        if dtype is None or torch.is_autocast_enabled(self._device_type):
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling() and self._modules:  # in this order, lest compiled code depends on them
            if choose is not _wider_of and any(id(tensor) in self._buffers for tensor in _tensors_in((args, kwargs))):
                return func(*args, **kwargs)  # torch's error, which `explain_error` translates
            self._note(func)
        args = (*_cast(args[:num_operands], dtype), *args[num_operands:])
        return func(*args, **{**kwargs, **_cast(operands, dtype)})


def _lower_of(dtypes: list[torch.dtype], low: torch.dtype) -> torch.dtype | None:
    """For products: the low precision, if there is an operand that has it and one that has not."""
    return low if low in dtypes and any(dtype is not low for dtype in dtypes) else None


def _weights_of(dtypes: list[torch.dtype], low: torch.dtype) -> torch.dtype | None:
    """For normalizations: the low precision, if only the input is wider. fp32 weights take low-precision input."""
    first, *rest = dtypes or [low]
    return low if first is not low and rest and all(dtype is low for dtype in rest) else None


def _wider_of(dtypes: list[torch.dtype], low: torch.dtype) -> torch.dtype | None:
    """For losses and coordinates: the wider dtype, so that no target is rounded."""
    wider = [dtype for dtype in dtypes if dtype is not low]
    return wider[0] if wider and len(wider) < len(dtypes) else None


def _named(names: str, *owners: Any) -> Iterator[Any]:
    for owner in owners:
        for name in names.split():
            if hasattr(owner, name):
                yield getattr(owner, name)


_PRODUCTS = """__matmul__ __rmatmul__ addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d dot einsum embedding_bag inner linear matmul mm
    multi_head_attention_forward mv outer prelu scaled_dot_product_attention tensordot vdot"""
_NORMS = "batch_norm group_norm instance_norm layer_norm"
# mse_loss mixes dtypes by itself, but in torch 2.9 its backward does not.
_LOSSES = "binary_cross_entropy cdist cross_entropy grid_sample huber_loss lerp mse_loss nll_loss"

_RULES: dict[Any, Callable[[list[torch.dtype], torch.dtype], torch.dtype | None]] = {
    **dict.fromkeys(_named(_PRODUCTS, torch, Tensor, F), _lower_of),
    **dict.fromkeys(_named(_NORMS, torch, F), _weights_of),
    **dict.fromkeys(_named(_LOSSES, torch, Tensor, F), _wider_of),
}


# -- tensors --------------------------------------------------------------------------------------------


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy of nested containers with every floating-point tensor cast; the value itself if there is none to cast."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.dtype in _FLOATS else tensor)


def _tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested containers, in their order."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype in _FLOATS:
            tensors.append(tensor)
        return tensor

    map_tensors(value, note)
    return tensors


def _kind_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward's way through a model may depend on: mode, gradients, and the kinds of its arguments."""
    inputs = tuple([_kind(value) for value in args]), tuple([(name, _kind(value)) for name, value in kwargs.items()])
    return module.training, torch.is_grad_enabled(), inputs


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return tuple([(key, _kind(item)) for key, item in value.items()])
    return type(value), frozenset(tensor.dtype for tensor in _tensors_in(value))


# -- errors ---------------------------------------------------------------------------------------------

_MIXED_DTYPES = re.compile(
    r"expected.*(dtype|scalar type|same type)|(same|mixed|mismatched) d?type|found dtype|type promoting not supported",
    re.IGNORECASE | re.DOTALL,
)
_NO_KERNEL = re.compile(r"not implemented for '(BFloat16|Half)'|low precision dtypes not supported", re.IGNORECASE)


def explain_error(error: BaseException, method: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Raise an EngineError that says what helps, if dtypes or sharding explain this error; else return."""
    if not isinstance(error, RuntimeError):
        return
    text = str(error)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    is_mixed = _MIXED_DTYPES.search(text) is not None
    buffers = [key for key, buffer in module.named_buffers() if buffer.dtype in _FLOATS and buffer.dtype is not dtype]
    if "DTensor" in text:
        what = "a sharded parameter met a plain tensor"
        remedy = (
            "with zero_optimization.stage 3 a parameter is full only within the forward of the module that owns it: "
            "use it there, have redline.zero.blocks name a module whose forward covers all its uses, or use "
            "zero_optimization.stage 2"
        )
    elif "storage of size 0" in text:
        what = "a sharded parameter was used after its block's forward, when it is freed"
        remedy = (
            "with zero_optimization.stage 3 only engine.backward(loss) goes back through the model; for "
            "torch.autograd.grad(), as in a gradient penalty, use zero_optimization.stage 2"
        )
    elif name != "fp32" and _NO_KERNEL.search(text):
        what = f"torch has no {name} kernel for an operation of the model"
        remedy = f"run it in fp32, as in x.float(), or use torch_autocast in place of {name}"
    elif is_mixed and buffers:
        what = f"{name} parameters met a tensor of another dtype"
        listed = ", ".join(buffers[:3]) + (", ..." if len(buffers) > 3 else "")
        remedy = (
            f'buffers of the model are not {name} ({listed}): set "data_types": {{"buffer_dtype": "{name}"}}, or cast '
            "them where they are used"
        )
    elif is_mixed and name != "fp32":
        what = f"{name} parameters met a tensor of another dtype"
        remedy = f"cast it in the model, as in x.to(self.weight.dtype), or use torch_autocast in place of {name}"
    else:
        return
    reason = next((line for line in text.splitlines() if line), "")
    raise EngineError(f"{method}: {what} ({reason}); {remedy}") from error
