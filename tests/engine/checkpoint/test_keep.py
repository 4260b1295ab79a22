"""Which checkpoints are to be removed, and how names and settings are compared: functions of plain values."""

from __future__ import annotations

import pytest

from engine.checkpoint.compare import listed, match_names, schedule_changes, setting_changes
from engine.checkpoint.keep import superfluous
from engine.checkpoint.manifest import Manifest


def row(*steps: int, latest: bool = True) -> list[Manifest]:
    """Checkpoints in the order they were saved in."""
    return [Manifest(f"s{step}", step, 1, latest, float(time), {}) for time, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [
        (None, None, []),
        (None, 2, []),
        (2, None, ["s1", "s2", "s3", "s4"]),
        (2, 2, ["s1", "s3"]),
        (1, 3, ["s1", "s2", "s4", "s5"]),
        (9, None, []),
    ],
)
def test_the_newest_stay_and_multiples(keep_last: int | None, keep_every: int | None, gone: list[str]) -> None:
    assert superfluous(row(1, 2, 3, 4, 5, 6), keep_last, keep_every) == gone


def test_the_newest_are_those_saved_last_whatever_their_step() -> None:
    assert superfluous(row(1, 2, 3, 2), 1, None) == ["s1", "s2", "s3"]


def test_others_stay() -> None:
    assert superfluous(row(1, 2, 3), 1, None, kept=["s1"]) == ["s2"]
    assert superfluous(row(1, 2, latest=False) + row(3, 4), 1, None) == ["s3"]


def test_names_match_by_any_of_a_tied_weights() -> None:
    names = match_names(["a", "b", "c"], ["x", "b"], {"x": "a"}, {})
    assert names == ({"a": "x", "b": "b"}, ["c"], [])
    names = match_names(["one", "two"], ["one", "three"], {}, {"two": "one"})
    assert names == ({"one": "one", "two": "one"}, [], ["three"])


def test_a_setting_that_one_side_does_not_know_is_no_change() -> None:
    assert setting_changes({"lr": 0.1, "eps": 1, "old": 3}, {"lr": 0.2, "eps": 1.0, "new": 4}) == ["lr was 0.1, is 0.2"]
    packed = {"$tuple": [0.9, 0.99]}
    assert setting_changes({"betas": packed}, {"betas": 1}) == ["betas was (0.9, 0.99), is 1"]
    assert setting_changes({"lr": 1, "betas": 2}, {"lr": 2, "betas": 2}, ["lr"]) == []


def test_schedules_are_compared_by_what_told_of_them() -> None:
    one = {"type": "A", "told_by": "config", "parameters": {"x": 1}}
    assert schedule_changes(None, None) == schedule_changes(one, {**one}) == []
    assert schedule_changes(one, {**one, "parameters": {"x": 2}}) == ["x was 1, is 2"]
    assert schedule_changes(one, {**one, "told_by": "state", "parameters": {"x": 2}}) == []
    assert schedule_changes(None, one) == ["type was none, is A"]


def test_of_many_names_the_first_are_listed() -> None:
    assert listed("abc") == "a, b, c"
    assert listed("abcdefgh") == "a, b, c, d, e and 3 more"
