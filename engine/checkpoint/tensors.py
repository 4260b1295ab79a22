"""The tensors of a checkpoint: torch.distributed.checkpoint's files, which any number of processes reads.

Its planners, writer and reader do the work; its front doors, which talk between processes at each step, are
left out: what processes have to tell each other goes with `Ranks`, and errors with it. It knows tensors only. Its
``.metadata`` is a pickle, and its items that are no tensors are, too: the one is read by an unpickler that knows
nothing but the classes of that file, the others are refused.

torch.distributed.checkpoint takes half a second to import. So whoever imports this file does so within a function.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engine.checkpoint.files import Checksummed, Record, why_unreadable
from engine.checkpoint.frames import write_tensor
from engine.checkpoint.manifest import Broken
from engine.compiled import plain_name

__all__ = ["METADATA", "Writing", "read", "read_metadata"]

METADATA = ".metadata"

_FRAME = 1600  # bytes of a tensor's item beside its values
_OWN = 16_000  # bytes of a process's own file


class Writing:
    """One process's part of writing tensors into a folder: plan, write, and on rank 0 finish.

    Args:
        tensors: by key; whole ones, of which one process writes each, or DTensors, of which each writes its own part.
        rank: this process.

    Attributes:
        plan: for all processes to see.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        self._planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
        self._rank = rank
        self._writer: _Writer | None = None
        self._metadata: Metadata | None = None
        self._plans: list[SavePlan] = []
        self.plan: SavePlan = self._planner.create_local_plan()

    def settle(self, plans: list[SavePlan]) -> int:
        """Decide who writes what, on every process alike.

        Args:
            plans: of all processes, by rank.

        Returns:
            The bytes that all files take together, or a little less.
        """
        self._plans, self._metadata = self._planner.create_global_plan(plans)
        sizes = (
            math.prod(entry.size) * entry.properties.dtype.itemsize + _FRAME * len(entry.chunks)
            for entry in self._metadata.state_dict_metadata.values()
            if isinstance(entry, TensorStorageMetadata)
        )
        return sum(sizes) + _OWN * len(plans)

    def write(self, folder: Path, values: Mapping[str, Tensor]) -> list[WriteResult]:
        """Write this process's share, not flushed.

        Args:
            folder: where.
            values: what this process has of each tensor; CPU or device.

        Returns:
            Where each tensor went, for `finish`.
        """
        self._writer = writer = _Writer(folder)
        plan = self._planner.finish_plan(writer.prepare_global_plan(self._plans)[self._rank])
        self._planner.values = values
        results: list[WriteResult] = writer.write_data(plan, self._planner).wait()
        return results

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Write the metadata, on rank 0, when all have written."""
        assert self._writer is not None and self._metadata is not None
        self._writer.finish(self._metadata, results)

    @property
    def records(self) -> dict[str, Record]:
        """The files that this process has written."""
        return {} if self._writer is None else dict(self._writer.fs.records)


class _SavePlanner(DefaultSavePlanner):
    """Plans with the tensors as they are, and writes what was copied from them."""

    values: Mapping[str, Tensor]

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.values[write_item.index.fqn]


class _Writer(FileSystemWriter):
    """One file for each process, as its base class writes it, checksummed."""

    fs: _Checksumming

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = _Checksumming()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with self.fs.create_stream(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                start = stream.tell()
                write_tensor(cast(Tensor, planner.resolve_data(item)), stream.write)
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> None:
        """No path of this machine, no random name: the same state makes the same file."""


class _Checksumming(FileSystem):
    """Files with their checksums; makes no folder."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with Checksummed(Path(path)) as file:
            yield file
        self.records[Path(path).name] = file.record

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        os.rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


def read_metadata(folder: Path) -> Metadata:
    """Which tensors a checkpoint has, and where they are; those of a model by its plain names.

    Raises:
        Broken: the file holds anything but that.
    """
    path = folder / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Broken as error:
        raise Broken(f"{path}: {error}") from None
    except Exception as error:  # an unpickler stumbles in many ways
        raise Broken(why_unreadable(path, error)) from error
    if not isinstance(metadata, Metadata):
        raise Broken(f"{path}: expected torch.distributed.checkpoint's Metadata, found {type(metadata).__name__}")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise Broken(f"{path}: {key} is no tensor")
    for index, place in (metadata.storage_data or {}).items():
        name = place.relative_path
        if Path(name).name != name or not name.endswith(".distcp") or getattr(place, "transform_descriptors", None):
            raise Broken(f"{path}: {index.fqn} is said to be in {name!r}, which is no plain file of this folder")
    entries, storage = metadata.state_dict_metadata, metadata.storage_data or {}
    metadata.state_dict_metadata = {_plain(key): entry for key, entry in entries.items()}
    metadata.storage_data = {replace(index, fqn=_plain(index.fqn)): place for index, place in storage.items()}
    return metadata


def _plain(key: str) -> str:
    return key if key.startswith(("client_state.", "data.")) else plain_name(key)


class _Unpickler(pickle.Unpickler):
    """Makes the objects that the metadata of tensors is made of, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "getattr" and module in ("builtins", "__builtin__"):
            return _enum_member
        known = name in _KNOWN.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not known:
            raise Broken(f"it asks for {module}.{name}, which has no place in it; it was not read further")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: Any) -> Enum:
    """Stands for ``getattr(cls, name)``, as which early releases of Python 3.11 (Debian 12's 3.11.2) pickle an enum."""
    if not isinstance(kind, EnumMeta) or not isinstance(name, str) or name not in kind.__members__:
        raise Broken(f"it asks for getattr({kind!r}, {name!r}), which is no member of an enum; it was not read further")
    member: Enum = kind[name]
    return member


_KNOWN = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip


def read(folder: Path, metadata: Metadata, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place: whole ones whole, of DTensors what this process has of them.

    Raises:
        Broken: a file holds anything but the tensors it should.
    """
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
    reader = FileSystemReader(folder)
    reader.fs = files = _Noting()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan: LoadPlan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    try:
        with torch.no_grad():
            reader.read_data(plan, planner).wait()
    except Broken:
        raise
    except Exception as error:
        raise Broken(why_unreadable(files.last or folder, error)) from error


class _Noting(FileSystem):
    """Files that are read, and which was the last: torch's errors do not tell."""

    last: Path | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        self.last = Path(path)
        with open(path, mode) as file:
            yield file


class _LoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """The base class would unpickle it; `read_metadata` lets none come here."""
        raise Broken(f"{read_item.dest_index.fqn} is no tensor")
