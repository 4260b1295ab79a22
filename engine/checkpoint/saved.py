"""A checkpoint of our own as tensors by name, each read from the files on its own: no engine, one process, no GPU."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint import layout
from engine.checkpoint.files import why_unreadable
from engine.checkpoint.layout import Found
from engine.checkpoint.manifest import Broken
from engine.checkpoint.opened import with_plain_names
from engine.checkpoint.stored import PART, Stored

__all__ = ["SavedCheckpoint"]

_MODEL = "model."  # what the keys of weights and buffers begin with


class _Chunk(NamedTuple):
    """A block of a tensor, and the stretch of a file that has it."""

    offsets: torch.Size
    sizes: torch.Size
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class _Chunked:
    """A tensor in blocks; see :class:`Stored`."""

    folder: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype
    chunks: list[_Chunk]

    def parts(self) -> Iterator[Tensor]:
        for block in self._blocks():
            yield from torch.split(block.contiguous().reshape(-1), PART)

    def _blocks(self) -> Iterator[Tensor]:
        """Blocks that follow each other in memory: those of the files where they are rows, else the whole tensor."""
        chunks = sorted(self.chunks, key=lambda chunk: tuple(chunk.offsets))
        row = 0
        for chunk in chunks:
            if not self.shape or (chunk.sizes[1:] == self.shape[1:] and chunk.offsets[0] == row):
                row += chunk.sizes[0] if self.shape else 1
            else:
                row = -1
                break
        if row == (self.shape[0] if self.shape else 1):
            yield from map(self._read, chunks)
            return
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in chunks:
            block = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                block = block.narrow(dim, offset, size)
            block.copy_(self._read(chunk))
        yield whole

    def _read(self, chunk: _Chunk) -> Tensor:
        path = self.folder / chunk.file
        with open(path, "rb", buffering=0) as file:
            try:
                # Through the file's own window, so that the values are in memory once.
                stretch: Any = _Stretch(file, chunk.begin, chunk.length)
                tensor = torch.load(stretch, map_location="cpu", weights_only=True)
            except Exception as error:  # of a broken file: RuntimeError, UnpicklingError, EOFError, ...
                raise Broken(f"{self.name}: {why_unreadable(path, error)}") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes or tensor.dtype != self.dtype:
            raise Broken(f"{path}: {self.name} is not what the metadata says")
        return tensor


class _Stretch(io.RawIOBase):
    """A part of an open file as if it were a file."""

    def __init__(self, file: io.FileIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        window = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(window) or 0
        self._at += count
        return count


class SavedCheckpoint:
    """One tag's folder.

    Args:
        found: its files hold.

    Attributes:
        aliases: further names of tied tensors, with the one that counts.
        buffers: names of those that are no parameters.
        left_out: parameters that were not saved, being frozen.

    Raises:
        Broken: it cannot be read.
    """

    def __init__(self, found: Found) -> None:
        from engine.checkpoint.tensors import read_metadata  # see there

        self._folder = found.folder
        self._metadata = read_metadata(found.folder)
        self._entries: Mapping[str, Any] = self._metadata.state_dict_metadata  # each of a tensor
        try:
            shared = with_plain_names(json.loads((found.folder / layout.STATE).read_text(encoding="utf-8")))
            self.aliases: dict[str, str] = dict(shared["aliases"])
            self.buffers: list[str] = list(shared["buffers"])
            self.left_out: list[str] = list(shared["left_out"])
            self._names: list[str] = [*shared["weights"], *self.buffers]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Broken(f"{found.folder / layout.STATE}: it is not a checkpoint's: {error!r}") from error

    def tensors(self) -> dict[str, Stored]:
        """Weights, in fp32 where there is an fp32 weight, and buffers, by name; no aliases."""
        places: dict[str, list[_Chunk]] = {}
        sizes = {
            (key, tuple(chunk.offsets)): chunk.sizes for key, entry in self._entries.items() for chunk in entry.chunks
        }
        storage: Any = self._metadata.storage_data
        for index, place in storage.items():
            offsets = tuple(index.offset or ())
            if (index.fqn, offsets) in sizes:
                size = sizes[index.fqn, offsets]
                chunk = _Chunk(torch.Size(offsets), size, place.relative_path, place.offset, place.length)
                places.setdefault(index.fqn, []).append(chunk)
        tensors: dict[str, Stored] = {}
        for name in self._names:
            entry = self._entries.get(f"{_MODEL}{name}")
            chunks = places.get(f"{_MODEL}{name}", [])
            if entry is None or sum(chunk.sizes.numel() for chunk in chunks) != entry.size.numel():
                raise Broken(f"{self._folder}: {name} is not in its files, or not all of it")
            tensors[name] = _Chunked(self._folder, name, entry.size, entry.properties.dtype, chunks)
        return tensors
