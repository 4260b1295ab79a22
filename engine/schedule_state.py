"""Where a schedule is, as something that can be kept and put back.

That is the schedule's state and the values that it has written to the optimizer's parameter groups. torch's recursive
schedules (StepLR, LinearLR, ...) compute the next learning rate from the one in the group, so that neither means
anything without the other.
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schedulers import Schedule
from schedulers.registry import is_built_in

__all__ = ["SCHEDULED", "ScheduleStart", "ScheduleState", "load_portable", "portable_state", "step_undoably"]

# Settings of a parameter group that schedules write: theirs while there is a schedule, and not the optimizer's.
SCHEDULED = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "betas",
    "momentum",
    "base_momentum",
    "max_momentum",
)

_PLAIN = frozenset((float, int, bool, str, type(None), complex, bytes))
_NEVER_WRITTEN_IN_PLACE = _PLAIN | {tuple}
_NESTED = "nested schedules"  # key of `portable_state`


class _Schedule(Protocol):
    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class ScheduleState:
    """A copy of a schedule's state, and of the optimizer's group settings.

    Args:
        schedule: may hold further schedules; None for a fixed learning rate.
        optimizer: the one that it moves.
    """

    def __init__(self, schedule: _Schedule | None, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._states = [] if schedule is None else list(_states(schedule, optimizer))
        self.groups = [
            {key: _copied(value, {}) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self) -> None:
        """Put everything back, any number of times; a learning rate that is a tensor keeps its identity."""
        self.restore_schedule()
        for group, saved in zip(self._optimizer.param_groups, self.groups):
            for key in group.keys() - saved.keys() - {"params"}:
                del group[key]
            for key, value in saved.items():
                _write(group, key, value)

    def restore_schedule(self) -> None:
        """Put the schedule back, and leave the optimizer's groups."""
        values = [{key: _value(group.get(key)) for key in SCHEDULED} for group in self._optimizer.param_groups]
        for schedule, state in self._states:
            _load(schedule, state, self._optimizer)
        for group, before in zip(self._optimizer.param_groups, values):  # a corrected schedule writes on loading
            for key, value in before.items():
                if key in group and value is not None:
                    _write(group, key, value)

    def write_scheduled(self, also: set[str]) -> None:
        """Write to the groups what schedules do, and `also` these settings; leave the others."""
        keys = {*SCHEDULED, *also}
        for group, saved in zip(self._optimizer.param_groups, self.groups):
            for key in keys & group.keys() - saved.keys():  # of another schedule
                del group[key]
            for key in keys & saved.keys():
                _write(group, key, saved[key])


class ScheduleStart:
    """A schedule as it is before the first optimizer step, from which any later step can be reached.

    Args:
        schedule: None for a fixed learning rate.
        optimizer: with the values of the first step.
    """

    def __init__(self, schedule: _Schedule | None, optimizer: Optimizer) -> None:
        self.schedule = schedule
        self._optimizer = optimizer
        self._state = ScheduleState(schedule, optimizer)

    def position(self, state: dict[str, Any]) -> int | None:
        """How many steps a state of this schedule is from the start; None if it does not tell."""
        first = next((own for part, own in self._state._states if part is self.schedule), {})
        now, then = _count(state), _count(first)
        return None if now is None or then is None or now < then else now - then

    def at(self, steps: int) -> Callable[[], None]:
        """What puts schedule and groups where a fresh run has them after so many steps; changes nothing yet.

        The schedule is run over these steps, which is right for every schedule and takes some microseconds a step;
        those of `schedulers` jump.

        Raises:
            ValueError: the schedule ends before; it is where it was.
        """
        now = ScheduleState(self.schedule, self._optimizer)
        try:
            self._state.restore()
            self._run(steps)
            there = ScheduleState(self.schedule, self._optimizer)
            written = self._written(self._state.groups)
            if steps == 0 and self.schedule is not None:
                with contextlib.suppress(ValueError):  # it has no second step
                    self._run(1)  # what does it write?
                written = self._written(self._state.groups)
        finally:
            now.restore()

        def put() -> None:
            there.restore_schedule()
            there.write_scheduled(written)

        return put

    def _run(self, steps: int) -> None:
        schedule: Any = self.schedule
        if schedule is None or steps == 0:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about an optimizer that is not stepped
            if isinstance(schedule, Schedule) and is_built_in(schedule):
                schedule.step(schedule.last_batch_iteration + steps)
                return
            for _ in range(steps):
                schedule.step()

    def _written(self, groups: list[dict[str, Any]]) -> set[str]:
        """The settings that differ from these."""
        return {
            key
            for group, before in zip(self._optimizer.param_groups, groups)
            for key, value in group.items()
            if key != "params" and not _same(value, before.get(key))
        }


def step_undoably(schedule: _Schedule | None, optimizer: Optimizer) -> Callable[[], None]:
    """Step a schedule.

    Returns:
        What undoes it: the schedule's state, of schedules within it too, and every setting that it wrote to the
        groups. What the script has written since stays. Nothing here waits for the device.
    """
    if schedule is None:
        return lambda: None
    states = list(_states(schedule, optimizer))
    before = [dict(group) for group in optimizer.param_groups]
    kept = [
        (index, key, value, _mark(value), _value(value))
        for index, group in enumerate(before)
        for key, value in group.items()
        if type(value) not in _NEVER_WRITTEN_IN_PLACE and key != "params"
    ]
    schedule.step()
    written = [
        (index, key, then.get(key), value, _mark(value))
        for index, (group, then) in enumerate(zip(optimizer.param_groups, before))
        for key, value in group.items()
        if value is not then.get(key)
    ]
    for index, key, value, mark, copied in kept:  # written in place
        if optimizer.param_groups[index].get(key) is value and _mark(value) != mark:
            written.append((index, key, copied, value, _mark(value)))

    def undo() -> None:
        now = [
            (index, key, then, _value(optimizer.param_groups[index].get(key)))
            for index, key, then, value, mark in written
            if optimizer.param_groups[index].get(key) is value and _mark(value) == mark
        ]
        for part, state in states:
            _load(part, state, optimizer)
        for index, key, then, _ in now:
            if then is None and key not in before[index]:
                optimizer.param_groups[index].pop(key, None)
            else:
                _write(optimizer.param_groups[index], key, then)

    return undo


def portable_state(schedule: _Schedule) -> dict[str, Any]:
    """A schedule's state without what the script makes again: functions, modules, optimizers.

    Schedules that it holds are there with their own state.
    """
    state, nested = {}, {}
    for key, value in schedule.state_dict().items():
        if isinstance(value, LRScheduler):
            nested[key] = portable_state(value)
        elif not isinstance(value, (*_FUNCTIONS, nn.Module, Optimizer)):
            state[key] = value
    return {**state, _NESTED: nested} if nested else state


def load_portable(schedule: Any, state: dict[str, Any]) -> None:
    """Load what `portable_state` gave."""
    nested = state.get(_NESTED, {})
    schedule.load_state_dict({key: value for key, value in state.items() if key != _NESTED})
    for key, inner in nested.items():
        load_portable(getattr(schedule, key), inner)


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, partial)


def _states(schedule: _Schedule, optimizer: Optimizer) -> Iterator[tuple[_Schedule, dict[str, Any]]]:
    """A schedule and those that it holds, each with a copy of its state."""
    if isinstance(schedule, Schedule) and is_built_in(schedule):  # its state is the step
        yield schedule, schedule.state_dict()
        return
    memo: dict[int, Any] = {id(optimizer): optimizer}
    pending, seen = [schedule], {id(schedule)}
    while pending:
        part = pending.pop()
        state = part.state_dict() if hasattr(part, "state_dict") else {}
        for value in state.values():
            if type(value) in _PLAIN:
                continue
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, LRScheduler) and id(each) not in seen:
                    pending.append(each)
                    seen.add(id(each))
                if isinstance(each, (LRScheduler, nn.Module, nn.Parameter, Optimizer)):
                    memo[id(each)] = each  # put back in place, or not the schedule's to move
        yield part, {key: _copied(value, memo) for key, value in state.items()}


def _load(schedule: Any, state: dict[str, Any], optimizer: Optimizer) -> None:
    if type(schedule).state_dict is LRScheduler.state_dict:  # all its attributes
        for key in vars(schedule).keys() - state.keys() - {"optimizer"}:
            delattr(schedule, key)
    memo: dict[int, Any] = {id(optimizer): optimizer}
    for value in state.values():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, (LRScheduler, nn.Module, nn.Parameter, Optimizer)):
                memo[id(each)] = each
    if not state:
        return
    # A copy: loading gives the schedule the very lists, and some torch schedules take entries out of the state.
    schedule.load_state_dict({key: _copied(value, memo) for key, value in state.items()})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    if type(value) is list and all(type(each) in _PLAIN for each in value):
        return memo.setdefault(id(value), value.copy())  # the usual case, ten times as fast
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # an open file, a lock, a generator: nothing that could be put back
        return value


def _value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value.copy() if type(value) is list else value


def _mark(value: Any) -> Any:
    """What differs once a value was written in place; a tensor's is read without waiting for the device."""
    return value._version if isinstance(value, Tensor) else list(value) if type(value) is list else None


def _write(group: dict[str, Any], key: str, value: Any) -> None:
    now = group.get(key)
    if isinstance(now, Tensor) and isinstance(value, (Tensor, float, int)):
        with torch.no_grad():
            now.copy_(value) if isinstance(value, Tensor) else now.fill_(value)
    else:
        group[key] = _value(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    try:
        return bool(one == other)
    except (TypeError, ValueError):  # an array
        return False


def _count(state: dict[str, Any]) -> int | None:
    if "last_batch_iteration" in state:
        return int(state["last_batch_iteration"]) + 1
    return int(state["last_epoch"]) if "last_epoch" in state else None
