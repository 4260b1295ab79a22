"""An update of which only the device knows yet whether it was made.

In fp16 and bf16 an update with a gradient that is not finite is skipped. On CUDA torch's fused optimizers do so by
themselves; that the schedule has moved all the same is found out, and undone, when the next update begins.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from engine.transfer import HostCopy

__all__ = ["Doubt", "can_skip"]


class Doubt:
    """An update that the device may have skipped: its loss, its gradient norm on the way here, how to undo the rest."""

    def __init__(self, loss: Tensor, norm: Tensor | float, undo: Callable[[], None]) -> None:
        self.loss = loss
        self.undo = undo
        self._norm = HostCopy(norm)

    def norm(self) -> float:
        """Waits for the end of that update's backward, when the next forward is under way already."""
        return self._norm.read()[0]


def can_skip(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer leaves an update out by itself where `found_inf` says so."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return optimizer is not None and all(group.get("fused") for group in optimizer.param_groups)
