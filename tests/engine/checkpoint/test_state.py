"""Plain values through JSON and back, exactly; and what would have to be unpickled."""

from __future__ import annotations

import io
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

from redline.checkpoint.state import decode_json, merge_tensors, plain_copy, split_tensors, tensor_keys
from redline.checkpoint.tensors import load_plain
from redline.errors import EngineError

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
    file = io.BytesIO()
    torch.save({"value": plain_copy(value, "value")}, file)
    file.seek(0)
    return load_plain(file)["value"]  # type: ignore[arg-type]  # torch.load reads from it, too


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


def test_tensors_are_stored_elsewhere_under_keys_of_their_own() -> None:
    tensors: dict[str, Tensor] = {}
    state = {"a": {"b": torch.ones(1)}, "c": [torch.ones(2), 3], "d": (torch.zeros(1),)}
    split = split_tensors(state, "state", tensors)
    assert sorted(tensor_keys(split)) == sorted(tensors) == ["state.a.b", "state.c.0", "state.d.0"]
    merged = merge_tensors(split, tensors)
    assert torch.equal(merged["c"][0], torch.ones(2)) and merged["c"][1] == 3 and type(merged["d"]) is tuple


def test_the_state_of_format_1_is_decoded() -> None:
    packed = {
        "tuple": {"$tuple": [1, {"$tuple": []}]}, "keys": {"$dict": [[1, "a"], [{"$tuple": [2]}, "b"]]},
        "inf": {"$float": "inf"}, "bytes": {"$bytes": "AP8="}, "complex": {"$complex": "(1+2j)"},
        "set": {"$set": [1]}, "frozen": {"$frozenset": [2]}, "size": {"$Size": [2, 3]}, "dtype": {"$dtype": "float16"},
        "device": {"$device": "cpu"}, "counter": {"$Counter": [["x", 2]]}, "tensor": {"$tensor": "k"},
        "plain": [1, None],
    }  # fmt: skip
    decoded = decode_json(json.dumps(packed))
    assert decoded["tuple"] == (1, ()) and decoded["keys"] == {1: "a", (2,): "b"} and decoded["inf"] == float("inf")
    assert (decoded["bytes"], decoded["complex"], decoded["set"]) == (b"\x00\xff", 1 + 2j, {1})
    assert (decoded["frozen"], decoded["size"], decoded["dtype"]) == (frozenset({2}), torch.Size([2, 3]), torch.float16)
    assert (decoded["device"], decoded["counter"]) == (torch.device("cpu"), Counter({"x": 2}))
    assert list(tensor_keys(decoded)) == ["k"] and decoded["plain"] == [1, None]


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
        plain_copy(value, "state")
    assert str(caught.value).startswith(named)


def test_of_many_that_are_refused_five_are_named() -> None:
    with pytest.raises(EngineError, match=r"state\[4\] is of type object and 3 more; expected None, numbers"):
        plain_copy([object()] * 8, "state")


def test_what_contains_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(EngineError, match="state: it contains itself"):
        plain_copy(knot, "state")


@pytest.mark.parametrize("packed", [{"$function": "os.system"}, {"$dtype": "save"}])
def test_what_format_1_never_had_is_an_error(packed: Any) -> None:
    with pytest.raises((ValueError, KeyError)):
        decode_json(json.dumps(packed))
