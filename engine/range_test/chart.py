"""Loss against learning rate in a terminal, with the suggested boundaries."""

from __future__ import annotations

import math
import shutil
import sys
from typing import Any

from engine.range_test.contents import Contents, groups_of
from engine.range_test.smoothing import smooth
from engine.range_test.suggestion import Suggestion
from engine.textplot import Line, draw_lines, shows_braille

__all__ = ["chart_of"]

WIDTHS = (40, 110)  # columns, at least and at most
LABELS = 12  # columns that the numbers beside the chart may take


def chart_of(contents: Contents, *, stream: Any = None, width: int | None = None) -> str:
    """A chart for a text stream.

    Args:
        contents: whose range tests are drawn.
        stream: where it will be printed: letters take the place of braille dots where the encoding has none. None for
            the standard output.
        width: columns; None takes the terminal's.
    """
    stream = sys.stdout if stream is None else stream
    columns = shutil.get_terminal_size().columns if width is None else width
    columns = min(max(columns, WIDTHS[0]), WIDTHS[1]) - LABELS
    groups = [group for group in groups_of(contents.curves, contents.train_batch_size) if not group.panel]
    curves = [(group.label, group.curves[0]) for group in groups if group.curves[0].is_test]
    lines = [Line(label, curve.lrs, smooth(curve.losses, contents.beta)) for label, curve in curves]
    starts = [loss for line in lines for loss in line.y[:5] if math.isfinite(loss)]
    answer = contents.answer
    span = (answer.cycle_min_lr, answer.cycle_max_lr) if isinstance(answer, Suggestion) else None
    return draw_lines(
        lines,
        title="Training loss by learning rate",
        width=columns,
        top=max(starts, default=None),
        span=span,
        span_name=f"suggested 1Cycle, {span[0]:.3g} to {span[1]:.3g}" if span else "",
        braille=shows_braille(stream),
    )
