"""What FSDP2 does and has no public name for.

In one place, since it may move between versions of torch; read in 2.6 to 2.13 (`torch/distributed/fsdp/_fully_shard`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

__all__ = ["forget", "reduce_unused", "send_held", "show_collectives"]

Show = Callable[[str, int, Callable[[], Any]], Any]  # a collective's name, the bytes given, and what runs it


def send_held(model: Any) -> None:
    """Sum over the processes the gradients that backwards have left on this one; all processes, together.

    What the end of a backward calls, of which FSDP2 lets the last alone be waited for.
    """
    model.set_requires_gradient_sync(True)
    model._get_fsdp_state()._root_post_backward_final_callback()


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
