"""Moving data between host and device: batches of any kind, and a few numbers without waiting for the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "fields_of", "map_tensors", "numbers_on", "reads_cost_nothing", "to_device", "widest_float"]

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
    items: dict[Any, Any]
    if isinstance(value, Mapping):
        items = dict(value.items())
    elif isinstance(value, (tuple, MutableSequence, AbstractSet)):
        items = dict(enumerate(value))
    else:
        items = {name: getattr(value, name) for name in fields_of(value) if hasattr(value, name)}
    changed = {key: map_tensors(item, change, change_object) for key, item in items.items()}
    return value if all(changed[key] is items[key] for key in items) else _copy_with(value, changed)


def fields_of(value: Any) -> Iterator[str]:
    """The names of the attributes that hold an object's data; none for objects of unknown kinds."""
    if dataclasses.is_dataclass(value):
        yield from (field.name for field in dataclasses.fields(value))
    elif hasattr(type(value), "__attrs_attrs__"):
        yield from (field.name for field in type(value).__attrs_attrs__)
    elif isinstance(value, SimpleNamespace):
        yield from vars(value)


def _copy_with(value: Any, items: dict[Any, Any]) -> Any:
    """A copy of a container with other items, by key, index or name; it keeps its type and its other attributes."""
    if type(value) is dict:
        return items
    if isinstance(value, tuple):
        new: Any = value._make(items.values()) if hasattr(value, "_make") else type(value)(items.values())
        if hasattr(value, "__dict__"):
            new.__dict__.update(vars(value))
        return new
    if isinstance(value, AbstractSet):
        return type(value)(items.values())  # type: ignore[call-arg]
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        try:
            return type(value)(items)  # type: ignore[call-arg]
        except TypeError:  # its constructor takes something else
            return items
    new = copy.copy(value)  # with a default factory, a deque's maxlen
    for key, item in items.items():
        if isinstance(value, (MutableMapping, MutableSequence)):
            new[key] = item  # not update(), which ModelOutput forbids
        else:
            object.__setattr__(new, key, item)  # past the guard of a frozen class
    return new


# -- a few numbers --------------------------------------------------------------------------------------

_READ_AT_ONCE = ("cpu",)


def reads_cost_nothing(device: torch.device) -> bool:
    """Whether a tensor there can be read without waiting: its operations are done when they return."""
    return device.type in _READ_AT_ONCE


def widest_float(device: torch.device) -> torch.dtype:
    """fp64, for sums over many values; fp32 on Apple's GPU, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


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
