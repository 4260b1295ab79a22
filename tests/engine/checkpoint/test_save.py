"""How a checkpoint comes to the disk, what is found of one that is broken, and which ones stay."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from redline import EngineError
from redline.checkpoint import save, storage
from tests import by_hand
from tests.distributed import run_ranks
from tests.resume import Case, build, trained

CASE = Case({"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}})


def run_of(folder: Path, saves: int = 2, **checkpoint: Any) -> Any:
    """An engine that has saved after each of its updates."""
    engine = build(CASE, redline={"checkpoint": checkpoint})
    trained(engine, saves, lambda: engine.save_checkpoint(folder, client_state={"step": engine.global_steps}))
    return engine


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def loaded(folder: Path, tag: str | None = None) -> Any:
    """The step that a checkpoint was saved at."""
    return build(CASE).load_checkpoint(folder, tag)[1]["step"]


# -- what is there -------------------------------------------------------------------------------------


def test_a_folder_holds_checkpoints_and_latest_and_nothing_else(tmp_path: Path) -> None:
    run_of(tmp_path)
    assert names(tmp_path) == {"global_step1", "global_step2", "latest"}
    assert (tmp_path / "latest").read_text() == "global_step2"
    files_of = {"manifest.json", "state.pt", ".metadata", "__0_0.distcp", "rank_0.pt"}
    assert names(tmp_path / "global_step2") == files_of
    manifest = json.loads((tmp_path / "global_step2" / "manifest.json").read_text())
    assert set(manifest["files"]) == files_of - {"manifest.json"}
    assert (manifest["format"], manifest["step"], manifest["world_size"]) == (2, 2, 1)


def test_any_reader_of_torchs_distributed_checkpoints_reads_the_tensors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    engine = run_of(tmp_path / "run", 1)
    dcp_to_torch_save(tmp_path / "run" / "global_step1", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(whole[f"model.{name}"], parameter)
    weight = engine.module.inputs.weight
    assert torch.equal(whole["optimizer.inputs.weight.exp_avg"], engine.optimizer.state[weight]["exp_avg"])


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden", "latest", "a\\b", " a", "a:b"])
def test_a_tag_that_is_no_name_for_a_folder_is_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be a directory's name"):
        build(CASE).save_checkpoint(tmp_path, tag)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("folder", ["", " "])
def test_a_save_to_nowhere_is_refused(folder: str) -> None:
    with pytest.raises(EngineError, match=r"save_dir: got '.?'; expected a directory"):
        build(CASE).save_checkpoint(folder)


# -- replaced, killed, tidied --------------------------------------------------------------------------


def test_a_tag_that_is_there_is_replaced(tmp_path: Path) -> None:
    engine = build(CASE)
    engine.save_checkpoint(tmp_path, "same", {"step": 1})
    engine.save_checkpoint(tmp_path, "same", {"step": 2})
    assert names(tmp_path) == {"same", "latest"}
    assert loaded(tmp_path) == 2


def test_a_tag_that_is_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    engine = run_of(tmp_path, 1)
    (tmp_path / "best").symlink_to("global_step1")
    for step in (2, 3):
        engine.save_checkpoint(tmp_path, "best", {"step": step}, save_latest=False)
        assert names(tmp_path) == {"global_step1", "best", "latest"}
        assert (loaded(tmp_path, "best"), loaded(tmp_path, "global_step1")) == (step, 1)


class Killed(BaseException):
    """What no handler of errors catches; the rest of a kill is a process that does no more."""


def killed_at(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Let the process die at one of its calls of rename and replace."""
    calls = iter(range(100))

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if next(calls) == place:
                monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # it cleans up nothing either
                raise Killed
            real(*args)

        return call

    monkeypatch.setattr(os, "rename", dying(os.rename))
    monkeypatch.setattr(os, "replace", dying(os.replace))


@pytest.mark.parametrize("place", range(3))
def test_a_kill_at_any_rename_of_a_replacement_leaves_the_old_one_or_the_new(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(CASE)
    engine.save_checkpoint(tmp_path, "same", {"step": 1})
    with monkeypatch.context() as patch:
        killed_at(patch, place)
        with pytest.raises(Killed):
            engine.save_checkpoint(tmp_path, "same", {"step": 2})
    assert loaded(tmp_path) in (1, 2)
    assert loaded(tmp_path, "same") in (1, 2)
    build(CASE).save_checkpoint(tmp_path, "other", {"step": 3})  # which tidies up
    assert names(tmp_path) == {"same", "other", "latest"}
    assert loaded(tmp_path, "same") in (1, 2)


def test_a_kill_in_the_very_first_save_after_its_rename_is_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        killed_at(patch, 1)  # the directory, latest
        with pytest.raises(Killed):
            build(CASE).save_checkpoint(tmp_path, client_state={"step": 0})
    assert "latest" not in names(tmp_path)
    assert loaded(tmp_path) == 0
    assert f"{tmp_path}/latest is not there; global_step0, the newest that is whole, is loaded instead" in caplog.text


def test_what_a_killed_run_has_left_is_removed_by_the_next_save_and_nothing_else_is(tmp_path: Path) -> None:
    for name in (".global_step9.partial-0123abcd", ".mine", "foreign", ".x.partial-xyz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    run_of(tmp_path, 1)
    assert names(tmp_path) == {".mine", "foreign", ".x.partial-xyz", "global_step1", "latest"}


# -- broken --------------------------------------------------------------------------------------------


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"{path}: expected {size} bytes, found {size - 1}"


def flip(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    expected = zlib.crc32(path.read_bytes())
    path.write_bytes(data)
    return f"{path}: expected checksum {expected:08x}, found {zlib.crc32(data):08x}"


def delete(path: Path) -> str:
    size = path.stat().st_size
    path.unlink()
    return f"{path}: missing; expected {size} bytes"


FILES = (".metadata", "__0_0.distcp", "rank_0.pt", "state.pt")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, flip, delete])
def test_a_file_that_was_harmed_is_named_and_the_newest_whole_checkpoint_is_used(
    name: str, harm: Callable[[Path], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path)
    said = harm(tmp_path / "global_step2" / name)
    assert loaded(tmp_path) == 1
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"load_checkpoint: {said}; global_step1, the newest that is whole, is loaded instead"]
    engine = build(CASE)
    before = torch.get_rng_state()
    with pytest.raises(EngineError) as caught:
        engine.load_checkpoint(tmp_path, "global_step2")
    assert str(caught.value).startswith(
        f"load_checkpoint: {said}; the tags in {tmp_path} are global_step1, global_step2"
    )
    assert (engine.global_steps, len(engine.optimizer.state)) == (0, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text[:-20], "not a valid manifest: "),
        (lambda text: text.replace('"step": 2', '"step": 3'), "expected checksum "),
        (lambda text: "", "not a valid manifest: "),
        (None, "which is written last"),
        (lambda text: text.replace('"format": 2', '"format": 3'), "format 3; this version of Redline reads (1, 2)"),
        (lambda text: '{"format": 1, "crc32": "90d9eb9d"}', "expected checksum "),
    ],
    ids=["truncated", "flipped", "empty", "missing", "newer", "another's"],
)
def test_a_manifest_that_was_harmed_is_named(
    harm: Callable[[str], str] | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path)
    path = tmp_path / "global_step2" / "manifest.json"
    if harm is None:
        path.unlink()
    else:
        path.write_text(harm(path.read_text()))
    assert loaded(tmp_path) == 1
    assert said in caplog.text and str(path.parent) in caplog.text


@pytest.mark.parametrize("text", ["", "global_step7", "../elsewhere", "global_step1\0"])
def test_a_latest_that_names_nothing_is_said_and_the_newest_is_used(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path)
    (tmp_path / "latest").write_text(text)
    assert loaded(tmp_path) == 2
    assert "global_step2, the newest that is whole, is loaded instead" in caplog.text


def test_where_nothing_is_whole_each_is_named_with_its_fault(tmp_path: Path) -> None:
    run_of(tmp_path)
    said = [truncate(tmp_path / "global_step2" / "state.pt"), delete(tmp_path / "global_step1" / "rank_0.pt")]
    with pytest.raises(EngineError) as caught:
        build(CASE).load_checkpoint(tmp_path)
    assert str(caught.value) == f"load_checkpoint: {'; '.join(said)}"


class Evil:
    """A pickle with code in it: one that leaves a mark when it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def sealed(folder: Path) -> None:
    """Write the manifest anew, as someone would who wants a checkpoint to be loaded."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    del document["crc32"]
    for name in document["files"]:
        record = storage.record_of(folder / name)
        document["files"][name] = {"bytes": record.bytes, "crc32": record.crc32}
    seal = f"{zlib.crc32(json.dumps(document, sort_keys=True).encode()):08x}"
    path.write_text(json.dumps({**document, "crc32": seal}))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rank_0.pt"])
@pytest.mark.parametrize("torchs", [False, True], ids=["a pickle", "a file of torch"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    name: str, torchs: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path / "run")
    mark, folder = tmp_path / "mark", tmp_path / "run" / "global_step2"
    size = (folder / name).stat().st_size
    if torchs:
        with open(folder / name, "wb") as file:
            torch.save(Evil(mark), file)
    else:
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    if name == "__0_0.distcp":  # long enough for the places of its tensors
        with open(folder / name, "ab") as file:
            file.truncate(size)
    sealed(folder)
    engine = build(CASE)
    assert engine.load_checkpoint(tmp_path / "run")[1] == {"step": 1}
    assert str(folder) in caplog.text
    assert not mark.exists()
    with pytest.raises(EngineError) as caught:
        engine.load_checkpoint(tmp_path / "run", "global_step2")
    assert str(caught.value).startswith(f"load_checkpoint: {folder / name}: ")
    assert not mark.exists()


def with_bytes(metadata: Any) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata["model.inputs.bias"] = BytesStorageMetadata()


def with_a_place_elsewhere(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../../secret.distcp"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_bytes, "asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata"),  # would be unpickled
        (with_a_place_elsewhere, r"in '../../secret.distcp', not a plain file"),
    ],
)
def test_a_metadata_that_asks_for_more_than_tensors_of_its_folder_is_refused(
    change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    run_of(tmp_path, 1)
    path = tmp_path / "global_step1" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    sealed(path.parent)
    with pytest.raises(EngineError, match=said):
        build(CASE).load_checkpoint(tmp_path)


# -- a full disk ---------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = run_of(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))
    with pytest.raises(EngineError) as caught:
        engine.save_checkpoint(tmp_path, "more")
    assert str(caught.value).startswith(
        f"save_checkpoint: {tmp_path}: the checkpoint needs 0.1 MB, and the disk has 0.0 MB"
    )
    assert names(tmp_path) == {"global_step1", "latest"}
    assert loaded(tmp_path) == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", "rank_0.pt", ".metadata", "state.pt", "manifest.json"])
def test_a_disk_that_gets_full_leaves_what_was_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = run_of(tmp_path, 1)
    real = storage.write_file

    def put(path: Path, write: Any) -> Any:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_file", put)
        with pytest.raises(EngineError) as caught:
            engine.save_checkpoint(tmp_path, "more")
    assert str(caught.value) == (
        f"save_checkpoint: {tmp_path}: No space left on device, while tag more was written; what was written of it is "
        "removed; the checkpoints that were there have not changed"
    )
    assert names(tmp_path) == {"global_step1", "latest"}
    assert loaded(tmp_path) == 1
    engine.save_checkpoint(tmp_path, "more", {"step": 5})  # with room again
    assert loaded(tmp_path) == 5


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"save_checkpoint: (File exists|Not a directory): "):
        build(CASE).save_checkpoint(tmp_path / "file")


# -- which ones stay -----------------------------------------------------------------------------------


def test_the_last_few_stay_and_every_so_many(tmp_path: Path) -> None:
    run_of(tmp_path, 7, keep_last=2, keep_every=3)
    assert names(tmp_path) == {"global_step3", "global_step6", "global_step7", "latest"}


def test_what_is_not_in_the_row_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    engine = build(CASE, redline={"checkpoint": {"keep_last": 1}})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("{}")
    engine.save_checkpoint(tmp_path, "best", save_latest=False)
    for tag in ("a", "b", "c"):
        engine.save_checkpoint(tmp_path, tag)
    assert names(tmp_path) == {"foreign", "best", "c", "latest"}


def test_the_one_that_latest_names_stays(tmp_path: Path) -> None:
    engine = build(CASE, redline={"checkpoint": {"keep_last": 1}})
    engine.save_checkpoint(tmp_path, "a")
    (tmp_path / "latest").write_text("a")
    engine.save_checkpoint(tmp_path, "b", save_latest=False)
    assert names(tmp_path) == {"a", "b", "latest"}


@pytest.mark.parametrize("has_latest", [True, False])
def test_a_clock_that_goes_back_does_not_change_the_order(
    has_latest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = run_of(tmp_path, 2, keep_last=2)
    if not has_latest:
        (tmp_path / "latest").unlink()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    trained(engine, 2, lambda: engine.save_checkpoint(tmp_path, client_state={"step": engine.global_steps}))
    assert names(tmp_path) == {"global_step3", "global_step4", "latest"}
    truncate(tmp_path / "global_step4" / "rank_0.pt")
    assert loaded(tmp_path) == 3


def test_after_going_back_the_newest_are_those_saved_last(tmp_path: Path) -> None:
    run_of(tmp_path, 4)
    engine = build(CASE, redline={"checkpoint": {"keep_last": 2}})
    engine.load_checkpoint(tmp_path, "global_step1")
    trained(engine, 1)
    engine.save_checkpoint(tmp_path, "again", {"step": 2})
    assert names(tmp_path) == {"again", "global_step1", "global_step4", "latest"}  # the loaded one stays


def test_an_old_one_goes_only_when_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = run_of(tmp_path, 1, keep_last=1)
    flushed: list[str] = []
    monkeypatch.setattr(save, "fsync", lambda paths: flushed.extend(str(path) for path in paths))
    monkeypatch.setattr(storage, "remove_expired", lambda *_: flushed.append("removed"))
    engine.save_checkpoint(tmp_path, "b")
    assert flushed[-2:] == [str(tmp_path), "removed"]
    written = {re.sub("-[0-9a-f]{8}$", "", Path(each).name) for each in flushed}
    assert written >= {"__0_0.distcp", "manifest.json", ".latest.partial"}


# -- while training goes on ----------------------------------------------------------------------------


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lets a save begin to write once it is set."""
    event, real = threading.Event(), save.Save.write

    def slow(self: Any) -> None:
        event.wait(10)
        real(self)

    monkeypatch.setattr(save.Save, "write", slow)
    return event


def test_in_the_background_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, hold: threading.Event) -> None:
    engine = build(CASE, redline={"checkpoint": {"async_save": True}})
    trained(engine, 1)
    state = {"step": torch.tensor(1)}
    weight = engine.module.inputs.weight
    before = weight.detach().clone()
    engine.save_checkpoint(tmp_path, client_state=state)
    trained(engine, 2)
    state["step"].fill_(9)
    assert names(tmp_path) == set()
    hold.set()
    engine.wait_for_checkpoint()
    other = build(CASE)
    path, back = other.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step1") and int(back["step"]) == 1
    assert torch.equal(other.module.inputs.weight, before)
    assert not torch.equal(weight, before)


def test_in_the_background_a_relative_directory_stays_what_it_was_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: threading.Event
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    engine = build(CASE, redline={"checkpoint": {"async_save": True}})
    engine.save_checkpoint("here")
    monkeypatch.chdir(tmp_path / "there")
    hold.set()
    engine.wait_for_checkpoint()
    assert names(tmp_path / "here") == {"global_step0", "latest"}
    assert names(tmp_path / "there") == set()


def test_in_the_background_a_second_save_waits_for_the_first_and_keeps_its_memory(tmp_path: Path) -> None:
    engine = run_of(tmp_path, 3, async_save=True)
    engine.wait_for_checkpoint()
    assert names(tmp_path) == {"global_step1", "global_step2", "global_step3", "latest"}
    buffers = dict(engine._checkpointer._buffers)
    engine.save_checkpoint(tmp_path, "again")
    engine.wait_for_checkpoint()
    assert all(engine._checkpointer._buffers[key] is buffer for key, buffer in buffers.items())


@pytest.mark.parametrize("notices", ["step", "flush", "save", "wait", "load"])
def test_in_the_background_an_error_is_raised_by_whatever_comes_next(notices: str, tmp_path: Path) -> None:
    engine = build(CASE, redline={"checkpoint": {"async_save": True}})
    trained(engine, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        engine.save_checkpoint(tmp_path)
        engine._checkpointer._saving.exception()
    actions = {
        "step": lambda: trained(engine, 1),
        "flush": engine.flush,
        "save": lambda: engine.save_checkpoint(tmp_path),
        "wait": engine.wait_for_checkpoint,
        "load": lambda: engine.load_checkpoint(tmp_path),
    }
    with pytest.raises(EngineError, match=r"the disk has 0.0 MB free; .* \(while training continued: async_save\)"):
        actions[notices]()
    engine.save_checkpoint(tmp_path, client_state={"step": 1})  # said once
    engine.wait_for_checkpoint()
    assert loaded(tmp_path) == 1


def test_in_the_background_what_cannot_be_saved_is_said_at_once(tmp_path: Path) -> None:
    engine = build(CASE, redline={"checkpoint": {"async_save": True}})
    with pytest.raises(EngineError, match=r"client_state\['x'\] is of type object"):
        engine.save_checkpoint(tmp_path, client_state={"x": object()})


SCRIPT = """
import sys, torch
from redline import initialize

model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"},
          "redline": {"checkpoint": {"async_save": True}}}
engine = initialize(model, config, device="cpu")
engine.backward(engine(torch.ones(1, 512)).square().mean())
engine.step()
engine.save_checkpoint(sys.argv[1])
"""


def test_the_interpreters_end_waits_until_it_is_on_the_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert "was not written" not in done.stderr
    assert names(tmp_path) == {"global_step1", "latest"}


# -- a directory that others use, too ------------------------------------------------------------------


def test_a_latest_that_is_a_directory_is_named_before_anything_changes(tmp_path: Path) -> None:
    engine = build(CASE)
    engine.save_checkpoint(tmp_path, "t", {"step": 1}, save_latest=False)
    (tmp_path / "latest").mkdir()
    with pytest.raises(EngineError, match=r"latest: it is a directory; expected the file"):
        engine.save_checkpoint(tmp_path, "t", {"step": 2})
    assert names(tmp_path) == {"t", "latest"} and loaded(tmp_path, "t") == 1
    engine.save_checkpoint(tmp_path, "t", {"step": 2}, save_latest=False)
    assert loaded(tmp_path, "t") == 2


def test_two_runs_in_one_directory_leave_each_others_files_and_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = build(CASE), build(CASE)
    real = storage.rename_into_place

    def rename(partial: Path, target: Path) -> None:
        if target.name == "one":  # while its files are complete, and not yet renamed, another run saves
            two.save_checkpoint(tmp_path, "two", {"step": 2})
        real(partial, target)

    monkeypatch.setattr(storage, "rename_into_place", rename)
    one.save_checkpoint(tmp_path, "one", {"step": 1})
    assert f"another run is saving in {tmp_path}" in caplog.text
    assert names(tmp_path) == {"one", "two", "latest"}
    assert (loaded(tmp_path, "one"), loaded(tmp_path, "two")) == (1, 2)


# -- what differs between ranks ------------------------------------------------------------------------


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """What a logger warns of in this block."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield seen
    finally:
        logging.getLogger(name).removeHandler(handler)


def writes_before_a_step(folder: str) -> dict[str, list[str]]:
    """Rank 0's warnings at the save after a write, and a step or none, with what was written on which rank."""
    found: dict[str, list[str]] = {}

    @torch.no_grad()
    def a_row(engine: Any, rank: int) -> None:
        engine.module.a.weight[rank] += 1.0

    def same_on_all(engine: Any) -> None:
        a_row(engine, 0)

    def on_rank_1(engine: Any) -> None:
        if engine.global_rank == 1:
            a_row(engine, 2)

    def other_values(engine: Any) -> None:
        a_row(engine, 2 * engine.global_rank)

    @torch.no_grad()
    def taken_back(engine: Any) -> None:
        if engine.global_rank == 0:
            weight = engine.module.a.weight
            before = weight.clone()
            weight.zero_()
            weight.copy_(before)

    for precision, stage in itertools.product(("fp32", "bf16"), (0, 1, 2)):
        for write in (same_on_all, on_rank_1, other_values, taken_back):
            engine = by_hand.build(by_hand.Case(precision, stage))
            dtype = by_hand.Case(precision).dtype
            with warnings_of("redline") as seen:
                for number in range(3):
                    engine.backward(by_hand.loss_of(engine, number, engine.global_rank, "a", dtype=dtype))
                    engine.step()
                    if number == 0:
                        write(engine)
                for _ in range(2):  # the second one has nothing new to say, but of parameters that still differ
                    engine.save_checkpoint(f"{folder}/{precision}{stage}{write.__name__}")
            found[f"{write.__name__} {stage} {precision}"] = seen
            if write is same_on_all:
                with warnings_of("redline") as found[f"after_the_step {stage} {precision}"]:
                    on_rank_1(engine)
                    engine.save_checkpoint(f"{folder}/{precision}{stage}{write.__name__}")
    return found


def test_a_write_that_some_ranks_lack_is_reported_even_if_a_step_has_made_the_ranks_equal(tmp_path: Path) -> None:
    first, _ = run_ranks(writes_before_a_step, 2, str(tmp_path))
    assert len(first) == 30
    for where, warnings in first.items():
        write, stage, _ = where.split()
        if write in ("same_on_all", "taken_back"):
            assert warnings == [], where
        elif write == "after_the_step":
            assert len(warnings) == 1, where
            assert "1 of the model's parameters differ on ranks 0-1: a.weight" in warnings[0]
        elif stage == "0":
            assert len(warnings) == 2, where
            assert "1 of the model's parameters differ on ranks 0-1: a.weight" in warnings[1]
        else:
            assert len(warnings) == 1, where
            assert "the same values into 1 of the model's parameters on ranks 0-1: a.weight" in warnings[0]
