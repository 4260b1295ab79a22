"""The state of a schedule: captured and restored in memory, placed at any step, and made portable for a checkpoint.

It consists of the schedule's attributes and of what it has written to the optimizer's parameter groups: torch's
recursive schedules (StepLR, LinearLR, ...) compute the next learning rate from the one in the group.
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from redline.schedulers import Schedule

__all__ = ["SCHEDULED", "ScheduleStart", "ScheduleState", "load_portable", "portable_state", "step_undoably"]

# Settings of a parameter group that schedules write: while there is a schedule they are its own, not the optimizer's.
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "base_momentum", "max_momentum")

_PLAIN = frozenset((float, int, bool, str, type(None)))
_FIXED = _PLAIN | {tuple}  # settings of these types are never written in place
_MISSING = object()
_NESTED = "nested schedules"  # key of `portable_state`
_REMADE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, partial, nn.Module, Optimizer)


class ScheduleState:
    """A copy of a schedule's state and of the optimizer's groups; None as a schedule is a fixed learning rate."""

    def __init__(self, schedule: Any, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._memo: dict[int, Any] = {id(optimizer): optimizer}  # what deepcopy leaves
        self._parts = [] if schedule is None else [schedule]  # and the schedules in it
        for part in self._parts:  # grows meanwhile
            self._memo[id(part)] = part
            for value in _attributes(part).values():
                for each in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(each, LRScheduler) and id(each) not in self._memo:
                        self._parts.append(each)
                    if isinstance(each, (LRScheduler, nn.Module, nn.Parameter, Optimizer)):
                        self._memo[id(each)] = each
        # The attributes and not the `state_dict`: what a script's `load_state_dict` does only the script knows.
        self._saved = self._copies([_attributes(part) for part in self._parts])
        self._groups = [
            {key: value if type(value) in _FIXED else _copied(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self) -> None:
        """Restore everything, any number of times; a learning rate that is a tensor keeps its identity."""
        self.restore_schedule()
        for index, (group, saved) in enumerate(zip(self._optimizer.param_groups, self._groups)):
            for key in (group.keys() | saved.keys()) - {"params"}:
                self.restore_setting(index, key)

    def restore_schedule(self) -> None:
        """Restore the schedule, and leave the optimizer's groups."""
        for part, saved in zip(self._parts, self._copies(self._saved)):  # copied: it may be restored once more
            attributes = getattr(part, "__dict__", {})
            if not _is_ours(part):
                attributes.clear()
            attributes.update(saved)

    def _copies(self, of_parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        memo = dict(self._memo)  # one for all: what two attributes share stays shared
        return [{key: _copied(value, memo) for key, value in attributes.items()} for attributes in of_parts]

    def restore_setting(self, index: int, key: str) -> None:
        """Restore a setting of a group; one that it did not have is removed."""
        group, saved = self._optimizer.param_groups[index], self._groups[index]
        if key not in saved:
            group.pop(key, None)
        elif isinstance(now := group.get(key), Tensor) and isinstance(saved[key], (Tensor, float, int)):
            with torch.no_grad():
                now.copy_(saved[key]) if isinstance(saved[key], Tensor) else now.fill_(saved[key])
        else:
            group[key] = _copied(saved[key])


class ScheduleStart:
    """A schedule as it is before the first optimizer step, from which any later step can be reached."""

    def __init__(self, schedule: Any, optimizer: Optimizer) -> None:
        self.schedule = schedule
        self._optimizer = optimizer
        self._state = ScheduleState(schedule, optimizer)

    def position(self, state: dict[str, Any]) -> int | None:
        """How many steps a state of this schedule is from the start; None if it has no count."""
        now, then = _count(state), _count(self._state._saved[0] if self._state._saved else {})
        return None if now is None or then is None or now < then else now - then

    def at(self, steps: int) -> Callable[[], None]:
        """What places schedule and groups where a fresh run has them after so many steps; changes nothing yet.

        The schedule is run over these steps, which is right for every schedule and takes some microseconds per step;
        those of `schedulers` jump.

        Raises:
            ValueError: the schedule ends before that step.
        """
        now = ScheduleState(self.schedule, self._optimizer)
        try:
            self._state.restore()
            start = _settings(self._optimizer)
            self._run(steps)
            there = ScheduleState(self.schedule, self._optimizer)
            if steps == 0:  # one step more, to see what it writes
                with contextlib.suppress(ValueError):  # it has no second step
                    self._run(1)
            written = {*SCHEDULED, *(key for _, key in _written(start, _settings(self._optimizer)))}
        finally:
            now.restore()

        def place() -> None:
            there.restore_schedule()
            for index in range(len(self._optimizer.param_groups)):
                for key in written:
                    there.restore_setting(index, key)

        return place

    def _run(self, steps: int) -> None:
        schedule = self.schedule
        if schedule is None or steps == 0:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about an optimizer that is not stepped
            if _is_ours(schedule):
                schedule.step(schedule.last_batch_iteration + steps)
                return
            for _ in range(steps):
                schedule.step()


def step_undoably(schedule: Any, optimizer: Optimizer) -> Callable[[], None]:
    """Step a schedule.

    Returns:
        What undoes it: restores the schedule, schedules within it, and every setting that it wrote to the groups. What
        the script has written since stays. Nothing here waits for the device.
    """
    if schedule is None:
        return lambda: None
    state, before = ScheduleState(schedule, optimizer), _settings(optimizer)
    schedule.step()
    after = _settings(optimizer)

    def undo() -> None:
        written, since = _written(before, after), _written(after, _settings(optimizer))
        state.restore_schedule()
        for index, key in written - since:
            state.restore_setting(index, key)

    return undo


_Settings = tuple[list[dict[str, Any]], dict[int, int]]


def _settings(optimizer: Optimizer) -> _Settings:
    """The groups' settings, and the versions of those that are tensors, which writes in place change."""
    groups = [dict(group) for group in optimizer.param_groups]
    tensors = [value for group in groups for value in group.values() if isinstance(value, Tensor)]
    return groups, {id(value): value._version for value in tensors}


def _written(before: _Settings, after: _Settings) -> set[tuple[int, str]]:
    """Which settings, by group and name, were assigned, written in place, added or removed in between."""
    found = set()
    for index, (then, now) in enumerate(zip(before[0], after[0])):
        for key in (then.keys() | now.keys()) - {"params"}:
            value = now.get(key, _MISSING)
            if value is not then.get(key, _MISSING) or before[1].get(id(value)) != after[1].get(id(value)):
                found.add((index, key))
    return found


def portable_state(schedule: Any) -> dict[str, Any]:
    """A schedule's `state_dict` without what the script makes again: functions, modules, optimizers.

    Schedules that it contains have their own.
    """
    state, nested = {}, {}
    for key, value in schedule.state_dict().items():
        if isinstance(value, LRScheduler):
            nested[key] = portable_state(value)
        elif not isinstance(value, _REMADE):
            state[key] = value
    return {**state, _NESTED: nested} if nested else state


def load_portable(schedule: Any, state: dict[str, Any]) -> None:
    """Load what `portable_state` returned."""
    schedule.load_state_dict({key: value for key, value in state.items() if key != _NESTED})
    for key, inner in state.get(_NESTED, {}).items():
        load_portable(getattr(schedule, key), inner)


def _is_ours(schedule: Any) -> bool:
    """Whether all of its state is the step: not so for a script's subclass."""
    return isinstance(schedule, Schedule) and type(schedule).__module__.startswith("redline.schedulers.")


def _attributes(part: Any) -> dict[str, Any]:
    return {"last_epoch": part.last_epoch} if _is_ours(part) else getattr(part, "__dict__", {})


def _copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # an open file, a lock, a generator: nothing that could be restored
        return value


def _count(state: dict[str, Any]) -> int | None:
    if "last_batch_iteration" in state:
        return int(state["last_batch_iteration"]) + 1
    return int(state["last_epoch"]) if "last_epoch" in state else None
