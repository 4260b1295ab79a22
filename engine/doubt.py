"""An update of which only the device knows yet whether it was made.

In fp16 and bf16 an update with a gradient that is not finite is skipped. On CUDA the device does so by
itself (`engine.skipping`); that the schedule has moved all the same is found out, and undone, when the next update
begins.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.transfer import HostCopy

__all__ = ["Doubt"]


class Doubt:
    """An update that the device may have skipped: its loss, its gradient norm on the way here, how to undo the rest."""

    def __init__(self, loss: Tensor, norm: Tensor | float, undo: Callable[[], None]) -> None:
        self.loss = loss
        self.undo = undo
        self._norm = HostCopy(norm)

    def norm(self) -> float:
        """Waits for the end of that update's backward, when the next forward is under way already."""
        return self._norm.read()[0]
