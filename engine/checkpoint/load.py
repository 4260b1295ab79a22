"""Reading a checkpoint: the newest that is whole, checked before anything in the engine moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint import layout
from engine.checkpoint.adopt import adopt
from engine.checkpoint.deepspeed_files import deepspeeds_folder
from engine.checkpoint.layout import Found
from engine.checkpoint.manifest import Broken, faults
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.restore import Wanted, plan_restore
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["load_checkpoint"]

_DOING = "load_checkpoint"


def load_checkpoint(
    engine: Engine, load_dir: str | Path, tag: str | None, wanted: Wanted
) -> tuple[str | None, dict[str, Any] | None]:
    """See :meth:`engine.Engine.load_checkpoint`."""
    ranks = Ranks(engine.global_rank, engine.world_size)
    parent = Path(load_dir)
    tag = None if tag is None else str(tag)
    asked = ranks.agree(_DOING, lambda: (tag, wanted.asked))
    if len(set(asked)) > 1:
        raise EngineError(f"{_DOING}: processes ask for different things: {asked}")
    deepspeeds = ranks.agree_own(_DOING, lambda: deepspeeds_folder(parent, tag))
    if deepspeeds is not None:
        return adopt(engine, ranks, deepspeeds, wanted)
    found = _choose(ranks, parent, tag)
    if found is None:
        return None, None
    restore = ranks.agree_own(_DOING, lambda: plan_restore(engine, found, wanted))
    ranks.agree(_DOING, restore.read)
    client_state = restore.install()
    return str(parent / found.manifest.tag), client_state


def _choose(ranks: Ranks, parent: Path, tag: str | None) -> Found | None:
    """The checkpoint to load, whole; None where there is none at all."""
    candidates: list[str] = []
    why: list[str] = []

    def list_candidates() -> tuple[list[str], list[str]]:
        return ([tag], []) if tag is not None else _candidates(parent)

    candidates, why = ranks.agree(_DOING, list_candidates)[0]
    for each in candidates:
        found: Found | None = None

        def look(each: str = each) -> tuple[int, list[str]]:
            nonlocal found
            try:
                found = layout.find(parent, each)
            except Broken as error:
                return 0, [str(error)]
            wrong = list(faults(found.folder, found.manifest, share=ranks.rank, shares=ranks.size))
            return hash(json.dumps(found.manifest.files)), wrong

        looks = ranks.agree(_DOING, look)
        wrong = list(dict.fromkeys(fault for _, faults_ in looks for fault in faults_))
        if not wrong:
            if why:
                log.warning(
                    "load_checkpoint: %s; tag %s, the newest that is whole, is loaded instead", "; ".join(why), each
                )
            assert found is not None
            return found
        why += wrong
    if why:
        raise EngineError(f"{_DOING}: " + "; ".join(why))
    log.warning("load_checkpoint: %s has no checkpoint: nothing is loaded", parent)
    return None


def _candidates(parent: Path) -> tuple[list[str], list[str]]:
    """Tags to try, the best first, and what was wrong on the way to them."""
    try:
        latest = (parent / layout.LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        latest = ""
    if not parent.is_dir():
        return [], []
    others = []
    for tag, _ in layout.tags(parent):
        try:
            found = layout.find(parent, tag)
        except Broken:
            continue
        if tag != latest:
            others.append((found.manifest.step, tag))
    rest = [tag for _, tag in sorted(others, reverse=True)]
    return ([latest] if latest else []) + rest, []
