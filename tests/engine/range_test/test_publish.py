"""A range test in the monitors that the config names: read back, and apart from the training's own points."""

from __future__ import annotations

from pathlib import Path

import pytest

from redline import Engine, RangeTestResult
from redline.monitoring.metrics import MetricsLogger
from redline.range_test.result import curve_report_of
from tests.callbacks import find
from tests.monitors import offline_comet, offline_wandb, read_comet, read_tensorboard
from tests.range_tests import make_data, make_engine, mse, run
from tests.records import KINDS, make_run, tuning


def measured(engine: Engine, steps: int = 25) -> RangeTestResult:
    return run(engine, rates=(5, 50), baseline=True, steps=steps, validation=make_data(), validations=5)


def train(engine: Engine) -> None:
    x, y = make_data(8)
    engine.backward(mse(engine(x), y))
    engine.step()


def rows(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


def test_tensorboard_has_the_curves_and_the_suggestion(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    engine = make_engine(tensorboard={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    result = measured(engine)
    train(engine)
    find(engine, MetricsLogger).close()
    events = read_tensorboard(tmp_path / "job")
    for curve in result.curves:
        for name, values in (("loss", curve.losses), ("lr", curve.lrs)):
            found = events.Scalars(f"RangeTest/{curve.name}/{name}")
            assert [event.step for event in found] == list(curve.steps)
            assert [event.value for event in found] == pytest.approx(values)
        held_out = events.Scalars(f"RangeTest/{curve.name}/validation_loss")
        assert [(event.step, event.value) for event in held_out] == [(k, pytest.approx(v)) for k, v in curve.validation]
    (text,) = events.Tensors("RangeTest/suggestion/text_summary")
    assert b"cycle_max_lr" in text.tensor_proto.string_val[0]
    assert [event.step for event in events.Scalars("Train/Samples/train_loss")] == [8], "the training's own update"


def test_csv_files_hold_the_last_test_and_the_training_stays_apart(tmp_path: Path) -> None:
    engine = make_engine(csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    measured(engine, steps=30)
    result = measured(engine, steps=25)
    train(engine)
    find(engine, MetricsLogger).close()
    header, *losses = rows(tmp_path / "job" / "RangeTest_rate_5_loss.csv")
    assert header == ["step", "loss"]
    assert [(int(step), float(loss)) for step, loss in losses] == list(enumerate(result.curves[1].losses))
    assert (tmp_path / "job" / "RangeTest_fixed_0.01_lr.csv").exists()
    assert [row[0] for row in rows(tmp_path / "job" / "Train_Samples_lr.csv")] == ["step", "8"]


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_run_of_wandb_gets_a_chart_and_its_steps_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = offline_wandb(tmp_path, monkeypatch)
    engine = make_engine(wandb={"enabled": True})
    result = measured(engine)
    assert result.has_suggestion
    run = wandb.run
    assert run.summary["RangeTest/cycle_max_lr"] == result.suggestion.params()["cycle_max_lr"]
    assert run.summary["RangeTest/curves"]["nrows"] == sum(len(curve.losses) for curve in result.curves[1:])
    for _ in range(2):
        train(engine)
    find(engine, MetricsLogger).flush()
    train(engine)
    find(engine, MetricsLogger).flush()
    assert run.summary["_step"] == 16, "the training's steps come after the test's"
    find(engine, MetricsLogger).close()


@pytest.mark.filterwarnings("ignore")  # comet's own
def test_an_offline_experiment_of_comet_has_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_comet(tmp_path, monkeypatch)
    engine = make_engine(comet={"enabled": True, "online": False, "project": "ours"})
    result = measured(engine)
    find(engine, MetricsLogger).close()
    losses = [float(m["metricValue"]) for m in read_comet(tmp_path) if m["metricName"] == "RangeTest/rate 5/loss"]
    assert losses == pytest.approx(result.curves[1].losses)


def test_a_report_has_every_curve_and_the_answer_or_the_refusal() -> None:
    report, flat, nan = tuning(), KINDS["flat"](), KINDS["nan"]()
    trials = [trial.curve for trial in report.trials]
    record = curve_report_of({"RangeTest": report.curves, "Trials": trials}, report.answer, report.left_out)
    names = {point.name for point in record.scalars}
    assert {"RangeTest/rate 5, seed 0/loss", "RangeTest/weight decay 0.01/lr"} <= names
    assert "Trials/OneCycle to 0.03/validation_loss" in names
    assert [line.name for line in record.lines][:2] == ["rate 5, seed 0", "rate 5, seed 1"]
    assert record.numbers == report.answer.params()
    assert record.text.startswith("| key | value | where it comes from |\n| --- | --- | --- |\n| `cycle_min_lr` | ")
    assert record.text.endswith("- The fast test was left out: the budget was 18 updates.")

    record = curve_report_of({"RangeTest": [*flat.curves, make_run(None)]}, flat.answer)
    assert (record.numbers, [line.name for line in record.lines]) == ({}, ["flat"])
    assert record.text.startswith("**No suggestion.** The loss does not fall")
    (line, _) = curve_report_of({"RangeTest": nan.curves}, nan.answer).lines
    assert len(line.x) == len(line.y) == 37, "without losses that are not finite"
