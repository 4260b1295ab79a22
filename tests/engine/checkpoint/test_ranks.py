"""Two processes that save and load: what is wrong on one is said on both, and neither waits for ever."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from redline import EngineError
from redline.checkpoint import storage
from tests import distributed
from tests.distributed import RanksFailed, run_ranks
from tests.engine.checkpoint.test_save import warnings_of
from tests.resume import Case, build, trained

CASE = Case({"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}})


def said(do: Callable[[], Any]) -> str:
    """The error that this process gets; "nothing" for none."""
    try:
        do()
    except EngineError as error:
        return str(error)
    return "nothing"


@contextmanager
def failing_disk(rank: int) -> Iterator[None]:
    """Of one process."""

    def put(path: Path, write: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == rank:
            patch.setattr(storage, "write_file", put)
        yield


def scenes(folder: str) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    there, happened = Path(folder), {}
    engines = {
        mode: build(CASE, checkpoint={"tag_validation": mode}) for mode in ("Warn", "Fail", "Ignore")
    }  # fmt: skip
    engine = engines["Warn"]
    for mode, each in engines.items():
        with warnings_of("redline") as heard:
            error = said(lambda each=each, mode=mode: each.save_checkpoint(there, f"{mode}{rank}"))
        happened[mode] = error, [message for message in heard if "tag" in message]
    trained(engine, 1)
    engine.save_checkpoint(there / "run", "one")
    trained(engine, 1)
    engine.save_checkpoint(there / "run", "two")

    with failing_disk(1):
        happened["a disk fails"] = said(lambda: engine.save_checkpoint(there / "run", "three"))
    bad = {"x": object()} if rank else {}
    happened["a client_state"] = said(lambda: engine.save_checkpoint(there / "run", "three", bad))
    happened["two folders"] = said(lambda: engine.save_checkpoint(there / f"own{rank}", "three"))
    happened["two tags"] = said(lambda: engine.load_checkpoint(there / "run", "one" if rank else "two"))
    happened["two wishes"] = said(lambda: engine.load_checkpoint(there / "run", load_module_only=rank == 1))
    custom = (lambda src, dst: dst.load_state_dict(src)) if rank == 1 else None
    happened["two functions"] = said(lambda: engine.load_checkpoint(there / "run", custom_load_fn=custom))
    happened["after that"] = sorted(os.listdir(there / "run"))

    import torch.distributed as dist

    dist.barrier()
    if rank == 0:
        os.truncate(there / "run" / "two" / "rank_1.pt", 10)
    dist.barrier()
    with warnings_of("redline") as heard:
        happened["a broken file"] = engine.load_checkpoint(there / "run")[0], engine.global_steps, heard

    background = build(CASE, redline={"checkpoint": {"async_save": True, "keep_last": 1}})
    trained(background, 3, lambda: background.save_checkpoint(there / "background"))
    background.wait_for_checkpoint()
    dist.barrier()
    happened["in the background"] = sorted(os.listdir(there / "background"))
    with failing_disk(1):
        background.save_checkpoint(there / "background", "more")
        happened["a disk fails in the background"] = said(background.wait_for_checkpoint)
    happened["a client_state in the background"] = said(
        lambda: (background.save_checkpoint(there / "background", "more", bad), background.wait_for_checkpoint())
    )
    happened["then"] = said(lambda: background.save_checkpoint(there / "background", "more"))
    background.wait_for_checkpoint()
    return happened


def test_what_is_wrong_on_one_process_is_said_on_both(tmp_path: Path) -> None:
    here, there = run_ranks(scenes, 2, str(tmp_path))
    warned = (
        "save_checkpoint: tag 'Warn0' on rank 0, 'Warn1' on rank 1; everything is saved under rank 0's; give the same"
    )
    assert here["Warn"][0] == there["Warn"][0] == "nothing" and here["Warn"][1][0].startswith(warned)
    failed = (
        "save_checkpoint: tag 'Fail0' on rank 0, 'Fail1' on rank 1; checkpoint.tag_validation is Fail; give the same "
        "tag on all ranks"
    )
    assert here["Fail"][0] == there["Fail"][0] == failed
    assert here["Ignore"] == there["Ignore"] == ("nothing", [])
    assert {path.name for path in tmp_path.iterdir() if path.name[-1].isdigit()} == {"Warn0", "Ignore0", "own0"}

    for scene in (
        "a disk fails",
        "a client_state",
        "two folders",
        "two tags",
        "two wishes",
        "two functions",
        "after that",
    ):
        assert here[scene] == there[scene]
    assert here["a disk fails"].startswith(f"save_checkpoint: rank 1: {tmp_path}/run: Input/output error (")
    assert here["a client_state"].startswith("save_checkpoint: rank 1: client_state['x'] is of type object; expected")
    assert here["two folders"].startswith(f"save_checkpoint: rank 1: {tmp_path}/own1/.three.partial-")
    assert here["two folders"].endswith(
        "which rank 0 has made, is not there; save_dir has to be one directory for all ranks"
    )
    assert "and a custom_load_fn on rank 1; expected the same" in here["two functions"]
    assert here["two tags"].startswith("load_checkpoint: called with tag 'two' and ")
    assert here["after that"] == ["latest", "one", "two"]
    assert (tmp_path / "own0").is_dir() and not list((tmp_path / "own0").iterdir())

    path, steps, messages = here["a broken file"]
    assert (path, steps) == (f"{tmp_path}/run/one", 1) == there["a broken file"][:2]
    assert len(messages) == 1 and "two/rank_1.pt: expected " in messages[0]

    assert here["in the background"] == ["global_step3", "latest"]
    for scene in ("a disk fails in the background", "a client_state in the background"):
        assert "rank 1: " in here[scene] and "rank 1: " in there[scene]
    assert here["then"] == there["then"] == "nothing"
    assert sorted(os.listdir(tmp_path / "background")) == ["latest", "more"]


def one_dies(folder: str) -> None:
    engine = build(CASE)
    trained(engine, 1)
    engine.save_checkpoint(folder, "one")
    if engine.global_rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "write_file", lambda *_: os._exit(9))
            engine.save_checkpoint(folder, "two")
    start = time.monotonic()
    Path(folder, "said").write_text(said(lambda: engine.save_checkpoint(folder, "two")))
    Path(folder, "took").write_text(str(time.monotonic() - start))


def test_a_process_that_dies_while_saving_ends_the_other_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_GRACE_SECONDS", 15.0)  # the other asks around before it says who has gone
    with pytest.raises(RanksFailed, match="rank 1 of 2 died with exit code 9"):
        run_ranks(one_dies, 2, str(tmp_path), fresh=True)
    said = (tmp_path / "said").read_text()
    assert said.startswith("save_checkpoint: step 1: lost rank 1"), said
    assert float((tmp_path / "took").read_text()) < 30
    assert {"one", "latest"} <= set(os.listdir(tmp_path)) and "two" not in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
    shutil.rmtree(tmp_path / "one")
