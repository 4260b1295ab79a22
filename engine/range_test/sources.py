"""What data is read through: loaders, their samplers and datasets, and what in them the order of samples follows from.

A range test reads the data again and again, and training after it must find it where it was: so all that moves is
found here, for `snapshot` to put back and for `conditions` to change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import ConcatDataset

from engine.data import Loader

__all__ = ["generators_in", "numbers_in", "parts_of"]

_INNER = ("dataloader", "sampler", "batch_sampler", "dataset")


def parts_of(*data: Any) -> list[Any]:
    """Loaders, samplers and datasets, each once, from the outside in."""
    found: dict[int, Any] = {}
    queue = [part for part in data if part is not None]
    while queue:
        part = queue.pop(0)
        if id(part) not in found:
            found[id(part)] = part
            queue.extend(inner for name in _INNER if (inner := getattr(part, name, None)) is not None)
            if isinstance(part, ConcatDataset):
                queue.extend(part.datasets)
    return list(found.values())


def generators_in(parts: list[Any]) -> list[torch.Generator]:
    """The generators that these parts shuffle with."""
    found = (getattr(part, "generator", None) for part in parts)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def numbers_in(parts: list[Any], name: str) -> list[tuple[Any, int]]:
    """The parts with their `seed` or `epoch`: the engine's own loader, and samplers such as DistributedSampler."""
    seeded = [
        part
        for part in parts
        if isinstance(part, Loader) or (hasattr(part, "set_epoch") and name in getattr(part, "__dict__", {}))
    ]
    return [(part, value) for part in seeded if isinstance(value := getattr(part, name, None), int)]
