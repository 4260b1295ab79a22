"""Moving a batch to a device, whatever it is made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on the device, in containers of the types they were.

    Tensors; whatever has a method ``to(device)``; (nested) tuples, named ones too, lists, mappings and
    dataclasses. Anything else is left as it is.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (str, bytes, int, float)) or batch is None:
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return _like(batch, {key: to_device(value, device) for key, value in batch.items()})
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        new = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):  # past a frozen one's guard
                object.__setattr__(new, field.name, to_device(getattr(batch, field.name), device))
        return new
    return batch


def _like(mapping: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """What was moved, in a mapping of the type that it was in."""
    if type(mapping) is dict:
        return moved
    if isinstance(mapping, MutableMapping):
        new = copy.copy(mapping)  # with a default factory and attributes
        new.update(moved)
        return new
    try:
        return type(mapping)(moved)  # type: ignore[call-arg]
    except TypeError:
        return moved
