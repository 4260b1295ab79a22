"""A process that dies, stops, leaves or disagrees ends the others, with a message and within a bounded time.

All trials run at once, each with three or four processes of its own, forked from one that has imported torch: most of
their time is waiting. Those in which the others find out by waiting are long.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from redline import initialize
from redline.distributed import failure
from redline.distributed.failure import explains_failures, name_ranks
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[3]

SCRIPT = '''
import gc, json, os, random, signal, socket, sys, time
from contextlib import suppress
import torch
from torch import nn
from redline import initialize

torch.set_num_threads(1)

FOLDER, TRIALS = sys.argv[1], json.loads(sys.argv[2])  # what happens, to which rank

class Fate(torch.autograd.Function):
    """Stands in the model; strikes within the third update's backward."""

    @staticmethod
    def forward(ctx, x, strike):
        ctx.strike = strike
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.strike()
        return gradient, None

class Model(nn.Module):
    def __init__(self, width, strike):
        super().__init__()
        self.first, self.last, self.strike = nn.Linear(4, width), nn.Linear(width, 1), strike

    def forward(self, x):
        return self.last(Fate.apply(self.first(x), self.strike))

def train(trial, rank, victim):
    struck = trial if rank == victim else ""
    global engine
    update = 0
    def strike():
        if update == 2 and struck.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if update == 2 and struck.startswith("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
    model = Model(9 if struck == "model" else 8, strike)
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
              "redline": {"distributed_timeout": WAIT}}
    data = torch.utils.data.TensorDataset(torch.randn(60 if struck != "data" else 66, 4))
    if struck == "left out":
        os._exit(0)
    engine = initialize(model, config, training_data=data, device="cpu")
    for (x,) in engine.training_dataloader:
        if update == 2 and struck.startswith("raises"):
            raise ValueError("sample 17 is broken")
        if update == 2 and struck == "fewer":
            break
        if update == 2 and struck == "saves alone":
            engine.save_checkpoint(f"{FOLDER}/saved alone")
        engine.backward(engine(x).square().mean())
        engine.step()
        update += 1

def child(trial, rank, size, victim, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(f"{FOLDER}/{trial}.{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    train(trial, rank, victim)

def free_port():
    """One that no connection of another trial is given by chance before it is used."""
    while True:
        port = random.randrange(10000, 30000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port

def main():
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    initialize(nn.Linear(1, 1), config, device="cpu")  # imports what the children need
    gc.freeze()  # else each child looks through all of it as it ends
    pids = {}
    for trial, victim in TRIALS.items():
        port = free_port()
        size = 4 if trial == "killed" else 3  # of four, one has no connection to the lost one
        for rank in range(size):
            pid = os.fork()
            if not pid:
                return child(trial, rank, size, victim, port)
            pids[pid] = (trial, rank)
    begin, ends = time.monotonic(), {}
    while pids and time.monotonic() < begin + 500:  # of those that wait for good; a busy machine takes its time
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                trial, rank = pids.pop(pid)
                ends[f"{trial}.{rank}"] = os.waitstatus_to_exitcode(status)
        stopped = [pid for pid, (trial, rank) in pids.items() if "stopped" in trial and rank == TRIALS[trial]]
        if len(stopped) == len(pids):  # the others of each have ended
            [os.kill(pid, signal.SIGKILL) for pid in stopped]
        time.sleep(0.05)
    for pid, (trial, rank) in pids.items():
        ends[f"{trial}.{rank}"] = "did not end"
        os.kill(pid, signal.SIGKILL)
    json.dump(ends, open(f"{FOLDER}/ends.json", "w"))

main()
'''


VICTIMS = {"killed": 3, "raises": 1, "fewer": 1, "model": 2, "data": 2}
LONG = {"killed zero": 0, "raises zero": 0, "stopped": 1, "stopped zero": 0, "left out": 2, "saves alone": 1}
WAIT = 15  # seconds that a rank waits for the others


def run_trials(folder: Path, victims: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Of each trial, each rank's exit code and output."""
    (folder / "trials.py").write_text(SCRIPT.replace("WAIT", str(WAIT)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "trials.py"), str(folder), json.dumps(victims)]
    subprocess.run(command, env=environment, check=True, timeout=600)
    found: dict[str, list[dict[str, Any]]] = {}
    for key, code in sorted(json.loads((folder / "ends.json").read_text()).items()):
        trial, _, rank = key.partition(".")
        said = re.sub(r"(?m)^\[rank\d\]: ", "", (folder / f"{key}.log").read_text())  # how torch marks a traceback
        found.setdefault(trial, []).append({"rank": int(rank), "code": code, "said": said})
    return found


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_trials(tmp_path_factory.mktemp("trials"), VICTIMS)


@pytest.fixture(scope="module")
def long_trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_trials(tmp_path_factory.mktemp("long trials"), LONG)


GONE = "no answer: it has died, was stopped, or is unreachable or busy; see its output for the cause; restart all "
WAITED = f" after {WAIT} s of waiting (redline.distributed_timeout)"
LEFT = "step 2: lost contact: rank {} exited after 2 steps: ValueError: sample 17 is broken; see its output"


def check(trial: list[dict[str, Any]], victim: int, message: str, *, all_know: bool = True) -> None:
    others = [rank for rank in trial if rank["rank"] != victim]
    assert {rank["code"] for rank in others} == {1}, others
    for rank in others if all_know else others[:1]:
        assert message in rank["said"], rank["said"]


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ("killed", f"EngineError: step 2: lost rank 3: {GONE}"),
        ("raises", f"EngineError: {LEFT.format(1)}"),
        ("fewer", "EngineError: step 2: lost contact: rank 1 ended its script after 2 steps; all need"),
    ],
)
def test_a_lost_process_ends_the_others_with_its_name(
    trial: str, message: str, trials: dict[str, list[dict[str, Any]]]
) -> None:
    check(trials[trial], VICTIMS[trial], message)


@pytest.mark.long
@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (
            "killed zero",
            "EngineError: step 2: lost rank 0, and the store with it: it has died or exited, or is unreachable",
        ),
        ("raises zero", f"EngineError: {LEFT.format(0)}"),
        ("stopped", f"EngineError: step 2: lost rank 1{WAITED}: {GONE}"),
        ("stopped zero", f"EngineError: step 2: lost rank 0{WAITED}, and the store with it: it has died or exited"),
        ("left out", "EngineError: process group: rank 0 of 3 did not meet the others at 127.0.0.1:"),
    ],
)
def test_a_process_that_answers_no_more_ends_the_others_with_its_name(
    trial: str, message: str, long_trials: dict[str, list[dict[str, Any]]]
) -> None:
    check(long_trials[trial], LONG[trial], message, all_know=trial != "left out")


@pytest.mark.long
def test_a_save_that_one_rank_alone_has_called_is_named_as_that(
    long_trials: dict[str, list[dict[str, Any]]],
) -> None:
    for rank in long_trials["saves alone"]:
        assert rank["code"] == 1
        assert (
            "though all ranks are alive: ranks 0, 2 called backward, rank 1 called save_checkpoint; all need the same "
            "number of micro-batches, and must make the same calls in the same order"
        ) in rank["said"]


def test_models_that_differ_are_named_on_every_rank(trials: dict[str, list[dict[str, Any]]]) -> None:
    for rank in trials["model"]:
        assert rank["code"] == 1
        assert (
            "EngineError: model: expected one model on all ranks, got\n"
            "  first.weight: float32 [8, 4] on ranks 0-1; float32 [9, 4] on rank 2\n"
            "  first.bias: float32 [8] on ranks 0-1; float32 [9] on rank 2\n"
            "  last.weight: float32 [1, 8] on ranks 0-1; float32 [1, 9] on rank 2\n"
        ) in rank["said"]


def test_data_of_different_lengths_is_named_on_every_rank(trials: dict[str, list[dict[str, Any]]]) -> None:
    for rank in trials["data"]:
        assert rank["code"] == 1
        said = "EngineError: training_data: got 60 samples on ranks 0-1; 66 samples on rank 2; expected one dataset on"
        assert said in rank["said"]


def raise_own_errors() -> list[str]:
    initialize(torch.nn.Linear(1, 1), {"train_micro_batch_size_per_gpu": 1}, device="cpu")
    caught = []
    for text in ("mat1 and mat2 shapes cannot be multiplied", "gloo is not built for Windows"):

        @explains_failures
        def fail(text: str = text) -> None:
            raise RuntimeError(text)

        try:
            fail()
        except RuntimeError as error:
            caught.append(f"{type(error).__name__}: {error}")
    return caught


def test_an_error_that_is_not_torch_distributeds_stays_what_it_is() -> None:
    for caught in run_ranks(raise_own_errors, 2):
        assert caught == [
            "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
            "RuntimeError: gloo is not built for Windows",
        ]


def test_ranks_are_named_in_runs() -> None:
    assert [name_ranks(ranks) for ranks in ([0], [1, 3, 4, 5], [0, 1])] == ["rank 0", "ranks 1, 3-5", "ranks 0-1"]


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_others_name_the_rank_that_is_lost_wherever_it_was(size: int) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "dev" / "blame.py"), "--part", "--ranks", str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
        (TimeoutError("timed out"), True),
        (OSError(errno.EHOSTUNREACH, "no route to host"), True),
    ],
)
def test_only_a_refusal_says_that_one_rank_of_a_host_has_ended(
    monkeypatch: pytest.MonkeyPatch, error: OSError, answers: bool
) -> None:
    def connect(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    assert failure._answers("10.0.0.1", 1234) is answers
