"""The learning rate range test as a schedule: the rate grows by equal amounts, step by step.

Source: L. Smith, "A disciplined approach to neural network hyper-parameters" (arXiv:1803.09820);
DeepSpeed's `LRRangeTest`. Recording, stopping and reading a test are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from schedulers.schedule import Rate, Schedule, groups_of

__all__ = ["LRRangeTest"]


class LRRangeTest(Schedule):
    """Grow the rate from its minimum without end: ``min_lr * (1 + step_rate * k / step_size)``.

    With the staircase, ``k / step_size`` is rounded down, so that the rate changes every `step_size`
    updates only.

    >>> test = LRRangeTest(None, lr_range_test_min_lr=1e-4, lr_range_test_step_size=200, lr_range_test_step_rate=5)
    >>> [round(lr, 6) for lr in test.lr_at([0, 200, 2000])]
    [0.0001, 0.0006, 0.0051]

    Args:
        optimizer: see :class:`Schedule`.
        lr_range_test_min_lr: rate of the first update, one value or one per group.
        lr_range_test_step_size: updates in which the rate grows by `step_rate` times the minimum; >= 1.
        lr_range_test_step_rate: growth per `step_size` updates, as a multiple of the minimum.
        lr_range_test_staircase: grow in stairs of `step_size` updates.
        last_batch_iteration: see :class:`Schedule`.
        corrected: taken for symmetry; there is nothing to correct.

    Raises:
        ValueError: a step size that is no positive integer; a list of another length than the groups.
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
        corrected: bool = False,
    ) -> None:
        super().__init__(
            optimizer, last_batch_iteration, corrected=corrected, num_groups=groups_of(lr_range_test_min_lr)
        )
        self.min_lrs = self._per_group(lr_range_test_min_lr, "lr_range_test_min_lr")
        if not isinstance(lr_range_test_step_size, int) or lr_range_test_step_size <= 0:
            raise ValueError(f"lr_range_test_step_size: got {lr_range_test_step_size!r}; expected an integer >= 1")
        self.step_size = lr_range_test_step_size
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        if last_batch_iteration == -1:
            self._write(self.min_lrs)

    def _lrs(self, k: int) -> list[Rate]:
        interval = k / self.step_size
        if self.staircase:
            interval = math.floor(interval)
        increase = 1 + self.step_rate * interval
        return [min_lr * increase for min_lr in self.min_lrs]
