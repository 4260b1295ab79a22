"""The 1Cycle policy: the learning rate rises and falls once, momentum does the opposite, then both may decay.

Source: L. Smith, "A disciplined approach to neural network hyper-parameters" (arXiv:1803.09820), and DeepSpeed's
`OneCycle`, whose values these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from redline.schedulers.schedule import Default, Rate, Schedule, fill, groups_of, log

__all__ = ["OneCycle"]

_FORCED_BETA2 = 0.99  # DeepSpeed writes this into every group's second beta


class OneCycle(Schedule):
    """Cycle the learning rate from its minimum to its maximum and back, and the momentum the other way.

    With ``u`` rising from 0 to 1 over the first `cycle_first_step_size` steps and falling back to 0 over the next
    `cycle_second_step_size`, and with ``d`` counting the steps after the cycle::

        lr       = min_lr + (max_lr - min_lr) * u       then  min_lr / (1 + decay_lr_rate * d / decay_step_size)
        momentum = max_mom - (max_mom - min_mom) * u    then  max_mom * (1 + decay_mom_rate * d / decay_step_size)

    A stair count cuts its half of the cycle into that many flat stairs. Momentum is the first of ``betas``. If an
    optimizer has ``momentum`` instead, DeepSpeed warns and leaves it unchanged, and so does this class unless a
    momentum bound is given.

    >>> cycle = OneCycle(None, 0.002, 0.005, cycle_first_step_size=2000)
    >>> [round(lr, 6) for lr in cycle.lr_at([0, 1000, 2000, 3000, 4000, 5000])]
    [0.002, 0.0035, 0.005, 0.0035, 0.002, 0.002]

    If corrected, momentum starts at its maximum (DeepSpeed's first step has the minimum), the second beta is the
    optimizer's (DeepSpeed sets 0.99), ``momentum`` is cycled like ``betas``, momentum decays downwards
    (``max_mom / (1 + ...)``; DeepSpeed's grows, eventually past 1.0), and a decay rate alone is enough, per step
    (DeepSpeed needs `decay_step_size`, too).

    Args:
        optimizer: See :class:`Schedule`, as for `last_batch_iteration`.
        cycle_min_lr: Learning rate at both ends of the cycle, one value or one per group; `cycle_max_lr` at the peak.
        cycle_first_step_size: Steps from minimum to maximum, > 0; `cycle_second_step_size` back, None for the same.
        cycle_first_stair_count: Stairs in the rise, 0 for none; `cycle_second_stair_count` in the fall, likewise.
        decay_lr_rate: Decay after the cycle per `decay_step_size` steps, 0 for none; `decay_mom_rate` of the momentum.
        cycle_momentum: Whether to cycle the momentum.
        cycle_min_mom: Momentum at the peak of the learning rate, or one per group; `cycle_max_mom` at both ends.

    Raises:
        ValueError: A step size is not positive, or a list has not one value per group.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = Default(0.8),
        cycle_max_mom: float | Sequence[float] = Default(0.9),
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
        *,
        corrected: bool = False,
    ) -> None:
        num_groups = groups_of(cycle_min_lr, cycle_max_lr, cycle_min_mom, cycle_max_mom)
        super().__init__(optimizer, last_batch_iteration, corrected=corrected, num_groups=num_groups)
        # Float arithmetic throughout, like DeepSpeed's: integers would round differently.
        second_size = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.first_step_size, self.second_step_size = float(cycle_first_step_size), float(second_size)
        if self.first_step_size <= 0:
            raise ValueError(f"cycle_first_step_size: got {cycle_first_step_size}; expected a number > 0")
        if self.second_step_size < 0:
            raise ValueError(f"cycle_second_step_size: got {cycle_second_step_size}; expected a number >= 0")
        self.total_size = self.first_step_size + self.second_step_size
        self.step_ratio = self.first_step_size / self.total_size
        self.first_stair_count = stairs = cycle_first_stair_count
        self.second_stair_count = stairs if cycle_second_stair_count is None else cycle_second_stair_count
        unset = math.isclose(decay_step_size, 0)  # before anything is written: DeepSpeed refuses None here
        self.decay_step_size, decays = 1 if unset else decay_step_size, corrected or not unset
        self.min_lrs = self._per_group(cycle_min_lr, "cycle_min_lr")
        self.max_lrs = self._per_group(cycle_max_lr, "cycle_max_lr")
        if last_batch_iteration == -1:
            self._write(self.min_lrs)
        self.decay_lr_rate = decay_lr_rate * decays
        bounded = not (isinstance(cycle_min_mom, Default) and isinstance(cycle_max_mom, Default))
        self._momentum_key = self._find_momentum(bounded) if cycle_momentum else None
        self.cycle_momentum = self._momentum_key is not None
        if not self.cycle_momentum:
            return
        # After the learning rates: DeepSpeed has written those already when it refuses a momentum.
        self.min_moms = [float(mom) for mom in self._per_group(cycle_min_mom, "cycle_min_mom")]
        self.max_moms = [float(mom) for mom in self._per_group(cycle_max_mom, "cycle_max_mom")]
        groups = self.optimizer.param_groups
        self._beta2s = [g["betas"][1] if corrected and "betas" in g else _FORCED_BETA2 for g in groups]
        if last_batch_iteration == -1:
            self._write_momenta(self.max_moms if corrected else self.min_moms)
        self.decay_mom_rate = decay_mom_rate * decays
        self._cycle = [
            (min_lr, max_lr - min_lr, max_mom, max_mom - min_mom, beta2)
            for min_lr, max_lr, min_mom, max_mom, beta2 in zip(
                self.min_lrs, self.max_lrs, self.min_moms, self.max_moms, self._beta2s
            )
        ]

    @property
    def quirks(self) -> tuple[str, ...]:
        if self.corrected or not self.cycle_momentum:
            return ()
        found = [f"the first step has momentum {self.min_moms[0]:g}, the minimum"]
        if self._momentum_key == "betas":
            found.append(f"the second beta is set to {_FORCED_BETA2}")
        return tuple(found)

    def step(self, batch_iteration: int | None = None) -> None:
        k = self.last_epoch + 1 if batch_iteration is None else batch_iteration + 1
        height = self._height(k)
        if height is None or self._momentum_key != "betas":
            super().step(batch_iteration)
            if self.cycle_momentum:
                self._write_momenta(self._cycle_momenta(k))
            return
        # The usual case in one loop, which takes a third of the time of building lists first.
        self.last_epoch = k
        for group, (low, lr_range, high, mom_range, beta2) in zip(self.optimizer.param_groups, self._cycle):
            lr = low + lr_range * height
            if type(group["lr"]) is float:
                group["lr"] = lr
            else:
                fill(group, lr)
            group["betas"] = (high - mom_range * height, beta2)

    def get_mom(self) -> list[Any] | None:
        """The ``betas`` (or ``momentum``) of each group at the current step; None if momentum is not cycled."""
        return self._pairs(self._cycle_momenta(self.last_epoch)) if self.cycle_momentum else None

    def _find_momentum(self, bounded: bool) -> str | None:
        """The key of the groups that holds the momentum to cycle, or None with a warning."""
        if "betas" in self.optimizer.defaults:
            return "betas"
        if "momentum" in self.optimizer.defaults and (bounded or self.corrected):
            return "momentum"
        log.warning(
            "OneCycle: %s has no betas, so momentum is not cycled; give cycle_min_mom and cycle_max_mom to "
            "cycle `momentum`, or set cycle_momentum to false",
            type(self.optimizer).__name__,
        )
        return None

    def _height(self, k: int) -> float | None:
        """Where step `k` is between minimum (0.0) and maximum (1.0); None after the cycle."""
        total = self.total_size
        if k - 1 >= total:
            return None
        # In DeepSpeed's order of operations: another order differs in the last bit.
        x = 1.0 + k / total
        x -= 1 if k < total else math.floor(x)
        rising = x <= self.step_ratio
        stairs = self.first_stair_count if rising else self.second_stair_count
        if stairs > 0:
            at = k % total
            if at <= self.first_step_size:
                return math.floor(at * stairs / self.first_step_size) / stairs
            return math.floor((total - at) * stairs / self.second_step_size) / stairs
        return x / self.step_ratio if rising else (x - 1) / (self.step_ratio - 1)

    def _decay(self, rate: float, k: int) -> float:
        return 1 + rate * ((k - 1 - self.total_size + 1) / self.decay_step_size)

    def _lrs(self, k: int) -> list[Rate]:
        height = self._height(k)
        if height is None:
            return [low / self._decay(self.decay_lr_rate, k) for low in self.min_lrs]
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs)]

    def _cycle_momenta(self, k: int) -> list[float]:
        height = self._height(k)
        if height is not None:
            return [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms)]
        factor = self._decay(self.decay_mom_rate, k)
        return [high / factor if self.corrected else high * factor for high in self.max_moms]

    def _momenta(self, k: int) -> list[float] | None:
        if not self.cycle_momentum:
            return None
        return self.min_moms if k == 0 and not self.corrected else self._cycle_momenta(k)

    def _pairs(self, momenta: list[float]) -> list[Any]:
        return list(zip(momenta, self._beta2s)) if self._momentum_key == "betas" else momenta

    def _write_momenta(self, momenta: list[float]) -> None:
        assert self._momentum_key is not None
        for group, value in zip(self.optimizer.param_groups, self._pairs(momenta)):
            group[self._momentum_key] = value
