"""Writing a checkpoint: beside, flushed, listed in a manifest, renamed, and then named in `latest`."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint import layout
from engine.checkpoint.background import Background
from engine.checkpoint.files import Checksummed, Record, flush, remove
from engine.checkpoint.keep import remove_old
from engine.checkpoint.manifest import NAME, Manifest, text_of
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.state import Captured, capture, checksum
from engine.errors import EngineError
from engine.log import log
from engine.peers import name_ranks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan

    from engine.checkpoint.tensors import Writing
    from engine.engine import Engine

__all__ = ["save_checkpoint"]

_DOING = "save_checkpoint"
_SHOWN = 8  # names in a warning


def save_checkpoint(
    engine: Engine,
    save_dir: str | Path,
    tag: str | None,
    client_state: Mapping[str, Any],
    *,
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See :meth:`engine.Engine.save_checkpoint`."""
    options = engine.config.redline.checkpoint
    section = engine.config.checkpoint
    background: Background | None = engine._background
    if options.async_save and background is None:
        background = engine._background = Background(engine.world_size)
    if background is not None:
        background.wait()
    captured: Captured | None = None
    fault: Exception | None = None
    try:
        captured = _capture(engine, save_dir, client_state, exclude_frozen)
    except Exception as error:  # to be told to the other processes
        fault = error
    save = _Save(
        ranks=Ranks(engine.global_rank, engine.world_size, None if background is None else background.group),
        parent=Path(save_dir),
        tag=f"global_step{engine.global_steps}" if tag is None else str(tag),
        latest=save_latest,
        step=engine.global_steps,
        validation=(section.tag_validation if section is not None else "Warn").lower(),
        keep_last=options.keep_last,
        keep_every=options.keep_every,
    )
    if background is None or captured is None:
        values = {} if captured is None else captured.values()
        save.run(captured, fault, values)
    else:
        values = background.copy(captured.values())
        background.start(lambda: save.run(captured, fault, values))
    return True


def _capture(engine: Engine, save_dir: str | Path, client_state: Mapping[str, Any], exclude_frozen: bool) -> Captured:
    if not str(save_dir).strip():
        raise EngineError(f"save_dir: got {save_dir!r}; expected a folder")
    done = engine._accumulation.accumulated
    if done:
        log.warning(
            "%s: in the middle of an update, after %d of its %d micro-batches; their gradients are in no checkpoint: "
            "it holds the last complete update, and a run that resumes from it sees these micro-batches again, if it "
            "reads engine.training_dataloader, with other random numbers; save after the step() that ends an update",
            _DOING, done, engine.gradient_accumulation_steps(),
        )  # fmt: skip
    return capture(engine, client_state, exclude_frozen=exclude_frozen)


@dataclass
class _Offer:
    """What a process tells the others before anything is written."""

    tag: str
    folder: str
    plan: SavePlan
    buffers: dict[str, int]
    params: dict[str, int]


@dataclass
class _Save:
    """One checkpoint on its way to the disk, on one process."""

    ranks: Ranks
    parent: Path
    tag: str
    latest: bool
    step: int
    validation: str
    keep_last: int | None
    keep_every: int | None

    def run(self, captured: Captured | None, fault: Exception | None, values: Mapping[str, Tensor]) -> None:
        """Bring it to the disk, on all processes or on none.

        Args:
            captured: the state, or None for what could not be captured.
            fault: why not.
            values: what this process has of each tensor; nobody changes them while this runs.

        Raises:
            EngineError: on all processes, if it failed on one.
        """
        from engine.checkpoint.tensors import Writing  # see there

        writing: list[Writing] = []
        made: list[Path] = []

        def offer() -> _Offer:
            if fault is not None:
                raise fault
            assert captured is not None
            layout.check_tag(self.tag)
            writing.append(Writing(captured.tensors, self.ranks.rank))
            partial = layout.new_partial(self.parent, self.tag)
            if self.ranks.rank == 0:
                self.parent.mkdir(parents=True, exist_ok=True)
                layout.tidy(self.parent)
                made.append(partial)
                partial.mkdir()
            sums = (
                {name: checksum(values[key]) for name, key in captured.buffers.items()} if self.ranks.size > 1 else {}
            )
            return _Offer(self.tag, partial.name, writing[0].plan, sums, captured.params)

        try:
            offers = self.ranks.agree(_DOING, offer)
            assert captured is not None
            self._check_tags([each.tag for each in offers])
            self._compare_params([each.params for each in offers])
            self.tag = offers[0].tag
            partial = self.parent / offers[0].folder
            size = writing[0].settle([each.plan for each in offers])
            self.ranks.agree(_DOING, lambda: self._check_room(partial, size))
            own = {**captured.own, "buffers": _differing(captured.buffers, values, offers, self.ranks.rank)}
            written = self.ranks.agree(_DOING, lambda: self._write(partial, writing[0], values, own))
            shared = captured.shared
            self.ranks.agree(_DOING, lambda: self._finish(partial, writing[0], written, shared))
        except BaseException:
            for path in made:
                remove(path)
            raise

    def _check_tags(self, tags: list[str]) -> None:
        if len(set(tags)) == 1 or self.validation == "ignore":
            return
        said = ", ".join(f"{tag!r} on rank {rank}" for rank, tag in enumerate(tags) if tag != tags[0])
        said = f"{_DOING}: tag {tags[0]!r} on rank 0, {said}"
        if self.validation == "fail":
            raise EngineError(f"{said}; checkpoint.tag_validation is Fail; give the same tag on all ranks")
        log.warning("%s; all of it is saved under rank 0's; give the same tag on all ranks", said)

    def _compare_params(self, checksums: list[dict[str, int]]) -> None:
        """Warn where a model's parameters are not the same on all ranks, as they are after every optimizer step."""
        first = checksums[0]
        different: dict[str, list[int]] = {}
        for rank, own in enumerate(checksums):
            for name in sorted(first.keys() | own.keys()):
                if first.get(name) != own.get(name):
                    different.setdefault(name, []).append(rank)
        if not different:
            return
        ranks = sorted({rank for each in different.values() for rank in each})
        shown = ", ".join([*list(different)[:_SHOWN], *(["..."] if len(different) > _SHOWN else [])])
        log.warning(
            "%s: %d of the model's parameters differ between rank 0 and %s: %s; a script has probably written into "
            "them on some ranks only; write the same values on all ranks; nothing was repaired",
            _DOING, len(different), name_ranks(ranks), shown,
        )  # fmt: skip

    def _check_room(self, partial: Path, size: int) -> None:
        if not partial.is_dir():
            raise EngineError(f"{partial}, which rank 0 has made, is not there; save_dir has to be one folder for all")
        free = shutil.disk_usage(partial).free
        if free < size:
            raise EngineError(
                f"{self.parent}: the checkpoint takes {_mb(size)}, and the disk has {_mb(free)} free; nothing was "
                "written; make room, or keep fewer checkpoints with redline.checkpoint.keep_last"
            )

    def _write(
        self, partial: Path, writing: Writing, values: Mapping[str, Tensor], own: dict[str, Any]
    ) -> tuple[dict[str, Record], Any]:
        """This process's files; flushed, but for rank 0's, which has more to write."""

        def write() -> tuple[dict[str, Record], Any]:
            results = writing.write(partial, values)
            name = layout.rank_file(self.ranks.rank)
            with Checksummed(partial / name) as file:
                torch.save(own, file)  # type: ignore[arg-type]  # it writes, and nothing else
            records = {**writing.records, name: file.record}
            if self.ranks.rank != 0:
                flush(partial / name for name in records)
            return records, results

        done: tuple[dict[str, Record], Any] = self._on_disk(write)
        return done

    def _finish(
        self, partial: Path, writing: Writing, written: list[tuple[dict[str, Record], Any]], shared: dict[str, Any]
    ) -> None:
        """What only rank 0 does, when all have written."""
        if self.ranks.rank != 0:
            return
        latest = layout.new_partial(self.parent, layout.LATEST)

        def write() -> None:
            writing.finish([results for _, results in written])
            records = {name: record for files, _ in written for name, record in files.items()} | writing.records
            records[layout.STATE] = _write_text(partial / layout.STATE, json.dumps(shared))
            manifest = Manifest(self.tag, self.step, len(written), self.latest, time.time(), records)
            _write_text(partial / NAME, text_of(manifest))
            if self.latest:
                _write_text(latest, self.tag)
            # All at once, and the disk is waited for once: before it has its name nobody looks into the folder.
            mine = {*written[0][0], *writing.records, layout.STATE, NAME}
            flush([*(partial / name for name in mine), partial, *([latest] if self.latest else [])])
            layout.put_in_place(partial, self.parent / self.tag)
            if self.latest:
                os.replace(latest, self.parent / layout.LATEST)
            flush(
                [self.parent]
            )  # both names; a file system that keeps the order of renames cannot keep the second alone

        self._on_disk(write)
        remove(layout.aside(self.parent, self.tag))
        remove_old(self.parent, self.tag, self.keep_last, self.keep_every)

    def _on_disk(self, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise EngineError(
                f"{self.parent}: {error.strerror or error}{where}, while tag {self.tag} was written; what there was of "
                "it is removed; the checkpoints that were there are as they were"
            ) from error


def _differing(
    buffers: Mapping[str, str], values: Mapping[str, Tensor], offers: list[_Offer], rank: int
) -> dict[str, Tensor]:
    """Buffers in which this process differs from rank 0: running statistics, say, which nobody averages."""
    mine, first = offers[rank].buffers, offers[0].buffers
    return {name: values[key].cpu().clone() for name, key in buffers.items() if mine.get(name) != first.get(name)}


def _write_text(path: Path, text: str) -> Record:
    with Checksummed(path) as file:
        file.write(text.encode())
    return file.record


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
