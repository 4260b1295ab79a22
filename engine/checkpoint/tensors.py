"""Tensors in the files of torch.distributed.checkpoint (DCP), which any number of ranks writes and reads.

DCP's save planner decides who writes which tensor, or part of a DTensor; the files can be read by any DCP reader. DCP's
own entry points are not used: they communicate at every step, and report an error on one rank only; here all that ranks
exchange goes through `RankGroup`. Each rank reads the parts that overlap its shard. DCP's ``.metadata`` is a pickle; it
is read by an unpickler that knows the classes of that file and nothing else.
"""

from __future__ import annotations

import ctypes
import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, EnumMeta
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_crc32_options, set_crc32_options

from redline.checkpoint import storage
from redline.checkpoint.storage import CorruptCheckpoint, FileRecord
from redline.compiled import plain_name

__all__ = [
    "PART", "StoredTensor", "TensorWriter", "is_sharded", "load_plain", "local_tensor", "memory_of", "open_tensors",
]  # fmt: skip

METADATA = ".metadata"
PART = 1 << 20  # elements in memory at a time: 4 MiB of fp32
_TENSOR_OVERHEAD = 1600  # bytes of a tensor's entry besides its values
_RANK_OVERHEAD = 16_000  # bytes of a rank's own file
_LARGE = 1 << 24  # bytes from which torch.save costs next to nothing beside the writing


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class takes half a second to import."""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: its shard of a DTensor, else all of it."""
    either: Any = tensor.detach()
    local: Tensor = either.to_local() if is_sharded(tensor) else either
    return local


def memory_of(tensor: Tensor) -> Any:
    """A CPU tensor's values as a buffer, without a copy; it has to be contiguous and not empty."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


# -- writing --------------------------------------------------------------------------------------------


class TensorWriter:
    """One rank's part of writing tensors: `plan` goes to all ranks, then share, write, and on rank 0 finish.

    Args:
        tensors: by key; plain ones, of which one rank writes each, or DTensors, of which each rank writes its shard.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
        self.plan: SavePlan = self._planner.create_local_plan()
        self.records: dict[str, FileRecord] = {}
        self._rank = rank

    def share(self, plans: list[SavePlan]) -> int:
        """Decide who writes what, given the plans of all ranks; the bytes of all files together, or a little less."""
        self._plans, self._metadata = self._planner.create_global_plan(plans)
        entries = cast(dict[str, TensorStorageMetadata], self._metadata.state_dict_metadata)
        sizes = (
            math.prod(entry.size) * entry.properties.dtype.itemsize + _TENSOR_OVERHEAD * len(entry.chunks)
            for entry in entries.values()
        )
        return sum(sizes) + _RANK_OVERHEAD * len(plans)

    def write(self, directory: Path, values: Mapping[str, Tensor]) -> list[WriteResult]:
        """Write this rank's file, not flushed to disk; where each tensor is, for `finish`.

        Args:
            values: what this rank has of each tensor, on any device.
        """
        name = f"__{self._rank}_0.distcp"
        results = []

        def write(file: IO[bytes]) -> None:
            for item in self._planner.finish_plan(self._plans[self._rank]).items:
                start = file.tell()
                write_tensor(values[item.index.fqn], file)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))

        self.records[name] = storage.write_file(directory / name, write)
        return results

    def finish(self, directory: Path, results: list[list[WriteResult]]) -> None:
        """Write the metadata, on rank 0, after all have written."""
        self._metadata.version = CURRENT_DCP_VERSION
        self._metadata.storage_data = {each.index: each.storage_data for written in results for each in written}
        self.records[METADATA] = storage.write_file(
            directory / METADATA, lambda file: pickle.dump(self._metadata, file)
        )


def write_tensor(tensor: Tensor, file: Any) -> None:
    """Write what `torch.load` reads as this tensor, contiguous.

    Small tensors are written without calling `torch.save`: that takes longer than writing their values, and holds the
    interpreter, which a background thread should not.
    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if 0 < tensor.nbytes <= _LARGE:
        before, after = _frame(tensor.dtype, tensor.shape)
        file.write(before)
        file.write(memory_of(tensor))
        file.write(after)
    else:
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes all of a storage
        with _without_checksums():
            torch.save(tensor, file)


@lru_cache(maxsize=4096)
def _frame(dtype: torch.dtype, shape: torch.Size) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after a tensor's values; the same for all of one dtype and shape."""
    empty, buffer = torch.zeros(shape, dtype=dtype), io.BytesIO()
    with _without_checksums():
        torch.save(empty, buffer)
    buffer.seek(0)
    begin: int = cast(Any, torch._C.PyTorchFileReader(buffer)).get_record_offset("data/0")
    content = buffer.getvalue()
    return content[:begin], content[begin + empty.nbytes :]


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save's own would depend on the values; the manifest has one of the whole file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


# -- reading --------------------------------------------------------------------------------------------


class StoredTensor:
    """A tensor in files, of which shape and dtype are known without reading it."""

    shape: torch.Size
    dtype: torch.dtype

    def parts(self) -> Iterator[Tensor]:
        """The values in order, as 1-D tensors on the CPU; each is valid until the next is asked for."""
        raise NotImplementedError

    def read_full(self) -> Tensor:
        """All of it, on the CPU."""
        full = torch.empty(self.shape.numel(), dtype=self.dtype)
        start = 0
        for part in self.parts():
            full[start : start + part.numel()] = part
            start += part.numel()
        return full.view(self.shape)

    def read_block(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A part of it, that begins at `offsets`."""
        return _narrow(self.read_full(), offsets, shape)

    @torch.no_grad()
    def read_into(self, target: Tensor) -> None:
        """Fill a tensor of the same shape; of a DTensor, this rank's shard."""
        if not is_sharded(target):
            target.copy_(self.read_full())
            return
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # see `is_sharded`

        sharded: Any = target
        shape, offsets = compute_local_shape_and_global_offset(target.shape, sharded.device_mesh, sharded.placements)
        # A rank whose shard is empty gets an offset at the end, or beyond.
        offsets = tuple(min(offset, full - size) for offset, full, size in zip(offsets, target.shape, shape))
        sharded.to_local().copy_(self.read_block(offsets, shape))


def _narrow(tensor: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, shape)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


class Chunk(NamedTuple):
    """A block of a tensor, and the bytes of a file that contain it."""

    offsets: tuple[int, ...]
    shape: torch.Size
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor(StoredTensor):
    """A tensor in blocks, as DCP writes it."""

    key: str
    shape: torch.Size
    dtype: torch.dtype
    chunks: list[Chunk]

    def parts(self) -> Iterator[Tensor]:
        # Chunk by chunk where each has full rows, else all at once.
        rows = all(chunk.shape[1:] == self.shape[1:] for chunk in self.chunks)
        for block in map(self._read, self.chunks) if rows else [self.read_full()]:
            yield from torch.split(block.contiguous().reshape(-1), PART)

    def read_full(self) -> Tensor:
        if len(self.chunks) == 1:  # without another copy
            return self._read(self.chunks[0])
        return self.read_block((0,) * len(self.shape), self.shape)

    def read_block(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        block = torch.empty(shape, dtype=self.dtype)
        ends = [offset + size for offset, size in zip(offsets, shape)]
        for chunk in self.chunks:
            starts = tuple(max(pair) for pair in zip(offsets, chunk.offsets))
            stops = map(min, ends, (offset + size for offset, size in zip(chunk.offsets, chunk.shape)))
            overlap = tuple(stop - start for start, stop in zip(starts, stops))
            if all(size > 0 for size in overlap):
                here = tuple(start - offset for start, offset in zip(starts, offsets))
                there = tuple(start - offset for start, offset in zip(starts, chunk.offsets))
                _narrow(block, here, overlap).copy_(_narrow(self._read(chunk), there, overlap))
        return block

    def _read(self, chunk: Chunk) -> Tensor:
        try:
            with open(chunk.path, "rb", buffering=0) as file:
                view: Any = _create_file_view(file, chunk.start, chunk.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways
            raise CorruptCheckpoint(f"{_why_unreadable(chunk.path, error)} ({self.key})") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.shape or tensor.dtype != self.dtype:
            raise CorruptCheckpoint(f"{chunk.path}: {self.key} is not what the metadata say")
        return tensor


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors in a checkpoint's directory, by key; names that `torch.compile` has changed are made plain."""
    path = directory / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path}: {error}") from None
    except Exception as error:  # an unpickler fails in many ways
        raise CorruptCheckpoint(_why_unreadable(path, error)) from error
    if not isinstance(metadata, Metadata):
        raise CorruptCheckpoint(f"{path}: expected DCP's Metadata, found {type(metadata).__name__}")
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, place in (metadata.storage_data or {}).items():
        name = place.relative_path
        if Path(name).name != name or not name.endswith(".distcp") or getattr(place, "transform_descriptors", None):
            raise CorruptCheckpoint(f"{path}: it places {index.fqn} in {name!r}, not a plain file of this directory")
        places[index.fqn, tuple(index.offset or ())] = place
    tensors: dict[str, StoredTensor] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CorruptCheckpoint(f"{path}: {key} is not a tensor")
        chunks = []
        for chunk in entry.chunks:
            if place := places.get((key, tuple(chunk.offsets))):
                file = directory / place.relative_path
                chunks.append(Chunk(tuple(chunk.offsets), chunk.sizes, file, place.offset, place.length))
        if sum(chunk.shape.numel() for chunk in chunks) != entry.size.numel():
            raise CorruptCheckpoint(f"{directory}: {key} is not in its files, or not all of it")
        name = key if key.startswith(("client_state.", "data.")) else plain_name(key)
        tensors[name] = ChunkedTensor(key, entry.size, entry.properties.dtype, sorted(chunks))
    return tensors


# -- reading without running code ------------------------------------------------------------------------


def load_plain(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: a dict of plain types and tensors, on the CPU; no code in it is run."""
    try:
        with torch.serialization.safe_globals([bytes, frozenset]):  # torch allows set, and bytes that are not empty
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways
        raise CorruptCheckpoint(_why_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path}: it contains {type(content).__name__}, not what a checkpoint does")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that `torch.load` has refused; torch's own text advises to let it run code."""
    text = str(error)
    if "eights only load failed" in text or "weights_only" in text:
        asks = re.search(r"(?:GLOBAL|global|class|function):? ([\w.]+\.\w+)", text)
        what = f"it asks for {asks[1]}" if asks else "it is not a file of torch.save"
        return f"{path}: {what}; nothing but tensors and plain types is read"
    return f"{path}: cannot be read: {type(error).__name__}: {text.partition(chr(10))[0]}"


class _Unpickler(pickle.Unpickler):
    """Makes the objects that the metadata of tensors consist of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "getattr" and module in ("builtins", "__builtin__"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _CLASSES.get(module, ()):
            raise CorruptCheckpoint(f"it asks for {module}.{name}, which does not belong there; nothing more was read")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: Any) -> Enum:
    """In place of ``getattr(kind, name)``, as which early releases of Python 3.11 (Debian's 3.11.2) pickle an enum."""
    if not isinstance(kind, EnumMeta) or not isinstance(name, str) or name not in kind.__members__:
        raise CorruptCheckpoint(f"it asks for getattr({kind!r}, {name!r}), not a member of an enum; nothing was read")
    member: Enum = kind[name]
    return member


_CLASSES = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip
