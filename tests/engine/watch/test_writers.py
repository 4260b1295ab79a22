"""Where points go: the real packages, read back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engine import EngineError, initialize
from engine.config import load_config
from engine.config.sections.records import CometConfig, CsvMonitorConfig, TensorBoardConfig, WandbConfig
from engine.watch.monitor import Point
from engine.watch.writers import CometWriter, CsvWriter, TensorBoardWriter, WandbWriter, wants_writers
from tests.monitors import offline_comet, offline_wandb, read_comet, read_tensorboard

POINTS = [
    Point("Train/Samples/train_loss", 0.5, 4),
    Point("Train/Samples/lr", 0.01, 4),
    Point("Train/Samples/train_loss", 0.25, 8),
    Point("Train/Samples/lr", 0.02, 8),
]


def test_csv_files_are_named_and_headed_as_deepspeeds(tmp_path: Path) -> None:
    writer = CsvWriter(CsvMonitorConfig(enabled=True, output_path=str(tmp_path), job_name="job"))
    writer.write(POINTS)
    writer.close()
    assert {path.name: path.read_text() for path in (tmp_path / "job").iterdir()} == {
        "Train_Samples_train_loss.csv": "step,train_loss\n4,0.5\n8,0.25\n",
        "Train_Samples_lr.csv": "step,lr\n4,0.01\n8,0.02\n",
    }


def test_a_second_start_goes_on_in_the_same_csv_files(tmp_path: Path) -> None:
    config = CsvMonitorConfig(enabled=True, output_path=str(tmp_path))
    CsvWriter(config).write(POINTS[:2])
    CsvWriter(config).write(POINTS[2:])
    assert (tmp_path / "DeepSpeedJobName" / "Train_Samples_lr.csv").read_text() == "step,lr\n4,0.01\n8,0.02\n"


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="csv_monitor: cannot write to"):
        CsvWriter(CsvMonitorConfig(enabled=True, output_path=str(tmp_path / "file")))


def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    writer = TensorBoardWriter(TensorBoardConfig(enabled=True, output_path=str(tmp_path), job_name="job"))
    writer.write(POINTS)
    writer.close()
    events = read_tensorboard(tmp_path / "job")
    tags = events.Tags()["scalars"]
    assert {tag: [(each.step, round(each.value, 6)) for each in events.Scalars(tag)] for tag in tags} == {
        "Train/Samples/train_loss": [(4, 0.5), (8, 0.25)],
        "Train/Samples/lr": [(4, 0.01), (8, 0.02)],
    }


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_run_of_wandb_has_the_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = offline_wandb(tmp_path, monkeypatch)
    writer = WandbWriter(WandbConfig(enabled=True, project="ours", group="first"))
    run = wandb.run
    assert (run.project, run.group) == ("ours", "first")
    writer.write(POINTS[:2])
    writer.write([*POINTS[2:], Point("Train/Samples/lr", 0.0375, 12)])  # which completes the step before it
    assert {name: run.summary[name] for name in ("Train/Samples/train_loss", "Train/Samples/lr", "_step")} == {
        "Train/Samples/train_loss": 0.25,
        "Train/Samples/lr": 0.02,
        "_step": 8,
    }
    writer.close()
    assert wandb.run is None
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"0.0375" in path.read_bytes()


@pytest.mark.filterwarnings("ignore")  # comet's own
def test_an_offline_experiment_of_comet_has_the_points_thinned_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_comet(tmp_path, monkeypatch)
    config = CometConfig(enabled=True, online=False, project="ours", experiment_name="first", samples_log_interval=8)
    writer = CometWriter(config)
    writer.write([*POINTS, Point("Train/Samples/lr", 0.03, 12)])
    writer.close()
    metrics = [metric for metric in read_comet(tmp_path) if "Train" in metric["metricName"]]
    ours = [(metric["metricName"], float(metric["metricValue"]), metric["step"]) for metric in metrics]
    assert ours == [
        ("Train/Samples/train_loss", 0.5, 4),
        ("Train/Samples/lr", 0.01, 4),
        ("Train/Samples/lr", 0.03, 12),
    ]


@pytest.mark.parametrize(
    ("section", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")]
)
def test_a_missing_package_is_an_error_with_its_remedy(
    section: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name))
    config: dict[str, Any] = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, section: {"enabled": True}}
    with pytest.raises(EngineError, match=rf"^{section}: it needs {package}; .*`pip install 'redline\[{section}\]'`"):
        initialize(nn.Linear(4, 1), config, device="cpu")
    config[section] = {"enabled": False}
    initialize(nn.Linear(4, 1), config, device="cpu")


def test_a_section_that_is_not_enabled_wants_no_writer() -> None:
    assert not wants_writers(load_config({"train_batch_size": 4, "wandb": {"project": "x"}, "csv_monitor": None}))
    assert wants_writers(load_config({"train_batch_size": 4, "csv_monitor": {"enabled": True}}))
