"""A schedule that is put back, or at another step, goes on as one that was only ever stepped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from redline.schedule_state import ScheduleStart, ScheduleState, load_portable, portable_state, step_undoably
from redline.schedulers import WarmupLR
from tests.schedules import KINDS, Inner, make_optimizer, skip_where_torch_fails, values_of

of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_every_group = pytest.mark.parametrize(("groups", "tensor"), [(1, False), (2, False), (1, True), (2, True)])


@pytest.fixture(autouse=True)
def without_torchs_warning() -> Iterator[None]:
    """About optimizers that are not stepped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trace(schedule: Any, optimizer: Any, steps: int) -> list[Any]:
    """What the groups hold for each of the next steps."""
    values = []
    for _ in range(steps):
        values.append(values_of(optimizer))
        schedule.step()
    return values


def fresh(kind: str, steps: int, groups: int = 1, tensor: bool = False) -> list[Any]:
    optimizer = make_optimizer(groups=groups, tensor=tensor)
    return trace(KINDS[kind](optimizer), optimizer, steps)


@of_every_group
@of_every_kind
def test_a_step_that_is_undone_leaves_no_trace(kind: str, groups: int, tensor: bool) -> None:
    skip_where_torch_fails(kind, tensor=tensor)
    optimizer = make_optimizer(groups=groups, tensor=tensor)
    schedule = KINDS[kind](optimizer)
    lrs = [group["lr"] for group in optimizer.param_groups]
    values = []
    for step in range(12):
        values.append(values_of(optimizer))
        if step in (0, 1, 4, 7):
            step_undoably(schedule, optimizer)()
            assert values_of(optimizer) == values[-1]
        step_undoably(schedule, optimizer)
    assert values == fresh(kind, 12, groups, tensor)
    if tensor:
        assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs))


def test_what_the_script_wrote_since_stays_when_a_step_is_undone() -> None:
    optimizer = make_optimizer()
    undo = step_undoably(lr_scheduler.StepLR(optimizer, 1, 0.5), optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    undo()
    assert values_of(optimizer) == [(0.08, (0.9, 0.999), 0.3)]
    step_undoably(None, optimizer)()


def test_what_a_schedule_holds_stays_the_object_that_it_was() -> None:
    optimizer = make_optimizer()
    schedule: Any = Inner(optimizer)
    schedule.source = (each for each in range(3))  # cannot be copied
    inner, source = schedule.after, schedule.source
    for _ in range(4):
        step_undoably(schedule, optimizer)()
        schedule.step()
    assert schedule.after is inner and inner.optimizer is optimizer and schedule.source is source


def test_undoing_reads_no_value_of_a_learning_rate_that_is_a_tensor() -> None:
    """Which on a GPU would wait for it; a tensor without values raises where one is read."""
    optimizer = make_optimizer()
    schedule = WarmupLR(optimizer, 0.01, 0.1, 6)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    step_undoably(schedule, optimizer)()
    assert schedule.last_epoch == 0


@of_every_group
@of_every_kind
def test_a_schedule_can_be_put_at_any_step_as_a_fresh_run_has_it(kind: str, groups: int, tensor: bool) -> None:
    skip_where_torch_fails(kind, tensor=tensor)
    expected = fresh(kind, 12, groups, tensor)
    optimizer = make_optimizer(groups=groups, tensor=tensor)
    schedule = KINDS[kind](optimizer)
    start = ScheduleStart(schedule, optimizer)
    for steps in (5, 0, 9, 2, 0):
        was = values_of(optimizer)
        put = start.at(steps)
        assert values_of(optimizer) == was, "nothing moves before it is asked for"
        put()
        assert trace(schedule, optimizer, 3) == expected[steps : steps + 3]


@of_every_kind
def test_what_another_schedule_left_in_the_groups_is_gone(kind: str) -> None:
    """Loading a checkpoint brings the settings of its groups first."""
    left = make_optimizer()
    trace(lr_scheduler.OneCycleLR(left, 0.7, 20), left, 5)
    optimizer = make_optimizer()
    schedule = KINDS[kind](optimizer)
    put = ScheduleStart(schedule, optimizer).at(4)
    optimizer.param_groups[0].update({k: v for k, v in left.param_groups[0].items() if k not in ("params", "eps")})
    put()
    assert trace(schedule, optimizer, 4) == fresh(kind, 8)[4:]


def test_settings_that_no_schedule_moves_stay_when_it_begins_again() -> None:
    optimizer = make_optimizer()
    start = ScheduleStart(lr_scheduler.StepLR(optimizer, 1, 0.5), optimizer)
    optimizer.param_groups[0].update(weight_decay=0.3, eps=1e-4, lr=5.0)
    start.at(0)()
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["eps"], group["lr"]) == (0.3, 1e-4, 0.08)


def test_a_schedule_that_ends_before_the_step_is_where_it_was() -> None:
    optimizer = make_optimizer()
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, 14)
    start = ScheduleStart(schedule, optimizer)
    schedule.step()
    was = values_of(optimizer)
    with pytest.raises(ValueError, match="Tried to step 15 times"):
        start.at(20)
    assert values_of(optimizer) == was and schedule.last_epoch == 1


@of_every_kind
def test_a_state_can_be_put_back_more_than_once(kind: str) -> None:
    optimizer = make_optimizer()
    schedule = KINDS[kind](optimizer)
    trace(schedule, optimizer, 4)
    state = ScheduleState(schedule, optimizer)
    for _ in range(2):
        state.restore()
        assert trace(schedule, optimizer, 4) == fresh(kind, 8)[4:]


@of_every_kind
def test_a_state_without_functions_and_objects_is_enough_to_go_on(kind: str) -> None:
    optimizer, again = make_optimizer(), make_optimizer()
    schedule, resumed = KINDS[kind](optimizer), KINDS[kind](again)
    trace(schedule, optimizer, 4)
    load_portable(resumed, copy.deepcopy(portable_state(schedule)))
    for group, saved in zip(again.param_groups, optimizer.param_groups):
        group.update({key: value for key, value in saved.items() if key != "params"})
    assert trace(resumed, again, 5) == trace(schedule, optimizer, 5)
