"""Curves in a terminal: a chart of braille dots, or of letters, with its axes; for a look without a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Line", "draw_lines", "draw_text", "shows_braille"]

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of each dot in a braille cell, [row][column]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: its name, and x and y of its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def shows_braille(stream: Any) -> bool:
    """Whether a text stream can take braille dots."""
    try:
        "\u28ff".encode(getattr(stream, "encoding", None) or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def draw_text(x: Sequence[float], y: Sequence[float], *, title: str, width: int = 72, height: int = 12) -> str:
    """A curve as lines of text.

    Args:
        x: ascending.
        y: as many; values that are not finite are left out.
        title: stands above.
        width: columns of the chart, without its labels.
        height: lines of the chart.
    """
    points = [(a, b) for a, b in zip(x, y) if math.isfinite(a) and math.isfinite(b)]
    if not points:
        return f"{title}\n(nothing to draw)"
    left, right = points[0][0], points[-1][0]
    low, high = min(b for _, b in points), max(b for _, b in points)
    cells = [[0] * width for _ in range(height)]
    for a, b in points:
        column = _scaled(a, left, right, 2 * width - 1)
        row = 4 * height - 1 - _scaled(b, low, high, 4 * height - 1)
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    rows = ["".join(chr(0x2800 + cell) if cell else " " for cell in line) for line in cells]
    return _framed(title, rows, (low, high), "-" * width, (left, right))


def draw_lines(
    lines: Sequence[Line],
    *,
    title: str,
    width: int = 72,
    height: int = 14,
    top: float | None = None,
    span: tuple[float, float] | None = None,
    span_name: str = "",
    braille: bool = True,
) -> str:
    """Several lines over a logarithmic x axis, each with a letter at its end, or made of it.

    Args:
        lines: at most 26; points that are not finite or whose x is not positive are left out.
        title: stands above.
        width: columns of the chart, without its labels.
        height: lines of the chart.
        top: y at the upper edge; what lies above it is not drawn. None for the highest.
        span: x of two boundaries, which stand in the chart as columns of colons and in its axis as brackets.
        span_name: what lies between them.
        braille: False makes the lines of letters, in ASCII.
    """
    shown = [(line.name, list(_drawable(line))) for line in lines[: len(_LETTERS)]]
    ys = [b for _, points in shown for _, b in points]
    if not ys:
        return f"{title}\n(nothing to draw)"
    low, high = min(ys), max(ys) if top is None else top
    xs = [a for _, points in shown for a, _ in points]
    left, right = math.log(min(xs)), math.log(max(xs))
    canvas = [[" "] * width for _ in range(height)]
    axis = ["-"] * width
    if span is not None:
        _draw_span(canvas, axis, [_scaled(math.log(edge), left, right, width - 1) for edge in span])
    ends = []
    for letter, (_, points) in zip(_LETTERS, shown):
        columns = [(math.log(a), b) for a, b in points if b <= high]
        cells = dict(_cells(columns, (left, right), (low, high), width, height, braille))
        for (row, column), cell in cells.items():
            canvas[row][column] = _joined(canvas[row][column], cell) if braille else letter
        ends += [(cell, letter) for cell in list(cells)[-1:]]
    for (row, column), letter in ends:  # last: a letter is not to be drawn over
        canvas[row][column] = letter
    names = [f"{letter} {name}" for letter, (name, _) in zip(_LETTERS, shown)]
    names += [f"[ ] {span_name}"] if span is not None else []
    chart = _framed(title, ["".join(row) for row in canvas], (low, high), "".join(axis), (min(xs), max(xs)))
    return "\n".join([chart, *_wrapped(names, width)])


def _drawable(line: Line) -> Iterator[tuple[float, float]]:
    return ((a, b) for a, b in zip(line.x, line.y) if 0 < a < math.inf and math.isfinite(b))


def _draw_span(canvas: list[list[str]], axis: list[str], edges: list[int]) -> None:
    """Boundaries as columns of colons, and the part of the axis between them; one that lies outside has no column."""
    low, high = edges
    for column in range(max(0, low), min(len(axis), high + 1)):
        axis[column] = "="
    for column, bracket in ((low, "["), (high, "]")):
        if 0 <= column < len(axis):
            axis[column] = bracket
            for row in canvas:
                row[column] = ":"


def _cells(
    points: Sequence[tuple[float, float]],
    across: tuple[float, float],
    up: tuple[float, float],
    width: int,
    height: int,
    braille: bool,
) -> Iterator[tuple[tuple[int, int], str]]:
    """Row, column and character of each cell that the points fall in, in their order."""
    wide, high = (2, 4) if braille else (1, 1)
    bits: dict[tuple[int, int], int] = {}
    for a, b in points:
        column = _scaled(a, *across, wide * width - 1)
        row = high * height - 1 - _scaled(b, *up, high * height - 1)
        cell = (row // high, column // wide)
        bits[cell] = bits.pop(cell, 0) | (_DOTS[row % 4][column % 2] if braille else 0)
        yield cell, chr(0x2800 + bits[cell])


def _joined(there: str, new: str) -> str:
    """Dots of two lines in one cell."""
    return chr(ord(there) | ord(new)) if there >= "\u2800" else new


def _framed(title: str, rows: Sequence[str], up: tuple[float, float], axis: str, across: tuple[float, float]) -> str:
    labels = [f"{up[1]:.4g}", *[""] * (len(rows) - 2), f"{up[0]:.4g}"]
    margin = max(map(len, labels))
    lines = [title]
    lines += [f"{label:>{margin}} |{row}".rstrip() for label, row in zip(labels, rows)]
    left, right = (f"{end:.4g}" if isinstance(end, float) else f"{end:g}" for end in across)
    ends = left.ljust(len(axis) - len(right)) + right
    return "\n".join([*lines, " " * margin + " +" + axis, " " * margin + "  " + ends])


def _wrapped(names: Sequence[str], width: int) -> Iterator[str]:
    """Names side by side, as many as there is room for."""
    line = ""
    for name in names:
        if line and len(line) + 3 + len(name) > width:
            yield line
            line = ""
        line = f"{line}   {name}" if line else name
    if line:
        yield line


def _scaled(value: float, low: float, high: float, steps: int) -> int:
    return round((value - low) / (high - low) * steps) if high > low else 0
