"""A tensor that is in files, read a part at a time: however large it is, little of it is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["PART", "Stored", "bytes_of", "elements_of", "read_whole"]

PART = 1 << 20  # elements that are in memory at a time: 4 MiB of fp32


class Stored(Protocol):
    """What is known of a tensor without reading it, and its values in order."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def parts(self) -> Iterator[Tensor]:
        """The values from first to last, as 1-D tensors on the CPU; each holds until the next is asked for."""
        ...


def elements_of(stored: Stored) -> int:
    """How many values it has."""
    return math.prod(stored.shape)


def bytes_of(stored: Stored) -> int:
    """Its size as it is stored."""
    return elements_of(stored) * stored.dtype.itemsize


def read_whole(stored: Stored) -> Tensor:
    """All of it, on the CPU."""
    whole = torch.empty(elements_of(stored), dtype=stored.dtype)
    at = 0
    for part in stored.parts():
        whole[at : at + part.numel()] = part
        at += part.numel()
    assert at == whole.numel(), (at, whole.numel())
    return whole.view(stored.shape)
