"""A checkpoint's list of its own files, written last: a folder with a manifest that holds is whole.

Sizes and checksums of all other files, and a checksum of the manifest itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.files import Record, record_of

__all__ = ["FORMAT", "NAME", "Broken", "Manifest", "faults", "read_manifest", "text_of"]

NAME = "manifest.json"
FORMAT = 1  # of the whole folder; raised when an older Redline could not read a newer one's


class Broken(Exception):
    """A folder is no whole checkpoint; the message says why."""


@dataclass(frozen=True)
class Manifest:
    """What a folder should hold.

    Attributes:
        tag: the name of the checkpoint.
        step: updates that were done.
        world_size: processes that wrote it.
        latest: whether it was saved as the one to go on from.
        time: when, in seconds since 1970.
        files: every other file, by name.
    """

    tag: str
    step: int
    world_size: int
    latest: bool
    time: float
    files: Mapping[str, Record]


def text_of(manifest: Manifest) -> str:
    """The file."""
    body = {
        "format": FORMAT,
        "versions": {"torch": torch.__version__},
        "tag": manifest.tag,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "latest": manifest.latest,
        "time": manifest.time,
        "files": {
            name: {"bytes": record.bytes, "crc32": f"{record.crc32:08x}"}
            for name, record in sorted(manifest.files.items())
        },
    }
    return json.dumps({**body, "crc32": _seal(body)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        Broken: there is none, or it does not hold.
    """
    path = folder / NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Broken(
            f"{folder} has no {NAME}, which is written last" if folder.is_dir() else f"{folder} is not there"
        ) from None
    except (OSError, ValueError) as error:
        raise Broken(f"{path} cannot be read: {error}") from error
    try:
        version = document["format"]
        seal = document.pop("crc32")
        if version == FORMAT and _seal(document) != seal:
            raise Broken(f"{path}: expected checksum {seal}, found {_seal(document)}")
        if version != FORMAT:
            raise Broken(f"{path}: format {version!r}; this Redline reads {FORMAT}")
        files = {name: Record(int(each["bytes"]), int(each["crc32"], 16)) for name, each in document["files"].items()}
        return Manifest(
            document["tag"],
            int(document["step"]),
            int(document["world_size"]),
            bool(document["latest"]),
            float(document["time"]),
            files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Broken(f"{path}: it is not a checkpoint's: {error!r}") from error


def _seal(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def faults(folder: Path, manifest: Manifest, *, share: int = 0, shares: int = 1) -> Iterator[str]:
    """What is wrong with a folder's files, one sentence a file; a part of the files if others look at the rest.

    Args:
        folder: a checkpoint's.
        manifest: its list.
        share: which part to look at, 0 to shares - 1; part 0 also finds what should not be there.
        shares: number of parts.
    """
    # By size, so that every share has large ones and small ones.
    names = sorted(manifest.files, key=lambda name: (manifest.files[name].bytes, name), reverse=True)
    for name in names[share::shares]:
        expected, path = manifest.files[name], folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                yield f"{path}: expected {expected.bytes} bytes, found {size}"
                continue
            found = record_of(path)
        except FileNotFoundError:
            yield f"{path}: missing; expected {expected.bytes} bytes"
        except OSError as error:
            yield f"{path}: cannot be read: {error}"
        else:
            if found != expected:
                yield f"{path}: expected checksum {expected.crc32:08x}, found {found.crc32:08x}"
    if share == 0:
        for path in sorted(folder.iterdir()):
            # Hidden files are what file systems and desktops leave behind.
            if path.name not in manifest.files and path.name != NAME and not path.name.startswith("."):
                yield f"{path}: foreign; it is not in {NAME}; move it away"
