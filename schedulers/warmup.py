"""Warm-ups: rise to the peak, then hold it, fall linearly, or fall along a cosine.

Source: DeepSpeed's `WarmupLR`, `WarmupDecayLR` and `WarmupCosineLR`, whose values these are. The
corrected variants differ in the steps: there the peak is reached by update ``warmup_num_steps - 1``
and the floor by the last one, and no update is spent at a rate of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from schedulers.schedule import Default, Rate, Schedule, groups_of, log

__all__ = ["WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]


class _Warmup(Schedule):
    """What the three share: the shape of the rise, in DeepSpeed's steps or the corrected ones."""

    warmup_num_steps: int
    warmup_type: str

    def _set_warmup(self, warmup_num_steps: int, warmup_type: str) -> None:
        if not isinstance(warmup_num_steps, int) or warmup_num_steps <= 0:
            raise ValueError(f"warmup_num_steps: got {warmup_num_steps!r}; expected an integer >= 1")
        if warmup_type not in {"log", "linear"}:
            log.warning("warmup_type: got %r; expected log or linear; running with log", warmup_type)
            warmup_type = "log"
        # DeepSpeed's warm-up is never shorter than two steps: log(1) is 0, and it is divided by.
        self.warmup_num_steps = warmup_num_steps if self.corrected else max(2, warmup_num_steps)
        self.warmup_type = warmup_type
        self._per_log = 1.0 / math.log(self.warmup_num_steps + self.corrected)

    def _rise(self, k: int) -> float:
        """How much of the way to the peak update `k`, which is within the warm-up, has come: 0 to 1."""
        if self.corrected:
            if self.warmup_type == "log":
                return math.log(k + 2) / math.log(self.warmup_num_steps + 1)
            return (k + 1) / self.warmup_num_steps
        if self.warmup_type == "log":
            return self._per_log * math.log(k)
        return (k - 1) / self.warmup_num_steps

    def _warns_of_length(self, total_num_steps: int) -> None:
        if total_num_steps < self.warmup_num_steps:
            log.warning(
                "%s: total_num_steps %s is less than warmup_num_steps %s",
                type(self).__name__,
                total_num_steps,
                self.warmup_num_steps,
            )


class WarmupLR(_Warmup):
    """Rise from the minimum to the maximum over the warm-up, then hold.

    With ``n = k - 1`` for update ``k`` (DeepSpeed's count) and ``W = warmup_num_steps``::

        lr = min + (max - min) * n / W                 linear
        lr = min + (max - min) * log(n + 1) / log(W)   log

    The first two updates (``n`` = -1 and 0) run at the minimum. Corrected, ``(k + 1) / W`` and
    ``log(k + 2) / log(W + 1)`` take the fractions' place: the first update is above the minimum.

    >>> for corrected in (False, True):
    ...     warmup = WarmupLR(None, 0.0, 0.1, 5, "linear", corrected=corrected)
    ...     print([round(lr, 3) for lr in warmup.lr_at(range(7))])
    [0.0, 0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1]

    Args:
        optimizer: see :class:`Schedule`.
        warmup_min_lr: rate to start from, one value or one per group.
        warmup_max_lr: rate to reach, likewise; None takes the optimizer's, group by group.
        warmup_num_steps: updates of the warm-up; >= 1, and counted as at least 2.
        warmup_type: "log" or "linear"; another name runs as log, with a warning.
        last_batch_iteration: see :class:`Schedule`.
        corrected: see above.

    Raises:
        ValueError: a warm-up that is no positive integer; a list of another length than the groups; an optimizer
            whose rate is None, where its rate is the maximum.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
        *,
        corrected: bool = False,
    ) -> None:
        num_groups = groups_of(warmup_min_lr, warmup_max_lr)
        super().__init__(optimizer, last_batch_iteration, corrected=corrected, num_groups=num_groups)
        self.min_lrs = self._per_group(warmup_min_lr, "warmup_min_lr")
        self.max_lrs = self._per_group(self._own_lrs() if warmup_max_lr is None else warmup_max_lr, "warmup_max_lr")
        self._ranges = [high - low for low, high in zip(self.min_lrs, self.max_lrs)]
        self._set_warmup(warmup_num_steps, warmup_type)
        if last_batch_iteration == -1:
            self._write(self._lrs(0))

    @property
    def quirks(self) -> tuple[str, ...]:
        if self.corrected:
            return ()
        return (f"the first two updates run at warmup_min_lr, {float(self.min_lrs[0]):g}",)

    def _lrs(self, k: int) -> list[Rate]:
        if k == 0 and not self.corrected:
            return list(self.min_lrs)
        within = k < self.warmup_num_steps if self.corrected else k <= self.warmup_num_steps
        gamma = self._rise(k) if within else self._after(k)
        return [low + delta * gamma for low, delta in zip(self.min_lrs, self._ranges)]

    def _after(self, k: int) -> float:
        """The share of the maximum that update `k`, past the warm-up, runs at."""
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Rise as :class:`WarmupLR`, then fall linearly, to the minimum at `total_num_steps`.

    After the warm-up, with ``n = k - 1``: ``lr = min + (max - min) * max(0, (total - n) / (total - W))``.
    Corrected, ``(total - k) / (total - W + 1)``: the peak is update ``W - 1``, and the last update is
    the last above the minimum.

    >>> for corrected in (False, True):
    ...     decay = WarmupDecayLR(None, 6, 0.0, 0.1, 2, "linear", corrected=corrected)
    ...     print([round(lr, 3) for lr in decay.lr_at(range(8))])
    [0.0, 0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0]
    [0.05, 0.1, 0.08, 0.06, 0.04, 0.02, 0.0, 0.0]

    Args:
        optimizer: see :class:`Schedule`.
        total_num_steps: updates of the whole schedule; shorter than the warm-up is warned of.
        warmup_min_lr: see :class:`WarmupLR`.
        warmup_max_lr: see :class:`WarmupLR`; DeepSpeed's default is 0.001 here, whatever the optimizer
            says. None, and the default of the corrected variant, is the optimizer's rate.
        warmup_num_steps: see :class:`WarmupLR`.
        warmup_type: see :class:`WarmupLR`.
        last_batch_iteration: see :class:`Schedule`.
        corrected: see above.

    Raises:
        ValueError: as :class:`WarmupLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = Default(0.001),
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
        *,
        corrected: bool = False,
    ) -> None:
        self.total_num_steps = total_num_steps
        if corrected and isinstance(warmup_max_lr, Default):
            warmup_max_lr = None
        super().__init__(
            optimizer,
            warmup_min_lr,
            warmup_max_lr,
            warmup_num_steps,
            warmup_type,
            last_batch_iteration,
            corrected=corrected,
        )
        self._warns_of_length(total_num_steps)

    def _after(self, k: int) -> float:
        if self.corrected:
            return max(0.0, (self.total_num_steps - k) / max(1, self.total_num_steps - self.warmup_num_steps + 1))
        left = self.total_num_steps - (k - 1)
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Rise to the optimizer's own rate, then fall along half a cosine to a share of it.

    The optimizer's rate is multiplied, with ``n = k - 1``, ``W = warmup_num_steps`` and
    ``p = min(1, (n - W + 1) / (total - W))``, by::

        min_ratio + (1 - min_ratio) * n / W                    in the warm-up (log: log(n + 1) / log(W))
        cos_min + (1 - cos_min) * (1 + cos(pi * p)) / 2        after it

    The first update runs at 0, and a linear warm-up never reaches the peak. Corrected, the rise is that of
    :class:`WarmupLR` and ``p = (k - W + 1) / (total - W)``: update ``W - 1`` has the peak and the
    last one the floor.

    >>> for corrected in (False, True):
    ...     cosine = WarmupCosineLR(None, 6, 0.0, 2, 0.1, "linear", corrected=corrected)
    ...     print([round(lr, 3) for lr in cosine.lr_at(range(7))])
    [0.0, 0.0, 0.5, 0.868, 0.55, 0.232, 0.1]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]

    Args:
        optimizer: see :class:`Schedule`.
        total_num_steps: updates of the whole schedule; shorter than the warm-up is warned of.
        warmup_min_ratio: share of the rate to start from.
        warmup_num_steps: updates of the warm-up; >= 1, and counted as at least 2.
        cos_min_ratio: share of the rate to end at and stay at.
        warmup_type: see :class:`WarmupLR`.
        last_batch_iteration: see :class:`Schedule`.
        corrected: see above.

    Raises:
        ValueError: a warm-up that is no positive integer; an optimizer whose rate is None.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
        *,
        corrected: bool = False,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration, corrected=corrected)
        self._own_lrs()
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self._set_warmup(warmup_num_steps, warmup_type)
        self._warns_of_length(total_num_steps)
        if last_batch_iteration == -1:
            self._write(self._lrs(0))

    @property
    def quirks(self) -> tuple[str, ...]:
        if self.corrected:
            return ()
        start = "update runs at a rate of 0" if self.warmup_min_ratio else "two updates run at a rate of 0"
        peak = ("the peak is never reached",) if self.warmup_type == "linear" else ()
        return (f"the first {start}", *peak)

    def get_lr_ratio(self) -> float:
        """The share of the optimizer's rate at the step reached."""
        return self._ratio(self.last_epoch)

    def _lrs(self, k: int) -> list[Rate]:
        if k == 0 and not self.corrected:
            return [0.0 for _ in self.base_lrs]
        ratio = self._ratio(k)
        return [lr * ratio for lr in self.base_lrs]

    def _ratio(self, k: int) -> float:
        if k == 0 and not self.corrected:
            return 0.0
        if k < self.warmup_num_steps or (k == self.warmup_num_steps and not self.corrected):
            return self.warmup_min_ratio + self._rise(k) * (1.0 - self.warmup_min_ratio)
        done = k - self.warmup_num_steps + self.corrected
        progress = min(1.0, done / max(1, self.total_num_steps - self.warmup_num_steps))
        height = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * height)
