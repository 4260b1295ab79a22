"""Plain values as JSON, and back again exactly: tuples stay tuples, integer keys integers, infinity infinity.

What JSON cannot say is an object with one key that begins with ``$``. Tensors are left out and named; who packs
them writes them elsewhere. Anything else is refused: reading it back would mean running its code.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError

__all__ = ["pack", "tensors_in", "unpack"]

_SHOWN = 5  # of the values that are refused


def pack(value: Any, name: str, tensors: dict[str, Tensor], *, key: str | None = None) -> Any:
    """A value as JSON has it.

    Args:
        value: None, numbers (NumPy's become Python's), strings, bytes, lists, tuples, sets, dicts and tensors, nested.
        name: what it is, for an error.
        tensors: takes the tensors in it; for each the JSON has its key there.
        key: with which the keys of its tensors begin; None takes `name`.

    Raises:
        EngineError: something else is in it; names where and of what type.
    """
    refused: list[str] = []
    try:
        packed = _pack(value, name, key or name, tensors, refused)
    except RecursionError:
        raise EngineError(f"{name}: it contains itself, or is nested too deeply to be saved; save its parts") from None
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise EngineError(
            f"{'; '.join(refused[:_SHOWN])}{more}; expected None, numbers, strings, bytes, lists, tuples, "
            "sets, dicts and tensors, so that nothing has to be unpickled; save what it is made of, such as vars(x) "
            "or x.state_dict()"
        )
    return packed


def _pack(value: Any, path: str, key: str, tensors: dict[str, Tensor], refused: list[str]) -> Any:
    def inner(item: Any, place: Any, shown: str) -> Any:
        return _pack(item, f"{path}{shown}", f"{key}.{place}", tensors, refused)

    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [inner(item, place, f"[{place}]") for place, item in enumerate(value)]
    if kind in _SEQUENCES:
        return {f"${kind.__name__}": [inner(item, place, f"[{place}]") for place, item in enumerate(value)]}
    if kind is dict and all(type(each) is str and not each.startswith("$") for each in value):
        return {each: inner(item, each, f"[{each!r}]") for each, item in value.items()}
    if kind in _MAPPINGS:
        pairs = [(inner(each, f"key{place}", f"[{each!r}]"), each) for place, each in enumerate(value)]
        return {f"${kind.__name__}": [[packed, inner(value[each], each, f"[{each!r}]")] for packed, each in pairs]}
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            refused.append(f"{path} is a tensor that is {value.layout}, quantized or without values")
            return None
        while key in tensors:  # {"a.b": x, "a": {"b": y}}
            key += "_"
        tensors[key] = value.detach()
        return {"$tensor": key}
    if kind in _OTHERS:
        return {f"${kind.__name__}": _OTHERS[kind][0](value)}
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
        return _pack(value.item(), path, key, tensors, refused)
    refused.append(f"{path} is of type {kind.__module__}.{kind.__qualname__}".replace("builtins.", ""))
    return None


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What was packed; a tensor comes from `tensors`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not what `pack` makes.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: unpack(item, tensors) for key, item in value.items()}
    ((tag, content),) = value.items()
    if tag == "$float":
        return float(content)
    if tag == "$tensor":
        return tensors[content]
    for kind in _SEQUENCES:
        if tag == f"${kind.__name__}":
            return kind(unpack(content, tensors))
    for kind in _MAPPINGS:
        if tag == f"${kind.__name__}":
            return kind({unpack(key, tensors): unpack(item, tensors) for key, item in content})
    for kind, (_, read) in _OTHERS.items():
        if tag == f"${kind.__name__}":
            return read(content)
    raise ValueError(f"{tag}: unknown mark")


def tensors_in(value: Any) -> Iterator[str]:
    """The keys of the tensors in what was packed."""
    if isinstance(value, list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            yield value["$tensor"]
        else:
            yield from tensors_in(list(value.values()))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: no number format")
    return dtype


_SEQUENCES: tuple[type, ...] = (tuple, set, frozenset, torch.Size)
_MAPPINGS: tuple[type, ...] = (dict, OrderedDict, Counter)
_OTHERS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: (lambda value: base64.b64encode(value).decode(), base64.b64decode),
    complex: (lambda value: repr(value), complex),
    torch.dtype: (lambda value: str(value).removeprefix("torch."), _dtype),
    torch.device: (str, torch.device),
}
