"""Warm-ups: rise to the peak, then hold it, decay linearly, or decay along a cosine.

Source: DeepSpeed's `WarmupLR`, `WarmupDecayLR` and `WarmupCosineLR`, whose values these are. The corrected variants
differ by a step: there the peak is at step ``warmup_num_steps - 1``, the floor at the last step, and no step has a
learning rate of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from redline.schedulers.schedule import Default, Rate, Schedule, groups_of, log

__all__ = ["WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "WarmupStableDecayLR"]


class _Warmup(Schedule):
    """The rise and the length, which all share."""

    def _set_warmup(self, warmup_num_steps: int, warmup_type: str) -> None:
        if not isinstance(warmup_num_steps, int) or warmup_num_steps <= 0:
            raise ValueError(f"warmup_num_steps: got {warmup_num_steps!r}; expected an integer >= 1")
        if warmup_type not in {"log", "linear"}:
            log.warning("warmup_type: got %r; expected log or linear; running with log", warmup_type)
            warmup_type = "log"
        # DeepSpeed's warm-up has at least two steps, because it divides by log(warmup_num_steps).
        self.warmup_num_steps = warmup_num_steps if self.corrected else max(2, warmup_num_steps)
        self.warmup_type = warmup_type
        self._per_log = 1.0 / math.log(max(2, warmup_num_steps))  # DeepSpeed multiplies, which rounds differently

    def _set_total(self, total_num_steps: int) -> None:
        self.total_num_steps, warmup, name = total_num_steps, self.warmup_num_steps, type(self).__name__
        if total_num_steps < warmup:
            log.warning("%s: total_num_steps %s is less than warmup_num_steps %s", name, total_num_steps, warmup)

    def _rise(self, k: int) -> float | None:
        """How far step `k` is on the way to the peak, from 0 to 1; None after the warm-up."""
        if k > self.warmup_num_steps - self.corrected:
            return None
        if self.corrected:
            if self.warmup_type == "log":
                return math.log(k + 2) / math.log(self.warmup_num_steps + 1)
            return (k + 1) / self.warmup_num_steps
        return self._per_log * math.log(k) if self.warmup_type == "log" else (k - 1) / self.warmup_num_steps


class WarmupLR(_Warmup):
    """Rise from the minimum to the maximum over the warm-up, then hold.

    With ``n = k - 1`` for step ``k`` (DeepSpeed's count) and ``W = warmup_num_steps``::

        lr = min + (max - min) * n / W                 linear
        lr = min + (max - min) * log(n + 1) / log(W)   log

    The first two steps (``n`` = -1 and 0) have the minimum. If corrected, the fractions are ``(k + 1) / W`` and
    ``log(k + 2) / log(W + 1)``, and the first step is above the minimum.

    >>> for corrected in (False, True):
    ...     warmup = WarmupLR(None, 0.0, 0.1, 5, "linear", corrected=corrected)
    ...     print([round(lr, 3) for lr in warmup.lr_at(range(7))])
    [0.0, 0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1]

    Args:
        optimizer: See :class:`Schedule`, as for `last_batch_iteration`.
        warmup_min_lr: Learning rate to start from, one value or one per group.
        warmup_max_lr: Learning rate to reach, likewise; None takes the optimizer's, group by group.
        warmup_num_steps: Steps of the warm-up; >= 1, and counted as at least 2.
        warmup_type: "log" or "linear"; any other name runs as log, with a warning.

    Raises:
        ValueError: A warm-up is not a positive integer, a list has not one value per group, or the optimizer's
            learning rate, if it is the maximum, is None.
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
        max_lrs = self._optimizer_lrs() if warmup_max_lr is None else warmup_max_lr
        self.max_lrs = self._per_group(max_lrs, "warmup_max_lr")
        self._ranges = [high - low for low, high in zip(self.min_lrs, self.max_lrs)]
        self._set_warmup(warmup_num_steps, warmup_type)
        if last_batch_iteration == -1:
            self._write(self._lrs(0))

    @property
    def quirks(self) -> tuple[str, ...]:
        return () if self.corrected else (f"the first two steps have warmup_min_lr, {float(self.min_lrs[0]):g}",)

    def _lrs(self, k: int) -> list[Rate]:
        if k == 0 and not self.corrected:  # the formula would round the minimum where learning rates are tensors
            return list(self.min_lrs)
        rise = self._rise(k)
        fraction = self._after(k) if rise is None else rise
        return [low + delta * fraction for low, delta in zip(self.min_lrs, self._ranges)]

    def _after(self, k: int) -> float:
        """The fraction of the maximum at step `k`, after the warm-up."""
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Rise like :class:`WarmupLR`, then decay linearly to the minimum at `total_num_steps`.

    After the warm-up, with ``n = k - 1``::

        lr = min + (max - min) * max(0, (total - n) / (total - W))

    If corrected, the fraction is ``(total - k) / (total - W + 1)``: the peak is at step ``W - 1``, and the last step is
    the last above the minimum.

    >>> for corrected in (False, True):
    ...     decay = WarmupDecayLR(None, 6, 0.0, 0.1, 2, "linear", corrected=corrected)
    ...     print([round(lr, 3) for lr in decay.lr_at(range(8))])
    [0.0, 0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0]
    [0.05, 0.1, 0.08, 0.06, 0.04, 0.02, 0.0, 0.0]

    Args, besides those of :class:`WarmupLR`:
        total_num_steps: Steps of the whole schedule; fewer than the warm-up's log a warning.
        warmup_max_lr: DeepSpeed's default here is 0.001, whatever the optimizer has; None, and the default of the
            corrected variant, is the optimizer's learning rate.
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
        max_lr = None if corrected and isinstance(warmup_max_lr, Default) else warmup_max_lr
        super().__init__(
            optimizer, warmup_min_lr, max_lr, warmup_num_steps, warmup_type, last_batch_iteration, corrected=corrected
        )
        self._set_total(total_num_steps)

    def _after(self, k: int) -> float:
        if self.corrected:
            return max(0.0, (self.total_num_steps - k) / max(1, self.total_num_steps - self.warmup_num_steps + 1))
        left = self.total_num_steps - (k - 1)
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupStableDecayLR(WarmupDecayLR):
    """Rise like :class:`WarmupLR`, hold the maximum, then decay linearly to zero over the last `decay_num_steps`.

    Redline's own, known as WSD (https://arxiv.org/abs/2404.06395): until the decay begins, nothing depends on the
    length of the training. After the warm-up, with ``n = k - 1``, or if corrected ``n = k``::

        lr = min + (max - min) * min(1, max(0, (total - n) / decay))

    >>> wsd = WarmupStableDecayLR(None, 8, 3, 0.0, 0.1, 2, "linear", corrected=True)
    >>> [round(lr, 3) for lr in wsd.lr_at(range(9))]
    [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.067, 0.033, 0.0]

    Args, besides those of :class:`WarmupDecayLR`:
        decay_num_steps: Steps of the decay, which ends at `total_num_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        total_num_steps: int,
        decay_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
        *,
        corrected: bool = False,
    ) -> None:
        self.decay_num_steps = decay_num_steps
        super().__init__(
            optimizer, total_num_steps, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type,
            last_batch_iteration, corrected=corrected,
        )  # fmt: skip

    def _after(self, k: int) -> float:
        left = self.total_num_steps - (k if self.corrected else k - 1)
        return max(0.0, min(1.0, left / max(1, self.decay_num_steps)))


class WarmupCosineLR(_Warmup):
    """Rise to the optimizer's own learning rate, then decay along half a cosine to a fraction of it.

    With ``n = k - 1``, ``W = warmup_num_steps`` and ``p = min(1, (n - W + 1) / (total - W))``, the optimizer's learning
    rate is multiplied by::

        min_ratio + (1 - min_ratio) * n / W                    in the warm-up (log: log(n + 1) / log(W))
        cos_min + (1 - cos_min) * (1 + cos(pi * p)) / 2        after it

    The first step has 0, and a linear warm-up never reaches the peak. If corrected, the rise is that of
    :class:`WarmupLR` and ``p = (k - W + 1) / (total - W)``: the peak is at step ``W - 1``, the floor at the last one.

    >>> for corrected in (False, True):
    ...     cosine = WarmupCosineLR(None, 6, 0.0, 2, 0.1, "linear", corrected=corrected)
    ...     print([round(lr, 3) for lr in cosine.lr_at(range(7))])
    [0.0, 0.0, 0.5, 0.868, 0.55, 0.232, 0.1]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]

    Args, besides those of :class:`WarmupLR`:
        total_num_steps: Steps of the whole schedule; fewer than the warm-up's log a warning.
        warmup_min_ratio: Fraction of the learning rate to start from.
        cos_min_ratio: Fraction of the learning rate to end at and stay at.

    Raises:
        ValueError: A warm-up is not a positive integer, or the optimizer's learning rate is None.
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
        self._optimizer_lrs()
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self._set_warmup(warmup_num_steps, warmup_type)
        self._set_total(total_num_steps)
        if last_batch_iteration == -1:
            self._write(self._lrs(0))

    @property
    def quirks(self) -> tuple[str, ...]:
        if self.corrected:
            return ()
        start = "step has learning rate 0" if self.warmup_min_ratio else "two steps have learning rate 0"
        peak = ("the peak is never reached",) if self.warmup_type == "linear" else ()
        return (f"the first {start}", *peak)

    def get_lr_ratio(self) -> float:
        """The fraction of the optimizer's learning rate at the current step."""
        return self._ratio(self.last_epoch)

    def _lrs(self, k: int) -> list[Rate]:
        ratio = self._ratio(k)
        return [lr * ratio for lr in self.base_lrs]

    def _ratio(self, k: int) -> float:
        if k == 0 and not self.corrected:
            return 0.0
        rise = self._rise(k)
        if rise is not None:
            return self.warmup_min_ratio + rise * (1.0 - self.warmup_min_ratio)
        done = k - self.warmup_num_steps + self.corrected
        progress = min(1.0, done / max(1, self.total_num_steps - self.warmup_num_steps))
        height = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * height)
