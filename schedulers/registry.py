"""Schedule names, as a config writes them, to classes.

Resolved in this order: ours, registered ones, `torch.optim.lr_scheduler`.
"""

from __future__ import annotations

import difflib
from typing import TypeVar

from torch.optim import lr_scheduler

from schedulers.lr_range_test import LRRangeTest
from schedulers.one_cycle import OneCycle
from schedulers.schedule import Schedule
from schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["UnknownScheduleError", "is_built_in", "known", "register", "resolve"]

_OURS: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
_registered: dict[str, type] = {}

C = TypeVar("C", bound=type)


class UnknownScheduleError(LookupError):
    """No schedule has this name; the message lists those that exist, and the nearest."""


def register(name: str, cls: C) -> C:
    """Make a schedule known to configs under a name of its own.

    Args:
        name: what the config's ``scheduler.type`` says.
        cls: called as ``cls(optimizer, **params)``; anything with ``step()``, ``state_dict()`` and
            ``load_state_dict()``.

    Returns:
        The class, so that the call can stand below its definition.

    Raises:
        ValueError: the name is one of ours, or registered for another class.
    """
    if name in _OURS or _registered.get(name, cls) is not cls:
        raise ValueError(f"{name}: the name is taken; register the schedule under another one")
    _registered[name] = cls
    return cls


def known() -> dict[str, type]:
    """Every name a config can use, in the order of resolution, with its class."""
    torch_own = {
        name: cls
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and not name.startswith("_") and _is_schedule(cls)
    }
    return {**torch_own, **_registered, **_OURS}


def resolve(name: str) -> type:
    """The class behind a config's ``scheduler.type``.

    Raises:
        UnknownScheduleError: there is none.
    """
    classes = known()
    if name in classes:
        return classes[name]
    nearest = difflib.get_close_matches(name, classes, n=1)
    hint = f'did you mean "{nearest[0]}"?' if nearest else "register a schedule of your own with schedulers.register."
    raise UnknownScheduleError(f'"{name}": unknown schedule; {hint} Known: {", ".join(sorted(classes))}')


def is_built_in(schedule: object) -> bool:
    """Whether a schedule is one of ours or torch's, whose values follow from arguments and step alone."""
    kind = type(schedule)
    return kind in _OURS.values() or kind.__module__ == lr_scheduler.__name__


def _is_schedule(cls: type) -> bool:
    bases = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    return issubclass(cls, bases) and cls is not lr_scheduler.LRScheduler and cls.__name__ != "_LRScheduler"
