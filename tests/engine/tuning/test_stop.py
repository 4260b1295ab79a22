"""Ctrl-C and SIGTERM, really sent: at any moment there is a report of what is known, and the engine is as before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Engine, Tuning, initialize, tune
from engine.cli import main
from engine.tuning import Interrupted
from engine.tuning.api import Wishes, run_tuning
from engine.tuning.stand import OneEngine
from engine.tuning.stop import Stop
from engine.tuning.store import load_tuning
from tests.tasks import task_folder

ROOT = Path(__file__).parents[3]
TASK = """
import os, signal, time
import torch
from torch import nn

calls = 0

def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])

    def loss(model, batch):
        global calls
        calls += model.training
        time.sleep(float(os.environ.get("NAP", "0")))
        if calls == int(os.environ.get("AT", "-1")):
            if os.environ["WHAT"] == "raise":
                raise ValueError("the loss is at fault")
            os.kill(os.getpid(), getattr(signal, os.environ["WHAT"]))
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    return nn.Linear(4, 1), (x, y), loss, (x[:32], y[:32])
"""
CONFIG = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
WISHES = Wishes(
    steps=2000, budget=0.1, max_updates=None, seeds=1, batch_sizes=None, sweep=None, target_batch_size=None,
    target_processes=None,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a task that interrupts itself."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with task_folder(tmp_path, monkeypatch, TASK):
        yield tmp_path
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


COMMAND = ("tune", "task.py:task", "--config", "config.json", "--steps", "4000", "--out", "out")


@pytest.mark.parametrize(
    ("at", "what", "code", "stage", "curves"),
    [
        (5, "SIGINT", 130, "sweep", ["sweep (broken off)"]),
        (80, "SIGINT", 130, "linear tests", ["sweep", "slow (broken off)"]),
        (180, "SIGINT", 130, "search", ["sweep", "slow", "fast"]),
        (350, "SIGTERM", 143, "trials", ["sweep", "slow", "fast"]),
    ],
)
def test_a_signal_at_any_moment_leaves_a_report_of_what_is_known(
    at: int, what: str, code: int, stage: str, curves: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AT", str(at))
    monkeypatch.setenv("WHAT", what)
    assert main([*COMMAND, "--quiet"]) == code
    tuning = load_tuning("out")
    assert tuning.stopped == f'by {what} in the stage "{stage}"'
    assert [curve.name for curve in tuning.test.curves] == curves
    assert tuning.updates == at
    assert len(tuning.search) == {"search": 1, "trials": 5}.get(stage, 0), "a try that is broken off is none"
    assert (folder / "out" / "report.html").exists()
    assert "This is what is known so far" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["SIGINT", "raise"])
def test_what_the_sweep_suggests_is_kept_when_a_linear_test_is_broken_off(
    what: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("AT", "70")
    monkeypatch.setenv("WHAT", what)
    with contextlib.suppress(ValueError):
        main([*COMMAND, "--quiet"])
    tuning = load_tuning("out")
    assert [curve.name for curve in tuning.test.curves] == ["sweep", "slow (broken off)"]
    assert tuning.refusal is None
    assert (folder / "out" / "tuned.json").exists()


def test_a_loss_that_raises_leaves_a_report_and_its_own_traceback(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("AT", "80")
    monkeypatch.setenv("WHAT", "raise")
    with pytest.raises(ValueError, match="the loss is at fault"):
        main([*COMMAND, "--quiet"])
    tuning = load_tuning("out")
    assert tuning.stopped == 'by ValueError in the stage "linear tests"'
    assert [curve.name for curve in tuning.test.curves] == ["sweep", "slow (broken off)"]
    assert (folder / "out" / "report.html").exists()


def test_a_loss_that_raises_at_once_leaves_nothing_of_an_earlier_tuning(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "out").mkdir()
    for name in ("tune.json", "tune.csv", "tuned.json", "tune.png", "report.html", "mine.txt"):
        (folder / "out" / name).write_text("{}")
    monkeypatch.setenv("AT", "1")
    monkeypatch.setenv("WHAT", "raise")
    with pytest.raises(ValueError, match="the loss is at fault"):
        main([*COMMAND, "--quiet"])
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


def python_tune(engine: Engine, at: int, act: Callable[[], None], **arguments: Any) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            act()
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    tune(engine, (x, x.sum(1, keepdim=True)), loss, steps=2000, progress=False, **arguments)


@pytest.mark.parametrize("at", [1, 30, 100])
def test_an_interrupted_engine_is_as_it_was_before(at: int) -> None:
    engine = initialize(nn.Linear(4, 1), CONFIG, device="cpu")
    weights, numbers = [each.clone() for each in engine.parameters()], torch.get_rng_state()
    with pytest.raises(Interrupted) as caught:
        python_tune(engine, at, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert caught.value.signal == signal.SIGINT
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.tuning.updates == at
    assert all(torch.equal(one, other) for one, other in zip(weights, engine.parameters()))
    assert torch.equal(numbers, torch.get_rng_state())
    assert engine.global_steps == 0 and engine.lr_scheduler is None


def test_a_second_ctrl_c_ends_at_once() -> None:
    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    engine = initialize(nn.Linear(4, 1), CONFIG, device="cpu")
    with pytest.raises(KeyboardInterrupt) as caught:
        python_tune(engine, 5, act)
    assert not isinstance(caught.value, Interrupted)


def test_where_the_next_update_does_not_come_the_report_is_made_without_it() -> None:
    reported: list[int] = []
    with Stop(patience=0.2) as stop:
        stop.report = reported.append
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: bool(reported))
    assert reported == [signal.SIGINT]


@pytest.mark.parametrize("lasts", [False, True], ids=["short", "longer than its report waits"])
def test_a_signal_during_the_last_validation_is_raised_with_the_whole_tuning(lasts: bool, tmp_path: Path) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1, keepdim=True))
    calls, last = 0, -1

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGTERM)
            if lasts:
                wait_until(lambda: (tmp_path / "report.html").exists())
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def run() -> Tuning:
        engine = initialize(nn.Linear(4, 1), CONFIG, device="cpu")
        with Stop(patience=0.2) as stop:
            return run_tuning(OneEngine(engine, data, loss, data), WISHES, stop, out=tmp_path, progress=False)

    torch.manual_seed(0)
    whole = run()
    torch.manual_seed(0)
    calls, last = 0, calls
    with pytest.raises(Interrupted) as caught:
        run()
    assert caught.value.signal == signal.SIGTERM and "after the last update" in str(caught.value)
    assert replace(caught.value.tuning, seconds=whole.seconds) == whole
    assert load_tuning(tmp_path).stopped is None
    if lasts:
        assert "interrupted" not in (tmp_path / "report.html").read_text().lower()


def test_a_signal_while_monitors_are_told_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.tuning.api.publish", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    engine = initialize(nn.Linear(4, 1), CONFIG, device="cpu")
    with pytest.raises(Interrupted) as caught:
        python_tune(engine, -1, lambda: None)
    assert caught.value.tuning.stopped is None


def test_an_update_that_comes_after_the_report_was_made_without_it_is_reported_once(tmp_path: Path) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    engine = initialize(nn.Linear(4, 1), CONFIG, device="cpu")
    late: list[bool] = []
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
            late.append(wait_until(lambda: (tmp_path / "report.html").exists()))
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    with Stop(patience=0.2) as stop, pytest.raises(Interrupted) as caught:
        stand = OneEngine(engine, (x, x.sum(1, keepdim=True)), loss, None)
        run_tuning(stand, WISHES, stop, out=tmp_path, progress=False)
    assert late == [True]
    tuning = caught.value.tuning
    assert [(curve.name, len(curve.losses)) for curve in tuning.test.curves] == [("sweep (broken off)", 5)]
    assert load_tuning(tmp_path).test.curves == tuning.test.curves


def wait_until(done: Callable[[], bool]) -> bool:
    begin = time.monotonic()
    while not done() and time.monotonic() - begin < 10:
        time.sleep(0.02)
    return done()


def launch(*command: str, **environment: str) -> subprocess.Popen[str]:
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | path | environment,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read what a process says until it says this."""
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if text in line:
            return said
    pytest.fail(f"{text!r} was never said, but:\n{said}")


def test_ctrl_c_to_all_of_torchrun_leaves_rank_zeros_report_in_time(folder: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "engine")
    process = launch(*torchrun, *COMMAND, NAP="0.01")
    try:
        said = wait_for(process, "20%  ")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun kills what is left after 30 seconds
        _, rest = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tuning = load_tuning("out")
    assert tuning.stopped is not None and tuning.stopped.startswith("by SIG"), said + rest
    assert tuning.test.curves[0].losses
    assert (folder / "out" / "report.html").exists()
