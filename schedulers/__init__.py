"""Learning rate schedules with DeepSpeed's names, arguments and values, on any torch optimizer.

They know torch only and can be used in any loop:

    schedule = OneCycle(optimizer, cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=500)
    for batch in loader:
        ...
        optimizer.step()
        schedule.step()

Without an optimizer they evaluate: ``OneCycle(None, 1e-4, 1e-3).lr_at(range(4000))``.
"""

from schedulers.lr_range_test import LRRangeTest
from schedulers.one_cycle import OneCycle
from schedulers.registry import UnknownScheduleError, known, register, resolve
from schedulers.schedule import Schedule
from schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "UnknownScheduleError",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "known",
    "register",
    "resolve",
]
