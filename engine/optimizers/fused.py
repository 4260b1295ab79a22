"""torch's fused Adam, AdamW, SGD and Adagrad, right in every case and with less Python around the kernel.

Same class names, same state, same numbers bit for bit: a step calls the kernel that torch's own step would call.
torch's way there (hooks, profiler range, grouping by device and dtype) takes two thirds of a small model's step. What
is not covered here goes to torch's own step. Source: `torch/optim/adam.py`, `sgd.py`, `adagrad.py`, 2.9 to 2.13.

The kernels walk through memory and look at no strides. Given a slice of columns, or a gradient that is laid out
differently from its parameter, they write to the wrong elements on the CPU and refuse on CUDA. Parameters that they
cannot take are left to torch's unfused step; gradients and state are copied into their parameter's layout. Sharded
parameters (DTensors) are updated shard by shard, since the kernels work on single elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as _torchs

from redline.optimizers.state import create_state, endless, like, local_tensor, without_counts

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "fused_class", "guard_fused", "is_fusable"]

_DEVICES = ("cpu", "cuda")

# One group's tensors as its kernel takes them: parameters with a gradient, their gradients, their state (one list per
# key), and whether all have one dtype and device. Of sharded ones, this rank's shards. A plain tuple: a named one takes
# longer to make than the rest of a small model's check.
_Inputs = tuple[list[Tensor], list[Tensor], list[list[Tensor]], bool]
_Kernel = tuple[Callable[..., None], dict[str, Any]]  # with its options
_Keys = tuple[str | None, ...]


def is_fusable(param: Tensor) -> bool:
    """Whether the fused kernels can take a parameter: floating point, on CPU or CUDA, and dense in memory."""
    param = local_tensor(param)
    if not param.is_floating_point() or param.device.type not in _DEVICES or param.layout is not torch.strided:
        return False
    # empty_like keeps the strides of a tensor without gaps and overlaps, and of no other.
    return param.is_contiguous() or torch.empty_like(param, device="meta").stride() == param.stride()


def _state_keys(optimizer: Optimizer, group: dict[str, Any]) -> _Keys:
    """What a kernel takes of a parameter's state, in its order; None for a list that stays empty."""
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if group["momentum"] != 0 else (None,)
    if isinstance(optimizer, torch.optim.Adagrad):
        return ("sum", "step")
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None, "step")


class _Checked(NamedTuple):
    """A group as it was checked last. While its tensors are the same ones, they need no second look."""

    params: list[Tensor]
    keys: _Keys
    state: list[list[Tensor]]
    layout: Callable[[Tensor], Any]  # of a tensor, as far as its kernel cares
    layouts: list[Any]  # of the (local) parameters
    local_state: list[list[Tensor]]
    is_uniform: bool  # one dtype and device
    is_sharded: bool


_Cache = dict[int, _Checked]  # by the number of the group


def _gather(optimizer: Optimizer, cache: _Cache, number: int, group: dict[str, Any]) -> _Inputs | None:
    """A group's inputs; None where torch's unfused step has to do it.

    State that does not exist yet is created. State that does not match its parameter is replaced. Layouts of parameters
    and gradients are read every time, since both can be replaced at any time; state is checked when its tensors are not
    the ones of the last check.
    """
    params: list[Tensor] = group["params"]
    grads: list[Any] = [param.grad for param in params]
    for grad in grads:
        if grad is None:  # of a frozen parameter, for example
            params = [param for param in params if param.grad is not None]
            grads = [param.grad for param in params]
            break
    if not params:
        return [], [], [], True
    keys = _state_keys(optimizer, group)
    state = _collect_state(optimizer, params, keys)
    if state is None:
        if not create_state(optimizer, group, params):
            return None
        state = _collect_state(optimizer, params, keys) or []
    checked = cache.get(number)
    if checked is None or not _is_unchanged(checked, params, keys, state):
        cache.pop(number, None)
        checked = _check(optimizer, params, keys, state)
        if checked is None:
            return None
        cache[number] = checked
    local = params
    if checked.is_sharded:
        local, grads = list(map(local_tensor, params)), list(map(local_tensor, grads))
    try:
        layouts = list(map(checked.layout, grads))
    except RuntimeError:  # sparse gradients have no strides
        return None
    if layouts != checked.layouts:
        if any(grad.layout is not torch.strided for grad in grads):
            return None
        grads = [
            grad if layout == wanted else like(grad, param)
            for grad, param, layout, wanted in zip(grads, local, layouts, checked.layouts)
        ]
    return local, grads, checked.local_state, checked.is_uniform


def _collect_state(optimizer: Optimizer, params: list[Tensor], keys: _Keys) -> list[list[Tensor]] | None:
    """One list per key; None where something does not exist yet."""
    if keys == (None,):
        return [[]]
    state = optimizer.state
    try:
        own = [state[param] for param in params]
        lists = [[each[key] for each in own] if key else [] for key in keys]
    except KeyError:
        return None
    if len(keys) == 1:
        for value in lists[0]:
            if value is None:  # SGD's, of a step without momentum
                return None
    return lists


def _is_unchanged(checked: _Checked, params: list[Tensor], keys: _Keys, state: list[list[Tensor]]) -> bool:
    if keys != checked.keys or len(params) != len(checked.params) or not all(map(is_, params, checked.params)):
        return False
    for now, before in zip(state, checked.state):
        if not all(map(is_, now, before)):
            return False
    local = map(local_tensor, params) if checked.is_sharded else params
    return list(map(checked.layout, local)) == checked.layouts


@torch.no_grad()
def _check(optimizer: Optimizer, params: list[Tensor], keys: _Keys, state: list[list[Tensor]]) -> _Checked | None:
    """Make state fit its parameters; None where the kernels cannot take them."""
    local = [local_tensor(param) for param in params]
    if not all(map(is_fusable, local)):
        return None
    # The CPU's kernels take any strides of dimensions of size 1, CUDA's none but the parameter's.
    simple = all(each.is_contiguous() and each.is_cpu for each in local)
    layout: Callable[[Tensor], Any] = Tensor.is_contiguous if simple else Tensor.stride
    for key, values in zip(keys, state):
        for index, (value, param) in enumerate(zip(values, params)):
            if isinstance(value, Tensor) and value.layout is not torch.strided:  # an unfused step left it sparse
                return None
            values[index] = optimizer.state[param][key] = _fitting(key, value, param)
    return _Checked(
        list(params),
        keys,
        state,
        layout,
        list(map(layout, local)),
        [[local_tensor(value) for value in values] for values in state],
        len({(each.dtype, each.device) for each in local}) == 1,
        not all(map(is_, local, params)),
    )


def _fitting(key: str | None, value: Any, param: Tensor) -> Tensor:
    """A parameter's state as the kernels take it; the same tensor if it is so already."""
    local = local_tensor(param)
    if key == "step":
        value = value if isinstance(value, Tensor) else torch.tensor(float(value))
        step: Tensor = value.to(local.device, torch.float32)
        return step
    if not isinstance(value, Tensor):
        return value  # type: ignore[no-any-return]  # nonsense, which the kernel will refuse
    own = local_tensor(value)
    if own.dtype == local.dtype and own.device == local.device and own.stride() == local.stride():
        return value
    return like(value, param)


# -- fused optimizers with little overhead ------------------------------------------------------------


class _DirectStep(Optimizer):
    """The step that the four share; the class after it in line is torch's."""

    # For torch.amp.GradScaler. torch 2.9's own Adagrad takes `grad_scale` and `found_inf`, too, but lacks the mark.
    _step_supports_amp_scaling = True
    _cache: _Cache | None = None
    num_steps = 0  # calls of step(), see `count_steps`
    _counts = True  # whether the state has step counts, last in order
    _kernel: Callable[..., _Kernel | None]  # that updates a group; None where torch's own step must do it

    def step(self, closure: Any = None) -> Any:
        """As torch's. Without hooks and profiler straight to the kernel."""
        if torch.compiler.is_compiling():  # such steps are not counted: torch 2.9 cannot compile what sets attributes
            return super().step(closure)
        self.num_steps += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._calls() if self._unobserved() else None
        if calls is None:
            self._torchs_step()
            return loss
        own = self.__dict__  # where GradScaler puts these; a subclass may have a slow __getattr__
        grad_scale, found_inf = own.get("grad_scale"), own.get("found_inf")
        grad_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # torch.no_grad() takes a microsecond longer
            for (kernel, options), tensors, steps in calls:
                if grad_scale is not None or found_inf is not None:
                    device = tensors[0][0].device
                    grad_scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
                    found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)
                if steps:
                    torch._foreach_add_(steps, 1)
                kernel(*tensors, **options, grad_scale=grad_scale, found_inf=found_inf)
                if steps and found_inf is not None:  # a skipped step does not count
                    torch._foreach_sub_(steps, [found_inf] * len(steps))
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # torch's mark of a step that needs no wrapper for hooks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _unfuse_where_needed(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._cache = None
        super().__setstate__(state)

    def _calls(self) -> list[tuple[_Kernel, list[list[Tensor]], list[Tensor] | None]] | None:
        """Kernels, their tensors, and step counts among these; None where torch's own step must do it."""
        cache = self._cache
        if cache is None:
            cache = self._cache = {}
        calls = []
        for number, group in enumerate(self.param_groups):
            if not group["params"]:
                continue
            if not group["fused"] or group["differentiable"] or isinstance(group["lr"], Tensor):
                return None
            inputs, kernel = _gather(self, cache, number, group), self._kernel(group)
            if inputs is None or kernel is None or not inputs[3]:
                return None
            params, grads, state, _ = inputs
            if params:
                counts = [state[-1]] if group.get("bias_correction", True) else [endless(state[-1])]
                calls.append((kernel, [params, grads, *state[:-1], *counts], state[-1] if self._counts else None))
        return calls

    def _unobserved(self) -> bool:
        """Whether nobody waits for what torch's own step does besides the update."""
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if hooks or _torchs._global_optimizer_pre_hooks or _torchs._global_optimizer_post_hooks:
            return False
        if torch._C._autograd._profiler_enabled():
            return False
        # torch refuses to have a step captured in a CUDA graph that would replay today's learning rate.
        return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]

    def _torchs_step(self) -> None:
        cache = self._cache = self._cache or {}
        step: Any = super().step
        with _right_step(self, cache), without_counts(self):
            if getattr(step, "hooked", False):
                step()
            else:  # torch wraps a class's step when it first makes one of that class, and may have made none
                Optimizer.profile_hook_step(step.__func__)(self)


class Adam(_DirectStep, torch.optim.Adam):
    """`torch.optim.Adam`, with little overhead when fused."""

    def _kernel(self, group: dict[str, Any]) -> _Kernel | None:
        beta1, beta2 = group["betas"]
        if group["capturable"] or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
            return None
        keys = ("lr", "weight_decay", "eps", "amsgrad", "maximize")
        options = {"beta1": beta1, "beta2": beta2, **{key: group[key] for key in keys}}
        return torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_, options


class AdamW(_DirectStep, torch.optim.AdamW):
    """`torch.optim.AdamW`, with little overhead when fused."""

    _kernel = Adam._kernel


class SGD(_DirectStep, torch.optim.SGD):
    """`torch.optim.SGD`, with little overhead when fused."""

    _counts = False

    def _kernel(self, group: dict[str, Any]) -> _Kernel:
        keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        options = {key: group[key] for key in keys}
        return torch._fused_sgd_, {**options, "is_first_step": False}  # buffers start as zeros, see `create_state`


class Adagrad(_DirectStep, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, with little overhead when fused."""

    def _kernel(self, group: dict[str, Any]) -> _Kernel:
        keys = ("lr", "lr_decay", "weight_decay", "eps", "maximize")
        return torch._fused_adagrad_, {key: group[key] for key in keys}


_FUSED: dict[Any, type[Optimizer]] = {each.__bases__[1]: each for each in (Adam, AdamW, SGD, Adagrad)}


def fused_class(cls: type[Optimizer]) -> type[Optimizer]:
    """Our class for torch's, or the class itself where there is none."""
    return _FUSED.get(cls, cls)


# -- torch's own steps -------------------------------------------------------------------------------------------------


def guard_fused(optimizer: Optimizer) -> None:
    """Make the steps of a script's own fused optimizer right where torch's are not; ours are by themselves.

    By hooks: a schedule made before has kept torch's step. They give gradients and state the layout of their
    parameters, and SGD a momentum buffer for a parameter whose first gradient comes late.
    """
    if isinstance(optimizer, _DirectStep) or not isinstance(optimizer, tuple(_FUSED)):
        return
    for group in optimizer.param_groups:
        _unfuse_where_needed(group)
    cache: _Cache = {}
    step = ExitStack()

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step.close()  # of a step that has raised
        step.enter_context(_right_step(optimizer, cache))

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step.close()

    if any(group["fused"] for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def _unfuse_where_needed(group: dict[str, Any]) -> None:
    """Leave a group that the fused kernels cannot take to the unfused step."""
    if group.get("fused") and not all(map(is_fusable, group["params"])):
        group["fused"] = None


@contextmanager
def _right_step(optimizer: Optimizer, cache: _Cache) -> Iterator[None]:
    """Make torch's own step right, whatever it is given; some groups may run unfused this once."""
    unfused = []
    fused_on_shards = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for number, group in enumerate(optimizer.param_groups):
        if not group["fused"]:
            continue
        inputs = _gather(optimizer, cache, number, group)
        params = [param for param in group["params"] if param.grad is not None]
        if inputs is None or not (fused_on_shards or all(map(is_, params, inputs[0]))):
            unfused.append(group)
            group["fused"] = None
            continue
        for param, grad in zip(params, inputs[1]):
            if param.grad is not grad and local_tensor(param) is param:
                param.grad = grad
    if not all(group["fused"] for group in optimizer.param_groups):
        _unscale(optimizer)
    try:
        yield
    finally:
        for group in unfused:
            group["fused"] = True


@torch.no_grad()
def _unscale(optimizer: Any) -> None:
    """Do what only the fused kernels can: divide by `grad_scale`, and skip a step for `found_inf`. May wait for it."""
    found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    if found_inf is not None:
        optimizer.found_inf = None
        if found_inf.item():
            for param in params:
                param.grad = None
            params = []
    if grad_scale is not None:
        optimizer.grad_scale = None
        for param in params:
            param.grad.div_(grad_scale.to(param.grad.device))
