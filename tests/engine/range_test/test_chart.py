"""The chart of a range test in a terminal."""

from __future__ import annotations

import io

import pytest

from engine.range_test.chart import chart_of
from tests.records import KINDS


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_kind_of_record_fits_into_eighty_columns(kind: str, encoding: str) -> None:
    text = chart_of(KINDS[kind](), stream=stream(encoding), width=80)
    assert max(map(len, text.splitlines())) <= 80
    text.encode(encoding)


def test_tests_and_boundaries_are_named_and_runs_beside_them_are_left_out() -> None:
    text = chart_of(KINDS["several"](), stream=stream("utf-8"), width=80)
    assert text.splitlines()[0] == "Training loss by learning rate"
    assert text.splitlines()[-2:] == ["a rate 5   b rate 50   c rate 500", "[ ] suggested 1Cycle, 0.0019 to 0.059"]


def test_a_refusal_has_no_boundaries() -> None:
    assert "[" not in chart_of(KINDS["flat"](), stream=stream("utf-8"), width=80)


def test_the_chart_is_as_wide_as_the_terminal_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def axis(columns: int) -> int:
        monkeypatch.setenv("COLUMNS", str(columns))
        return next(len(line) for line in chart_of(KINDS["one"]()).splitlines() if " +" in line)

    assert axis(10) < 40 < 70 < axis(80) < 80 < axis(110) == axis(1000) < 110
