"""What lies where in a folder of checkpoints, and what a process that was killed has left there.

DIR/latest                       the tag to go on from
DIR/TAG/manifest.json            every other file with size and checksum; written last
DIR/TAG/state.json               plain things that all processes share
DIR/TAG/.metadata, *.distcp      tensors, torch.distributed.checkpoint's
DIR/TAG/rank_R.pt                what is each process's own
DIR/.TAG.partial-XXXXXXXX        being written, or left by a process that was killed
DIR/.TAG.replaced                what TAG was, while another takes its place
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint.files import remove
from engine.checkpoint.manifest import NAME, Manifest, read_manifest
from engine.errors import EngineError

__all__ = [
    "LATEST",
    "STATE",
    "Found",
    "aside",
    "check_tag",
    "find",
    "new_partial",
    "put_in_place",
    "rank_file",
    "tags",
    "tidy",
]

LATEST = "latest"
STATE = "state.json"

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.(.+)\.replaced")


class Found(NamedTuple):
    """A whole checkpoint, as far as its manifest tells."""

    folder: Path
    manifest: Manifest


def rank_file(rank: int) -> str:
    """The file of one process's own state."""
    return f"rank_{rank}.pt"


def check_tag(tag: str) -> str:
    """A tag that can be the name of a folder.

    Raises:
        EngineError: it cannot.
    """
    if (
        not tag
        or tag.startswith(".")
        or tag == LATEST
        or any(sign in tag for sign in '/\\\0:*?"<>|\n')
        or tag != tag.strip()
    ):
        raise EngineError(
            f"tag {tag!r} cannot be the name of a folder; give one without slashes, colons and the "
            f'like, that does not begin with a dot and is not "{LATEST}"'
        )
    return tag


def new_partial(parent: Path, tag: str) -> Path:
    """A name for a folder to write a checkpoint in."""
    return parent / f".{tag}.partial-{secrets.token_hex(4)}"


def aside(parent: Path, tag: str) -> Path:
    """Where a checkpoint steps while another takes its place."""
    return parent / f".{tag}.replaced"


def put_in_place(partial: Path, target: Path) -> None:
    """Make a folder that was written the checkpoint; at each instant it or the one that it replaces is found.

    POSIX replaces no folder that has something in it. So the old one steps aside first; a process that is killed in
    between leaves it under a name where `find` looks.
    """
    if target.exists():
        old = aside(target.parent, target.name)
        remove(old)
        os.rename(target, old)
    os.rename(partial, target)


def tidy(parent: Path) -> None:
    """Remove what killed processes have left, and give a checkpoint its name back that was about to be replaced."""
    for path in list(parent.iterdir()):
        if match := _REPLACED.fullmatch(path.name):
            if (parent / match[1]).exists():
                remove(path)
            else:
                os.rename(path, parent / match[1])
        elif _PARTIAL.fullmatch(path.name):
            if path.is_dir():
                remove(path)
            else:
                path.unlink(missing_ok=True)


def tags(parent: Path) -> Iterator[str]:
    """Every tag in a folder: what has a manifest, whole or not."""
    for path in sorted(parent.iterdir()):
        match = _REPLACED.fullmatch(path.name)
        tag = match[1] if match else path.name
        if tag.startswith(".") or (match and (parent / tag).exists()) or not (path / NAME).is_file():
            continue
        yield tag


def find(parent: Path, tag: str) -> Found:
    """The checkpoint of that tag.

    Raises:
        Broken: it is not there, or was not finished.
    """
    folder = parent / tag
    if not folder.exists() and aside(parent, tag).is_dir():
        folder = aside(parent, tag)
    return Found(folder, read_manifest(folder))
