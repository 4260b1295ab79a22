"""Charts for a terminal."""

from __future__ import annotations

import io
import math

from engine.textplot import Line, draw_lines, draw_text, shows_braille


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


# -- several lines -------------------------------------------------------------------------------------

FALL = Line("fall", [10.0**k for k in range(-5, 0)], [4.0, 3.0, 2.0, 1.0, 0.0])
FLAT = Line("flat", [1e-5, 1e-3, 1e-1], [4.0, 4.0, 4.0])


def test_lines_are_letters_over_a_logarithmic_axis_where_there_is_no_braille() -> None:
    text = draw_lines([FALL, FLAT], title="t", width=9, height=5, braille=False)
    assert text.splitlines() == [
        "t",
        "4 |b   b   b",
        "  |  a",
        "  |    a",
        "  |      a",
        "0 |        a",
        "  +---------",
        "   1e-05 0.1",
        "a fall",
        "b flat",
    ]


def test_braille_lines_end_in_their_letters() -> None:
    first, *_, last = draw_lines([FALL, FLAT], title="t", width=9, height=5).splitlines()[1:6]
    assert first[-1] == "b"
    assert last[-1] == "a"
    assert "\u2801" <= first[3] <= "\u28ff"


def test_boundaries_stand_in_the_chart_and_in_its_axis() -> None:
    text = draw_lines([FALL], title="t", width=9, height=5, span=(1e-4, 1e-2), span_name="here", braille=False)
    *_, axis, _, names, more = text.splitlines()
    assert axis == "  +--[===]--"
    assert (names, more) == ("a fall", "[ ] here")
    assert [line[5] for line in text.splitlines()[1:6]] == [":", "a", ":", ":", ":"]


def test_a_boundary_outside_of_the_chart_is_not_drawn() -> None:
    text = draw_lines([FALL], title="t", width=9, height=5, span=(1e-9, 1e-2), span_name="here", braille=False)
    assert "  +======]--" in text.splitlines()


def test_what_lies_above_the_top_is_left_out() -> None:
    text = draw_lines([Line("a", [1, 10, 100], [1.0, 0.0, 1e9])], title="", width=9, height=3, top=1.0, braille=False)
    assert [row.strip() for row in rows(text)[:3]] == ["a", "", "a"]


def test_points_that_have_no_place_on_the_axes_are_left_out() -> None:
    whole = draw_lines([Line("a", [1.0, 10.0], [0.0, 1.0])], title="")
    holed = draw_lines([Line("a", [0.0, 1.0, -1.0, 5.0, 10.0], [9.0, 0.0, 9.0, math.nan, 1.0])], title="")
    assert holed == whole
    nothing = "t\n(nothing to draw)"
    assert draw_lines([], title="t") == draw_lines([Line("a", [0.0], [1.0])], title="t") == nothing


def test_two_lines_share_a_cell_dot_by_dot() -> None:
    low, high = Line("low", [1.0, 2.0], [0.0, 0.0]), Line("high", [1.0, 2.0], [1.0, 1.0])
    (row, *_) = rows(draw_lines([low, high, Line("end", [4.0], [0.0])], title="", width=2, height=1))
    assert row[0] == "\u2841"


def test_an_encoding_either_has_braille_or_has_not() -> None:
    assert shows_braille(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for encoding in ("ascii", "latin-1", "cp1252"):
        assert not shows_braille(io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert not shows_braille(io.StringIO())
