"""Batches of every kind on their way to a device: all tensors arrive, and containers keep their types."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from redline.device import map_tensors, to_device

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


def test_sequences_sets_and_objects_keep_their_types_too() -> None:
    attrs = pytest.importorskip("attrs")
    meta, x = torch.device("meta"), torch.ones(2)

    @attrs.frozen
    class Frozen:
        x: torch.Tensor
        name: str = "one"

    class Listed(list[Any]):
        note = ""

    class Checked(NamedTuple("Checked", [("x", torch.Tensor), ("size", int)])):
        def __new__(cls, x: torch.Tensor) -> Checked:
            return super().__new__(cls, x, len(x))

    listed = Listed([x])
    listed.note = "kept"
    for batch, find in [
        (deque([x], maxlen=3), lambda moved: moved[0]),
        (listed, lambda moved: moved[0]),
        (Checked(x), lambda moved: moved.x),
        ({x}, lambda moved: next(iter(moved))),
        (Frozen(x), lambda moved: moved.x),
        (SimpleNamespace(x=x), lambda moved: moved.x),
    ]:
        moved = to_device(batch, meta)
        assert type(moved) is type(batch)
        assert find(moved).device == meta and find(batch) is x
    assert to_device(deque([x], maxlen=3), meta).maxlen == 3
    assert to_device(listed, meta).note == "kept"
    assert to_device(Frozen(x), meta).name == "one"


def test_an_object_that_moves_itself_in_place_is_returned() -> None:
    class Graph:
        def __init__(self) -> None:
            self.x = torch.ones(2)

        def to(self, device: torch.device) -> None:
            self.x = self.x.to(device)

    graph = Graph()
    moved = to_device([graph], torch.device("meta"))
    assert moved[0] is graph and graph.x.device.type == "meta"


def test_what_does_not_change_is_not_copied() -> None:
    batch = {"ids": [torch.ones(2, dtype=torch.int64)], "more": (None, "text", deque([1]))}
    assert map_tensors(batch, lambda tensor: tensor) is batch


def test_batches_of_hugging_face_keep_their_types() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers, which no part of the engine does")
    x = torch.ones(2)

    def double(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double()

    for batch in (
        transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x),
        transformers.BatchEncoding({"last_hidden_state": x}),
        transformers.BatchFeature({"last_hidden_state": x}),
    ):
        changed = map_tensors(batch, double)
        assert type(changed) is type(batch)
        assert changed["last_hidden_state"].dtype == changed.last_hidden_state.dtype == torch.float64
        assert batch["last_hidden_state"] is x
