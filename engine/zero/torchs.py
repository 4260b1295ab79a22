"""What FSDP2 does and has no public name for.

In one place, since it may move between versions of torch; read in 2.6 to 2.13 (`torch/distributed/fsdp/_fully_shard`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.utils._pytree import tree_leaves

__all__ = [
    "break_off_forward", "clear_held_too", "fill_held", "follow_flags", "forget", "held_versions",
    "let_methods_compute", "reduce_unused", "replaced_params", "send_held", "show_collectives",
]  # fmt: skip

Show = Callable[[str, int, Callable[[], Any]], Any]  # a collective's name, the bytes given, and what runs it


def send_held(model: Any) -> None:
    """Sum over the processes the gradients that backwards have left on this one; all processes, together.

    What the end of a backward calls, of which FSDP2 lets the last alone be waited for.
    """
    model.set_requires_gradient_sync(True)
    model._get_fsdp_state()._root_post_backward_final_callback()


def let_methods_compute(model: Any) -> None:
    """Gather the model for its own methods, too, as FSDP2 does for `forward`: in place, on this model alone.

    A method gathers when it is given a tensor; others (`get_input_embeddings()`, say) may be called on one rank alone.
    """
    names = {
        name
        for cls in type(model).__mro__[: type(model).__mro__.index(nn.Module)]
        if cls is not FSDPModule
        for name, value in vars(cls).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and name != "forward"
        and not hasattr(FSDPModule, name)
    }
    for name in names:
        setattr(model, name, partial(_compute, model, getattr(model, name)))


def _compute(model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    state = model._get_fsdp_state()
    tensors = any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs)))
    if not tensors or state._training_state is not TrainingState.IDLE:  # it is called within a forward
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
    return state._post_forward(model, args, output)


def follow_flags(units: Iterable[Any]) -> None:
    """Take up which parameters require gradients: a block of which none did has no dtypes of gradients yet."""
    for group in _groups(units):
        group._init_mp_dtypes()
        for each in group.fsdp_params:
            if hasattr(each, "_unsharded_param"):  # otherwise it is told at the next forward, which may leave it out
                each._unsharded_param.requires_grad_(each.sharded_param.requires_grad)


def replaced_params(units: Iterable[Any]) -> Iterator[str]:
    """The names of parameters that are other objects than those that were sharded."""
    for group in _groups(units):
        for each in group.fsdp_params:
            info = each._module_info
            now = info.module._parameters.get(info.param_name)
            own = (each.sharded_param, getattr(each, "_unsharded_param", None), getattr(each, "_original", None))
            if now is not None and all(now is not param for param in own):
                yield each._param_fqn or info.param_name


def fill_held(units: Iterable[Any]) -> None:
    """Give every parameter of a block a gradient to add to, where others of the block have one in another dtype."""
    for group in _groups(units):
        held = [each for each in group.fsdp_params if each.unsharded_accumulated_grad is not None]
        if not held:
            continue
        for each in group.fsdp_params:
            if each.unsharded_accumulated_grad is None and each.sharded_param.requires_grad:
                like = held[0].unsharded_accumulated_grad
                each.unsharded_accumulated_grad = torch.zeros(each._orig_size, dtype=like.dtype, device=like.device)


def held_versions(units: Iterable[Any]) -> list[tuple[int, int]]:
    """Which whole gradients backwards have left on this rank, and how often each was written to."""
    held = []
    for group in _groups(units):
        for each in group.fsdp_params:
            grad = each.unsharded_accumulated_grad
            if grad is None and hasattr(each, "_unsharded_param"):
                grad = each._unsharded_param.grad
            if grad is not None:
                held.append((id(grad), grad._version))
    return held


def break_off_forward(model: Any, units: Iterable[Any]) -> None:
    """Bring blocks back to where they are between forwards, after one that has raised; gradients stay."""
    state = model._get_fsdp_state()
    for each in state._state_ctx.all_states:
        each._training_state = TrainingState.IDLE
        getattr(each, "_modules_to_run_forward", set()).clear()
    for group in _groups(units):
        if group._all_gather_result is not None:
            group.wait_for_unshard()
        group._training_state = TrainingState.IDLE
        group.reshard()
    state._state_ctx.iter_forward_root = None


def forget(model: Any, units: Iterable[Any]) -> None:
    """Drop gradients that are held, and what a forward or backward that has broken off left in between."""
    state = model._get_fsdp_state()
    resets = hasattr(state, "_reset_iter_state")  # newer versions
    if resets and state._is_root:
        state._reset_iter_state()
    for group in _groups(units):
        if not resets and group._all_gather_result is not None:
            group.wait_for_unshard()
        if not resets:
            group._post_forward_indices.clear()
            getattr(group.comm_ctx, "post_forward_order", []).clear()  # it is there from the first forward on
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
        group._training_state = TrainingState.IDLE
        group.reshard()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def reduce_unused(units: Sequence[Any]) -> None:
    """Reduce zeros for parameters that this rank's backward did not reach: other ranks' may have reached them."""
    if hasattr(units[0], "set_reduce_scatter_unused_params"):  # newer versions
        for unit in units:
            unit.set_reduce_scatter_unused_params(True, recurse=False)
        return
    for group in _groups(units):
        group.post_backward = partial(_post_backward_with_zeros, group, group.post_backward)


def _post_backward_with_zeros(group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
    for each in group.fsdp_params if group.reduce_grads else ():
        parameter = getattr(each, "_unsharded_param", None)  # there is none before its first forward
        if parameter is None or not parameter.requires_grad or each.unsharded_accumulated_grad is not None:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    post_backward(*unused)


def clear_held_too(module: Any, units: Sequence[Any]) -> None:
    """Have a model's zero_grad() drop the gradients, too, that FSDP2 holds where it does not see them."""
    module.zero_grad = partial(_zero_all, units, module.zero_grad)


def _zero_all(units: Sequence[Any], zero_grad: Callable[[bool], None], set_to_none: bool = True) -> None:
    zero_grad(set_to_none)
    for group in _groups(units):
        for each in group.fsdp_params:
            each.unsharded_accumulated_grad = None
            if hasattr(each, "_unsharded_param"):
                each._unsharded_param.grad = None


def show_collectives(units: Iterable[Any], show: Show) -> None:
    """Let `show` run every gathering of parameters and every sum of gradients from here on."""
    for group in _groups(units):
        for op, name in (("all_gather", "_all_gather_comm"), ("reduce_scatter", "_reduce_scatter_comm")):
            if hasattr(group, name):  # not in older versions
                setattr(group, name, _Shown(getattr(group, name), op, show))


class _Shown:
    """A collective of FSDP2's, run by somebody who looks at it."""

    def __init__(self, inner: Any, op: str, show: Show) -> None:
        self._inner, self._op, self._show = inner, op, show

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner.allocate(*args, **kwargs)

    def __call__(self, output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            return self._inner(output_tensor, input_tensor, *args, **kwargs)

        return self._show(self._op, input_tensor.nbytes, run)


def _groups(units: Iterable[Any]) -> Iterator[Any]:
    for unit in units:
        state = unit._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        yield from (group for group in groups if group is not None)
