"""Names of schedules to classes."""

from __future__ import annotations

import pytest
from torch.optim import lr_scheduler

from redline import schedulers
from redline.schedulers import Schedule, UnknownScheduleError, known, register, resolve

OURS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "WarmupStableDecayLR")


class Constant(Schedule):
    """A schedule of somebody's own."""


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schedulers.registry._registered", {})


def test_names_are_ours_then_registered_ones_then_torchs() -> None:
    assert all(resolve(name) is getattr(schedulers, name) for name in OURS)
    torchs = ("StepLR", "OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau")
    assert all(resolve(name) is getattr(lr_scheduler, name) for name in torchs)
    assert not known().keys() & {"LRScheduler", "_LRScheduler", "Schedule"}
    assert register("Constant", Constant) is resolve("Constant") is known()["Constant"] is Constant
    register("StepLR", Constant)
    assert resolve("StepLR") is Constant
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
    with pytest.raises(UnknownScheduleError, match=r"schedulers\.register"):
        resolve("zzzzzzz")
