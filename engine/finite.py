"""Says when a loss or a gradient is not finite, without waiting for the device.

On the CPU the numbers are there at once. On CUDA they are copied aside and looked at when they have arrived, some
updates later; what has not arrived is never waited for.
"""

from __future__ import annotations

import math
from collections import deque

from torch import Tensor

from engine.log import log
from engine.transfer import HostCopy, reads_cost_nothing

__all__ = ["FiniteWatch"]


class FiniteWatch:
    """Looks at the loss and the gradient norm of every update; reports the 1st, 2nd, 4th, 8th... that is not finite."""

    def __init__(self) -> None:
        self._count = 0
        self._on_the_way: deque[tuple[int, HostCopy]] = deque()

    def see(self, step: int, loss: Tensor, norm: Tensor | float) -> None:
        """Look at an update that was made."""
        if reads_cost_nothing(loss.device):
            self._look(step, float(loss), float(norm))
            return
        while self._on_the_way and self._on_the_way[0][1].has_arrived():
            earlier, values = self._on_the_way.popleft()
            self._look(earlier, *values.read())
        self._on_the_way.append((step, HostCopy(loss, norm)))

    def skipped(self, step: int, loss: Tensor, norm: float, then: str) -> None:
        """Report an update that was left out; `then` says what follows from it."""
        if self._says_this_one():
            log.warning(
                "update %d is skipped: its gradient norm is %g, its loss %g; weights and schedule stay%s%s",
                step, norm, float(loss), then, self._so_far(),
            )  # fmt: skip

    def _look(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        if self._says_this_one():
            log.warning(
                "update %d: its loss is %g and its gradient norm %g, and the weights now hold what came of that; lower "
                "the learning rate, clip gradients, or look at this update's data%s",
                step, loss, norm, self._so_far(),
            )  # fmt: skip

    def _says_this_one(self) -> bool:
        self._count += 1
        return self._count & (self._count - 1) == 0

    def _so_far(self) -> str:
        return f" ({self._count} such updates so far)" if self._count > 1 else ""
