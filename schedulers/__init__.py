"""Learning rate schedules with DeepSpeed's names, arguments and values, on any torch optimizer.

They know torch only and can be used in any loop:

    schedule = OneCycle(optimizer, cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=500)
    for batch in loader:
        ...
        optimizer.step()
        schedule.step()

Without an optimizer they evaluate: ``OneCycle(None, 1e-4, 1e-3).lr_at(range(4000))``.
"""

import sys
from importlib import import_module

if __name__ == "schedulers":
    # A script in a checkout has imported this folder by its name. It gets the installed package: the same objects.
    try:
        sys.modules["schedulers"] = import_module("redline.schedulers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "schedulers: Redline is not installed in this Python; run scripts/setup, and import redline.schedulers"
        ) from error

from redline.schedulers.lr_range_test import LRRangeTest
from redline.schedulers.one_cycle import OneCycle
from redline.schedulers.registry import UnknownScheduleError, known, register, resolve
from redline.schedulers.schedule import Schedule
from redline.schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR, WarmupStableDecayLR

__all__ = [
    "LRRangeTest", "OneCycle", "Schedule", "UnknownScheduleError", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR",
    "WarmupStableDecayLR", "known", "register", "resolve",
]  # fmt: skip
