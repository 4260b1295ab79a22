"""Files and folders that survive a power cut: written with a checksum, flushed, put in place in one step."""

from __future__ import annotations

import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Checksummed", "Record", "flush", "record_of", "remove", "why_unreadable"]

_CHUNK = 1 << 20  # bytes read or written at a time
_CRUMB = 1 << 15  # bytes below which a write waits for others
_AHEAD = 1 << 23  # bytes after which the disk is set to work
_datasync = getattr(os, "fdatasync", os.fsync)


class Record(NamedTuple):
    """What a file holds, in two numbers."""

    bytes: int
    crc32: int


class Checksummed:
    """A file being written from its beginning, whose checksum is known when it is done.

    CRC32 costs a seventh of a second per GiB, and finds every flipped bit, every short burst and all but one in four
    billion other faults; against an attacker no checksum in the same folder helps.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by whoever opened this
        self._bytes, self._crc32 = 0, 0
        self._small = bytearray()  # torch.save writes dozens of crumbs for each tensor
        self._behind = 0  # bytes that nobody has begun to bring to the disk
        self._flusher: threading.Thread | None = None
        self._fault: OSError | None = None

    def write(self, data: Any) -> int:
        """All of it, or an OSError, now or later."""
        size = len(data)
        self._bytes += size
        if size < _CRUMB:
            self._small += data
            if len(self._small) > _CHUNK:
                self.flush()
        else:
            self.flush()
            self._put(data)
        return size

    def _put(self, data: Any) -> None:
        view = memoryview(data)
        self._crc32 = zlib.crc32(view, self._crc32)
        self._behind += len(view)
        while view:
            view = view[self._file.write(view) :]
        if self._behind >= _AHEAD and (self._flusher is None or not self._flusher.is_alive()):
            # The disk works while the next bytes are copied and summed up, and is waited for less in the end.
            flusher = threading.Thread(target=self._flush_ahead)
            try:
                flusher.start()
            except RuntimeError:  # an interpreter that ends starts no thread any more
                return
            self._behind, self._flusher = 0, flusher

    def _flush_ahead(self) -> None:
        try:
            _datasync(self._file.fileno())
        except OSError as error:
            self._fault = error  # the system tells it once, and the flush at the end would hear nothing

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand what was held back to the operating system."""
        if self._small:
            small, self._small = self._small, bytearray()
            self._put(small)

    def fileno(self) -> int:
        """The operating system's number for it."""
        return self._file.fileno()

    def close(self) -> None:
        """Done; having all of it on the disk is another matter.

        Raises:
            OSError: the disk has refused some of it.
        """
        try:
            self.flush()
        finally:
            if self._flusher is not None:
                self._flusher.join()
            self._file.close()
        if self._fault is not None:
            raise self._fault

    @property
    def closed(self) -> bool:
        """Whether it is done."""
        return self._file.closed

    @property
    def record(self) -> Record:
        """Bytes and checksum of what was written, once it is closed."""
        return Record(self._bytes, self._crc32)

    def __enter__(self) -> Checksummed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def record_of(path: Path) -> Record:
    """Bytes and checksum of a file that is there."""
    size, crc32 = 0, 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return Record(size, crc32)


def flush(paths: Iterable[Path]) -> None:
    """Have files and folders on the disk before going on; together, so that the disk is waited for once."""
    failures: list[BaseException] = []

    def run(path: Path) -> None:
        try:
            _flush(path)
        except BaseException as error:
            failures.append(error)

    threads: list[threading.Thread] = []
    for path in paths:
        thread = threading.Thread(target=run, args=(path,))
        try:
            thread.start()  # no pool of concurrent.futures: none works any more while an interpreter waits for the last
        except RuntimeError:  # save; nor, from Python 3.12 on, does a thread start
            run(path)
        else:
            threads.append(thread)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder, and needs no flush of one
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """A folder and all in it; what is gone already does not matter."""
    shutil.rmtree(folder, ignore_errors=True)


def why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that `torch.load` has refused; its own words advise to let it run code."""
    text = str(error)
    if "eights only load failed" in text or "weights_only" in text:
        asks = re.search(r"(?:GLOBAL|global|class|function):? ([\w.]+\.\w+)", text)
        what = f"it asks for {asks[1]}" if asks else "it is no file of torch's"
        return f"{path}: {what}; nothing but tensors and plain types is read"
    return f"{path}: cannot be read: {type(error).__name__}: {text.partition(chr(10))[0]}"
