"""How DeepSpeed lays tensors out in flat ones, and these over its files: where each value is, before any is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.deepspeed_files import Files, Mapped
from engine.checkpoint.stored import PART, Stored
from engine.errors import EngineError

__all__ = ["Place", "cut_from", "in_equal_parts", "one_after_the_other", "whole"]

Keys = tuple[Any, ...]


class Place(NamedTuple):
    """A tensor in a file: by the keys that lead to it; and where in it something begins."""

    file: Mapped
    keys: Keys
    start: int = 0

    @property
    def tensor(self) -> Tensor:
        """The whole flat tensor, mapped."""
        return self.file.tensor(*self.keys)

    def __str__(self) -> str:
        return f"{self.file.path}: {'.'.join(map(str, self.keys))}"


class _Run(NamedTuple):
    """A stretch of a flat tensor in a file."""

    place: Place
    length: int


@dataclass(frozen=True)
class _Flat:
    """A tensor that lies in stretches, one after the other; see :class:`Stored`."""

    files: Files
    shape: torch.Size
    dtype: torch.dtype
    runs: tuple[_Run, ...]

    def parts(self) -> Iterator[Tensor]:
        for place, length in self.runs:
            for at in range(0, length, PART):
                count = min(PART, length - at)
                # Looked up each time: the mapping may have been made anew.
                yield place.tensor.reshape(-1).narrow(0, place.start + at, count)
                self.files.has_read(count * self.dtype.itemsize)


def whole(files: Files, place: Place) -> Stored:
    """A tensor that a file has as it is."""
    tensor = place.tensor
    return _Flat(files, tensor.shape, tensor.dtype, (_Run(place, tensor.numel()),))


def cut_from(files: Files, place: Place, shape: torch.Size) -> Stored:
    """A tensor out of one flat one.

    Raises:
        EngineError: that is too short.
    """
    flat = place.tensor
    if flat.numel() < place.start + shape.numel():
        raise EngineError(
            f"{place} has {flat.numel()} elements, expected at least {place.start + shape.numel()}; give initialize "
            "the same parameters in the same order"
        )
    return _Flat(files, shape, flat.dtype, (_Run(place, shape.numel()),))


def one_after_the_other(files: Files, places: Sequence[Place]) -> Callable[[int, torch.Size], Stored]:
    """A flat vector that was cut into parts, wherever the cuts fell; makes tensors out of stretches of it."""
    lengths = [place.tensor.numel() for place in places]
    dtype = places[0].tensor.dtype

    def stretch(start: int, shape: torch.Size) -> Stored:
        runs, wanted, before = [], shape.numel(), 0
        for place, length in zip(places, lengths):
            first, last = max(start, before), min(start + wanted, before + length)
            if first < last:
                runs.append(_Run(place._replace(start=first - before), last - first))
            before += length
        if sum(run.length for run in runs) != wanted:
            raise EngineError(
                f"{files.folder}: {wanted} elements are wanted from {start} on, and the processes' parts have "
                f"{sum(lengths)} in all; it is not as DeepSpeed writes it"
            )
        return _Flat(files, shape, dtype, tuple(runs))

    return stretch


def in_equal_parts(files: Files, places: Sequence[Place], shape: torch.Size) -> Stored:
    """A tensor of which each process has an equal part, rounded up; the last ones are padded, or all padding.

    Raises:
        EngineError: a part is too short.
    """
    part = math.ceil(shape.numel() / len(places))
    runs, left = [], shape.numel()
    for place in places:
        if left > 0:
            runs.append(_Run(place, min(part, left)))
        left -= part
    for place, length in runs:
        there = place.tensor.numel()
        if place.start + length > there:
            raise EngineError(f"{place} has {there} elements, expected at least {place.start + length}")
    return _Flat(files, shape, places[0].tensor.dtype, tuple(runs))
