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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, EnumMeta
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)  # fmt: skip
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import _create_read_items
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_crc32_options, set_crc32_options

from redline.checkpoint import storage
from redline.checkpoint.storage import CorruptCheckpoint, Records
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

    def write(self, directory: Path, values: Mapping[str, Tensor]) -> tuple[Records, list[WriteResult]]:
        """Write what this rank has of each tensor into its file, not flushed; the file, and what `finish` needs."""
        name = f"__{self._rank}_0.distcp"
        results = []

        def write(file: IO[bytes]) -> None:
            for item in self._planner.finish_plan(self._plans[self._rank]).items:
                start = file.tell()
                write_tensor(values[item.index.fqn], file)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))

        return {name: storage.write_file(directory / name, write)}, results

    def finish(self, directory: Path, results: list[list[WriteResult]]) -> Records:
        """Write the metadata, on rank 0, after all have written."""
        self._metadata.version = CURRENT_DCP_VERSION
        self._metadata.storage_data = {each.index: each.storage_data for written in results for each in written}
        return {METADATA: storage.write_file(directory / METADATA, partial(pickle.dump, self._metadata))}


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
    """A tensor in blocks, of which shape and dtype are known without reading it."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, blocks: list[ChunkStorageMetadata]) -> None:
        self.shape, self.dtype = shape, dtype
        self._metadata = TensorStorageMetadata(TensorProperties(dtype), shape, blocks)

    def read_block(self, index: int) -> Tensor:
        """One of the blocks, on the CPU."""
        raise NotImplementedError

    def parts(self) -> Iterator[Tensor]:
        """The values in order, as 1-D tensors on the CPU; each is valid until the next is asked for."""
        raise NotImplementedError

    def read_full(self) -> Tensor:
        """All of it, on the CPU."""
        full = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(full)
        return full

    @torch.no_grad()
    def read_into(self, target: Tensor) -> None:
        """Fill a tensor of the same shape; of a DTensor, this rank's shard."""
        for item in _create_read_items("", self._metadata, target):
            source = narrow_tensor_by_index(
                self.read_block(item.storage_index.index or 0), item.storage_offsets, item.lengths
            )
            narrow_tensor_by_index(local_tensor(target), item.dest_offsets, item.lengths).copy_(source)


class BlockFile(NamedTuple):
    """The bytes of a file that contain a block."""

    path: Path
    start: int
    length: int


class ChunkedTensor(StoredTensor):
    """A tensor as DCP writes it: each block with `torch.save`, in a range of a file."""

    def __init__(self, key: str, entry: TensorStorageMetadata, files: Mapping[tuple[int, ...], BlockFile]) -> None:
        self._key, self._blocks = key, sorted(entry.chunks, key=lambda block: tuple(block.offsets))
        self._files = [files[tuple(block.offsets)] for block in self._blocks]
        super().__init__(entry.size, entry.properties.dtype, self._blocks)

    def parts(self) -> Iterator[Tensor]:
        # Block by block where each has full rows, else all at once.
        has_rows = all(block.sizes[1:] == self.shape[1:] for block in self._blocks)
        for block in map(self.read_block, range(len(self._blocks))) if has_rows else [self.read_full()]:
            yield from torch.split(block.contiguous().reshape(-1), PART)

    def read_block(self, index: int) -> Tensor:
        path, start, length = self._files[index]
        try:
            with open(path, "rb", buffering=0) as file:
                tensor = _load(_create_file_view(file, start, length), path)
        except OSError as error:  # another process has removed it
            raise CorruptCheckpoint(f"{path}: cannot be read: {error}") from error
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (self._blocks[index].sizes, self.dtype):
            raise CorruptCheckpoint(f"{path}: {self._key} is not what the metadata say")
        return tensor


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors in a checkpoint's directory, by key; names that `torch.compile` has changed are made plain."""
    path = directory / METADATA
    files: dict[str, dict[tuple[int, ...], BlockFile]] = defaultdict(dict)
    tensors: dict[str, StoredTensor] = {}
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        for index, place in metadata.storage_data.items():
            name = place.relative_path
            if Path(name).name != name or not name.endswith(".distcp"):
                raise CorruptCheckpoint(f"it places {index.fqn} in {name!r}, not a plain file of this directory")
            files[index.fqn][tuple(index.offset or ())] = BlockFile(directory / name, place.offset, place.length)
        for key, entry in metadata.state_dict_metadata.items():
            entry.chunks = [block for block in entry.chunks if tuple(block.offsets) in files[key]]
            if sum(block.sizes.numel() for block in entry.chunks) != entry.size.numel():
                raise CorruptCheckpoint(f"{key} is not in its files, or not all of it")
            name = key if key.startswith(("client_state.", "data.")) else plain_name(key)
            tensors[name] = ChunkedTensor(key, entry, files[key])
    except Exception as error:  # an unpickler fails in many ways
        what = error if isinstance(error, CorruptCheckpoint) else f"cannot be read: {error!r}"
        raise CorruptCheckpoint(f"{path}: {what}") from error
    return tensors


# -- reading without running code ------------------------------------------------------------------------


def load_plain(path: Path, *, classes: Sequence[Any] = (), mmap: bool = False) -> dict[str, Any]:
    """What `torch.save` wrote: a dict of plain types, tensors and these classes; no code in it is run."""
    with torch.serialization.safe_globals([bytes, frozenset, *classes]):  # torch allows bytes that are not empty
        content = _load(path, path, mmap=mmap)
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path}: it contains {type(content).__name__}, not what a checkpoint does")
    return content


def _load(file: Any, path: Path, *, mmap: bool = False) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load fails in many ways
        text = str(error)
        what = f"cannot be read: {type(error).__name__}: {text.partition(chr(10))[0]}"
        if "eights only load failed" in text or "weights_only" in text:  # torch advises to let it run code
            asks = re.search(r"GLOBAL ([\w.]+)", text)
            what = f"refused: it asks for {asks[1]}" if asks else "refused: it is more than tensors and plain types"
            what += "; nothing else is read, and nothing was run; if it is in your client_state, save without it"
        raise CorruptCheckpoint(f"{path}: {what}") from error


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
