"""Ctrl-C and SIGTERM, really sent: at any moment there is a report of what is known, and the engine is restored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, Tuning, initialize, tune
from redline.cli import main
from redline.range_test.task import Task
from redline.tuning import Interrupted
from redline.tuning.api import Engines, Stop, run_tuning
from redline.tuning.budget import Request
from redline.tuning.result import load_tuning
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
COMMAND = ("tune", "task.py:task", "--config", "config.json", "--steps", "4000", "--out", "out")
FILES = ("tune.json", "tune.csv", "tuned.json", "tune.png", "report.html")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a task that interrupts itself."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with task_folder(tmp_path, monkeypatch, TASK):
        yield tmp_path
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("at", "what", "code", "stage", "curves"),
    [
        (5, "SIGINT", 130, "range tests", ["sweep (broken off)"]),
        (80, "SIGINT", 130, "search", ["sweep"]),
        (80, "raise", None, "search", ["sweep"]),
        (340, "SIGTERM", 143, "trials", ["sweep"]),
    ],
)
def test_an_interruption_at_any_moment_leaves_a_report_of_what_is_known(
    at: int, what: str, code: int | None, stage: str, curves: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AT", str(at))
    monkeypatch.setenv("WHAT", what)
    if code is None:
        with pytest.raises(ValueError, match="the loss is at fault"):
            main([*COMMAND, "--quiet"])
    else:
        assert main([*COMMAND, "--quiet"]) == code
        assert "this is what is known so far" in capsys.readouterr().out
    tuning = load_tuning("out")
    assert tuning.stopped == f'by {what if code else "ValueError"} in the stage "{stage}"'
    assert [curve.name for curve in tuning.test.curves] == curves
    assert tuning.updates == (at if code else at - 1)
    assert bool(tuning.search) == (stage != "range tests"), "part of a trial is no trial"
    assert all(trial.diverged or len(trial.curve.losses) == trial.steps for trial in tuning.search)
    assert (folder / "out" / "report.html").exists()
    # From the first trial on there is a config.
    assert (tuning.refusal is None) == (folder / "out" / "tuned.json").exists() == (stage != "range tests")


def test_a_loss_that_raises_at_once_leaves_nothing_of_an_earlier_tuning(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "out").mkdir()
    for name in (*FILES, "mine.txt"):
        (folder / "out" / name).write_text("{}")
    monkeypatch.setenv("AT", "1")
    monkeypatch.setenv("WHAT", "raise")
    with pytest.raises(ValueError, match="the loss is at fault"):
        main([*COMMAND, "--quiet", "--force"])
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


class Script:
    """A script that tunes, and does something in the loss at a call."""

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        self.engine: Engine = initialize(nn.Linear(4, 1), CONFIG, device="cpu")
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        self.data, self.at, self.act, self.calls = (x, x.sum(1, keepdim=True)), at, act, 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def tune(self) -> Tuning:
        return tune(self.engine, self.data, self.loss, steps=4000, progress=False)

    def tune_impatiently(self, out: Path, *, validates: bool = False) -> Tuning:
        task = Task(self.engine.module, self.data, self.loss, self.data if validates else None)
        engines = Engines(lambda seed: (self.engine, task), per_seed=False)
        with Stop(patience=0.2) as stop:
            return run_tuning(engines, Request(4000), stop, out=out, force=True, progress=False)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def wait_until(done: Callable[[], bool]) -> bool:
    begin = time.monotonic()
    while not done() and time.monotonic() - begin < 10:
        time.sleep(0.02)
    return done()


@pytest.mark.parametrize("at", [1, 30, 100])
def test_an_interrupted_engine_is_as_it_was_before(at: int) -> None:
    script = Script(at, interrupt)
    engine = script.engine
    weights, numbers = [each.clone() for each in engine.parameters()], torch.get_rng_state()
    with pytest.raises(Interrupted) as caught:
        script.tune()
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.signal == signal.SIGINT
    assert caught.value.tuning.updates == at
    assert all(torch.equal(one, other) for one, other in zip(weights, engine.parameters()))
    assert torch.equal(numbers, torch.get_rng_state())
    assert engine.global_steps == 0 and engine.lr_scheduler is None


def test_a_second_ctrl_c_ends_at_once() -> None:
    def act() -> None:
        interrupt()
        time.sleep(1.1)
        interrupt()
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt) as caught:
        Script(5, act).tune()
    assert not isinstance(caught.value, Interrupted)


@pytest.mark.parametrize("lasts", [False, True], ids=["short", "longer than its report waits"])
def test_a_signal_during_the_last_validation_is_raised_with_the_complete_tuning(lasts: bool, tmp_path: Path) -> None:
    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if lasts:
            wait_until((tmp_path / "report.html").exists)

    torch.manual_seed(0)
    script = Script(-1, act)
    complete = script.tune_impatiently(tmp_path, validates=True)
    torch.manual_seed(0)
    script = Script(script.calls, act)
    with pytest.raises(Interrupted, match="after the last step") as caught:
        script.tune_impatiently(tmp_path, validates=True)
    assert caught.value.signal == signal.SIGTERM
    assert replace(caught.value.tuning, seconds=complete.seconds) == complete
    assert load_tuning(tmp_path).stopped is None
    if lasts:
        assert "Tuning (interrupted)" not in (tmp_path / "report.html").read_text()


def test_a_signal_while_curves_are_sent_to_monitors_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redline.tuning.api.publish", lambda *_: interrupt())
    with pytest.raises(Interrupted) as caught:
        Script(-1, interrupt).tune()
    assert caught.value.tuning.stopped is None


def test_a_step_that_ends_after_the_report_was_made_without_it_is_counted_once(tmp_path: Path) -> None:
    late: list[bool] = []

    def act() -> None:
        interrupt()
        late.append(wait_until((tmp_path / "report.html").exists))

    with pytest.raises(Interrupted) as caught:
        Script(5, act).tune_impatiently(tmp_path)
    assert late == [True]
    curves = caught.value.tuning.test.curves
    assert [(curve.name, len(curve.losses)) for curve in curves] == [("sweep (broken off)", 5)]
    assert load_tuning(tmp_path).test.curves == curves


def test_ctrl_c_to_all_of_torchrun_leaves_the_report_of_rank_0_in_time(folder: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "redline")
    process = subprocess.Popen(
        [sys.executable, "-m", *torchrun, *COMMAND], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NAP": "0.01"}, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        logged = ""
        while "20%  " not in logged and (line := process.stderr.readline()):
            logged += line
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun kills what is left after 30 seconds
        _, rest = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tuning = load_tuning("out")
    assert tuning.stopped is not None and tuning.stopped.startswith("by SIG"), logged + rest
    assert tuning.test.curves[0].losses
    assert (folder / "out" / "report.html").exists()
