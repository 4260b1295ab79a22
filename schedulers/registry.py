"""Schedule names, as a config writes them, to classes: ours, then registered ones, then `torch.optim.lr_scheduler`."""

from __future__ import annotations

import difflib
from typing import TypeVar

from torch.optim import lr_scheduler

from redline.schedulers.lr_range_test import LRRangeTest
from redline.schedulers.one_cycle import OneCycle
from redline.schedulers.schedule import Schedule
from redline.schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR, WarmupStableDecayLR

__all__ = ["UnknownScheduleError", "known", "register", "resolve"]

_OURS: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, WarmupStableDecayLR)
}
_registered: dict[str, type] = {}

C = TypeVar("C", bound=type)


class UnknownScheduleError(LookupError):
    """No schedule has this name; the message lists those that exist, and the nearest."""


def register(name: str, cls: C) -> C:
    """Make a schedule of your own available to configs; returns its class.

    Args:
        name: The config's ``scheduler.type``.
        cls: Called as ``cls(optimizer, **params)``; has ``step()``, ``state_dict()`` and ``load_state_dict()``.

    Raises:
        ValueError: The name is one of ours, or registered for another class.
    """
    if name in _OURS or _registered.get(name, cls) is not cls:
        raise ValueError(f"{name}: the name is taken; register the schedule under another one")
    _registered[name] = cls
    return cls


def known() -> dict[str, type]:
    """Every name that a config can use, with its class."""
    torch_own = {
        name: cls
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, lr_scheduler.LRScheduler)
        if name not in ("LRScheduler", "_LRScheduler")
    }
    return {**torch_own, **_registered, **_OURS}


def resolve(name: str) -> type:
    """The class of a config's ``scheduler.type``.

    Raises:
        UnknownScheduleError: There is none.
    """
    classes = known()
    if name in classes:
        return classes[name]
    nearest = difflib.get_close_matches(name, classes, n=1)
    hint = f'did you mean "{nearest[0]}"?' if nearest else "register a schedule of your own with schedulers.register."
    raise UnknownScheduleError(f'"{name}": unknown schedule; {hint} Known: {", ".join(sorted(classes))}')
