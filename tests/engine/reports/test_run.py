"""The curves of a finished training run, from the CSV files that it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from redline import RangeTestError
from redline.cli import main
from redline.reports.run import is_run, load_run
from tests.tiny import make_engine, train


def run_into(folder: Path, steps: int = 120) -> None:
    engine = make_engine(redline={"log_dir": str(folder)}, fp16={"enabled": True, "loss_scale": 0, "hysteresis": 1})
    train(engine, steps)
    engine.callbacks[0].close()  # type: ignore[attr-defined]  # at the end of the process


def test_every_number_of_a_run_is_written_and_read(tmp_path: Path) -> None:
    run_into(tmp_path / "first")
    record = load_run(tmp_path / "first")
    assert set(record.series) >= {"train_loss", "lr", "grad_norm", "loss_scale", "samples_per_second"}
    samples, losses = record.series["train_loss"]
    assert samples == list(range(4, 484, 4))
    assert losses[-1] < losses[0]
    assert record.summary().startswith("first: 120 optimizer steps, 480 samples")


def test_a_step_that_was_skipped_is_counted(tmp_path: Path) -> None:
    engine = make_engine(redline={"log_dir": str(tmp_path)}, fp16={"enabled": True, "initial_scale_power": 32})
    train(engine, 3)
    assert engine.skipped_steps > 0
    engine.callbacks[0].close()  # type: ignore[attr-defined]
    assert load_run(tmp_path).series["skipped_steps"][1][-1] == engine.skipped_steps


def test_the_command_draws_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    run_into(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "training loss: first" in shown and "training.png, training.html" in shown
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "<script" in (tmp_path / "training.html").read_text()


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    path = tmp_path / "Train_Samples_train_loss.csv"
    path.write_text("step,train_loss\n")
    with pytest.raises(RangeTestError, match="no training loss"):
        load_run(tmp_path)
    path.write_text("step,train_loss\n4,low\n")
    with pytest.raises(RangeTestError, match=r"train_loss\.csv: cannot be read"):
        load_run(tmp_path)
