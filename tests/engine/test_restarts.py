"""Runs of the script of docs/restarts.md, killed and started again by torchrun, end as if they had not been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from redline import EngineError, initialize
from tests.distributed import run_ranks

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
    script = script.replace("STEPS, SAVE_EVERY = 1000, 50", f"STEPS, SAVE_EVERY = {updates}, 5")
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
        return process.communicate(timeout=600)[0]
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
    deadline = time.monotonic() + 600
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


@pytest.mark.long
def test_a_run_that_was_killed_and_terminated_ends_with_the_weights_of_one_that_was_not(
    straight: tuple[Path, str], restarted: tuple[Path, str]
) -> None:
    for rank in (0, 1):
        files = [folder / f"weights.{rank}" for folder, _ in (restarted, straight)]
        ours, theirs = (torch.load(file, weights_only=True) for file in files)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.long
def test_no_update_is_made_twice_with_different_data(straight: tuple[Path, str], restarted: tuple[Path, str]) -> None:
    for rank in (0, 1):
        expected = {update: data for _, update, data in updates(straight[0], rank)}
        assert sorted(expected) == list(range(len(expected)))
        lived = updates(restarted[0], rank)
        assert {life for life, _, _ in lived} == {0, 1, 2}
        assert all(expected[update] == data for _, update, data in lived)


@pytest.mark.long
def test_each_life_goes_on_where_the_checkpoint_before_it_was_made(restarted: tuple[Path, str]) -> None:
    for rank in (0, 1):
        lives = [[update for life, update, _ in updates(restarted[0], rank) if life == each] for each in range(3)]
        assert lives[0][0] == 0
        assert lives[1][0] == 5  # killed in update 8; saved after 5
        assert 12 <= lives[1][-1] < UPDATES  # with the next exchange, some updates later
        assert lives[2][0] == lives[1][-1] + 1  # saved on SIGTERM: nothing is made again
        assert lives[2][-1] == UPDATES


@pytest.mark.long
def test_what_sigterm_did_is_said_once(restarted: tuple[Path, str]) -> None:
    folder, said = restarted
    last = max(update for life, update, _ in updates(folder, 0) if life == 1)
    assert said.count(f"SIGTERM: saving after step {last + 1} into {folder / 'checkpoints'}") == 1
    assert len(re.findall(r"SIGTERM: saved in \d+\.\d s; exiting with code 143", said)) == 1
    assert "DataLoader worker" not in said


@pytest.mark.long
def test_sigterm_to_torchrun_saves_and_ends_all(straight: tuple[Path, str]) -> None:
    folder, said = straight
    (update,) = re.findall(r"SIGTERM: saving after step (\d+) into \S+/checkpoints", said)
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"global_step{update}"
    assert len(updates(folder, 0)) == len(updates(folder, 1)) == int(update)


def test_each_row_of_the_documentations_table_names_a_test_that_there_is() -> None:
    text = (ROOT / "docs" / "restarts.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (?!what happens|---).*\|$", text)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, row
        assert all(f"def {name}(" in tests for name in names), row


# -- one process ---------------------------------------------------------------------------------------------

ALONE: dict[str, Any] = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
SAVED: dict[str, Any] = {**ALONE, "redline": {"checkpoint": {"save_on_sigterm": "saved", "async_save": True}}}


def update(engine: Any) -> None:
    engine.backward(engine(torch.ones(2, 2)).mean())
    engine.step()


@pytest.fixture
def sigterm() -> Iterator[list[str]]:
    """What the script's own handler was called for; the handler of before comes back."""
    said: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: said.append("the script's own"))
    yield said
    signal.signal(signal.SIGTERM, before)


def test_alone_the_save_comes_with_the_update_under_way_and_the_scripts_handler_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sigterm: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = initialize(torch.nn.Linear(2, 1), SAVED, device="cpu")
    engine.client_state_on_sigterm = lambda: {"best": 0.25}
    update(engine)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the directory is relative to where initialize was called
    os.kill(os.getpid(), signal.SIGTERM)
    assert sigterm == ["the script's own"]
    with pytest.raises(SystemExit) as left:
        update(engine)
    assert (left.value.code, engine.global_steps) == (143, 2)
    resumed = initialize(torch.nn.Linear(2, 1), ALONE, device="cpu")
    assert resumed.load_checkpoint(tmp_path / "saved")[1] == {"best": 0.25}
    assert resumed.global_steps == 2


def saved_step(directory: Path) -> int:
    return int((directory / "latest").read_text().removeprefix("global_step"))


def config_saving_into(directory: Path) -> dict[str, Any]:
    return {**ALONE, "redline": {"checkpoint": {"save_on_sigterm": str(directory)}}}


def lockstep(folder: Path, signalled_before: str, who: int) -> tuple[int, int, int]:
    """Two engines, step by step in turn; on one rank SIGTERM comes before a step. Exit code, and the steps saved."""
    rank, batch = int(os.environ.get("RANK", "0")), 2 * int(os.environ.get("WORLD_SIZE", "1"))
    engines = {
        name: initialize(
            torch.nn.Linear(2, 1), {**config_saving_into(folder / name), "train_batch_size": batch}, device="cpu"
        )
        for name in "ab"
    }
    try:
        for step in range(500):
            for name, engine in engines.items():
                if (step, name, rank) == (3, signalled_before, who):
                    os.kill(os.getpid(), signal.SIGTERM)
                update(engine)
    except SystemExit as left:
        return int(str(left.code)), saved_step(folder / "a"), saved_step(folder / "b")
    return 0, 0, 0


@pytest.mark.parametrize("signalled_before", ["a", "b"])
def test_of_two_engines_both_are_saved_at_the_end_of_the_same_round(
    signalled_before: str, tmp_path: Path, sigterm: list[str]
) -> None:
    assert lockstep(tmp_path, signalled_before, who=0) == (143, 4, 4)


def test_on_two_ranks_both_engines_are_saved_at_the_end_of_the_same_round(tmp_path: Path) -> None:
    first, second = run_ranks(lockstep, 2, tmp_path, "b", 1)
    code, a, b = first
    assert first == second
    assert (code, a) == (143, b)
    assert 4 <= a < 500


def test_an_engine_that_no_longer_steps_is_saved_too_and_keeps_nobody_waiting(
    tmp_path: Path, sigterm: list[str]
) -> None:
    a, b = (initialize(torch.nn.Linear(2, 1), config_saving_into(tmp_path / name), device="cpu") for name in "ab")
    for engine in (a, b, a):
        update(engine)
    os.kill(os.getpid(), signal.SIGTERM)
    update(a)  # the round would end with b's step
    with pytest.raises(SystemExit):
        update(a)
    assert (saved_step(tmp_path / "a"), saved_step(tmp_path / "b")) == (4, 1)


def test_of_two_engines_with_one_directory_the_newer_is_saved_and_a_warning_says_so(
    tmp_path: Path, sigterm: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (initialize(torch.nn.Linear(2, 1), config_saving_into(tmp_path), device="cpu") for _ in range(2))
    assert "two engines of this process have" in caplog.text
    update(a)
    update(a)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        update(b)
    assert saved_step(tmp_path) == b.global_steps == 1


@pytest.mark.long
def test_a_child_process_and_a_process_whose_engine_is_gone_are_ended_as_before(tmp_path: Path) -> None:
    script = f"""
import os, signal
import torch
from redline import initialize

engine = initialize(torch.nn.Linear(2, 1), {SAVED!r}, device="cpu")
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
del engine
os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
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
