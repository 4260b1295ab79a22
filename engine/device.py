"""The tensors of a batch, whatever it is made of, and moving them to a device.

One walk over containers, which keeps the type of every one of them; the casts in `engine.inputs` use it, too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["fields_of", "map_tensors", "to_device"]


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on the device, in containers of the types they had.

    An object that has a method ``to(device)`` of its own moves itself; see :func:`map_tensors` for the others.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def move_object(value: Any) -> Any:
        moved = value.to(device)
        return value if moved is None else moved  # some move in place and return nothing

    return map_tensors(batch, move, move_object)


def map_tensors(
    value: Any, change: Callable[[Tensor], Tensor], change_object: Callable[[Any], Any] | None = None
) -> Any:
    """A copy of nested containers with every tensor in them changed.

    Walks mappings, sequences, sets, named tuples, dataclasses, attrs classes, simple namespaces and their subclasses,
    such as Hugging Face's `ModelOutput` and `BatchEncoding`. The copy of each has its type and its other attributes.

    Args:
        value: a tensor, a container, or anything else.
        change: called with every tensor.
        change_object: called with every object that has a method ``to``, in place of a walk into it; None walks into
            those that are containers and leaves the others alone.

    Returns:
        The copy; a container in which nothing changed is returned itself.
    """
    if isinstance(value, Tensor):
        return change(value)
    if value is None or isinstance(value, (str, bytes, bytearray, int, float, type)):
        return value
    if change_object is not None and callable(getattr(value, "to", None)):
        return change_object(value)

    def walk(items: Iterable[Any]) -> tuple[list[Any], bool]:
        old = list(items)
        new = [map_tensors(item, change, change_object) for item in old]
        return new, all(one is other for one, other in zip(new, old))

    if isinstance(value, Mapping):
        items, same = walk(value.values())
        return value if same else _mapping_like(value, dict(zip(value, items)))
    if isinstance(value, (tuple, MutableSequence)):
        items, same = walk(value)
        return value if same else _sequence_like(value, items)
    if isinstance(value, AbstractSet):
        items, same = walk(value)
        return value if same else type(value)(items)  # type: ignore[call-arg]
    names = [name for name in fields_of(value) if hasattr(value, name)]
    items, same = walk(getattr(value, name) for name in names)
    return value if same else _object_like(value, dict(zip(names, items)))


def fields_of(value: Any) -> Iterator[str]:
    """The names of the attributes that hold an object's data; none for objects of unknown kinds."""
    if dataclasses.is_dataclass(value):
        yield from (field.name for field in dataclasses.fields(value))
    elif hasattr(type(value), "__attrs_attrs__"):
        yield from (field.name for field in type(value).__attrs_attrs__)
    elif isinstance(value, SimpleNamespace):
        yield from vars(value)


def _object_like(value: Any, items: dict[str, Any]) -> Any:
    new = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(new, name, item)  # past the guard of a frozen class
    return new


def _mapping_like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    if isinstance(mapping, MutableMapping):
        new = copy.copy(mapping)  # with a default factory and attributes
        for key, item in items.items():  # not update(), which ModelOutput forbids
            new[key] = item
        return new
    try:
        return type(mapping)(items)  # type: ignore[call-arg]
    except TypeError:  # its constructor takes something else
        return items


def _sequence_like(sequence: Any, items: list[Any]) -> Any:
    if isinstance(sequence, MutableSequence):
        new: Any = copy.copy(sequence)  # with a deque's maxlen and attributes
        for index, item in enumerate(items):
            new[index] = item
        return new
    new = type(sequence)._make(items) if hasattr(sequence, "_make") else type(sequence)(items)
    if hasattr(sequence, "__dict__"):
        new.__dict__.update(vars(sequence))
    return new
