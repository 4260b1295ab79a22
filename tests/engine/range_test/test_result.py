"""A test as a value: on disk and back, as a config, in words."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redline import RangeTestError, load_config
from redline.range_test import Curve, RangeTestResult, Refusal, Suggestion
from redline.range_test.result import adapt_config

INF, NAN = math.inf, math.nan
CONFIG = {
    "_comment": "mine",
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "scheduler": {"type": "LRRangeTest", "params": {}},
}


def falling(rate: float | None = 50.0, steps: int = 100, end: float | None = None) -> Curve:
    """A loss that falls from 2.3 in a straight line; from `end` on it is what it is given."""
    losses = [max(0.3, 2.3 - 0.05 * k) for k in range(steps)]
    if end is not None:
        losses[-1] = end
    lrs = tuple(1e-4 * (1 + (rate or 0) * k / 5) for k in range(steps))
    name = "fixed 0.0001" if rate is None else f"rate {rate:g}"
    return Curve(name, rate, tuple(range(steps)), lrs, tuple(losses), ((0, 2.5), (50, 1.0), (100, 0.5)))


def make_result(*curves: Curve, config: dict[str, Any] | None = None) -> RangeTestResult:
    return RangeTestResult(curves or (falling(None), falling()), config or CONFIG, 8, 1, "AdamW", 1000)


def flat() -> RangeTestResult:
    curve = falling()
    return make_result(replace(curve, losses=(1.0,) * 100))


# -- several batch sizes and settings in one record ------------------------------------------------------------


def of_several() -> RangeTestResult:
    slow = falling(5)
    return make_result(
        falling(None),
        falling(),
        replace(falling(500), train_batch_size=32, name="rate 500, batch 32"),
        replace(slow, settings=(("momentum", 0.5),), name="rate 5, momentum 0.5"),
        config=CONFIG | {"gradient_accumulation_steps": 2},
    )


def test_a_suggestion_is_of_the_records_own_batch_size_and_settings() -> None:
    result = of_several()
    assert result.suggestion == make_result().suggestion
    assert result.suggestion.curve == "rate 50"
    own = result.select()
    assert (own.curves, own.config, own.suggestion) == (result.curves[:2], result.config, result.suggestion)


def test_what_was_measured_at_another_batch_size_is_a_test_of_its_own() -> None:
    large = of_several().select(train_batch_size=32)
    assert [curve.name for curve in large.curves] == ["rate 500, batch 32"]
    assert (large.train_batch_size, large.suggestion.curve) == (32, "rate 500, batch 32")
    config = large.to_config()
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (32, 4)
    assert load_config(config, world_size=1).gradient_accumulation_steps == 8
    assert large.select(train_batch_size=32) == large


def test_what_was_measured_with_other_settings_suggests_a_config_with_them(tmp_path: Path) -> None:
    light = of_several().select(settings={"momentum": 0.5})
    assert [curve.name for curve in light.curves] == ["rate 5, momentum 0.5"]
    config = light.to_config()
    assert config["optimizer"]["params"] == {"lr": 0.001, "betas": [0.5, 0.999]}
    assert config["scheduler"]["params"]["cycle_momentum"] is False
    load_config(config)
    light.save(tmp_path)
    assert RangeTestResult.load(tmp_path) == light


@pytest.mark.parametrize(
    ("optimizer", "settings", "params"),
    [
        ("SGD", {"momentum": 0.5, "weight_decay": 0.1}, {"momentum": 0.5, "weight_decay": 0.1}),
        ("Muon", {"momentum": 0.5}, {"momentum": 0.5}),
        ("Lion", {"momentum": 0.5}, {"betas": [0.5, 0.999]}),
        ("NAdam", {"momentum": 0.5}, {"betas": [0.5, 0.999]}),
    ],
)
def test_settings_go_where_the_optimizer_has_them(optimizer: str, settings: Any, params: Any) -> None:
    assert adapt_config({"optimizer": {"type": optimizer}}, (8, 8), 1, settings)["optimizer"]["params"] == params
    assert adapt_config({}, (8, 8), 1, settings) == {}


def test_what_was_not_measured_is_said_to_be_missing() -> None:
    with pytest.raises(RangeTestError, match=r"no test at batch size 64, .* there are: batch size 8, settings"):
        of_several().select(train_batch_size=64)


# -- on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.5, NAN, INF, -INF], ids=str)
def test_a_result_is_the_same_after_saving_and_loading(end: float, tmp_path: Path) -> None:
    result = make_result(falling(None), falling(end=end), replace(falling(5), validation=((0, NAN), (100, INF))))
    result = replace(
        result, curves=(*result.curves, replace(falling(5), kind="exponential", lrs=(1e-4,) * 99 + (INF,)))
    )
    result.save(tmp_path)
    loaded = RangeTestResult.load(tmp_path)
    assert repr(loaded) == repr(result)  # nan is no equal of itself
    assert loaded.suggestion == result.suggestion


def test_the_csv_has_a_row_for_each_step_of_each_run(tmp_path: Path) -> None:
    make_result().save(tmp_path)
    with (tmp_path / "range_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "step", "lr", "loss", "validation_loss"]
    test = [row for row in rows if row["run"] == "rate 50"]
    assert len(test) == 101  # and one for the validation before the first update
    assert (test[0]["step"], test[0]["loss"], test[0]["validation_loss"]) == ("-1", "", "2.5")
    assert [row["validation_loss"] for row in test if row["step"] in ("49", "99")] == ["1.0", "0.5"]
    assert [float(row["loss"]) for row in test[1:]] == list(falling().losses)


def test_without_a_suggestion_an_earlier_tests_config_is_removed(tmp_path: Path) -> None:
    make_result().save(tmp_path)
    assert (tmp_path / "one_cycle.json").exists()
    assert "config" not in flat().save(tmp_path)
    assert not (tmp_path / "one_cycle.json").exists()


def test_a_saving_that_fails_leaves_the_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_result().save(tmp_path)
    before = (tmp_path / "range_test.json").read_text()

    def full(self: Path, text: str, **_: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        flat().save(tmp_path)
    assert (tmp_path / "range_test.json").read_text() == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"curves": [{}]}', '{"curves": 3}', '{"curves": []}', '{"curves": [3]}', "\x00",
     '{"curves": [{"name": "", "rate": 1, "steps": [0], "lrs": [1], "losses": ["x"], "validation": []}]}'],
)  # fmt: skip
def test_a_damaged_record_is_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "range_test.json").write_text(text)
    with pytest.raises(RangeTestError, match=r"range_test\.json: not a record of a range test"):
        RangeTestResult.load(tmp_path)


# -- as a config ---------------------------------------------------------------------------------------------


def test_the_config_is_the_tests_own_with_the_suggested_cycle_and_loads() -> None:
    result = make_result()
    config, suggestion = result.to_config(), result.suggestion
    assert isinstance(suggestion, Suggestion)
    assert config["scheduler"] == {"type": "OneCycle", "params": suggestion.params()}
    assert {key: config[key] for key in CONFIG if key != "scheduler"} == {
        key: value for key, value in CONFIG.items() if key != "scheduler"
    }
    assert CONFIG["scheduler"] == {"type": "LRRangeTest", "params": {}}
    loaded = load_config(json.dumps(config), world_size=1)
    assert loaded.scheduler is not None and loaded.scheduler.type == "OneCycle"
    assert loaded.scheduler.arguments() == config["scheduler"]["params"]


def test_a_refusal_gives_no_config_and_says_why_and_what_to_do() -> None:
    result = flat()
    assert isinstance(result.suggestion, Refusal)
    with pytest.raises(RangeTestError, match="no schedule can be suggested") as caught:
        result.to_config()
    assert result.suggestion.reason in str(caught.value)
    assert result.suggestion.remedy in str(caught.value)


# -- in words ------------------------------------------------------------------------------------------------


def test_the_summary_has_a_line_for_each_number_with_its_reason() -> None:
    result = make_result()
    suggestion = result.suggestion
    assert isinstance(suggestion, Suggestion)
    head, *lines = result.summary().splitlines()
    assert head == "Suggested OneCycle for 1000 steps at batch size 8:"
    for line, (key, value) in zip(lines, suggestion.params().items()):
        assert line == f"  {key} = {value:g}  {suggestion.reasons[key]}"
    assert lines[4:] == [f"Note: {note}" for note in suggestion.notes]


def test_groups_with_rates_of_their_own_get_boundaries_in_the_same_ratios() -> None:
    result = replace(make_result(), group_ratios=(1.0, 0.1))
    params = result.to_config()["scheduler"]["params"]
    alone = result.suggestion
    assert isinstance(alone, Suggestion)
    assert params["cycle_max_lr"] == pytest.approx([alone.cycle_max_lr, 0.1 * alone.cycle_max_lr])
    assert params["cycle_min_lr"] == pytest.approx([alone.cycle_min_lr, 0.1 * alone.cycle_min_lr])
