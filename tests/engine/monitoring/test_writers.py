"""Metrics of every step: complete, in batches, by rank 0 alone, however the run ends; read back by the packages."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, EngineError, initialize, run_range_test
from redline.config.sections import CometConfig, TensorBoardConfig, WandbConfig
from redline.monitoring import metrics
from redline.monitoring.metrics import MetricsLogger
from redline.monitoring.writers import CometWriter, CsvWriter, Scalar, TensorBoardWriter, WandbWriter
from tests.callbacks import find
from tests.distributed import run_ranks
from tests.monitors import offline_comet, offline_wandb, read_comet, read_tensorboard
from tests.tiny import X, Y, listen, make_engine, train

ROOT = Path(__file__).parents[3]


class Kept:
    """A writer that keeps what it gets, batch by batch."""

    name = "kept"

    def __init__(self) -> None:
        self.batches: list[list[Scalar]] = []
        self.reports: list[Any] = []
        self.closed = 0
        self.replaced: list[int] = []

    def replace_after(self, samples: int) -> None:
        self.replaced.append(samples)

    def write(self, scalars: list[Scalar]) -> None:
        self.batches.append(scalars)

    def write_report(self, report: Any) -> None:
        self.reports.append(report)

    def close(self) -> None:
        self.closed += 1

    def series(self, name: str) -> list[tuple[int, float]]:
        scalars = [scalar for batch in self.batches for scalar in batch if scalar.name == f"Train/Samples/{name}"]
        return [(scalar.samples, scalar.value) for scalar in scalars]


def attached(engine: Engine) -> tuple[Engine, MetricsLogger, Kept]:
    kept = Kept()
    logger = MetricsLogger(engine.world, [kept])
    engine.callbacks.insert(0, logger)
    return engine, logger, kept


def test_every_step_has_its_metrics_at_the_samples_so_far() -> None:
    schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine, logger, kept = attached(make_engine(gradient_accumulation_steps=2, scheduler=schedule))
    losses = train(engine, 6)
    logger.close()
    steps = [one + other for one, other in zip(losses[::2], losses[1::2])]
    assert kept.series("train_loss") == [(8 * (n + 1), pytest.approx(loss)) for n, loss in enumerate(steps)]
    assert kept.series("lr") == [(8, 0.001), (16, 0.0005), (24, 0.00025)]
    assert [samples for samples, _ in kept.series("grad_norm")] == [8, 16, 24]
    assert kept.series("loss_scale") == []


def test_there_is_a_loss_scale_where_the_training_has_one() -> None:
    engine, logger, kept = attached(make_engine(fp16={"enabled": True, "loss_scale": 1024.0}))
    train(engine, 1)
    logger.close()
    assert kept.series("loss_scale") == [(4, 1024.0)]
    assert len(kept.series("grad_norm")) == 1


def test_a_tensor_learning_rate_is_kept_as_it_is_at_its_step() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    engine, logger, kept = attached(initialize(model, {"train_batch_size": 4}, optimizer=optimizer, device="cpu"))
    for _ in range(2):
        train(engine, 1)
        optimizer.param_groups[0]["lr"].mul_(0.5)
    logger.close()
    assert kept.series("lr") == [(4, 0.5), (8, 0.25)]


def test_they_are_written_in_batches_with_each_progress_line_and_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    engine, logger, kept = attached(make_engine())
    train(engine, metrics.FLUSH_EVERY - 1)
    assert kept.batches == []
    train(engine, 2)
    assert len(kept.batches) == 1
    engine.steps_per_print = 3
    train(engine, 4)
    assert [batch[-1].samples for batch in kept.batches] == [200, 216]
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    assert kept.batches[-1][-1].samples == 224
    train(engine, 1)
    logger.close()
    logger.close()
    assert len(kept.series("train_loss")) == metrics.FLUSH_EVERY + 7
    assert (len(kept.batches), kept.closed) == (4, 1)


def test_charts_of_a_resumed_run_have_each_step_once(tmp_path: Path) -> None:
    charts = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(csv_monitor=charts, steps_per_print=1)  # each step is written at once
    train(engine, 3)
    engine.save_checkpoint(tmp_path / "checkpoints")
    train(engine, 4)
    resumed = make_engine(csv_monitor=charts, steps_per_print=1)
    resumed.load_checkpoint(tmp_path / "checkpoints")
    train(resumed, 2)
    assert [samples for samples, _ in rows_in(tmp_path)] == [4, 8, 12, 16, 20]


def test_charts_of_a_run_that_was_killed_before_its_first_save_have_each_step_once(tmp_path: Path) -> None:
    charts = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    for steps in (3, 5):
        engine = make_engine(csv_monitor=charts, steps_per_print=1)
        engine.load_checkpoint(tmp_path / "checkpoints")
        train(engine, steps)
    assert [samples for samples, _ in rows_in(tmp_path)] == [4, 8, 12, 16, 20]
    earlier = (tmp_path / "job" / "Train_Samples_train_loss.csv.earlier").read_text()
    assert [line.partition(",")[0] for line in earlier.splitlines()] == ["step", "4", "8", "12"]


def test_a_load_replaces_what_was_kept_in_memory_and_tells_the_writers_with_the_next_step(tmp_path: Path) -> None:
    engine, logger, kept = attached(make_engine())
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    train(engine, 3)
    engine.load_checkpoint(tmp_path)
    logger.flush()
    assert kept.replaced == []  # a script that does not train leaves the charts alone
    train(engine, 1)
    logger.close()
    assert kept.replaced == [8]
    assert [samples for samples, _ in kept.series("train_loss")] == [4, 8, 12]


def test_loading_the_model_only_is_no_resume_and_leaves_the_charts_alone(tmp_path: Path) -> None:
    make_engine().save_checkpoint(tmp_path)
    engine, logger, kept = attached(make_engine())
    engine.load_checkpoint(tmp_path, load_module_only=True)
    train(engine, 1)
    logger.close()
    assert kept.replaced == []


def test_a_step_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, logger, _ = attached(make_engine())
    train(engine, 1)

    def refuse(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the hot path read a number")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__"):
            patch.setattr(Tensor, name, refuse)
        logger.on_step(engine)
    logger.close()


def test_a_writer_that_fails_is_logged_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Kept):
        name = "full"

        def write(self, scalars: list[Scalar]) -> None:
            raise OSError("no space left")

    engine, kept = make_engine(steps_per_print=1), Kept()
    logger = MetricsLogger(engine.world, [Full(), kept])
    engine.callbacks.append(logger)
    train(engine, 3)
    logger.close()
    assert [message for message in caplog.messages if "full" in message] == [
        "full: no space left; nothing more is written there"
    ]
    assert len(kept.series("lr")) == 3


def test_a_range_test_writes_a_report_and_nothing_among_the_trainings_metrics() -> None:
    engine, logger, kept = attached(make_engine())
    run_range_test(engine, (X, Y), nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
    train(engine, 1)
    logger.close()
    assert [samples for samples, _ in kept.series("lr")] == [4]
    assert len(kept.reports) == 1


# -- the end of a process ------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, signal
import torch
from torch import nn
from redline import initialize

config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"},
          "csv_monitor": {"enabled": True, "job_name": "job"}}
engine = initialize(nn.Linear(4, 1), config, device="cpu")
for step in range(53):
    if step == 52:
        ENDING
    engine.backward(engine(torch.full((4, 4), 1.0 + engine.global_rank)).square().mean())
    engine.step()
"""


def rows_in(folder: Path) -> list[tuple[int, float]]:
    with (folder / "job" / "Train_Samples_train_loss.csv").open() as file:
        return [(int(samples), float(loss)) for samples, loss in list(csv.reader(file))[1:]]


@pytest.mark.parametrize(
    ("ending", "code"),
    [("raise RuntimeError('planted')", 1), ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT)],
    ids=["exception", "Ctrl-C"],
)
def test_nothing_is_lost_however_a_run_ends(tmp_path: Path, ending: str, code: int) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("ENDING", ending))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == code, done.stderr
    assert [samples for samples, _ in rows_in(tmp_path)] == [4 * (n + 1) for n in range(52)]


def on_a_rank(folder: str, who_fails: int | None) -> tuple[bool, list[float], list[str]]:
    """Five steps, written after every second, and an end without collectives; has writers, losses, log."""
    messages = listen()
    files = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = make_engine(csv_monitor=files, steps_per_print=2)
    logger = find(engine, MetricsLogger)
    has_writers = bool(logger._writers)
    losses = train(engine, 5)
    torch.distributed.destroy_process_group()  # as scripts do at their end
    if engine.global_rank == who_fails:
        logger._store = None  # it is gone
    logger.close()
    return has_writers, losses, [line for line in messages if "monitors" in line]


def test_losses_are_means_over_the_ranks_and_rank_0_alone_writes(tmp_path: Path) -> None:
    (first, one, messages), (second, other, _) = run_ranks(on_a_rank, 2, str(tmp_path), None)
    assert (first, second) == (True, False)
    assert one != other
    assert [loss for _, loss in rows_in(tmp_path)] == pytest.approx([(a + b) / 2 for a, b in zip(one, other)])
    assert messages == []


def test_a_rank_that_does_not_answer_at_the_end_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (_, losses, messages), _ = run_ranks(on_a_rank, 2, str(tmp_path), 1)
    assert rows_in(tmp_path)[-1][1] == pytest.approx(losses[-1])
    assert messages == ["monitors: the loss of the last 1 steps is rank 0's own, not the mean over the ranks"]


# -- the packages ----------------------------------------------------------------------------------------

POINTS = [
    Scalar("Train/Samples/train_loss", 0.5, 4),
    Scalar("Train/Samples/lr", 0.01, 4),
    Scalar("Train/Samples/train_loss", 0.25, 8),
    Scalar("Train/Samples/lr", 0.02, 8),
]


def test_csv_files_are_named_and_headed_as_deepspeeds_and_go_on_after_a_second_start(tmp_path: Path) -> None:
    for points in (POINTS[:2], POINTS[2:]):
        writer = CsvWriter(tmp_path / "job")
        writer.write(points)
        writer.close()
    assert {path.name: path.read_text() for path in (tmp_path / "job").iterdir()} == {
        "Train_Samples_train_loss.csv": "step,train_loss\n4,0.5\n8,0.25\n",
        "Train_Samples_lr.csv": "step,lr\n4,0.01\n8,0.02\n",
    }


def test_a_csv_file_of_a_resumed_run_loses_later_rows_and_one_that_a_kill_cut_off(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "job")
    writer.write(POINTS)
    path = tmp_path / "job" / "Train_Samples_lr.csv"
    for damage in ("12,0.03", "12,0.03\n16,0.0", "\x00\x00\n"):
        with path.open("a") as file:
            file.write(damage)
        writer.replace_after(8)
        assert path.read_text() == "step,lr\n4,0.01\n8,0.02\n"
    assert {each.name for each in path.parent.iterdir()} == {"Train_Samples_lr.csv", "Train_Samples_train_loss.csv"}


@pytest.mark.parametrize("section", ["csv_monitor", "tensorboard"])
def test_a_folder_that_cannot_be_made_is_an_error_before_training(section: str, tmp_path: Path) -> None:
    if section == "tensorboard":
        pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"monitors: cannot write to .*file"):
        make_engine(**{section: {"enabled": True, "output_path": str(tmp_path / "file")}})


def test_tensorboard_reads_the_event_files_and_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")

    def points(name: str) -> list[tuple[int, float]]:
        return [(each.step, round(each.value, 6)) for each in read_tensorboard(tmp_path / "job").Scalars(name)]

    config = TensorBoardConfig(enabled=True, output_path=str(tmp_path), job_name="job")
    first = TensorBoardWriter(config)
    first.write(POINTS)
    first.close()
    assert read_tensorboard(tmp_path / "job").Tags()["scalars"] == ["Train/Samples/train_loss", "Train/Samples/lr"]
    assert points("Train/Samples/lr") == [(4, 0.01), (8, 0.02)]
    assert points("Train/Samples/train_loss") == [(4, 0.5), (8, 0.25)]
    resumed = TensorBoardWriter(config)
    resumed.replace_after(4)
    resumed.write([Scalar("Train/Samples/train_loss", 0.75, 8)])
    resumed.close()
    assert points("Train/Samples/train_loss") == [(4, 0.5), (8, 0.75)]


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_run_of_wandb_has_the_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = offline_wandb(tmp_path, monkeypatch)
    writer = WandbWriter(WandbConfig(enabled=True, project="ours", group="first"))
    run = wandb.run
    assert (run.project, run.group) == ("ours", "first")
    writer.write(POINTS[:2])
    writer.write([*POINTS[2:], Scalar("Train/Samples/lr", 0.0375, 12)])  # which completes the step before it
    assert {name: run.summary[name] for name in ("Train/Samples/train_loss", "Train/Samples/lr", "_step")} == {
        "Train/Samples/train_loss": 0.25,
        "Train/Samples/lr": 0.02,
        "_step": 8,
    }
    other = WandbWriter(WandbConfig(enabled=True, project="ours"))  # of another engine, or of a cell that is run again
    other.write([Scalar("Train/Samples/lr", 0.0625, 4)])
    writer.write([Scalar("Train/Samples/lr", 0.03125, 16)])
    writer.close()
    other.close()
    assert wandb.run is None
    written = [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    assert [[b"0.0375" in each, b"0.03125" in each, b"0.0625" in each] for each in written] in (
        [[True, True, False], [False, False, True]], [[False, False, True], [True, True, False]],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # comet's own
def test_an_offline_experiment_of_comet_has_the_points_thinned_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offline_comet(tmp_path, monkeypatch)
    config = CometConfig(enabled=True, online=False, project="ours", experiment_name="first", samples_log_interval=8)
    writer = CometWriter(config)
    assert "share one experiment" not in caplog.text
    CometWriter(config)
    assert "comet: engines of this process share one experiment" in caplog.text
    writer.write([*POINTS, Scalar("Train/Samples/lr", 0.03, 12)])
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
