"""Plain values through JSON and back, exactly; and what would have to be unpickled."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoint.plain import pack, tensors_in, unpack
from engine.errors import EngineError

keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.complex_numbers(allow_nan=False), st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2])]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.dictionaries(keys, inner).map(OrderedDict),
        st.frozensets(st.integers()),
        st.sets(st.text()),
    ),
    max_leaves=20,
)


def there_and_back(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(value, "value", tensors)))
    assert sorted(tensors_in(packed)) == sorted(tensors)
    return unpack(packed, tensors)


def types(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), [(types(key), types(item)) for key, item in value.items()]
    return (type(value), [types(item) for item in value]) if isinstance(value, (list, tuple)) else type(value)


@given(values)
def test_what_is_packed_comes_back_as_it_was(value: Any) -> None:
    back = there_and_back(value)
    assert back == value and types(back) == types(value)


def test_a_counter_stays_one() -> None:
    assert there_and_back(Counter([3, 3, 5])) == Counter({3: 2, 5: 1})
    assert type(there_and_back(Counter([3]))) is Counter


def test_not_a_number_comes_back() -> None:
    back = there_and_back([float("nan"), float("-inf")])
    assert back[0] != back[0] and back[1] == float("-inf")


def test_tensors_go_elsewhere_under_keys_of_their_own() -> None:
    tensors: dict[str, Tensor] = {}
    packed = pack({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), "c": [torch.ones(2)]}, "state", tensors)
    assert set(tensors) == {"state.a.b", "state.a.b_", "state.c.0"}
    assert packed["c"] == [{"$tensor": "state.c.0"}]


class Colour(Enum):
    RED = 1


class Number(int):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"where": Path("x")}, "state['where'] is of type pathlib.PosixPath"),
        ([1, (2, len)], "state[1][1] is of type builtin_function_or_method"),
        ({3: object()}, "state[3] is of type object"),
        (Colour.RED, "state is of type "),
        (Number(3), "state is of type "),
        (torch.ones(2).to_sparse(), "state is a tensor that is torch.sparse_coo, quantized or without values"),
        (torch.ones(2, device="meta"), "state is a tensor that is torch.strided, quantized or without values"),
    ],
)
def test_anything_else_is_refused_with_its_place_and_type(value: Any, named: str) -> None:
    with pytest.raises(EngineError) as caught:
        pack(value, "state", {})
    assert str(caught.value).startswith(named)


def test_of_many_that_are_refused_five_are_named() -> None:
    with pytest.raises(EngineError, match=r"state\[4\] is of type object and 3 more; expected None, numbers"):
        pack([object()] * 8, "state", {})


def test_what_contains_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(EngineError, match="state: it contains itself"):
        pack(knot, "state", {})


@pytest.mark.parametrize("packed", [{"$function": "os.system"}, {"$dtype": "save"}, {"$tensor": "gone"}])
def test_what_pack_never_writes_is_an_error(packed: Any) -> None:
    with pytest.raises((ValueError, KeyError)):
        unpack(packed, {})
