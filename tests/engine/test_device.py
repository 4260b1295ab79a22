"""Batches of every kind on their way to a device: all tensors arrive, and containers keep their types."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from engine.device import to_device

Pair = namedtuple("Pair", "x y")


def test_every_tensor_of_a_nested_batch_goes_to_the_device() -> None:
    meta = torch.device("meta")
    x = torch.ones(2)
    moved = to_device({"pair": Pair(x, [x, (x, "text")]), "number": 3, "none": None}, meta)
    assert type(moved["pair"]) is Pair
    assert moved["pair"].x.device == meta
    assert moved["pair"].y[0].device == meta
    assert moved["pair"].y[1][0].device == meta
    assert isinstance(moved["pair"].y[1], tuple)
    assert (moved["pair"].y[1][1], moved["number"], moved["none"]) == ("text", 3, None)


class Encoding(UserDict[str, Any]):
    """As tokenizers return them: a mapping that moves itself."""

    def to(self, device: torch.device) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


@dataclass(frozen=True)
class Example:
    x: torch.Tensor
    name: str


def test_containers_keep_their_types_on_the_way_to_the_device() -> None:
    meta, x = torch.device("meta"), torch.ones(2)
    default = defaultdict(list, x=x)
    for batch in (Encoding(x=x), OrderedDict(x=x), UserDict(x=x), MappingProxyType({"x": x}), default):
        moved = to_device(batch, meta)
        assert type(moved) is type(batch)
        assert moved["x"].device == meta
    assert default["x"] is x
    example = to_device(Example(x, "one"), meta)
    assert (type(example), example.x.device, example.name) == (Example, meta, "one")
    assert to_device(range(3), meta) == range(3)
