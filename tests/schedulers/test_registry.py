"""Names of schedules to classes."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

import schedulers
from schedulers import Schedule, UnknownScheduleError, known, register, resolve

OURS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


class Constant(Schedule):
    """A schedule of somebody's own."""


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schedulers.registry._registered", {})


@pytest.mark.parametrize("name", OURS)
def test_our_names_give_our_classes(name: str) -> None:
    assert resolve(name) is getattr(schedulers, name)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_torchs_names_give_torchs_classes(name: str) -> None:
    assert resolve(name) is getattr(lr_scheduler, name)


def test_a_registered_name_gives_its_class() -> None:
    assert register("Constant", Constant) is Constant
    assert resolve("Constant") is Constant
    assert known()["Constant"] is Constant


def test_a_registered_name_goes_before_torchs() -> None:
    register("StepLR", Constant)
    assert resolve("StepLR") is Constant


def test_our_names_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match="OneCycle: the name is taken"):
        register("OneCycle", Constant)


def test_a_class_may_be_registered_again_but_another_not_under_its_name() -> None:
    register("Constant", Constant)
    register("Constant", Constant)
    with pytest.raises(ValueError, match="Constant: the name is taken; register the schedule under another one"):
        register("Constant", lr_scheduler.StepLR)
    assert resolve("Constant") is Constant


def test_a_miss_names_the_nearest_and_all_that_are_known() -> None:
    with pytest.raises(UnknownScheduleError) as caught:
        resolve("OneCyle")
    assert 'did you mean "OneCycle"?' in str(caught.value)
    assert all(name in str(caught.value) for name in (*OURS, "StepLR"))


def test_a_miss_near_nothing_says_how_to_register() -> None:
    with pytest.raises(UnknownScheduleError, match=r"schedulers\.register"):
        resolve("zzzzzzz")


def test_base_classes_are_no_schedules() -> None:
    assert not known().keys() & {"LRScheduler", "_LRScheduler", "Schedule"}


def test_everything_known_can_be_called_with_an_optimizer_first() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert resolve("ExponentialLR")(optimizer, gamma=0.5).get_last_lr() == [0.1]
