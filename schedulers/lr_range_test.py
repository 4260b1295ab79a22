"""The learning rate range test as a schedule: the rate grows by equal amounts, or by equal factors, step by step.

Source: L. Smith, "A disciplined approach to neural network hyper-parameters" (arXiv:1803.09820);
DeepSpeed's `LRRangeTest`, which grows by equal amounts only. Recording, stopping and reading a test are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

from schedulers.schedule import Rate, Schedule, groups_of

__all__ = ["LRRangeTest"]

Growth = Literal["linear", "exponential"]


class LRRangeTest(Schedule):
    """Grow the rate from its minimum without end: ``min_lr * (1 + step_rate * k / step_size)``.

    Exponential growth compounds: ``min_lr * (1 + step_rate) ** (k / step_size)``. The two agree after the first
    `step_size` updates; a sweep over powers of ten wants the second. With the staircase, ``k / step_size`` is rounded
    down, so that the rate changes every `step_size` updates only.

    >>> test = LRRangeTest(None, lr_range_test_min_lr=1e-4, lr_range_test_step_size=200, lr_range_test_step_rate=5)
    >>> [round(lr, 6) for lr in test.lr_at([0, 200, 2000])]
    [0.0001, 0.0006, 0.0051]
    >>> sweep = LRRangeTest(None, 1e-5, 10, 9.0, growth="exponential")
    >>> [round(lr, 6) for lr in sweep.lr_at([0, 10, 20, 25])]
    [1e-05, 0.0001, 0.001, 0.003162]

    Args:
        optimizer: see :class:`Schedule`.
        lr_range_test_min_lr: rate of the first update, one value or one per group.
        lr_range_test_step_size: updates in which the rate grows by `step_rate` times the minimum; >= 1.
        lr_range_test_step_rate: growth per `step_size` updates, as a multiple of the minimum.
        lr_range_test_staircase: grow in stairs of `step_size` updates.
        last_batch_iteration: see :class:`Schedule`.
        growth: by equal amounts, as in DeepSpeed, or by equal factors.
        corrected: taken for symmetry; there is nothing to correct.

    Raises:
        ValueError: a step size that is no positive integer; a list of another length than the groups; an unknown
            growth, or an exponential one by a factor that is not positive.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
        *,
        growth: Growth = "linear",
        corrected: bool = False,
    ) -> None:
        super().__init__(
            optimizer, last_batch_iteration, corrected=corrected, num_groups=groups_of(lr_range_test_min_lr)
        )
        self.min_lrs = self._per_group(lr_range_test_min_lr, "lr_range_test_min_lr")
        if not isinstance(lr_range_test_step_size, int) or lr_range_test_step_size <= 0:
            raise ValueError(f"lr_range_test_step_size: got {lr_range_test_step_size!r}; expected an integer >= 1")
        if growth not in ("linear", "exponential"):
            raise ValueError(f'growth: got {growth!r}; expected "linear" or "exponential"')
        if growth == "exponential" and not lr_range_test_step_rate > -1:
            raise ValueError(
                f"lr_range_test_step_rate: got {lr_range_test_step_rate!r}; expected more than -1, since exponential "
                "growth is by powers of 1 + step_rate"
            )
        self.step_size = lr_range_test_step_size
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self.growth: Growth = growth
        if last_batch_iteration == -1:
            self._write(self.min_lrs)

    def _lrs(self, k: int) -> list[Rate]:
        interval = k / self.step_size
        if self.staircase:
            interval = math.floor(interval)
        increase = 1 + self.step_rate * interval if self.growth == "linear" else self._power(interval)
        return [min_lr * increase for min_lr in self.min_lrs]

    def _power(self, interval: float) -> float:
        try:
            return float((1 + self.step_rate) ** interval)
        except OverflowError:  # a test that nobody stops
            return math.inf
