"""A directory of checkpoints: names, files that survive a crash, manifests, and which checkpoints are kept.

DIR/latest                       the tag to continue from
DIR/TAG/manifest.json            size and checksum of every other file; written last
DIR/TAG/state.pt                 what all ranks share, besides tensors of the model and the optimizer
DIR/TAG/.metadata, *.distcp      those tensors, in the format of torch.distributed.checkpoint
DIR/TAG/rank_R.pt                what each rank has of its own
DIR/.TAG.partial-XXXXXXXX        being written, or left by a process that was killed
DIR/.TAG.replaced                the old TAG, while a new one takes its place

What the manifest lists is the checkpoint; it is intact if every file has the size and checksum in the manifest. Other
files are ignored.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import TypeAdapter

from redline.errors import EngineError
from redline.log import log

__all__ = [
    "LATEST", "MANIFEST", "CorruptCheckpoint", "FileRecord", "Manifest", "Records", "check_free_space", "check_tag",
    "claim", "find", "fsync", "manifests", "partial_path", "read_latest", "record_of", "remove", "remove_expired",
    "rename_into_place", "replaced_path", "verify_files", "write_file",
]  # fmt: skip

LATEST, MANIFEST = "latest", "manifest.json"
FORMATS = (1, 2)  # 1, until 0.1.0, has state.json; 2 has state.pt

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.(.+)\.replaced")
_LONGEST_NAME = 255  # bytes, on nearly all file systems
_BUFFER = 1 << 20  # bytes; torch.save writes dozens of small pieces for each tensor


class CorruptCheckpoint(EngineError):
    """A directory is not an intact checkpoint; the message says which file and why."""


# -- files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file, as in a manifest; CRC32 finds every flipped bit, and stops no attacker."""

    bytes: int
    crc32: str


Records = dict[str, FileRecord]  # of files, by name


class _ChecksummedFile(io.BufferedWriter):
    """A file that is written from its beginning; reading it again for its checksum would cost a fifth more."""

    crc32 = 0

    def write(self, data: Any, /) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)


def write_file(path: Path, write: Callable[[Any], object]) -> FileRecord:
    """Write a file, not flushed to disk, by what is given an open file; its size and checksum."""
    with _ChecksummedFile(open(path, "wb", buffering=0), _BUFFER) as file:
        write(file)
        return FileRecord(file.tell(), f"{file.crc32:08x}")


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A regular file; OSError at once for a pipe, which would wait for a writer, or a device."""
    nonblocking = getattr(os, "O_NONBLOCK", 0)
    # Unbuffered: a buffer would copy each chunk once more.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | nonblocking)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        yield file


def record_of(path: Path) -> FileRecord:
    """Size and checksum of an existing file."""
    crc32 = 0
    with _open(path) as file:
        while chunk := file.read(_BUFFER):
            crc32 = zlib.crc32(chunk, crc32)
        return FileRecord(file.tell(), f"{crc32:08x}")


def _read(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
        return file.read()


def fsync(paths: Iterable[Path]) -> None:
    """Wait until files and directories are on disk; all at the same time, so that the disk is waited for once."""
    paths = list(paths)
    try:
        with ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(_fsync, paths))
    except RuntimeError:  # no thread starts while the interpreter waits for the last asynchronous save
        for path in paths:
            _fsync(path)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_free_space(directory: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to write what does not fit on the disk; EngineError, and nothing was written."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise EngineError(
            f"{what} needs {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB free; nothing was written; "
            f"{remedy}"
        )


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with everything in it; what is not there, or cannot be removed, stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


# -- the manifest ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's directory contains."""

    tag: str
    step: int  # optimizer steps done
    world_size: int
    latest: bool  # saved with `save_latest`
    time: float  # seconds since 1970; after that of the checkpoint that was the latest then
    files: Records  # every other file, by name
    format: int = FORMATS[-1]

    def to_json(self) -> str:
        """The content of the file, with a checksum of its own."""
        body = {**asdict(self), "versions": {"torch": torch.__version__}}
        return json.dumps({**body, "crc32": _checksum(body)}, indent=1) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a checkpoint's directory; CorruptCheckpoint if there is none, or it is not valid."""
        path = directory / MANIFEST
        try:
            document = json.loads(_read(path, limit=1 << 26))
            if document["format"] not in FORMATS:
                raise ValueError(f"format {document['format']!r}; this version of Redline reads {FORMATS}")
            crc32 = document.pop("crc32")
            if _checksum(document) != crc32:
                raise ValueError(f"expected checksum {crc32}, found {_checksum(document)}")
            return _MANIFEST.validate_python(document)
        except FileNotFoundError:
            reason = f"has no {MANIFEST}, which is written last" if os.path.isdir(directory) else "does not exist"
            raise CorruptCheckpoint(f"{directory} {reason}") from None
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"{path}: not a valid manifest: {type(error).__name__}: {error}") from error


_MANIFEST = TypeAdapter(Manifest)


def _checksum(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def verify_files(directory: Path, manifest: Manifest, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with the files that a manifest lists, one sentence per file; each rank reads a part of them."""
    problems = []
    # Sorted by size, so that every rank reads large files and small ones.
    names = sorted(manifest.files, key=lambda name: (manifest.files[name].bytes, name), reverse=True)
    for name in names[rank::world_size]:
        path, expected = directory / name, manifest.files[name]
        try:
            if (size := path.stat().st_size) != expected.bytes:
                problems.append(f"{path}: expected {expected.bytes} bytes, found {size}")
            elif (found := record_of(path)) != expected:
                problems.append(f"{path}: expected checksum {expected.crc32}, found {found.crc32}")
        except FileNotFoundError:
            problems.append(f"{path}: missing; expected {expected.bytes} bytes")
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error}")
    return problems


# -- the directory --------------------------------------------------------------------------------------


def partial_path(parent: Path, tag: str) -> Path:
    """A new name under which a checkpoint is written."""
    return parent / f".{tag}.partial-{secrets.token_hex(4)}"


def replaced_path(parent: Path, tag: str) -> Path:
    """The name of a checkpoint while another one takes its place."""
    return parent / f".{tag}.replaced"


def check_tag(tag: str) -> str:
    """Refuse a tag that cannot be a directory's name."""
    is_hidden = not tag or tag.startswith(".") or tag == LATEST
    if is_hidden or any(sign in tag for sign in '/\\\0:*?"<>|\n') or tag != tag.strip():
        raise EngineError(
            f"tag {tag!r} cannot be a directory's name; expected a name without slashes, colons and the like that does "
            f'not start with a dot and is not "{LATEST}"'
        )
    room = _LONGEST_NAME - len(partial_path(Path(), "").name)
    if len(os.fsencode(tag)) > room:
        raise EngineError(f"tag {tag!r} is too long for a directory's name; expected at most {room} bytes")
    return tag


@contextmanager
def claim(parent: Path) -> Iterator[None]:
    """While a checkpoint is written: no other run takes its files for those of a run that was killed.

    Every run that saves has a shared lock on the directory. One that gets it exclusively is alone, and tidies.
    """
    if sys.platform == "win32":  # has no locks of this kind
        _tidy(parent)
        yield
        return
    import fcntl

    handle, is_alone = os.open(parent, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_alone = False
        except OSError:  # a file system without locks
            pass
        if is_alone:
            _tidy(parent)
        else:
            log.warning(
                "save_checkpoint: another run is saving in %s, too; both save intact checkpoints, but `latest` and "
                "keep_last follow whichever saved last; give each run a directory of its own", parent,
            )  # fmt: skip
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a fork, such as a data worker, has the handle, too
        with suppress(OSError):
            os.close(handle)


def _tidy(parent: Path) -> None:
    """Remove what killed processes have left; a checkpoint that was about to be replaced gets its name back."""
    for path in list(parent.iterdir()):
        match = _REPLACED.fullmatch(path.name)
        if match and not (parent / match[1]).exists():  # killed between the two renames
            os.rename(path, parent / match[1])
        elif match or _PARTIAL.fullmatch(path.name):
            remove(path)


def rename_into_place(partial: Path, target: Path) -> None:
    """Give a complete checkpoint its name; at every instant it or the one that it replaces can be found.

    POSIX replaces no directory that has files in it, so the old one is renamed first; `find` knows that name, too.
    """
    if target.exists():
        old = replaced_path(target.parent, target.name)
        remove(old)
        os.rename(target, old)
    os.rename(partial, target)


def find(parent: Path, tag: str) -> tuple[Path, Manifest]:
    """The directory of a tag and its manifest, of which files are not verified yet; else CorruptCheckpoint."""
    directory, old = parent / tag, replaced_path(parent, tag)
    if not os.path.exists(directory) and os.path.isdir(old):  # unlike pathlib's, False for a name that is too long
        directory = old
    return directory, Manifest.read(directory)


def manifests(parent: Path) -> dict[str, Manifest | None]:
    """The manifest of every tag in a directory, sorted by tag; None for one that is not valid."""
    found: dict[str, Manifest | None] = {}
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = _REPLACED.fullmatch(path.name)
        tag = match[1] if match else path.name
        with suppress(OSError, CorruptCheckpoint):  # a directory may belong to somebody else, such as lost+found
            if not tag.startswith(".") and (path / MANIFEST).is_file():
                found[tag] = None
                found[tag] = find(parent, tag)[1]
    return found


def read_latest(parent: Path) -> str | None:
    """The tag in the file `latest`, None if there is no such file; EngineError if it does not contain a tag."""
    path = parent / LATEST
    try:
        return check_tag(_read(path, limit=1024).decode("utf-8").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EngineError) as error:
        raise EngineError(f"{path} does not contain a tag: {error}") from error


def remove_expired(parent: Path, keep_last: int, keep_every: int | None, protected: Iterable[str]) -> None:
    """Remove all but the last saved checkpoints and multiples of `keep_every` optimizer steps.

    What `latest` names, what was saved with `save_latest=False` and what is not a checkpoint stays.
    """
    kept = set(protected)
    with suppress(EngineError):
        kept.add(read_latest(parent) or "")
    found = manifests(parent).items()
    saved = [each for tag, each in found if each is not None and each.latest and each.tag == tag]
    for manifest in sorted(saved, key=lambda each: (each.time, each.step))[:-keep_last]:
        tag = manifest.tag
        if tag in kept or (keep_every is not None and manifest.step % keep_every == 0):
            continue
        try:
            # Renamed first: a kill halfway leaves no part of a checkpoint under a checkpoint's name.
            going = partial_path(parent, tag)
            os.rename(parent / tag, going)
            remove(going)
        except OSError as error:
            log.warning("save_checkpoint: keep_last: %s cannot be removed: %s", parent / tag, error)
