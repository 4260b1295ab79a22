"""`redline run`: what it makes of the flags of `deepspeed` and torchrun, and one run in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from redline.cli import main

ROOT = Path(__file__).parents[3]
SCRIPT = """
import argparse, json, multiprocessing, os, sys

import torch
import deepspeed

def child(queue):
    import deepspeed
    queue.put(deepspeed.__redline__)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    engine, optimizer, _, _ = deepspeed.initialize(args=arguments, model=torch.nn.Linear(2, 2))
    loss = engine(torch.ones(2, 2)).sum()
    engine.backward(loss)
    engine.step()
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    worker = spawn.Process(target=child, args=(queue,))
    worker.start()
    found = {"rank": arguments.local_rank, "ranks": engine.world_size, "steps": engine.global_steps,
             "version": deepspeed.__version__, "spawned": queue.get()}
    worker.join()
    with open(f"rank{engine.global_rank}.json", "w") as file:
        json.dump(found, file)
"""


class Replaced(Exception):
    """Stands for the process that the command becomes."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command up to torchrun; returns torchrun's arguments and environment."""

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert path == sys.executable and arguments[:3] == [path, "-m", "torch.distributed.run"]
        raise Replaced(arguments[3:], environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*arguments: str) -> tuple[list[str], dict[str, str]]:
        with pytest.raises(Replaced) as replaced:
            main(["run", *arguments])
        found: tuple[list[str], dict[str, str]] = replaced.value.args
        return found

    return run


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    """This host is the second of three."""
    path = tmp_path / "hosts"
    path.write_text(f"host0 slots=4\n\n{socket.gethostname()} slots=4  # this one\nhost2 slots=2\n")
    return str(path)


def test_a_deepspeed_script_trains_on_two_ranks_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "redline", "run", "--num_gpus", "2", "train.py", "--deepspeed_config", "ds.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == {
            "rank": rank, "ranks": 2, "steps": 1, "version": "0.19.8", "spawned": True
        }  # fmt: skip


def test_the_script_gets_its_arguments_after_its_local_rank(started: Any) -> None:
    arguments, environment = started("--num_gpus", "2", "train.py", "--lr", "0.1", "--help")
    assert arguments == ["--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1", "train.py",
                         "--local_rank=${local_rank}", "--lr", "0.1", "--help"]  # fmt: skip
    assert environment["PYTHONPATH"] == str(ROOT / "engine" / "compat")


def test_flags_of_torchrun_and_a_path_of_the_users_own(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/own")
    flags = ("--nproc-per-node=4", "--nnodes=2", "--node-rank=1", "--master-addr=host0", "--no_local_rank")
    arguments, environment = started(*flags, "-m", "package.train")
    assert arguments == ["--nproc-per-node=4", "--nnodes=2", "--node-rank=1", "--master-addr=host0",
                         "--master-port=29500", "--module", "package.train"]  # fmt: skip
    assert environment["PYTHONPATH"].endswith("compat:/own")


def test_slots_of_this_host_alone(started: Any) -> None:
    arguments, environment = started("--include", "localhost:1,3", "--master_port", "1234", "train.py")
    assert arguments[:3] == ["--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=1234"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_a_host_file_gives_each_host_its_rank_and_prints_the_command_of_the_others(
    started: Any, hostfile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, environment = started("--hostfile", hostfile, "--exclude", f"host2@{socket.gethostname()}:0", "train.py")
    assert arguments[:5] == ["--nproc-per-node=3", "--nnodes=2", "--node-rank=1", "--master-addr=host0",
                             "--master-port=29500"]  # fmt: skip
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,2,3"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("on host0: redline run --hostfile=") and line.endswith(" train.py")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_nodes", "2"), "--num_nodes above 1 needs --master_addr"),
        (("--include", "host9"), 'got "host9"; expected a host of localhost'),
        (("--include", "localhost:a"), 'got "localhost:a"'),
        (("--include", "localhost", "--exclude", "localhost"), "give one of them"),
        (("--exclude", "localhost"), "no slot is left"),
        (("--hostfile", "wrong"), 'wrong:1: got "host0"; expected "HOST slots=N", each host once'),
        (("--hostfile", "others"), "is none of 192.0.2.1"),
        (("--hostfile", "nowhere"), "nowhere: No such file"),
    ],
)
def test_a_mistake_exits_with_1_and_what_to_do(
    flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("wrong").write_text("host0\n")
    Path("others").write_text("192.0.2.1 slots=1\n")
    assert main(["run", *flags, "train.py"]) == 1
    assert message in capsys.readouterr().err
