"""Finding a checkpoint that is whole, and reading it: nothing in the engine moves before all of it is there."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint import layout
from engine.checkpoint.adopt import adopt
from engine.checkpoint.deepspeed_files import is_deepspeeds
from engine.checkpoint.manifest import Broken, faults, text_of
from engine.checkpoint.opened import Opened, open_checkpoint
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.restore import Restore, Wanted
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["load_checkpoint"]

_DOING = "load_checkpoint"
_SHOWN = 4  # faults of one checkpoint


def load_checkpoint(
    engine: Engine, load_dir: str | Path, tag: str | None, wanted: Wanted
) -> tuple[str | None, dict[str, Any] | None]:
    """See :meth:`engine.Engine.load_checkpoint`."""
    ranks = Ranks(engine.global_rank, engine.world_size)
    parent = Path(load_dir)
    candidates, why = _candidates(ranks, parent, None if tag is None else str(tag), wanted)
    deepspeeds = ranks.agree(_DOING, lambda: bool(candidates) and is_deepspeeds(parent / candidates[0]))
    if any(deepspeeds):
        return adopt(engine, ranks, parent / candidates[0], wanted)
    for candidate in candidates:
        opened, wrong = _open(ranks, parent, candidate)
        if opened is not None and not wrong:
            restore = _plan(engine, ranks, opened, wanted)
            wrong = _read(ranks, restore)
            if not wrong:
                if why:
                    log.warning(
                        "%s: %s; %s, the newest that is whole, is loaded instead", _DOING, _said(why), candidate
                    )
                return str(parent / candidate), restore.install()
        why += wrong[:_SHOWN] + ([f"{len(wrong) - _SHOWN} more such files"] if len(wrong) > _SHOWN else [])
    if why:
        others = f"; the tags in {parent} are {', '.join(layout.tags(parent)) or 'none'}" if tag is not None else ""
        raise EngineError(f"{_DOING}: {_said(why)}{others}")
    return None, None


def _said(why: list[str]) -> str:
    return "; ".join(why)


def _candidates(ranks: Ranks, parent: Path, tag: str | None, wanted: Wanted) -> tuple[list[str], list[str]]:
    """Tags to try, the best first, and what is wrong already; as rank 0 sees them."""
    looks = ranks.agree(_DOING, lambda: (tag, wanted.flags, _look(parent, tag)))
    for rank, (other, flags, _) in enumerate(looks):
        first = looks[0]
        if (other, flags) != first[:2]:
            raise EngineError(
                f"{_DOING}: called with tag {first[0]!r} and {first[1]} on rank 0, with tag {other!r} and {flags} on "
                f"rank {rank}; expected the same on all ranks"
            )
    candidates, why = looks[0][2]
    if not candidates and not why:
        found = list(layout.tags(parent)) if parent.is_dir() else []
        hint = f"; tags that were saved with save_latest=False have to be named: {', '.join(found)}" if found else ""
        log.warning("%s: no checkpoint in %s: nothing is loaded%s", _DOING, parent, hint)
    return list(candidates), list(why)


def _look(parent: Path, tag: str | None) -> tuple[list[str], list[str]]:
    if tag is not None:
        return [tag], []
    path = parent / layout.LATEST
    why, latest = [], ""
    try:
        latest = layout.check_tag(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EngineError) as error:
        why = [f"{path} names no tag: {error}"]
    others, broken = [], []
    for other in layout.tags(parent) if parent.is_dir() else ():
        try:
            manifest = layout.find(parent, other).manifest
        except Broken:
            broken.append(other)  # to be named, if it comes to that
            continue
        # A process that is killed in its very first save leaves no `latest`. What was not to be the latest is not
        # looked for either, as in DeepSpeed.
        if latest or why or manifest.latest:
            others.append((manifest.time, manifest.step, other))
    if others and not latest and not why:
        why = [f"{path} is not there"]
    rest = [other for _, _, other in sorted(others, reverse=True)] + (broken if latest or others or why else [])
    return list(dict.fromkeys([latest, *rest] if latest else rest)), why


def _open(ranks: Ranks, parent: Path, tag: str) -> tuple[Opened | None, list[str]]:
    """A checkpoint, if all of its files hold; else what is wrong with it. Each process looks at its share of them."""
    opened: Opened | None = None

    def look() -> tuple[int, list[str]]:
        nonlocal opened
        try:
            found = layout.find(parent, tag)
            wrong = list(faults(found.folder, found.manifest, share=ranks.rank, shares=ranks.size))
            if not wrong:
                opened = open_checkpoint(found, ranks.rank)
        except Broken as error:
            return 0, [str(error)]
        return zlib.crc32(text_of(found.manifest).encode()), wrong

    looks = ranks.agree(_DOING, look)
    wrong = list(dict.fromkeys(fault for _, faults_ in looks for fault in faults_))
    if not wrong and len({which for which, _ in looks}) > 1:
        wrong = [f"{parent / tag} is not the same on all ranks; load_dir has to be one folder for all"]
    return opened, wrong


def _plan(engine: Engine, ranks: Ranks, opened: Opened, wanted: Wanted) -> Restore:
    made: list[Restore] = []
    ranks.agree(_DOING, lambda: made.append(Restore(engine, opened, wanted)))
    return made[0]


def _read(ranks: Ranks, restore: Restore) -> list[str]:
    """Read the tensors; what was wrong, if anything."""

    def read() -> list[str]:
        try:
            restore.read()
        except Broken as error:  # a tensor's file with code in it is found here
            return [str(error)]
        return []

    return list(dict.fromkeys(fault for wrong in ranks.agree(_DOING, read) for fault in wrong))
