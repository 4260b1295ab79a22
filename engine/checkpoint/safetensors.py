"""The safetensors format, written a part at a time.

Eight bytes with the length of a JSON header, the header, and then the tensors' bytes without gaps. The package of that
name wants all tensors in memory at once to write them. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.frames import memory_of
from engine.errors import EngineError

__all__ = ["Entry", "Writer", "in_order", "offsets_of"]

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor as the header tells of it."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order to write in: wide formats first, so that each tensor begins at a multiple of its format's width."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # stable: else as they come


def offsets_of(entries: Iterable[Entry]) -> list[int]:
    """Where each tensor begins, counted from the first one's beginning; the file's end for tensors comes last."""
    offsets = [0]
    for entry in entries:
        offsets.append(offsets[-1] + entry.bytes)
    return offsets


class Writer:
    """Writes a file of tensors whose sizes are known before their values.

    Args:
        file: open for writing bytes, at its beginning.
        entries: all tensors, in the order in which they will come.
        metadata: strings for the header.

    Attributes:
        header_bytes: how much stands before the first tensor.

    Raises:
        EngineError: a number format that safetensors has no name for.
    """

    def __init__(self, file: IO[bytes], entries: list[Entry], metadata: Mapping[str, str]) -> None:
        assert sys.byteorder == "little", "safetensors is little-endian"
        strange = [f"{each.name} ({each.dtype})" for each in entries if each.dtype not in _NAMES]
        if strange:
            raise EngineError(f"safetensors has no name for the format of {', '.join(strange)}; write .pt instead")
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offsets = offsets_of(entries)
        for entry, begin, end in zip(entries, offsets, offsets[1:]):
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of eight bytes
        self._file = file
        self.header_bytes = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, part: Tensor) -> None:
        """The next values, of the tensor whose turn it is, in its format."""
        flat = part.detach().contiguous()
        if flat.nbytes:
            self._file.write(memory_of(flat))
