"""The chart for the terminal."""

from __future__ import annotations

import io
import sys

import pytest

from redline.reports.model import Axis, Line, Panel
from redline.reports.terminal import REMEDY, draw_chart, draw_panel
from tests.records import KINDS

pytest.importorskip("plotext", reason="the extra `terminal` is not installed")


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_kind_of_record_fits_into_eighty_columns(kind: str, encoding: str) -> None:
    text = draw_chart(KINDS[kind](), stream=stream(encoding), width=80)
    assert max(map(len, text.splitlines())) <= 80
    text.encode(encoding)


def test_tests_and_boundaries_are_named_and_baselines_are_left_out() -> None:
    text = draw_chart(KINDS["several"](), stream=stream("utf-8"), width=80)
    assert text.splitlines()[0] == "Training loss by learning rate"
    assert text.splitlines()[-1] == "| suggested 1Cycle, 0.0019 to 0.059"
    assert all(f"{letter} rate {rate}" in text for letter, rate in zip("abc", (5, 50, 500)))
    assert "fixed" not in text
    assert "1Cycle" not in draw_chart(KINDS["flat"](), stream=stream("utf-8"), width=80), "a refusal"


def test_a_line_goes_where_its_values_do() -> None:
    line = Line("fall", 0, [10.0**k for k in range(-5, 0)], [4.0, 3.0, 2.0, 1.0, 0.0])
    panel = Panel("rate", "t", Axis("LR", log=True), Axis("loss"), (line,))
    rows = draw_panel(panel, stream=stream("ascii"), width=60, height=12).splitlines()
    marks = [row.rindex("a") for row in rows[3:-1] if "a" in row]
    assert marks == sorted(marks) and marks[-1] - marks[0] > 30
    assert rows[-1].split() == ["1e-05", "0.0001", "0.001", "0.01", "0.1"]


def test_the_chart_is_as_wide_as_the_terminal_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def width(columns: int) -> int:
        monkeypatch.setenv("COLUMNS", str(columns))
        return max(map(len, draw_chart(KINDS["one"](), stream=stream("utf-8")).splitlines()))

    assert [width(columns) for columns in (10, 80, 110, 1000)] == [40, 80, 110, 110]


def test_without_plotext_there_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotext", None)
    assert draw_chart(KINDS["several"]()) == REMEDY
