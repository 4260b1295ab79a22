"""The files of a checkpoint that DeepSpeed wrote: found by name, read without running anything, mapped into memory.

Next to tensors, DeepSpeed pickles objects of its own: the loss scaler, an enum, addresses in flat buffers. Those few
classes, found by looking into what 0.19.8 writes, are read as inert objects with the same attributes. Everything else
that is neither a tensor nor a plain type is refused by name.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from redline.checkpoint.storage import MANIFEST, CorruptCheckpoint
from redline.checkpoint.tensors import PART, StoredTensor, load_plain
from redline.compiled import plain_names
from redline.errors import EngineError

__all__ = ["SCALERS", "FlatTensor", "MappedFiles", "is_deepspeed"]

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
_UNSUPPORTED = {  # what else DeepSpeed writes
    "layer_*_model_states.pt": "the layers of a PipelineModule or the experts of an MoE model",
    "expp_rank_*_optim_states.pt": "the experts of an MoE model",
    "expert_*_model_states.pt": "the experts of an MoE model",
    "*mp_rank_0[1-9]_model_states.pt": "a model that was split by tensor parallelism",
    "zero": "a model in DeepSpeed's universal format",
    "offloaded_tensors": "tensors that were offloaded to NVMe",
}
# Where the names of parameters and buffers are; of a compiled module they have the compiler's prefix.
_NAMED = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments")


# -- DeepSpeed's classes --------------------------------------------------------------------------------


class _Inert:
    """In place of an object of DeepSpeed's: its arguments and attributes, and no behavior."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _stand_in(module: str, name: str) -> type[_Inert]:
    # Named like what it replaces: not every torch accepts (class, name) tuples.
    return type(name, (_Inert,), {"__module__": f"deepspeed.{module}", "__qualname__": name})


def _zero_stage(kind: Any, name: Any) -> Any:
    """In place of ``getattr(kind, name)``, as which Debian 12's Python 3.11.2 pickles an enum."""
    stages = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
    if getattr(kind, "__qualname__", None) != "ZeroStageEnum" or name not in stages:
        raise pickle.UnpicklingError(f"weights_only: GLOBAL getattr, of {kind!r} and {name!r}")
    return kind(stages[name])


_zero_stage.__module__, _zero_stage.__qualname__ = "builtins", "getattr"  # the name by which torch's unpickler finds it
SCALERS = tuple(_stand_in("runtime.fp16.loss_scaler", name) for name in ("LossScaler", "DynamicLossScaler"))
_STAND_INS: list[Any] = [
    *SCALERS,
    _stand_in("runtime.zero.config", "ZeroStageEnum"),
    _stand_in("utils.tensor_fragment", "fragment_address"),
    _zero_stage,
]


# -- files ----------------------------------------------------------------------------------------------


def is_deepspeed(directory: Path) -> bool:
    """Whether a directory is a checkpoint of DeepSpeed's and not one of Redline's, by the names in it."""
    try:
        if (directory / MANIFEST).exists():  # which may have DeepSpeed's files next to its own
            return False
        return directory.is_dir() and any(_MODEL.fullmatch(path.name) for path in directory.iterdir())
    except OSError:  # somebody else's
        return False


class MappedFiles:
    """The files of one checkpoint; each is mapped when it is needed, and tensors are paged in when they are touched.

    Attributes:
        model: ``mp_rank_00_model_states.pt``, or one file per rank at stage 3.
        optimizer: one file per rank at stages 1 to 3; none at stage 0.
        release_bytes: bytes read after which the files are unmapped, so that their pages do not fill up the memory.

    Raises:
        EngineError: some are missing, or of a kind that is not supported.
    """

    def __init__(self, directory: Path) -> None:
        for pattern, what in _UNSUPPORTED.items():
            if any(directory.glob(pattern)):
                raise EngineError(f"{directory}: it has {what} ({pattern}), which is not supported")
        self.release_bytes = 16 << 20
        self.model, self.optimizer = _by_rank(directory, _MODEL), _by_rank(directory, _OPTIMIZER)
        self._contents: dict[Path, dict[str, Any]] = {}
        self._read_bytes = 0

    def content(self, path: Path) -> dict[str, Any]:
        """What was saved in a file."""
        if path not in self._contents:
            content = load_plain(path, classes=_STAND_INS, mmap=True)
            self._contents[path] = {
                key: plain_names(value) if key in _NAMED else value for key, value in content.items()
            }
        return self._contents[path]

    def find(self, path: Path, keys: Sequence[Any]) -> Any:
        """What is in a file, by the keys that lead to it; None if there is nothing."""
        value: Any = self.content(path)
        try:
            for key in keys:
                value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
        return value

    def vector(self, path: Path, keys: Sequence[Any]) -> Tensor:
        """A tensor in a file, taken as a flat vector."""
        value = self.find(path, keys)
        if not isinstance(value, Tensor):
            raise CorruptCheckpoint(
                f"{path}: no tensor at {'.'.join(map(str, keys))}; it is not as DeepSpeed writes it"
            )
        return value.detach().reshape(-1)

    def count(self, num_bytes: int) -> None:
        """Count bytes that were read; after many, all files are unmapped, until they are needed again."""
        self._read_bytes += num_bytes
        if self._read_bytes >= self.release_bytes:
            self._read_bytes = 0
            self._contents.clear()


def _by_rank(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = {int(match["rank"] or 0): path for path in directory.iterdir() if (match := pattern.fullmatch(path.name))}
    missing = [rank for rank in range(max(found, default=0)) if rank not in found]
    if missing:
        name = found[max(found)].name.replace(f"rank_{max(found)}_", f"rank_{missing[0]}_")
        raise EngineError(f"{directory}: {name} is missing, and with it the part of rank {missing[0]}")
    return [found[rank] for rank in sorted(found)]


class FlatTensor(StoredTensor):
    """A tensor in flat vectors, of which each file has one.

    Args:
        keys: that lead to the vector in each file.
        start: where the tensor begins: in the vectors one after the other, or in each of them if it is sharded.
        sharded: each file has an equal shard of the tensor, rounded up; the last ones may be padding.

    Raises:
        EngineError: the vectors have fewer elements than the tensor.
    """

    def __init__(
        self, files: MappedFiles, paths: Sequence[Path], keys: tuple[Any, ...], shape: torch.Size, start: int = 0,
        *, sharded: bool = False,
    ) -> None:  # fmt: skip
        self._files, self._keys = files, keys
        self._pieces: list[tuple[Path, int, int]] = []  # file, first element, and how many
        shard, before, found = math.ceil(shape.numel() / len(paths)), 0, 0
        for path in paths:
            vector = files.vector(path, keys)
            first = start if sharded else max(start - before, 0)
            count = min(shape.numel() - found, vector.numel() - first, shard if sharded else shape.numel())
            if count > 0:
                self._pieces.append((path, first, count))
                found += count
            before += vector.numel()
        super().__init__(shape, vector.dtype, [ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)])
        if found != shape.numel():
            raise EngineError(
                f"{path}: {'.'.join(map(str, keys))} has {found} elements for a parameter of {shape.numel()}; give "
                "initialize the same parameters in the same order"
            )

    def read_block(self, index: int = 0) -> Tensor:
        block, start = torch.empty(self.shape.numel(), dtype=self.dtype), 0
        for part in self.parts():
            block[start : start + part.numel()] = part
            start += part.numel()
        return block.view(self.shape)

    def parts(self) -> Iterator[Tensor]:
        for path, first, length in self._pieces:
            for start in range(first, first + length, PART):
                count = min(PART, first + length - start)
                # Looked up each time: the file may have been unmapped in between.
                yield self._files.vector(path, self._keys).narrow(0, start, count)
                self._files.count(count * self.dtype.itemsize)
