"""The loss scale of fp16 against DeepSpeed's `DynamicLossScaler`, update by update.

The expected scales are in ``tests/golden/loss_scale.json``; ``scripts/dev/record_deepspeed.py`` records them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from redline.errors import EngineError
from redline.precision import LossScale

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "loss_scale.json").read_text(encoding="utf-8"))
SETTINGS = ("scale", "window", "hysteresis", "consecutive_hysteresis", "minimum")


def settings(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in SETTINGS}


def told(case: dict[str, Any]) -> str:
    return ", ".join(f"{name}={case[name]:g}" for name in SETTINGS) + f", overflows={case['overflows']}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=told)
def test_a_dynamic_scale_is_deepspeeds_after_every_update(case: dict[str, Any]) -> None:
    scale = LossScale(**settings(case), dynamic=True)
    for overflow, expected in zip(case["overflows"], case["scales"], strict=False):
        scale.update(overflow == "1")
        assert scale.value == expected
    if case["error"]:
        with pytest.raises(EngineError):
            scale.update(True)


def values(scale: LossScale, overflows: Iterable[bool]) -> list[float]:
    """The scale after each update."""
    after = []
    for overflow in overflows:
        scale.update(overflow)
        after.append(scale.value)
    return after


def test_a_static_scale_stays_whatever_overflows() -> None:
    scale = LossScale(128.0, dynamic=False, window=1, hysteresis=1, minimum=128.0)
    assert values(scale, (True, True, False, False, True)) == [128.0] * 5


def test_a_clean_run_doubles_the_scale_after_window_and_one_updates_and_then_every_window() -> None:
    scale = LossScale(4.0, dynamic=True, window=3, hysteresis=2)
    assert values(scale, [False] * 10) == [4, 4, 4, 8, 8, 8, 16, 16, 16, 32]


def test_hysteresis_forgives_the_first_overflows_and_only_growth_forgives_again() -> None:
    scale = LossScale(64.0, dynamic=True, window=2, hysteresis=3)
    overflows = (True, False, True, False, True, True, False, False, False, True, True)
    assert values(scale, overflows) == [64, 64, 64, 64, 32, 16, 16, 16, 32, 32, 32]


def test_consecutive_hysteresis_forgives_again_after_every_clean_update() -> None:
    scale = LossScale(64.0, dynamic=True, window=100, hysteresis=2, consecutive_hysteresis=True)
    overflows = (True, False, True, False, True, True, True, False, True)
    assert values(scale, overflows) == [64, 64, 64, 64, 64, 32, 16, 16, 16]


def test_the_scale_falls_to_its_minimum_and_an_overflow_there_is_an_error() -> None:
    scale = LossScale(16.0, dynamic=True, hysteresis=1, minimum=3.0)
    assert values(scale, [True] * 3) == [8, 4, 3]
    with pytest.raises(EngineError):
        scale.update(True)
