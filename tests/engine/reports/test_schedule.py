"""A config's rates and momenta before any training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from redline import EngineError, load_config
from redline.reports.schedule import Trace, trace_schedule
from redline.schedulers import OneCycle

ADAM = {"type": "Adam", "params": {"lr": 0.5}}
CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3, "cycle_first_step_size": 2}


def trace(
    scheduler: str | None, params: dict[str, Any] | None = None, steps: int | None = None, **config: Any
) -> Trace:
    config = {"train_batch_size": 8, "optimizer": ADAM, **config}
    if scheduler is not None:
        config["scheduler"] = {"type": scheduler, "params": params or {}}
    return trace_schedule(load_config(config), steps)


def test_a_trace_is_what_the_optimizer_gets() -> None:
    found = trace("OneCycle", CYCLE, 6)
    assert found.name == "OneCycle"
    assert found.lrs[0] == pytest.approx((0.1, 0.2, 0.3, 0.2, 0.1, 0.1))
    assert found.momenta[0] == pytest.approx((0.8, 0.85, 0.8, 0.85, 0.9, 0.9))
    assert list(found.lrs[0]) == OneCycle(None, **CYCLE).lr_at(range(6))


def test_corrected_schedules_are_shown_corrected() -> None:
    assert trace("OneCycle", CYCLE, 3, redline={"schedules": "corrected"}).momenta[0] == pytest.approx((0.9, 0.85, 0.8))


def test_a_range_test_that_grows_by_powers_is_shown_so() -> None:
    params = {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 8}
    found = trace("LRRangeTest", params, 5, redline={"range_test": {"growth": "exponential"}})
    assert found.lrs[0] == pytest.approx((0.001, 0.003, 0.009, 0.027, 0.081))


def test_without_a_schedule_the_lr_is_fixed_and_without_an_optimizer_it_is_adams() -> None:
    found = trace(None, steps=3)
    assert (found.name, found.lrs, found.momenta) == ("fixed learning rate", ((0.5,) * 3,), ((0.9,) * 3,))
    assert trace(None, steps=1, optimizer=None).lrs == ((0.001,),)
    assert trace(None, steps=2, optimizer={"type": "Adagrad"}).momenta == ()


def test_torchs_schedules_are_shown_too_and_without_a_warning() -> None:
    assert trace("StepLR", {"step_size": 2, "gamma": 0.5}, 5).lrs == ((0.5, 0.5, 0.25, 0.25, 0.125),)
    with pytest.raises(EngineError, match=r"scheduler OneCycleLR: .*pct_start"):
        trace("OneCycleLR", {"max_lr": 0.1, "total_steps": 10, "pct_start": 2.0})


@pytest.mark.parametrize(
    ("scheduler", "params", "length"),
    [
        ("OneCycle", {**CYCLE, "cycle_first_step_size": 100}, 220),
        ("WarmupLR", {"warmup_num_steps": 100}, 110),
        ("WarmupDecayLR", {"total_num_steps": 1000, "warmup_num_steps": 10}, 1100),
        ("LRRangeTest", {"lr_range_test_step_size": 20}, 220),
        ("StepLR", {"step_size": 10}, 110),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": 50}, 51),  # torch's own ends there, by an error
        ("CosineAnnealingLR", {"T_max": 50}, 51),  # after which it would climb again
        ("ExponentialLR", {"gamma": 0.9}, 1000),
        (None, None, 1000),
    ],
)
def test_a_trace_is_as_long_as_its_schedule_unless_told(scheduler: str | None, params: Any, length: int) -> None:
    assert len(trace(scheduler, params).lrs[0]) == length
    assert len(trace(scheduler, params, 7).lrs[0]) == 7


def test_the_csv_has_a_row_for_each_step_and_columns_for_each_group(tmp_path: Path) -> None:
    with trace("OneCycle", CYCLE, 3).save_csv(tmp_path / "a.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["step", "lr", "momentum"]
    assert [list(map(float, row)) for row in rows] == [
        [0, 0.1, 0.8], pytest.approx([1, 0.2, 0.85]), pytest.approx([2, 0.3, 0.8])
    ]  # fmt: skip
    several = trace("OneCycle", CYCLE | {"cycle_max_lr": [0.3, 0.5]}, 3)
    assert several.lrs == (pytest.approx((0.1, 0.2, 0.3)), pytest.approx((0.1, 0.3, 0.5)))
    path = several.save_csv(tmp_path / "a.csv")
    assert path.read_text().splitlines()[0] == "step,lr_0,lr_1,momentum_0,momentum_1"


def test_the_picture_is_drawn_without_a_display(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert trace("OneCycle", CYCLE, 6).save_picture(tmp_path / name).read_bytes().startswith(start)
    assert trace("OneCycle", CYCLE, 6).save_picture(tmp_path / "b") == tmp_path / "b.png"
    with pytest.raises(EngineError, match=r"a\.xyz: "):
        trace(None, steps=2).save_picture(tmp_path / "a.xyz")
    with pytest.raises(EngineError, match=r"is a folder; give a file, such as .*picture\.png"):
        trace(None, steps=2).save_picture(tmp_path)


def test_the_text_has_a_chart_for_rate_and_momentum() -> None:
    pytest.importorskip("plotext", reason="the extra `terminal` is not installed")
    text = trace("OneCycle", CYCLE, 6).to_text()
    assert "OneCycle: learning rate by step" in text
    assert "momentum by step" in text
    assert text.splitlines()[-1].split() == ["0", "1", "2", "4", "5"], "steps are whole numbers"
    assert "momentum" not in trace(None, steps=2).to_text(), "it is constant"
