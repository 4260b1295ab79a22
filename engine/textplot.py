"""Curves in a terminal: a chart of braille dots with its axes, for a look without a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["draw_text"]

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of each dot in a braille cell, [row][column]


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
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [title]
    for label, line in zip(labels, cells):
        lines.append(f"{label:>{margin}} |" + "".join(chr(0x2800 + cell) if cell else " " for cell in line).rstrip())
    ends = f"{left:g}".ljust(width - len(f"{right:g}")) + f"{right:g}"
    lines += [" " * margin + " +" + "-" * width, " " * margin + "  " + ends]
    return "\n".join(lines)


def _scaled(value: float, low: float, high: float, steps: int) -> int:
    return round((value - low) / (high - low) * steps) if high > low else 0
