"""A training run whose config says LRRangeTest records itself, with no change to the script."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from redline import Engine, RangeTestResult, initialize
from redline.distributed.process_group import World
from redline.range_test import recorder
from tests.callbacks import drop_recorder, find

ROOT = Path(__file__).parent.parent.parent.parent

# A user's script, with no word about recording in it.
SCRIPT = """
import json, sys
import torch
from torch import nn
from redline import initialize

torch.manual_seed(0)
model, x, y = nn.Linear(4, 1), torch.randn(64, 4), torch.randn(64, 1)
engine = initialize(model, "config.json", device="cpu")
for step in range(40):
    engine.backward(nn.functional.mse_loss(engine(x), y))
    engine.step()
{ending}
"""


def make_config(folder: str = "record", **sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "LRRangeTest",
            "params": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 5, "lr_range_test_step_rate": 5},
        },
        "redline": {"range_test": {"output_dir": folder}},
        **sections,
    }


def run_script(folder: Path, ending: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT.format(ending=ending))
    (folder / "config.json").write_text(json.dumps(make_config()))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, env=environment, timeout=180
    )


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    torch.manual_seed(0)
    engine = initialize(nn.Linear(4, 1), make_config(str(tmp_path / "record")), device="cpu")
    yield engine
    drop_recorder(engine)


def recorder_of(engine: Engine) -> Any:
    return find(engine, recorder.PassiveRecorder)


def train(engine: Engine, steps: int) -> list[float]:
    x, y = torch.ones(4, 4), torch.zeros(4, 1)
    losses = []
    for _ in range(steps * engine.gradient_accumulation_steps()):
        losses.append(engine.backward(nn.functional.mse_loss(engine(x), y)).item())
        engine.step()
    return losses


# -- a script of its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("raise ValueError('mine')", 1)],
    ids=["at the end", "by an exception"],
)
def test_a_script_that_ends_leaves_its_record_picture_and_config(ending: str, code: int, tmp_path: Path) -> None:
    done = run_script(tmp_path, ending)
    assert done.returncode == code, done.stderr
    files = {path.name for path in (tmp_path / "record").iterdir()}
    assert files == {"range_test.json", "range_test.csv", "range_test.png", "report.html", "one_cycle.json"}
    assert f"Written to record: {', '.join(['range_test.json', 'range_test.csv', 'one_cycle.json'])}" in done.stderr
    assert "Suggested OneCycle" in done.stderr
    result = RangeTestResult.load(tmp_path / "record")
    assert len(result.curves[0].losses) == 40
    assert (result.curves[0].name, result.train_steps) == ("rate 5", 400)


def test_a_script_that_is_killed_keeps_what_was_saved(tmp_path: Path) -> None:
    ending = """
from redline.range_test import recorder
recorder.SAVE_EVERY = 25
for step in range(20):
    engine.backward(nn.functional.mse_loss(engine(x), y))
    engine.step()
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_script(tmp_path, ending)
    assert done.returncode == -signal.SIGKILL
    result = RangeTestResult.load(tmp_path / "record")
    assert len(result.curves[0].losses) == 50
    assert not list((tmp_path / "record").glob("*.tmp"))


# -- in this process -----------------------------------------------------------------------------------------


def test_every_step_is_recorded_with_its_lr(engine: Engine) -> None:
    losses = train(engine, 6)
    (curve,) = recorder_of(engine).result().curves
    assert curve.steps == tuple(range(6))
    assert curve.lrs == pytest.approx([0.001 * (1 + k) for k in range(6)])
    assert curve.losses == pytest.approx(losses)
    assert curve.rate == 5


def test_a_test_that_grows_by_powers_is_recorded_as_one(tmp_path: Path) -> None:
    redline = {"range_test": {"output_dir": str(tmp_path / "record"), "growth": "exponential"}}
    engine = initialize(nn.Linear(4, 1), make_config(redline=redline), device="cpu")
    drop_recorder(engine)
    train(engine, 11)
    (curve,) = recorder_of(engine).result().curves
    assert (curve.name, curve.kind, curve.rate) == ("rate 5, exponential", "exponential", 5.0)
    assert [curve.lrs[k] for k in (0, 5, 10)] == pytest.approx([0.001, 0.006, 0.036])


def test_steps_that_the_loss_scaler_skipped_are_marked(tmp_path: Path) -> None:
    redline = {"range_test": {"output_dir": str(tmp_path / "record")}}
    fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    engine = initialize(nn.Linear(4, 1), make_config(redline=redline, fp16=fp16), device="cpu")
    drop_recorder(engine)
    x = torch.ones(4, 4)
    for _ in range(20):
        engine.backward(100 * engine(x).float().square().mean())
        engine.step()
    (curve,) = recorder_of(engine).result().curves
    assert engine.skipped_steps == len(curve.skipped) > 5
    assert curve.skipped[:5] == (0, 1, 2, 3, 4)
    assert set(curve.lrs[:6]) == {0.001}


def test_validation_losses_are_recorded_if_the_script_gives_them(engine: Engine) -> None:
    engine.record_validation(2.0)
    train(engine, 3)
    engine.record_validation(torch.tensor(1.0))
    assert recorder_of(engine).result().curves[0].validation == ((0, 2.0), (3, 1.0))


def test_the_record_is_saved_every_so_often(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SAVE_EVERY", 10)
    recorder_of(engine).close()  # a run without a step writes nothing
    train(engine, 9)
    assert not (tmp_path / "record").exists()
    train(engine, 5)
    assert len(RangeTestResult.load(tmp_path / "record").curves[0].losses) == 10


def test_earlier_results_are_replaced_with_a_warning(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "record").mkdir(exist_ok=True)
    (tmp_path / "record" / "one_cycle.json").write_text("{}")
    train(engine, 3)
    assert [line for line in caplog.messages if "holds earlier results, which this run replaces" in line] != []


def test_a_folder_that_cannot_be_written_costs_the_record_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "SAVE_EVERY", 10)
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "record"
    engine = initialize(nn.Linear(4, 1), make_config(str(folder)), device="cpu")
    with caplog.at_level(logging.WARNING, logger="redline"):
        train(engine, 25)
        recorder_of(engine).close()
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [f"range test: the record could not be written to {folder}: Not a directory"] * 3


def test_other_ranks_keep_no_file(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SAVE_EVERY", 10)
    monkeypatch.setattr(recorder_of(engine), "_world", World(1, 1, 1, torch.device("cpu")))
    train(engine, 30)
    assert not (tmp_path / "record").exists()
    assert recorder_of(engine)._unread == []


def test_the_suggested_config_trains(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    for _ in range(60):
        engine.backward(nn.functional.mse_loss(engine(x), x.sum(1, keepdim=True)))
        engine.step()
    recorder_of(engine).close()
    config = json.loads((tmp_path / "record" / "one_cycle.json").read_text())
    assert config["scheduler"]["type"] == "OneCycle"
    cycle = initialize(nn.Linear(4, 1), tmp_path / "record" / "one_cycle.json", device="cpu")
    assert type(cycle.lr_scheduler).__name__ == "OneCycle"
    assert recorder_of(cycle) is None
    train(cycle, 2)
