"""A small table as text: names to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["table"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, indented.

    Args:
        heads: one for each column.
        rows: of as many words each; the first is a name, the others are numbers.
    """
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    for row in (heads, *rows):
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        yield "  " + "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()
