"""Writing a checkpoint: beside, flushed, listed in a manifest, renamed, and then named in `latest`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint import layout
from engine.checkpoint.files import Checksummed, Record, flush, remove
from engine.checkpoint.manifest import NAME, Manifest, text_of
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.state import Captured, capture
from engine.errors import EngineError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan

    from engine.checkpoint.tensors import Writing
    from engine.engine import Engine

__all__ = ["save_checkpoint"]

_DOING = "save_checkpoint"


@dataclass
class Job:
    """One checkpoint on its way to the disk, on one process."""

    parent: Path
    tag: str
    partial: Path
    latest: bool
    step: int
    writing: Writing
    plans: list[SavePlan]
    values: dict[str, Tensor]
    shared: dict[str, Any]
    own: dict[str, Any]
    bytes: int
    records: dict[str, Record] = field(default_factory=dict)


def save_checkpoint(
    engine: Engine,
    save_dir: str | Path,
    tag: str | None,
    client_state: dict[str, Any],
    *,
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See :meth:`engine.Engine.save_checkpoint`."""
    ranks = Ranks(engine.global_rank, engine.world_size)
    job = _prepare(engine, ranks, save_dir, tag, client_state, save_latest, exclude_frozen)
    _write(job, ranks)
    return True


@dataclass
class _Offer:
    """What a process tells the others before anything is written."""

    tag: str
    partial: Path
    plan: SavePlan
    bytes: int
    buffers: dict[str, int]


def _prepare(
    engine: Engine,
    ranks: Ranks,
    save_dir: str | Path,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> Job:
    from engine.checkpoint.tensors import Writing, local  # see there

    captured: Captured | None = None
    writing: Writing | None = None

    def offer() -> _Offer:
        nonlocal captured, writing
        if not save_dir or str(save_dir).isspace():
            raise EngineError(f"save_dir: got {save_dir!r}; expected a folder")
        parent = Path(save_dir)
        name = layout.check_tag(f"global_step{engine.global_steps}" if tag is None else str(tag))
        partial = layout.new_partial(parent, name)
        captured = capture(engine, client_state, exclude_frozen=exclude_frozen)
        writing = Writing(captured.tensors, ranks.rank)
        if ranks.rank == 0:
            parent.mkdir(parents=True, exist_ok=True)
            layout.tidy(parent)
            partial.mkdir()
        size = sum(local(tensor).nbytes for tensor in captured.tensors.values())
        return _Offer(name, partial, writing.plan, size, captured.buffers)

    offers = ranks.agree(_DOING, offer)
    assert captured is not None and writing is not None
    first = offers[0]
    for name, buffer in captured.buffers.items():
        if first.buffers.get(name) != buffer:
            captured.own.setdefault("buffers", {})[name] = dict(engine.module.named_buffers())[name].detach().cpu()
    return Job(
        parent=Path(save_dir),
        tag=first.tag,
        partial=Path(save_dir) / first.partial.name,
        latest=save_latest,
        step=engine.global_steps,
        writing=writing,
        plans=[each.plan for each in offers],
        values={key: local(tensor) for key, tensor in captured.tensors.items()},
        shared=captured.shared,
        own=captured.own,
        bytes=first.bytes,
    )


def _write(job: Job, ranks: Ranks) -> None:
    """Bring a checkpoint to the disk; on all processes or on none."""
    try:
        results = ranks.agree(_DOING, lambda: _write_own(job, ranks))
        ranks.agree(_DOING, lambda: _finish(job, results) if ranks.rank == 0 else None)
    except BaseException:
        if ranks.rank == 0:
            remove(job.partial)
        raise


def _write_own(job: Job, ranks: Ranks) -> tuple[dict[str, Record], Any]:
    """This process's files; flushed, but for rank 0's, which has more to write."""
    if not job.partial.is_dir():
        raise EngineError(f"{job.partial}, which rank 0 has made, is not there; save_dir has to be one folder for all")
    results = job.writing.write(job.partial, job.plans, job.values)
    own = layout.rank_file(ranks.rank)
    records = {**job.writing.records, own: _save(job.partial / own, job.own)}
    if ranks.rank != 0:
        flush(job.partial / name for name in records)
    return records, results


def _save(path: Path, value: Any) -> Record:
    with Checksummed(path) as file:
        torch.save(value, file)  # type: ignore[arg-type]  # it writes, and nothing else
    return file.record


def _write_text(path: Path, text: str) -> Record:
    with Checksummed(path) as file:
        file.write(text.encode())
    return file.record


def _finish(job: Job, written: list[tuple[dict[str, Record], Any]]) -> None:
    """What only rank 0 does, when all have written."""
    mine = set(written[0][0])
    job.writing.finish([results for _, results in written])
    records = {name: record for files, _ in written for name, record in files.items()} | job.writing.records
    records[layout.STATE] = _write_text(job.partial / layout.STATE, json.dumps(job.shared))
    manifest = Manifest(job.tag, job.step, len(written), job.latest, records)
    _write_text(job.partial / NAME, text_of(manifest))
    latest = job.parent / f".{layout.LATEST}.partial"
    if job.latest:
        _write_text(latest, job.tag)
    # All at once, and the disk is waited for once: before it has a name, nobody looks into the folder.
    names = {*mine, *job.writing.records, layout.STATE, NAME}
    flush([*(job.partial / name for name in names), job.partial, *([latest] if job.latest else [])])
    layout.put_in_place(job.partial, job.parent / job.tag)
    if job.latest:
        os.replace(latest, job.parent / layout.LATEST)
    flush([job.parent])  # both names; a file system that keeps the order of renames cannot keep the second alone
    remove(job.parent / f".{job.tag}.replaced")
