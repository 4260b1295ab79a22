"""What is needed of FSDP2 and has no public API.

In one place, since it may change between versions of torch. Source: `torch/distributed/fsdp/_fully_shard`, 2.9 to 2.15.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from redline.device import fields_of
from redline.distributed.sharding import RunCollective
from redline.errors import EngineError

__all__ = ["adapt", "fill_held", "gathered_params", "held_versions", "observe_collectives", "policy_of", "reduce_held",
           "replaced_params", "reset", "see_gradients", "share_hooks", "sync_requires_grad"]  # fmt: skip


def _groups(units: Iterable[Any]) -> Iterator[Any]:
    for unit in units:
        state = unit._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        yield from (group for group in groups if group is not None)


def _params(units: Iterable[Any]) -> Iterator[Any]:
    for group in _groups(units):
        yield from group.fsdp_params


def _unsharded(param: Any) -> Any:
    """The unsharded parameter; there is none before its first forward."""
    return getattr(param, "_unsharded_param", None)


def policy_of(unit: Any) -> Any:
    """The dtypes for which a unit was sharded."""
    return unit._get_fsdp_state()._mp_policy


# -- gradients that wait for their reduction --------------------------------------------------------------------------

# Up to torch 2.14 FSDP2 moves them to `unsharded_accumulated_grad`, in the dtype of the reduction. From 2.15 on they
# stay on the unsharded parameter, and this is a property that returns them.
_MOVES_HELD = not isinstance(getattr(FSDPParam, "unsharded_accumulated_grad", None), property)


def reduce_held(model: Any) -> None:
    """Reduce the gradients that backwards have left on this rank; a collective."""
    model.set_requires_gradient_sync(True)
    state = model._get_fsdp_state()
    if hasattr(state._state_ctx, "manual_backward_finalization_active"):  # from torch 2.15 on; None after a backward
        state._state_ctx.manual_backward_finalization_active = False
    state._root_post_backward_final_callback()  # what FSDP2 calls at the end of a backward


def fill_held(units: Iterable[Any]) -> None:
    """Give every parameter of a block a gradient to add to, where others of the block have one in another dtype."""
    for group in _groups(units) if _MOVES_HELD else ():
        held = [each.unsharded_accumulated_grad for each in group.fsdp_params]
        like = next((grad for grad in held if grad is not None), None)
        for each, grad in zip(group.fsdp_params, held):
            if like is not None and grad is None and each.sharded_param.requires_grad:
                each.unsharded_accumulated_grad = torch.zeros(each._orig_size, dtype=like.dtype, device=like.device)


def held_versions(units: Iterable[Any]) -> list[tuple[int, int]]:
    """The unsharded gradients that backwards have left on this rank, with their versions."""
    held = []
    for each in _params(units):
        grad = each.unsharded_accumulated_grad
        if grad is None and hasattr(each, "_unsharded_param"):
            grad = each._unsharded_param.grad
        if grad is not None:
            held.append((id(grad), grad._version))
    return held


def _drop_held(units: Iterable[Any]) -> None:
    for each in _params(units):
        if _MOVES_HELD:
            each.unsharded_accumulated_grad = None
        if hasattr(each, "_unsharded_param"):
            each._unsharded_param.grad = None


def _reduce_unused(units: Sequence[Any]) -> None:
    """Reduce zeros for parameters that this rank's backward did not reach: other ranks' may have reached them."""
    if hasattr(units[0], "set_reduce_scatter_unused_params"):  # newer versions
        for unit in units:
            unit.set_reduce_scatter_unused_params(True, recurse=False)
        return
    for group in _groups(units):
        group.post_backward = partial(_post_backward_with_zeros, group, group.post_backward)


def _post_backward_with_zeros(group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
    for each in group.fsdp_params if group.reduce_grads else ():
        param = _unsharded(each)
        if param is not None and param.requires_grad and each.unsharded_accumulated_grad is None and param.grad is None:
            param.grad = torch.zeros_like(param)
    post_backward(*unused)


# -- parameters --------------------------------------------------------------------------------------------------------


def sync_requires_grad(units: Iterable[Any]) -> None:
    """Follow changes of `requires_grad`: a block that was frozen as a whole has no gradient dtypes yet."""
    for group in _groups(units):
        group._init_mp_dtypes()
        for each in group.fsdp_params:
            if hasattr(each, "_unsharded_param"):  # otherwise FSDP2 does this at the next forward, which may not use it
                each._unsharded_param.requires_grad_(each.sharded_param.requires_grad)


def gathered_params(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Each sharded parameter of a model, and the full one that takes its place while it is gathered."""
    for each in _params(module for module in model.modules() if isinstance(module, FSDPModule)):
        yield each.sharded_param, _unsharded(each)


def replaced_params(units: Iterable[Any]) -> Iterator[str]:
    """The names of parameters that are other objects than those that were sharded."""
    for each in _params(units):
        info = each._module_info
        now = info.module._parameters.get(info.param_name)
        own = (each.sharded_param, _unsharded(each), getattr(each, "_original", None))
        if now is not None and all(now is not param for param in own):
            yield each._param_fqn or info.param_name


def share_hooks(units: Iterable[Any]) -> None:
    """Let the hooks of sharded parameters see the unsharded gradients, as without sharding.

    Raises:
        EngineError: a parameter has a hook that runs once its gradient is accumulated, which is when FSDP2 takes it.
    """
    for each in _params(units):
        sharded, unsharded = each.sharded_param, _unsharded(each)
        if sharded._post_accumulate_grad_hooks:
            name = each._param_fqn or each._module_info.param_name
            raise EngineError(
                f"{name}: it has a hook of register_post_accumulate_grad_hook, which ZeRO stage 3 cannot call; use "
                "register_hook, or zero_optimization.stage 2"
            )
        hooks = sharded._backward_hooks
        if hooks is not None and unsharded is not None and unsharded._backward_hooks is not hooks:
            unsharded._backward_hooks = hooks


# -- what scripts expect of plain modules ------------------------------------------------------------------------------


def adapt(model: Any, blocks: Sequence[Any]) -> None:
    """Let a model that was just sharded, and the blocks of it, do what scripts expect of plain modules."""
    units = [*blocks, model]
    for unit in units:
        cls = type(unit)
        cls.__name__ = _original_class(unit).__name__  # which scripts print and save; FSDP2 puts "FSDP" before it
        cls.__deepcopy__ = _copy_unsharded
        unit.register_forward_hook(_copy_returned_params, prepend=True)  # before FSDP2's own frees them
        unit.register_forward_hook(_hook_outputs)
    for param in _params(units):
        # load_state_dict may fill parameters that are full for a while; FSDP2 expects them to be DTensors after it.
        param._post_load_hook_handle.remove()
        param._post_load_hook_handle = param._module_info.module.register_load_state_dict_post_hook(_resetter(param))
    model.zero_grad = partial(_zero_all, units, model.zero_grad)
    _reduce_unused(units)
    _unshard_in_methods(model, blocks)


def _original_class(unit: Any) -> type[nn.Module]:
    cls: type[nn.Module] = type(unit).__mro__[getattr(type(unit), "_orig_cls_mro_index", 2)]  # 2 in older versions
    return cls


def _resetter(param: Any) -> Callable[..., None]:
    def reset_shard(*args: Any) -> None:  # not a partial: a copy of the module would copy its arguments
        if isinstance(param.sharded_param, DTensor):
            param.reset_sharded_param()

    return reset_shard


def _zero_all(units: Sequence[Any], zero_grad: Callable[[bool], None], set_to_none: bool = True) -> None:
    zero_grad(set_to_none)
    _drop_held(units)


def _unshard_in_methods(model: Any, blocks: Iterable[nn.Module]) -> None:
    """Unshard the model in its other methods, too, as FSDP2 does in `forward`; changes this model in place.

    A method unshards when it is given a tensor; others, such as `get_input_embeddings()`, may be called on one rank.
    Modules in no block, such as an embedding, unshard in their forward where a script calls a part of the model alone,
    as `generate` does of an encoder.
    """
    classes = [cls for cls in type(model).__mro__[: type(model).__mro__.index(nn.Module)] if cls is not FSDPModule]
    functions = {name for cls in classes for name, value in vars(cls).items() if inspect.isfunction(value)}
    for name in functions - {"forward"}:
        if not name.startswith("_") and not hasattr(FSDPModule, name):
            setattr(model, name, _computing(model, getattr(model, name)))
    in_blocks = {each for block in blocks for each in block.modules()}
    for each in model.modules():
        if each is not model and each not in in_blocks and any(True for _ in each.parameters(recurse=False)):
            each.forward = _computing(model, each.forward)


def _computing(model: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    computing: Any = partial(_compute, model, method)
    computing.__wrapped__ = method  # for inspect.signature
    return computing  # type: ignore[no-any-return]


def _compute(model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    state = model._get_fsdp_state() if hasattr(model, "_get_fsdp_state") else None
    if state is None or state._training_state is not TrainingState.IDLE:  # a plain copy; called within a forward
        return method(*args, **kwargs)
    # Hugging Face calls save_pretrained(state_dict=...) on rank 0: weights do not count.
    inputs = args, {name: value for name, value in kwargs.items() if name != "state_dict"}
    if not any(isinstance(each, Tensor) for each in tree_leaves(inputs)):
        return method(*args, **kwargs)
    # The method may call the model itself, whose forward would free what the rest of the method needs.
    groups = list(_groups([model]))
    after = [group.post_forward_mesh_info for group in groups]
    args, kwargs = state._pre_forward(model, args, kwargs)
    for group in groups:
        group.post_forward_mesh_info = None
    try:
        output = method(*args, **kwargs)
    finally:
        for group, info in zip(groups, after):
            group.post_forward_mesh_info = info
    copied = _copy_returned_params(model, args, output)
    return state._post_forward(model, args, output if copied is None else copied)


def _copy_returned_params(unit: Any, inputs: Any, outputs: Any) -> Any:
    """Copy the parameters, and views of them, that a unit's forward returns; None where it returns none.

    FSDP2 frees a unit's parameters after its forward. A caller that reads one then, such as a loss that takes the
    prototypes that the model has returned, would read memory that is gone.
    """
    tensors = [each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.layout is torch.strided]
    # What a function has computed is no parameter, unless it is a view of one.
    if not any(each.is_leaf or each._is_view() for each in tensors):
        return None
    params = {each._unsharded_param.untyped_storage()._cdata for each in _params([unit])}
    found = {id(each) for each in tensors if each.untyped_storage()._cdata in params}
    return tree_map(lambda each: each.clone() if id(each) in found else each, outputs) if found else None


def _hook_outputs(unit: Any, inputs: Any, outputs: Any) -> None:
    """Let FSDP2 find the tensors that a unit's forward returns in objects of any kind.

    FSDP2 begins a unit's backward, with its all-gather, by hooks on the tensors that the forward returned
    (`FSDPState._register_pre_backward_hook`). It finds them in lists, tuples, dicts and, in newer versions,
    dataclasses. In any other object it finds none, and the backward reads parameters that have been freed, or gradients
    are never reduced.
    """
    # FSDP2's own hook has run already. To meet some of its tensors twice does no harm.
    if type(outputs) is not Tensor and torch.is_grad_enabled():
        tensors = [tensor for tensor in _hidden_in(outputs, set()) if tensor.grad_fn is not None]
        if tensors:
            unit._get_fsdp_state()._register_pre_backward_hook(tensors)


def _hidden_in(value: Any, seen: set[int], *, hidden: bool = False) -> Iterator[Tensor]:
    """Tensors in containers, and in the attributes of objects of any kind, that some version of FSDP2 does not find."""
    if isinstance(value, Tensor):
        if hidden:
            yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))  # objects may refer to each other
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (tuple, MutableSequence, AbstractSet)):
        items = list(value)
    else:
        items = list(getattr(value, "__dict__", {}).values())
        items += [getattr(value, name) for name in fields_of(value) if hasattr(value, name)]  # those in slots, too
    for item in items:
        yield from _hidden_in(item, seen, hidden=hidden or type(value) not in (list, tuple, dict))


def _copy_unsharded(unit: Any, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` makes: plain modules with full parameters, as a collective; FSDP2 refuses it."""
    for param in unit.parameters():
        if isinstance(param, DTensor) and id(param) not in memo:
            memo[id(param)] = nn.Parameter(param.full_tensor().detach(), param.requires_grad)
    original = _original_class(unit)
    memo[id(unit)] = copied = original.__new__(original)
    own = {
        name: value for name, value in vars(unit).items()
        if not _is_of_sharding(value) and not name.startswith("__composable_api")
    }  # fmt: skip
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        own[name] = type(own[name])((key, each) for key, each in own[name].items() if not _is_of_sharding(each))
    vars(copied).update(copy.deepcopy(own, memo))
    for each in copied.modules():
        hooks = each._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", None) == __name__]:
            del hooks[key]
    return copied


def _is_of_sharding(value: Any) -> bool:
    """Whether it is a hook of FSDP2's, or one of the functions above."""
    if isinstance(value, partial):
        return value.func in (_compute, _zero_all)
    if value is _copy_returned_params or value is _hook_outputs:
        return True
    return isinstance(getattr(value, "__self__", None), FSDPState)


# -- forwards and collectives ------------------------------------------------------------------------------------------


def reset(model: Any, units: Iterable[Any], *, clear: bool) -> None:
    """Reset the blocks after a forward or backward that has raised; with `clear` drop held gradients, too."""
    state = model._get_fsdp_state()
    if clear and state._is_root and hasattr(state, "_reset_iter_state"):  # newer versions
        state._reset_iter_state()
    for each in state._state_ctx.all_states:  # else a block would take the next forward for recomputation
        each._training_state = TrainingState.IDLE
        getattr(each, "_modules_to_run_forward", set()).clear()
    if clear:
        _drop_held(units)
        state._state_ctx.post_backward_final_callback_queued = False
    for group in _groups(units):
        if group._all_gather_result is not None:
            group.wait_for_unshard()
        if clear:
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()  # it is there from the first forward on
        group._training_state = TrainingState.IDLE
        group.reshard()
    state._state_ctx.iter_forward_root = None


def observe_collectives(units: Iterable[Any], run_collective: RunCollective) -> None:
    """Let `run_collective` run every all-gather and reduce-scatter from here on."""
    for group in _groups(units):
        for op, name in (("all_gather", "_all_gather_comm"), ("reduce_scatter", "_reduce_scatter_comm")):
            setattr(group, name, _ObservedCollective(getattr(group, name), op, run_collective))


def see_gradients(units: Iterable[Any], see: Callable[[Tensor], None]) -> None:
    """Let `see` look at this rank's own gradients before each reduce-scatter."""
    for group in _groups(units):
        if not isinstance(group._reduce_scatter_comm, _ObservedCollective):
            group._reduce_scatter_comm = _ObservedCollective(group._reduce_scatter_comm)
        group._reduce_scatter_comm.see = see


class _ObservedCollective:
    """A collective of FSDP2's, run by an observer."""

    see: Callable[[Tensor], None] | None = None

    def __init__(self, inner: Any, op: str = "", run_collective: RunCollective = lambda op, size, run: run()) -> None:
        self.allocate = inner.allocate
        self._inner, self._op, self._run_collective = inner, op, run_collective

    def __call__(self, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if self.see is not None:
            self.see(input_tensor)
        run = partial(self._inner, output_tensor, input_tensor, *args, **kwargs)
        return self._run_collective(self._op, input_tensor.nbytes, run)
