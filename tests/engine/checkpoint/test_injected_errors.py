"""The operating system fails at each call that a save or a load makes of it, in turn: nothing is lost."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from redline import Engine, EngineError
from tests.resume import Case, build, trained

NAMES = {
    os: (
        *("open", "close", "fsync", "read", "write", "stat", "lstat", "scandir", "listdir", "statvfs"),
        *("mkdir", "rename", "replace", "remove", "unlink", "rmdir", "utime"),
    ),
    io: ("open",),
    builtins: ("open",),
    fcntl: ("flock", "lockf"),
    shutil: ("disk_usage",),
}
CASES = {
    "fp32": Case({"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}),
    "bf16": Case({"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "bf16": {"enabled": True}}),
}


class Failure:
    """An error of the operating system at one call in a folder; the number of calls."""

    def __init__(self, folder: Path, at: int, code: int) -> None:
        self.folder, self.at, self.code, self.calls, self.place = str(folder), at, code, 0, ""

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Files by descriptor are counted, too: they are the folder's while a save or a load runs.
            if args and (isinstance(args[0], int) or os.fspath(args[0]).startswith(self.folder)):
                self.calls += 1
                if self.calls == self.at:
                    self.place = f"{name}({args[0]})"
                    if name == "close":  # Linux closes even where it reports an error
                        function(*args, **kwargs)
                    raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return function(*args, **kwargs)

        return call


@contextmanager
def failing(folder: Path, at: int, code: int) -> Iterator[Failure]:
    failure = Failure(folder, at, code)
    with pytest.MonkeyPatch.context() as patch:
        for module, names in NAMES.items():
            for name in names:
                patch.setattr(module, name, failure.wrapped(name, getattr(module, name)))
        yield failure


def state_of(engine: Engine) -> dict[str, Any]:
    states = engine.optimizer.state_dict()["state"]
    return {
        "model": {name: value.clone() for name, value in engine.module.state_dict().items()},
        "optimizer": {
            f"{key}.{name}": torch.as_tensor(value).clone()
            for key, state in states.items()
            for name, value in state.items()
        },
        "step": engine.global_steps,
        "lr": engine.get_lr(),
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def faults_of_save(case: Case, folder: Path, at: int, code: int) -> tuple[Failure, list[str]]:
    """A run saves twice, and the n-th call of the second save fails."""
    engine = build(case, redline={"checkpoint": {"keep_last": 2}})
    trained(engine, 1, lambda: engine.save_checkpoint(folder))
    trained(engine, 1)
    before, faults = state_of(engine), []
    with failing(folder, at, code) as failure:
        try:
            engine.save_checkpoint(folder)
            saved = True
        except EngineError:
            saved = False
    if not equal(state_of(engine), before):
        faults.append("the save changed the engine")
    found = build(case)
    tag, _ = found.load_checkpoint(folder)
    if tag is None or (saved and found.global_steps != 2) or found.global_steps not in (1, 2):
        faults.append(f"saved: {saved}, found {tag}")
    elif found.global_steps == 2 and not equal(state_of(found), before):
        faults.append("what was found is not what was saved")
    trained(engine, 1, lambda: engine.save_checkpoint(folder))  # the next save succeeds
    after = build(case)
    after.load_checkpoint(folder)
    if after.global_steps != 3:
        faults.append(f"after the next save: step {after.global_steps}")
    left = {path.name for path in folder.iterdir()} - {"latest"} - {f"global_step{step}" for step in (1, 2, 3)}
    if left:
        faults.append(f"left behind: {left}")
    return failure, faults


def faults_of_load(case: Case, folder: Path, at: int, code: int, saved: dict[int, Any]) -> tuple[Failure, list[str]]:
    """Of a folder with two checkpoints one is loaded, and the n-th call fails."""
    engine = build(case)
    trained(engine, 3)
    before = state_of(engine)
    with failing(folder, at, code) as failure:
        try:
            engine.load_checkpoint(folder)
        except EngineError:
            return failure, [] if equal(state_of(engine), before) else ["refused, but changed"]
    if equal(state_of(engine), saved[2]) or equal(state_of(engine), saved[1]):
        return failure, []
    return failure, ["found no checkpoint" if equal(state_of(engine), before) else "half loaded"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize(
    "every", [11, pytest.param(1, marks=pytest.mark.long)], ids=["one call in eleven", "every call"]
)
@pytest.mark.parametrize("name", CASES)
def test_a_save_whose_call_fails_leaves_a_whole_checkpoint_and_the_next_save_succeeds(
    name: str, every: int, code: int, tmp_path: Path
) -> None:
    at, wrong = 1, []
    while True:
        failure, faults = faults_of_save(CASES[name], tmp_path / str(at), at, code)
        if not failure.place:
            break
        wrong += [f"call {at}, {failure.place}: {fault}" for fault in faults]
        shutil.rmtree(tmp_path / str(at))
        at += every
    assert at > 30
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "every", [11, pytest.param(1, marks=pytest.mark.long)], ids=["one call in eleven", "every call"]
)
@pytest.mark.parametrize("name", CASES)
def test_a_load_whose_call_fails_loads_all_or_nothing(name: str, every: int, tmp_path: Path) -> None:
    case = CASES[name]
    engine, saved = build(case), {}
    for step in (1, 2):
        trained(engine, 1, lambda: engine.save_checkpoint(tmp_path))
        saved[step] = state_of(engine)
    at, wrong = 1, []
    while True:
        failure, faults = faults_of_load(case, tmp_path, at, errno.EIO, saved)
        if not failure.place:
            break
        wrong += [f"call {at}, {failure.place}: {fault}" for fault in faults]
        at += every
    assert at > 20
    assert not wrong, "\n".join(wrong)
