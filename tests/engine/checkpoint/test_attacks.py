"""Disks that fill up, files that are damaged or made to harm: nothing lost, nothing run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redline import EngineError
from redline.random_state import random_state, set_random_state
from tests.engine.checkpoint.test_save import Evil, names, sealed
from tests.resume import Case, _left, build, trained

pytestmark = pytest.mark.long

CASE = Case(
    {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 10}},
        "fp16": {"enabled": True, "initial_scale_power": 4},
    }
)
FILES = (".metadata", "__0_0.distcp", "rank_0.pt", "state.pt")


def fresh() -> Any:
    engine = build(CASE)
    random.seed(0)
    torch.manual_seed(0)
    return engine


class Saved:
    """A directory with checkpoints of steps 1 and 2, to be copied, and what a run is after loading each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        engine = build(CASE)
        trained(engine, 2, lambda: engine.save_checkpoint(folder, client_state={"step": engine.global_steps}))
        self.left = {0: _left(fresh())}
        self.third: Any = None  # an engine after step 3, which nobody has saved
        for step in (1, 2, 3):
            engine = fresh()
            engine.load_checkpoint(folder, f"global_step{min(step, 2)}")
            if step == 3:
                trained(engine, 1)
                self.third, self._random = engine, random_state()
            self.left[step] = _left(engine)

    def save_third(self, folder: Path) -> None:
        set_random_state(self._random)
        self.third.save_checkpoint(folder)

    def copy(self, to: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        return Path(shutil.copytree(self.folder, to))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("attacks") / "run")


def load(folder: Path, saved: Saved) -> tuple[int, str]:
    """The step that a new engine gets, 0 for none, and the error; asserts that it is that step's state."""
    engine, step, said = fresh(), 0, ""
    try:
        path, _ = engine.load_checkpoint(folder)
        step = int((path or "0")[-1])
    except EngineError as error:
        said = str(error)
    assert _left(engine) == saved.left[step], f"not the state of step {step}: {said}"
    return step, said


# -- full disks ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
def test_a_disk_that_fills_up_at_any_byte_loses_nothing(saved: Saved, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted(path.stat().st_size for path in (saved.folder / "global_step2").iterdir())
    limits = sorted({0, 1, *sizes[:-1], *(size - 1 for size in sizes), *range(0, sizes[-1], sizes[-1] // 60)})
    for limit in limits:
        folder = saved.copy(tmp_path / "run")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(EngineError, match="what was written of it is removed"):
                saved.save_third(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(folder) == {"global_step1", "global_step2", "latest"}
        assert load(folder, saved) == (2, "")


# -- damaged files -------------------------------------------------------------------------------------


DAMAGES = ("cut", "flip", "zeros", "longer", "empty", "gone", "older", "folder", "link")


def damage(path: Path, dice: random.Random) -> str:
    """Change a file in one of the ways in which disks, copies and people do; how."""
    content, other = path.read_bytes(), path.parents[1] / "global_step1" / path.name
    place, kind = dice.randrange(len(content) - 1), dice.choice(DAMAGES)
    if kind == "older" and (not other.is_file() or other.read_bytes() == content):
        kind = "zeros"
    if kind == "zeros" and not any(content[place : place + 64]):
        kind = "flip"
    if kind in ("gone", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        if kind == "link":
            path.symlink_to("nowhere")
        return kind
    changed = {
        "cut": content[:place],
        "flip": content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :],
        "zeros": content[:place] + bytes(len(content[place : place + 64])) + content[place + 64 :],
        "longer": content + b"x" * (1 + place % 9),
        "empty": b"",
        "older": other.read_bytes() if other.is_file() else b"",
    }
    path.write_bytes(changed[kind])
    return kind


def test_of_300_damaged_files_each_is_named_and_the_checkpoint_before_is_loaded(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(300):
        dice, folder = random.Random(seed), saved.copy(tmp_path / "run")
        path = folder / "global_step2" / dice.choice([*FILES, "manifest.json"])
        kind = damage(path, dice)
        caplog.clear()
        step, said = load(folder, saved)
        assert (step, said) == (1, ""), f"{seed}: {path.name}, {kind}: {said}"
        assert str(path) in caplog.text or (path.name == "manifest.json" and str(path.parent) in caplog.text)


# -- hostile files: their manifests are right -----------------------------------------------------------


class Calls:
    """Pickles as a call, which leaves a mark when it is run."""

    def __init__(self, mark: Path, dice: random.Random) -> None:
        code = f"open({str(mark)!r}, 'w').close()"
        self.call = dice.choice(
            [
                (os.system, (f"touch {mark}",)), (os.mkdir, (str(mark),)), (exec, (code,)), (eval, (code,)),
                (shutil.copy, (__file__, str(mark))), (open, (str(mark), "w")), (torch.save, (1, str(mark))),
                (torch.load, (str(mark),)), (pickle.loads, (pickle.dumps(Evil(mark)),)), (getattr, (mark, "touch")),
                (__import__, ("this",)), (Path.touch, (mark,)),
            ]
        )  # fmt: skip

    def __reduce__(self) -> Any:
        return self.call


def within(value: Any, evil: Any, dice: random.Random) -> Any:
    """The value, with something else in one of its places."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        return {**value, key: within(value[key], evil, dice)}
    if isinstance(value, (list, tuple)) and 0 < len(value) < 50 and dice.random() < 0.9:
        index = dice.randrange(len(value))
        return type(value)([*value[:index], within(value[index], evil, dice), *value[index + 1 :]])
    return evil


ODD: list[Any] = [
    None, -1, 0, True, "x", "", [], {}, (), float("inf"), float("nan"), 2**70, b"x", {"a": 1}, [1], torch.zeros(()),
    torch.zeros(2), torch.zeros(0, 3), {"$tensor": "nope"}, {"$tensor": "model.head.weight"}, {None: None},
]  # fmt: skip


def put_code(path: Path, mark: Path, dice: random.Random) -> None:
    """Put a call into a file."""
    evil = Calls(mark, dice)
    if path.suffix == ".pt":
        evil = within(torch.load(path, weights_only=True), evil, dice)
    kind = dice.choice(["a pickle", "a file of torch", "an old file of torch"])
    size = path.stat().st_size
    if kind == "a pickle" or path.name == ".metadata":
        path.write_bytes(pickle.dumps(evil, protocol=dice.randrange(6)))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "a file of torch")
    if path.suffix == ".distcp" and path.stat().st_size < size:  # long enough for the places of its tensors
        os.truncate(path, size)


def put_odd_value(path: Path, mark: Path, dice: random.Random) -> None:
    """Put a plain value into a file, where there was another one."""
    path = path.with_name(dice.choice(["state.pt", "rank_0.pt"]))
    torch.save(within(torch.load(path, weights_only=True), dice.choice(ODD), dice), path)


@pytest.mark.filterwarnings("ignore")  # torch's, about pickle protocols
@pytest.mark.parametrize("put", [put_code, put_odd_value])
def test_of_300_hostile_files_none_is_run_and_none_leaves_a_half_loaded_engine(
    put: Callable[[Path, Path, random.Random], None], saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(300 if put is put_code else 150):
        dice, folder, mark = random.Random(seed), saved.copy(tmp_path / "run"), tmp_path / "mark"
        tag = folder / "global_step2"
        put(tag / dice.choice(FILES), mark, dice)
        sealed(tag)
        engine, step, said = fresh(), 0, ""
        caplog.clear()
        try:
            step = int((engine.load_checkpoint(folder)[0] or "0")[-1])
        except EngineError as error:
            said = str(error)
        assert not mark.exists(), seed
        assert put is not put_code or step == 1, f"{seed}: {step}, {said}"
        if step == 2:  # what is in it is as good as what was
            continue
        assert _left(engine) == saved.left[step], f"{seed}: not the state of step {step}: {said}"
        assert "global_step2" in caplog.text + said, seed
