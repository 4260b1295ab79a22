"""What FSDP2 does and has no public name for.

In one place, since it may move between versions of torch; read in 2.6 to 2.13 (`torch/distributed/fsdp/_fully_shard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

__all__ = ["forget", "send_held"]


def send_held(model: Any) -> None:
    """Sum over the processes the gradients that backwards have left on this one; all processes, together.

    What the end of a backward calls, of which FSDP2 lets the last alone be waited for.
    """
    model.set_requires_gradient_sync(True)
    model._get_fsdp_state()._root_post_backward_final_callback()


def forget(model: Any, units: Iterable[Any]) -> None:
    """Drop gradients that are held, and what a forward or backward that has broken off left in between."""
    state = model._get_fsdp_state()
    if hasattr(state, "_reset_iter_state") and state._is_root:
        state._reset_iter_state()
    for group in _groups(units):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
        group._training_state = TrainingState.IDLE
        group.reshard()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _groups(units: Iterable[Any]) -> Iterator[Any]:
    for unit in units:
        state = unit._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        yield from (group for group in groups if group is not None)
