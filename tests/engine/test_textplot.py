"""Charts for a terminal."""

from __future__ import annotations

import math

from engine.textplot import draw_text


def rows(text: str) -> list[str]:
    """The chart itself, without title, labels and axis."""
    return [line.partition("|")[2] for line in text.splitlines()[1:-2]]


def test_a_rise_starts_at_the_bottom_left_and_ends_at_the_top_right() -> None:
    top, *_, bottom = rows(draw_text(range(100), range(100), title="", width=10, height=4))
    assert bottom[0] != " "
    assert len(top) == 10
    assert top[0] == " "
    assert len(bottom) < 10


def test_the_labels_are_the_ends_of_both_axes() -> None:
    text = draw_text([0, 500], [0.25, 1e-4], title="rate", width=20, height=3)
    title, first, *_, last, axis, ends = text.splitlines()
    assert title == "rate"
    assert first.startswith("  0.25 |")
    assert last.startswith("0.0001 |")
    assert axis == "       +" + "-" * 20
    assert ends.split() == ["0", "500"]


def test_a_constant_is_a_line_at_the_bottom() -> None:
    *above, line = rows(draw_text(range(40), [3.0] * 40, title="", width=20, height=3))
    assert above == ["", ""]
    assert len(set(line)) == 1


def test_values_that_are_not_finite_are_left_out() -> None:
    values = [0.0, math.nan, 1.0, math.inf]
    assert draw_text(range(4), values, title="t") == draw_text([0, 2], [0.0, 1.0], title="t")


def test_nothing_is_said_to_be_nothing() -> None:
    assert draw_text([], [], title="t") == draw_text([1], [math.nan], title="t") == "t\n(nothing to draw)"


def test_one_point_is_drawn() -> None:
    assert "".join(rows(draw_text([3], [5.0], title=""))).strip() != ""


def test_no_line_is_wider_than_asked() -> None:
    text = draw_text(range(1000), [math.sin(k / 50) for k in range(1000)], title="", width=30, height=5)
    assert max(len(row) for row in rows(text)) <= 30
    assert len(rows(text)) == 5
