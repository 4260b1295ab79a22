"""Rows of words as text: aligned and folded for a terminal, one line each for a pipe."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

__all__ = ["COLORS", "Paint", "paint_nothing", "paint_on_terminal", "rows_as_text"]

Paint = Callable[[str, str], str]  # a text and what it is: the text, in color or not

COLORS = {"honoured": "32", "no effect": "33", "refused": "31", "problem": "31", "head": "1"}
_GAP = "  "


def paint_nothing(text: str, kind: str) -> str:
    return text


def paint_on_terminal(text: str, kind: str) -> str:
    code = COLORS.get(kind.strip())
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def rows_as_text(
    rows: Sequence[Sequence[str]], heads: Sequence[str], width: int | None = None, paint: Paint = paint_nothing
) -> Iterator[str]:
    """Lines of a table.

    Args:
        rows: of as many words each as there are heads.
        heads: what the columns are; shown on a terminal only.
        width: columns of the terminal, which the last column is folded to; None for a pipe: a row is a line.
        paint: color of a cell, by its own text.
    """
    every = [*rows, heads] if width else rows
    widths = [max((len(row[index]) for row in every), default=0) for index in range(len(heads) - 1)]
    left = sum(widths) + len(_GAP) * len(heads)
    if width:
        yield _GAP + _GAP.join([*(paint(head.ljust(size), "head") for head, size in zip(heads, widths)), heads[-1]])
        yield _GAP + "-" * (min(width, left + max((len(row[-1]) for row in rows), default=0)) - len(_GAP))
    for row in rows:
        cells = [paint(cell.ljust(size), cell) for cell, size in zip(row, widths)]
        last = textwrap.wrap(row[-1], max(width - left, 20)) if width else [row[-1]]
        yield (_GAP + _GAP.join([*cells, last[0] if last else ""])).rstrip()
        yield from (" " * left + line for line in last[1:])
