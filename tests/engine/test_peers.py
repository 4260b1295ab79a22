"""A process that dies, stops, leaves or disagrees ends the others, with a message and within a bounded time.

All trials run at once, each with three processes of its own, forked from one that has imported torch: most of their
time is waiting.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.peers import explains_losses, name_ranks

ROOT = Path(__file__).parents[2]

SCRIPT = '''
import gc, json, os, random, signal, socket, sys, time
from contextlib import suppress
import torch
from torch import nn
from engine import initialize

torch.set_num_threads(1)

TRIALS = {  # what happens, to which rank
    "killed": 1, "killed zero": 0, "raises": 1, "raises zero": 0, "fewer": 1, "stopped": 1, "stopped zero": 0,
    "model": 2, "data": 2, "left out": 2,
}

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
              "redline": {"distributed_timeout": 6}}
    data = torch.utils.data.TensorDataset(torch.randn(60 if struck != "data" else 66, 4))
    if struck == "left out":
        os._exit(0)
    engine = initialize(model, config, training_data=data, device="cpu")
    for (x,) in engine.training_dataloader:
        if update == 2 and struck.startswith("raises"):
            raise ValueError("sample 17 is broken")
        if update == 2 and struck == "fewer":
            break
        engine.backward(engine(x).square().mean())
        engine.step()
        update += 1

def child(trial, rank, victim, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    begin = time.monotonic()
    log = os.open(f"{folder}/{trial}.{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        train(trial, rank, victim)
    finally:
        with open(f"{folder}/{trial}.{rank}.seconds", "w") as file:
            file.write(str(time.monotonic() - begin))

def free_port():
    """One that no connection of another trial is given by chance before it is used."""
    while True:
        port = random.randrange(10000, 30000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port

def main(folder):
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    initialize(nn.Linear(1, 1), config, device="cpu")  # imports what the children need
    gc.freeze()  # else each child looks through all of it as it ends
    pids = {}
    for trial, victim in TRIALS.items():
        port = free_port()
        for rank in range(3):
            pid = os.fork()
            if not pid:
                return child(trial, rank, victim, port, folder)
            pids[pid] = (trial, rank)
    begin, ends = time.monotonic(), {}
    while pids and time.monotonic() < begin + 60:
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
    json.dump(ends, open(f"{folder}/ends.json", "w"))

main(sys.argv[1])
'''


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of each trial, each rank's exit code, output and seconds."""
    folder = tmp_path_factory.mktemp("trials")
    (folder / "trials.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "trials.py"), str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    found: dict[str, list[dict[str, Any]]] = {}
    for key, code in sorted(json.loads((folder / "ends.json").read_text()).items()):
        trial, _, rank = key.partition(".")
        seconds = folder / f"{key}.seconds"
        said = re.sub(r"(?m)^\[rank\d\]: ", "", (folder / f"{key}.log").read_text())  # how torch marks a traceback
        found.setdefault(trial, []).append(
            {
                "rank": int(rank),
                "code": code,
                "said": said,
                "seconds": float(seconds.read_text()) if seconds.exists() else None,
            }
        )
    return found


GONE = "no answer: it has died, was stopped, or is cut off or busy elsewhere; what it printed may say more; start all "
WAITED = " after 6 s of waiting (redline.distributed_timeout)"
LEFT = "update 2: lost contact: rank {} has left after 2 updates: ValueError: sample 17 is broken; what it printed"


@pytest.mark.parametrize(
    ("trial", "victim", "message"),
    [
        ("killed", 1, f"EngineError: update 2: lost rank 1: {GONE}"),
        ("killed zero", 0, "EngineError: update 2: lost rank 0, and the store with it: it has died or left, or is cut"),
        ("raises", 1, f"EngineError: {LEFT.format(1)}"),
        ("raises zero", 0, f"EngineError: {LEFT.format(0)}"),
        ("fewer", 1, "EngineError: update 2: lost contact: rank 1 ended its script after 2 updates; all need"),
        ("stopped", 1, f"EngineError: update 2: lost rank 1{WAITED}: {GONE}"),
        ("stopped zero", 0, f"EngineError: update 2: lost rank 0{WAITED}, and the store with it: it has died or left"),
        ("left out", 2, "EngineError: process group: rank 0 of 3 did not meet the others at 127.0.0.1:"),
    ],
)  # fmt: skip
def test_a_lost_process_ends_the_others_with_its_name(
    trial: str, victim: int, message: str, trials: dict[str, list[dict[str, Any]]]
) -> None:
    others = [rank for rank in trials[trial] if rank["rank"] != victim]
    assert [rank["code"] for rank in others] == [1, 1], others
    for rank in others[:1] if trial == "left out" else others:
        assert message in rank["said"], rank["said"]
        assert rank["seconds"] < 30


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


def test_an_error_that_is_not_torch_distributeds_stays_what_it_is() -> None:
    @explains_losses
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fail()


def test_ranks_are_named_in_runs() -> None:
    assert [name_ranks(ranks) for ranks in ([0], [1, 3, 4, 5], [0, 1])] == ["rank 0", "ranks 1, 3-5", "ranks 0-1"]
