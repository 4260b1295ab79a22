"""A chart for the terminal, by plotext (the extra `terminal`)."""

from __future__ import annotations

import math
import shutil
import sys
from typing import Any

from redline.reports.model import OWN_RULE, Panel, Report, panels_of

__all__ = ["REMEDY", "draw_chart", "draw_panel"]

REMEDY = "No chart: it needs plotext; install it with `pip install 'redline[terminal]'`"

WIDTHS = (40, 110)  # columns, at least and at most
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_chart(report: Report, *, stream: Any = None, width: int | None = None) -> str:
    """The range tests of a report as loss by LR, with what is suggested as vertical lines.

    The stream that it will be printed to, by default standard output, decides between braille dots and letters.
    """
    panel = panels_of(report)[0]
    chart = draw_panel(panel, stream=stream, width=width)
    if chart != REMEDY and (edges := _edges(panel)):
        what = "peak" if panel.span is None else "1Cycle"
        chart += f"\n| suggested {what}, {' to '.join(f'{edge:.3g}' for edge in edges)}"
    return chart


def _edges(panel: Panel) -> tuple[float, ...]:
    """The suggested range on the x axis, or the suggested peak alone."""
    if panel.span is None:
        return tuple(mark.lr for mark in panel.marks if mark.rule == OWN_RULE and mark.lr)
    return () if panel.span_on_y else panel.span


def draw_panel(panel: Panel, *, stream: Any = None, width: int | None = None, height: int = 18) -> str:
    """A panel's first 26 lines as text; one line with the remedy where plotext is missing. See `draw_chart`."""
    try:
        import plotext
    except ImportError:
        return REMEDY
    low, high = panel.y.bounds or (-math.inf, math.inf)
    drawn: list[tuple[str, str, list[float], list[float]]] = []
    for letter, line in zip(LETTERS, panel.lines):
        points = [(x, y) for x, y in zip(line.x, line.y) if low <= y <= high and (x > 0 or not panel.x.log)]
        if points := [point for point in points if all(map(math.isfinite, point))]:
            drawn.append((letter, line.label, [x for x, _ in points], [y for _, y in points]))
    if not drawn:
        return f"{panel.title}\n(nothing to draw)"
    width = shutil.get_terminal_size().columns if width is None else width
    braille = _has_braille(sys.stdout if stream is None else stream)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(min(max(width, WIDTHS[0]), WIDTHS[1]), height)
    plotext.frame(braille)  # drawn with box characters
    for letter, name, xs, ys in drawn:
        label = f"{letter} {name}" if len(drawn) > 1 else None
        plotext.plot(xs, ys, label=label, marker="braille" if braille else letter)
        if label is not None:
            plotext.text(letter, xs[-1], ys[-1], alignment="right")  # without colors, its end tells lines apart
    left, right = min(min(xs) for _, _, xs, _ in drawn), max(max(xs) for _, _, xs, _ in drawn)
    if left < right:  # five ticks of our own: plotext's labels have a fixed number of decimals
        plotext.xscale("log" if panel.x.log else "linear")
        ticks = [left * (right / left) ** (k / 4) for k in range(5)] if panel.x.log else []
        ticks = ticks or sorted({round(left + (right - left) * k / 4) for k in range(5)})
        plotext.xticks(ticks, [f"{tick:.2g}" if panel.x.log else str(tick) for tick in ticks])
    for edge in _edges(panel):
        if left <= edge <= right:
            plotext.vline(edge)
    text = plotext.uncolorize(plotext.build())
    if not braille:
        text = text.replace("\u2502", "|")  # of vertical lines
    return "\n".join([panel.title, *(line.rstrip() for line in text.splitlines())]).rstrip()


def _has_braille(stream: Any) -> bool:
    try:
        "\u28ff\u2500".encode(getattr(stream, "encoding", None) or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
