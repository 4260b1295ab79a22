"""The learning rate range test as a schedule: it grows by equal amounts or by equal factors, step by step.

Source: L. Smith, "A disciplined approach to neural network hyper-parameters" (arXiv:1803.09820), and DeepSpeed's
`LRRangeTest`, which grows by equal amounts only. Running and reading a test is the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

from redline.schedulers.schedule import Rate, Schedule, groups_of

__all__ = ["LRRangeTest"]

Growth = Literal["linear", "exponential"]


class LRRangeTest(Schedule):
    """Grow the learning rate from its minimum without end.

    For step ``k``::

        lr = min_lr * (1 + step_rate * k / step_size)     linear
        lr = min_lr * (1 + step_rate) ** (k / step_size)  exponential

    The two agree after the first `step_size` steps; a sweep over powers of ten needs the second. With the staircase,
    ``k / step_size`` is rounded down.

    >>> test = LRRangeTest(None, lr_range_test_min_lr=1e-4, lr_range_test_step_size=200, lr_range_test_step_rate=5)
    >>> [round(lr, 6) for lr in test.lr_at([0, 200, 2000])]
    [0.0001, 0.0006, 0.0051]
    >>> sweep = LRRangeTest(None, 1e-5, 10, 9.0, growth="exponential")
    >>> [round(lr, 6) for lr in sweep.lr_at([0, 10, 20, 25])]
    [1e-05, 0.0001, 0.001, 0.003162]

    Args:
        optimizer: See :class:`Schedule`, as for `last_batch_iteration`; `corrected` has no effect.
        lr_range_test_min_lr: Learning rate of the first step, one value or one per group.
        lr_range_test_step_size: Steps in which it grows by `step_rate` times the minimum; >= 1.
        lr_range_test_step_rate: Growth per `step_size` steps, as a multiple of the minimum.
        lr_range_test_staircase: Grow every `step_size` steps only.
        growth: "linear", as in DeepSpeed, or "exponential".

    Raises:
        ValueError: A step size is not a positive integer, a list has not one value per group, or a growth is unknown
            or by a factor that is not positive.
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
        num_groups = groups_of(lr_range_test_min_lr)
        super().__init__(optimizer, last_batch_iteration, corrected=corrected, num_groups=num_groups)
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
        self.step_size, self.step_rate = lr_range_test_step_size, lr_range_test_step_rate
        self.staircase, self.growth = lr_range_test_staircase, growth
        if last_batch_iteration == -1:
            self._write(self.min_lrs)

    def _lrs(self, k: int) -> list[Rate]:
        interval = math.floor(k / self.step_size) if self.staircase else k / self.step_size
        if self.growth == "linear":
            increase = 1 + self.step_rate * interval
        else:
            try:
                increase = float((1 + self.step_rate) ** interval)
            except OverflowError:  # nobody stopped the test
                increase = math.inf
        return [min_lr * increase for min_lr in self.min_lrs]
