"""A drawing of loss against LR that needs no script, for a reader without JavaScript."""

from __future__ import annotations

import math
from html import escape

from engine.range_test.contents import Contents
from engine.range_test.smoothing import smooth
from engine.range_test.suggestion import Suggestion

__all__ = ["sketch"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 300, 52, 30


def sketch(contents: Contents) -> str:
    """An SVG element, or nothing where there is nothing to draw."""
    lines = []
    for curve in contents.curves:
        if curve.is_test:
            pairs = zip(curve.lrs, smooth(curve.losses, contents.beta))
            lines.append((curve.name, [(lr, loss) for lr, loss in pairs if lr > 0 and math.isfinite(loss)]))
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    left, right = math.log(min(lr for lr, _ in points)), math.log(max(lr for lr, _ in points))
    low, high = min(loss for _, loss in points), max(max(b for _, b in line[:5]) for _, line in lines if line)

    def x(lr: float) -> float:
        return _LEFT + (math.log(lr) - left) / ((right - left) or 1) * (_WIDTH - _LEFT - 10)

    def y(loss: float) -> float:
        return 8 + (high - min(loss, high)) / ((high - low) or 1) * (_HEIGHT - _BOTTOM - 8)

    drawn = []
    if isinstance(contents.answer, Suggestion):
        from_, to = x(contents.answer.cycle_min_lr), x(contents.answer.cycle_max_lr)
        drawn.append(f'<rect class="span" x="{from_:.1f}" y="8" width="{to - from_:.1f}" height="{_HEIGHT - 38}"/>')
    for index, (name, line) in enumerate(lines):
        path = " ".join(f"{x(lr):.1f},{y(loss):.1f}" for lr, loss in line[:: max(1, len(line) // 300)])
        drawn.append(f'<polyline class="line look{index % 6}" points="{path}"><title>{escape(name)}</title></polyline>')
    words = (
        (_LEFT, _HEIGHT - 8, "start", f"LR {math.exp(left):.2g}"),
        (_WIDTH - 10, _HEIGHT - 8, "end", f"LR {math.exp(right):.2g}"),
        (_LEFT - 6, 18, "end", f"{high:.3g}"),
        (_LEFT - 6, _HEIGHT - _BOTTOM, "end", f"{low:.3g}"),
    )
    drawn += [f'<text x="{a}" y="{b}" text-anchor="{anchor}">{word}</text>' for a, b, anchor, word in words]
    label = "Smoothed training loss against the learning rate"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
