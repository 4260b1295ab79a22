"""The first step at which a schedule leaves what optimizers accept is known before it is there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from redline.schedulers import LRRangeTest, OneCycle
from redline.schedulers.schedule import find_violation
from tests.schedules import KINDS, make_optimizer, values_of

warn = pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")


def sgd(**settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, **settings)


def first_step(schedule: Any, optimizer: Any, most: int = 20_000) -> int:
    """Found by stepping."""
    for step in range(most):
        group = optimizer.param_groups[0]
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        if not (0 <= float(group["lr"]) < float("inf") and 0 <= momentum < 1):
            return step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
    raise AssertionError("it never leaves")


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_that_stay_within_have_no_violation_and_are_not_moved(kind: str) -> None:
    if kind == "OneCycle":  # with a momentum that decays upwards
        return
    optimizer = make_optimizer(groups=2)
    schedule = KINDS[kind](optimizer)
    was = values_of(optimizer)
    assert find_violation(schedule) is None
    assert values_of(optimizer) == was


@pytest.mark.parametrize("rate", [1e-4, 0.001, 0.05, 3.0])
@pytest.mark.parametrize(("size", "decay_size"), [(3, 1), (7, 4), (500, 10)])
def test_the_step_at_which_onecycles_momentum_reaches_1_is_known(rate: float, size: int, decay_size: int) -> None:
    def make(optimizer: Any, **more: Any) -> OneCycle:
        return OneCycle(
            optimizer, 0.001, 0.01, cycle_first_step_size=size, decay_step_size=decay_size, decay_mom_rate=rate, **more
        )

    optimizer = make_optimizer()
    schedule = make(optimizer)
    found = find_violation(schedule)
    assert found is not None and (found.name, found.group) == ("beta1", 0)
    assert found.value == pytest.approx(schedule.momentum_at(found.step))
    assert found.step == first_step(schedule, optimizer)
    assert find_violation(make(make_optimizer(), corrected=True)) is None


def test_onecycles_momentum_is_known_beyond_the_steps_that_are_run() -> None:
    schedule = OneCycle(make_optimizer(), 0.001, 0.01, cycle_first_step_size=100_000, decay_step_size=1000,
                        decay_mom_rate=0.001)  # fmt: skip
    found = find_violation(schedule)
    assert found is not None
    before, there = schedule.momentum_at([found.step - 1, found.step])  # type: ignore[misc]
    assert before < 1 <= there


def test_the_momentum_of_sgd_counts_where_it_is_cycled() -> None:
    def make(optimizer: Any, **bounds: Any) -> OneCycle:
        return OneCycle(
            optimizer, 0.001, 0.01, cycle_first_step_size=3, decay_step_size=1, decay_mom_rate=0.1, **bounds
        )

    optimizer = sgd(momentum=0.9)
    schedule = make(optimizer, cycle_max_mom=0.95)
    found = find_violation(schedule)
    assert found is not None and found.name == "momentum"
    assert found.step == first_step(schedule, optimizer)
    assert find_violation(make(sgd(momentum=0.9))) is None, "DeepSpeed leaves it alone"


def test_the_group_that_is_first_is_named() -> None:
    schedule = OneCycle(make_optimizer(groups=2), 0.001, 0.01, cycle_first_step_size=3, decay_step_size=1,
                        decay_mom_rate=0.01, cycle_max_mom=[0.9, 0.99])  # fmt: skip
    found = find_violation(schedule)
    assert found is not None and found.group == 1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 50, eta_min=-0.01), "learning rate"),
        (lambda o: lr_scheduler.StepLR(o, 3, gamma=-0.5), "learning rate"),
        (lambda o: lr_scheduler.LinearLR(o, 1.0, end_factor=0.0, total_iters=4), None),
        (lambda o: lr_scheduler.MultiStepLR(o, [3, 1500], gamma=1e200), "learning rate"),
        (lambda o: lr_scheduler.ExponentialLR(o, 1e30), "learning rate"),
        (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, max_momentum=1.2), "beta1"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20, base_momentum=1.5), "beta1"),
        (lambda o: LRRangeTest(o, 0.001, 1, 99.0, growth="exponential"), "learning rate"),
        (lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.StepLR(o, 2, -1.0)], [1200]), "learning rate"),
    ],
)  # fmt: skip
@warn
def test_torchs_schedules_are_looked_at_too(make: Any, name: str | None) -> None:
    optimizer = make_optimizer()
    schedule = make(optimizer)
    found = find_violation(schedule)
    if name is None:
        assert found is None
    else:
        assert found is not None and found.name == name
        assert found.step == first_step(schedule, optimizer)


def test_functions_of_the_user_are_not_called() -> None:
    def factor(step: int) -> float:
        assert step == 0
        return 1.0

    assert find_violation(lr_scheduler.LambdaLR(make_optimizer(), factor)) is None


def test_a_momentum_that_the_schedule_leaves_alone_is_not_its_affair() -> None:
    assert find_violation(lr_scheduler.StepLR(sgd(momentum=1.5), 3)) is None
