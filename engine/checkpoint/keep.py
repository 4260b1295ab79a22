"""Which checkpoints stay: the last few, and some for ever."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from engine.checkpoint import layout
from engine.checkpoint.files import remove
from engine.checkpoint.manifest import Broken, Manifest
from engine.log import log

__all__ = ["remove_old", "superfluous"]


def superfluous(
    saved: Iterable[Manifest], keep_last: int | None, keep_every: int | None, kept: Iterable[str] = ()
) -> list[str]:
    """The tags to be removed, oldest first.

    Those that were saved with save_latest=False are neither counted nor removed: they are no part of the row.

    Args:
        saved: of all checkpoints in a folder.
        keep_last: how many of the newest stay, by the time they were saved; None for all.
        keep_every: those after a multiple of so many updates stay, too; None for none.
        kept: tags that stay in any case.
    """
    if keep_last is None:
        return []
    row = sorted((each for each in saved if each.latest), key=lambda each: (each.time, each.step))
    kept = set(kept)
    return [
        each.tag
        for each in row[:-keep_last]
        if each.tag not in kept and not (keep_every is not None and each.step % keep_every == 0)
    ]


def remove_old(parent: Path, tag: str, keep_last: int | None, keep_every: int | None) -> None:
    """Remove old checkpoints, now that `tag` is on the disk; never the one that `latest` names, nor anything else."""
    if keep_last is None:
        return
    saved = []
    for name in layout.tags(parent):
        try:
            found = layout.find(parent, name)
        except Broken:
            continue  # not ours to judge
        if found.manifest.tag == name and found.folder.name == name:
            saved.append(found.manifest)
    try:
        latest = (parent / layout.LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        latest = ""
    for name in superfluous(saved, keep_last, keep_every, (tag, latest)):
        try:
            # Under another name first: one that is killed in between leaves no half of a checkpoint that looks whole.
            going = layout.new_partial(parent, name)
            os.rename(parent / name, going)
            remove(going)
        except OSError as error:
            log.warning(
                "save_checkpoint: %s is to go (keep_last %d), and cannot be removed: %s", name, keep_last, error
            )
