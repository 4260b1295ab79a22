"""What is written down about every update: complete, in batches, by rank zero alone, whatever ends the run."""

from __future__ import annotations

import atexit
import csv
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Engine, initialize, run_range_test
from engine.distributed import World
from engine.watch import monitor
from engine.watch.monitor import Monitor, Point
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[3]
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(16, 1)


class Kept:
    """A writer that keeps what it gets, batch by batch."""

    name = "kept"

    def __init__(self) -> None:
        self.batches: list[list[Point]] = []
        self.shown: list[Any] = []
        self.closed = 0

    def write(self, points: list[Point]) -> None:
        self.batches.append(points)

    def show(self, record: Any) -> None:
        self.shown.append(record)

    def close(self) -> None:
        self.closed += 1

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(p.samples, p.value) for batch in self.batches for p in batch if p.name == f"Train/Samples/{name}"]


def make_engine(**config: Any) -> Engine:
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, **config}
    return initialize(nn.Linear(4, 1), config, device="cpu")


def watched(**config: Any) -> tuple[Engine, Monitor, Kept]:
    engine, kept = make_engine(**config), Kept()
    each = Monitor(engine.world, [kept])
    engine.observers.insert(0, each)
    return engine, each, kept


def train(engine: Engine, micro_steps: int) -> list[float]:
    losses = []
    for _ in range(micro_steps):
        losses.append(float(engine.backward(nn.functional.mse_loss(engine(X[:4]), Y[:4])).detach()))
        engine.step()
    return losses


def test_every_update_is_a_point_at_the_samples_so_far() -> None:
    schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine, each, kept = watched(gradient_accumulation_steps=2, scheduler=schedule)
    losses = train(engine, 6)
    each.close()
    updates = [one + other for one, other in zip(losses[::2], losses[1::2])]
    assert kept.series("train_loss") == [(8 * (n + 1), pytest.approx(loss)) for n, loss in enumerate(updates)]
    assert kept.series("lr") == [(8, 0.001), (16, 0.0005), (24, 0.00025)]
    assert [samples for samples, _ in kept.series("grad_norm")] == [8, 16, 24]
    assert kept.series("loss_scale") == []


def test_there_is_a_loss_scale_where_the_training_has_one() -> None:
    engine, each, kept = watched(fp16={"enabled": True, "loss_scale": 1024.0})
    train(engine, 1)
    each.close()
    assert kept.series("loss_scale") == [(4, 1024.0)]
    assert len(kept.series("grad_norm")) == 1


def test_a_tensor_rate_is_noted_as_it_is_at_its_update() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    engine = initialize(model, {"train_batch_size": 4}, optimizer=optimizer, device="cpu")
    kept = Kept()
    engine.observers.append(each := Monitor(engine.world, [kept]))
    for _ in range(2):
        train(engine, 1)
        optimizer.param_groups[0]["lr"].mul_(0.5)
    each.close()
    assert kept.series("lr") == [(4, 0.5), (8, 0.25)]


def test_points_are_written_in_batches() -> None:
    engine, each, kept = watched()
    train(engine, monitor.FLUSH_EVERY - 1)
    assert kept.batches == []
    train(engine, 2)
    assert len(kept.batches) == 1
    each.close()
    assert [len(kept.batches), len(kept.series("train_loss"))] == [2, monitor.FLUSH_EVERY + 1]


def test_points_are_written_with_each_line_of_progress() -> None:
    engine, each, kept = watched(steps_per_print=3)
    train(engine, 7)
    assert [batch[-1].samples for batch in kept.batches] == [12, 24]
    each.close()


def test_an_update_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, each, _ = watched()
    train(engine, 1)

    def refuse(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the hot path read a number")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__"):
            patch.setattr(Tensor, name, refuse)
        each.updated(engine)
    each.close()


def test_closing_twice_closes_once() -> None:
    engine, each, kept = watched()
    train(engine, 1)
    each.close()
    each.close()
    assert (len(kept.batches), kept.closed) == (1, 1)


def test_a_writer_that_fails_is_told_of_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Kept):
        name = "full"

        def write(self, points: list[Point]) -> None:
            raise OSError("no space left")

    engine, kept = make_engine(steps_per_print=1), Kept()
    engine.observers.append(each := Monitor(engine.world, [Full(), kept]))
    train(engine, 3)
    each.close()
    assert [message for message in caplog.messages if "full" in message] == [
        "full: no space left; nothing more is written there"
    ]
    assert len(kept.series("lr")) == 3


def test_a_range_test_writes_nothing_among_the_trainings_points_and_is_shown_once() -> None:
    engine, each, kept = watched()
    run_range_test(engine, (X, Y), nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
    train(engine, 1)
    each.close()
    assert [samples for samples, _ in kept.series("lr")] == [4]
    assert len(kept.shown) == 1


def test_the_times_of_a_breakdown_are_points_too(tmp_path: Path) -> None:
    files = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(csv_monitor=files, wall_clock_breakdown=True, steps_per_print=2)
    train(engine, 4)
    for name in ("forward", "backward", "step"):
        rows = (tmp_path / "job" / f"Train_Samples_elapsed_time_ms_{name}.csv").read_text().splitlines()
        assert [row.partition(",")[0] for row in rows] == ["step", "8", "16"]


# -- the end of a process ------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, signal
import torch
from torch import nn
from engine import initialize

config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"},
          "csv_monitor": {"enabled": True, "job_name": "job"}}
engine = initialize(nn.Linear(4, 1), config, device="cpu")
for update in range(53):
    if update == 52:
        ENDING
    engine.backward(engine(torch.full((4, 4), 1.0 + engine.global_rank)).square().mean())
    engine.step()
"""


def losses_after(folder: Path, ending: str) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    (folder / "train.py").write_text(SCRIPT.replace("ENDING", ending))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, env=environment, timeout=90
    )
    with (folder / "job" / "Train_Samples_train_loss.csv").open() as file:
        return list(csv.reader(file))[1:], done


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("raise RuntimeError('planted')", 1),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("sys.exit(3)", 3),
    ],
    ids=["exception", "Ctrl-C", "exit"],
)
def test_nothing_is_lost_however_a_run_ends(tmp_path: Path, ending: str, code: int) -> None:
    rows, done = losses_after(tmp_path, ending)
    assert done.returncode == code, done.stderr
    assert [int(samples) for samples, _ in rows] == [4 * (n + 1) for n in range(52)]


def last_points(folder: str, who_fails: int | None) -> list[str]:
    """Three updates on two ranks, then the end without a flush; what the log says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine").addHandler(handler)
    files = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = make_engine(csv_monitor=files)
    rank = engine.global_rank
    for _ in range(3):
        engine.backward(engine(torch.full((4, 4), 1.0 + rank)).square().mean())
        engine.step()
    losses = [float(loss) for loss in [engine.loss] if loss is not None]
    torch.distributed.destroy_process_group()  # as scripts do at their end: no collective is to be had
    each = next(each for each in engine.observers if isinstance(each, Monitor))
    if rank == who_fails:
        atexit.unregister(each.close)
    else:
        each.close()
    return [json.dumps(losses), *said]


def read(folder: Path) -> list[float]:
    with (folder / "job" / "Train_Samples_train_loss.csv").open() as file:
        return [float(loss) for _, loss in list(csv.reader(file))[1:]]


def test_the_last_losses_are_means_over_the_ranks_without_a_collective(tmp_path: Path) -> None:
    (first, *said), (second, *_) = run_ranks(last_points, 2, str(tmp_path), None)
    (one,), (other,) = json.loads(first), json.loads(second)
    assert one != other
    assert len(read(tmp_path)) == 3
    assert read(tmp_path)[-1] == pytest.approx((one + other) / 2)
    assert not any("monitors" in line for line in said)


def test_a_rank_that_says_nothing_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    (first, *said), _ = run_ranks(last_points, 2, str(tmp_path), 1)
    assert read(tmp_path)[-1] == pytest.approx(json.loads(first)[0])
    assert "monitors: the loss of the last 3 updates is rank 0's own, not the mean over the processes" in said


def written_by_ranks(folder: str) -> tuple[bool, list[float]]:
    files = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = make_engine(csv_monitor=files, steps_per_print=2)
    writes = next(each for each in engine.observers if isinstance(each, Monitor))._writers
    losses = []
    for _ in range(4):
        engine.backward(engine(torch.full((4, 4), 1.0 + engine.global_rank)).square().mean())
        engine.step()
        assert engine.loss is not None
        losses.append(float(engine.loss))
    return bool(writes), losses


def test_two_ranks_agree_on_the_mean_and_rank_zero_alone_writes(tmp_path: Path) -> None:
    (first, one), (second, other) = run_ranks(written_by_ranks, 2, str(tmp_path))
    assert (first, second) == (True, False)
    assert read(tmp_path) == pytest.approx([(a + b) / 2 for a, b in zip(one, other)])


def test_a_monitor_without_an_update_writes_nothing() -> None:
    kept = Kept()
    Monitor(World(0, 0, 1, torch.device("cpu")), [kept]).close()
    assert (kept.batches, kept.closed) == ([], 1)
