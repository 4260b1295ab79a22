"""Moving data between host and device: batches of any kind, and a few numbers without waiting for the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "fields_of", "map_tensors", "numbers_on", "reads_cost_nothing", "to_device"]

# -- batches --------------------------------------------------------------------------------------------


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on the device, in containers of the types they had.

    An object that has a method ``to(device)`` of its own moves itself; see :func:`map_tensors` for the others.
    """

    def move_object(value: Any) -> Any:
        moved = value.to(device)
        return value if moved is None else moved  # some move in place and return nothing

    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True), move_object)


def map_tensors(
    value: Any, change: Callable[[Tensor], Tensor], change_object: Callable[[Any], Any] | None = None
) -> Any:
    """A copy of nested containers with every tensor in them changed.

    Walks mappings, sequences, sets, named tuples, dataclasses, attrs classes, simple namespaces and their subclasses,
    such as Hugging Face's `ModelOutput` and `BatchEncoding`. The copy of each has its type and its other attributes.

    Args:
        value: a tensor, a container, or anything else.
        change: called with every tensor.
        change_object: called with every object that has a method ``to``, instead of walking into it; None walks into
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

    def walk(items: Iterable[Any], rebuild: Callable[[list[Any]], Any]) -> Any:
        old = list(items)
        new = [map_tensors(item, change, change_object) for item in old]
        return value if all(one is other for one, other in zip(new, old)) else rebuild(new)

    if isinstance(value, Mapping):
        return walk(value.values(), lambda items: _mapping_like(value, dict(zip(value, items))))
    if isinstance(value, (tuple, MutableSequence)):
        return walk(value, lambda items: _sequence_like(value, items))
    if isinstance(value, AbstractSet):
        return walk(value, type(value))
    names = [name for name in fields_of(value) if hasattr(value, name)]
    return walk([getattr(value, name) for name in names], lambda items: _object_like(value, dict(zip(names, items))))


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


# -- a few numbers --------------------------------------------------------------------------------------

_READ_AT_ONCE = ("cpu",)


def reads_cost_nothing(device: torch.device) -> bool:
    """Whether a tensor there can be read without waiting: its operations are done when they return."""
    return device.type in _READ_AT_ONCE


def numbers_on(device: torch.device | None, numbers: Sequence[float]) -> Tensor:
    """Numbers as an fp32 tensor on a device, shape (n,); None is the CPU."""
    if device is None or reads_cost_nothing(device):
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    # torch.tensor() would copy from pageable memory, and wait for the stream to get there.
    made = torch.empty(len(numbers), dtype=torch.float32, device=device)
    for place, number in zip(made.unbind(), numbers):
        place.fill_(number)
    return made


class HostCopy:
    """Scalars on their way to the host: valid at once on the CPU, all 0 on the meta device.

    Args:
        values: scalar tensors, and numbers that the host has already.
    """

    def __init__(self, *values: Tensor | float) -> None:
        self._values, self._event = _send(values)

    def has_arrived(self) -> bool:
        """Whether :meth:`read` would return at once."""
        if self._event is not None and self._event.query():
            self._event = None
        return self._event is None

    def read(self) -> list[float]:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values]


def _send(values: Sequence[Tensor | float]) -> tuple[Sequence[Tensor | float], Any]:
    """The copies on the host, and an event that tells when they are valid; None where they are valid already."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    if device == "meta":
        return [0.0] * len(values), None
    if device != "cuda":
        return values, None
    host = torch.empty(len(values), pin_memory=True)  # page-locked: only such a copy is asynchronous
    for place, value in zip(host.unbind(), values):
        if isinstance(value, Tensor):
            place.copy_(value, non_blocking=True)
        else:
            place.fill_(value)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host.unbind(), event
