"""What a range test would leave its trace in: data that draws random numbers; equality to the last bit."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Noisy", "same"]


class Noisy(Dataset[Any]):
    """Samples that carry their index, and draw from every random generator there is."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if index >= self.size:
            raise IndexError
        noise = random.random() + float(numpy.random.rand()) + torch.rand(()).item()
        x = torch.full((4,), index / self.size) + 0.1 * noise
        return x, x.sum().reshape(1), index


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the last bit, through every container."""
    if isinstance(ours, (Tensor, numpy.ndarray)):
        return type(ours) is type(theirs) and ours.dtype == theirs.dtype and bool((ours == theirs).all())
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))  # nan is nan
