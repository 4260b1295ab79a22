"""Runs of the script of docs/restarts.md, killed and started again by torchrun, end as if they had not been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import EngineError, initialize

ROOT = Path(__file__).parents[2]
UPDATES = 30

# Its model notes what each update trains on, and strikes as the environment says. A buffer, which is in the checkpoint,
# counts the updates; a life is the time from one start to the next.
TASK = (
    f"UPDATES = {UPDATES}"
    + """
import os, signal, time, torch
from torch import nn

LIFE = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
RANK = os.environ.get("RANK", "0")

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        update = int(self.count)
        with open(f"updates.{RANK}", "a") as file:
            file.write(f"{LIFE} {update} {x.sum().item().hex()}\\n")
        if update == UPDATES:
            torch.save([parameter.detach() for parameter in self.parameters()], f"weights.{RANK}")
        time.sleep(0.05)
        blow = f"{LIFE}:{RANK}:{update}"
        if blow == os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if blow == os.environ.get("TERMINATE"):
            os.killpg(0, signal.SIGTERM)  # as torchrun and SLURM do: workers of the loader get it, too
        self.count += 1
        return self.layers(x)

def make_model():
    torch.manual_seed(0)
    return Model()

def make_data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(*(torch.randn(44, size, generator=generator) for size in (8, 1)))
"""
)
CONFIG = """{
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "redline": {"data": {"workers": 1}, "checkpoint": {"save_on_sigterm": "checkpoints"}}
}"""


def write_script(folder: Path, updates: int) -> None:
    """The documentation's, with fewer updates."""
    text = (ROOT / "docs" / "restarts.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(from torch import nn.*?)```", text, re.DOTALL)
    script = script.replace("UPDATES, SAVE_EVERY = 1000, 50", f"UPDATES, SAVE_EVERY = {updates}, 5")
    (folder / "train.py").write_text(script)
    (folder / "task.py").write_text(TASK)
    (folder / "config.json").write_text(CONFIG)


def torchrun(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*command, "train.py"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def updates(folder: Path, rank: int) -> list[tuple[int, int, str]]:
    """Life, update and what it trained on, in the order they came."""
    lines = (line.split() for line in (folder / f"updates.{rank}").read_text().splitlines())
    return [(int(life), int(update), data) for life, update, data in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing interrupts; when it has made its updates it goes on, until torchrun gets SIGTERM."""
    folder = tmp_path_factory.mktemp("straight")
    write_script(folder, 10**6)
    process = torchrun(folder)
    deadline = time.monotonic() + 60
    while not (folder / "weights.1").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode == 1, said  # torchrun's own
    return folder, said


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three lives: a process is killed in the first, and SIGTERM comes to one in the second."""
    folder = tmp_path_factory.mktemp("restarted")
    write_script(folder, UPDATES + 1)
    process = torchrun(folder, "--max-restarts", "2", KILL="0:1:8", TERMINATE="1:0:12")
    said = finish(process)
    assert process.returncode == 0, said
    return folder, said


def test_a_run_that_was_killed_and_terminated_ends_with_the_weights_of_one_that_was_not(
    straight: tuple[Path, str], restarted: tuple[Path, str]
) -> None:
    for rank in (0, 1):
        files = [folder / f"weights.{rank}" for folder, _ in (restarted, straight)]
        ours, theirs = (torch.load(file, weights_only=True) for file in files)
        assert all(map(torch.equal, ours, theirs))


def test_no_update_is_made_twice_with_different_data(straight: tuple[Path, str], restarted: tuple[Path, str]) -> None:
    for rank in (0, 1):
        expected = {update: data for _, update, data in updates(straight[0], rank)}
        assert sorted(expected) == list(range(len(expected)))
        lived = updates(restarted[0], rank)
        assert {life for life, _, _ in lived} == {0, 1, 2}
        assert all(expected[update] == data for _, update, data in lived)


def test_each_life_goes_on_where_the_checkpoint_before_it_was_made(restarted: tuple[Path, str]) -> None:
    for rank in (0, 1):
        lives = [[update for life, update, _ in updates(restarted[0], rank) if life == each] for each in range(3)]
        assert lives[0][0] == 0
        assert lives[1][0] == 5  # killed in update 8; saved after 5
        assert 12 <= lives[1][-1] <= 24  # an update takes 0.05 s, and the processes talk every 0.25 s
        assert lives[2][0] == lives[1][-1] + 1  # saved on SIGTERM: nothing is made again
        assert lives[2][-1] == UPDATES


def test_what_sigterm_did_is_said_once(restarted: tuple[Path, str]) -> None:
    folder, said = restarted
    last = max(update for life, update, _ in updates(folder, 0) if life == 1)
    assert said.count(f"SIGTERM: saving after update {last + 1} into checkpoints") == 1
    assert len(re.findall(r"SIGTERM: saved in \d+\.\d s; leaving with exit code 143", said)) == 1
    assert "DataLoader worker" not in said


def test_sigterm_to_torchrun_saves_and_ends_all(straight: tuple[Path, str]) -> None:
    folder, said = straight
    (update,) = re.findall(r"SIGTERM: saving after update (\d+) into checkpoints", said)
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"global_step{update}"
    assert len(updates(folder, 0)) == len(updates(folder, 1)) == int(update)


# -- one process ---------------------------------------------------------------------------------------------

ALONE: dict[str, Any] = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
SAVED: dict[str, Any] = {**ALONE, "redline": {"checkpoint": {"save_on_sigterm": "saved", "async_save": True}}}


def run_alone(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import os, signal
import torch
from engine import initialize

said = []
signal.signal(signal.SIGTERM, lambda number, frame: said.append("the script's own"))
engine = initialize(torch.nn.Linear(2, 1), {SAVED!r}, device="cpu")

def update():
    engine.backward(engine(torch.ones(2, 2)).mean())
    engine.step()
{body}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_alone_the_save_comes_with_the_update_under_way_and_the_scripts_handler_is_called(tmp_path: Path) -> None:
    body = """
engine.client_state_on_sigterm = lambda: {"best": 0.25}
update()
os.kill(os.getpid(), signal.SIGTERM)
try:
    update()
finally:
    print(said, engine.global_steps)
"""
    ran = run_alone(tmp_path, body)
    assert (ran.returncode, ran.stdout) == (143, '["the script\'s own"] 2\n'), ran.stderr
    engine = initialize(torch.nn.Linear(2, 1), ALONE, device="cpu")
    assert engine.load_checkpoint(tmp_path / "saved")[1] == {"best": 0.25}
    assert engine.global_steps == 2


def test_a_child_process_and_a_process_whose_engine_is_gone_are_ended_as_before(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, signal.SIG_DFL)
engine = initialize(torch.nn.Linear(2, 1), engine.config, device="cpu")
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
del engine
os.kill(os.getpid(), signal.SIGTERM)
"""
    ran = run_alone(tmp_path, body)
    assert (ran.stdout, ran.returncode) == ("-15\n", -15), ran.stderr


def test_without_the_key_no_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    initialize(torch.nn.Linear(2, 1), ALONE, device="cpu")
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_it_is_an_error_that_says_where_to_call_it() -> None:
    said = []

    def start() -> None:
        with pytest.raises(EngineError) as caught:
            initialize(torch.nn.Linear(2, 1), SAVED, device="cpu")
        said.append(str(caught.value))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert said[0].startswith("redline.checkpoint.save_on_sigterm: Python handles signals in the main thread only")
