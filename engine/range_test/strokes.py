"""The strokes that a picture is made of: a group's line with its band, its raw losses, where it diverged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from engine.range_test.contents import Group, looks_of
from engine.range_test.curve import Curve
from engine.range_test.smoothing import smooth

__all__ = [
    "COLORS",
    "Look",
    "bound_losses",
    "draw_by_rate",
    "draw_cross",
    "draw_line",
    "draw_raw",
    "ends",
    "finish",
    "kind_of",
    "with_looks",
]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")  # where the colours begin again
_BASELINE = "#777777"

Look = tuple[str, str]  # colour and dash


def with_looks(groups: Sequence[Group]) -> list[tuple[Group, Look]]:
    def look(number: int) -> Look:
        if number < 0:
            return _BASELINE, _DASHES[(-1 - number) % len(_DASHES)]
        return COLORS[number % len(COLORS)], _DASHES[number // len(COLORS) % len(_DASHES)]

    return [(group, look(number)) for group, number in zip(groups, looks_of(groups))]


def ends(group: Group) -> Iterator[tuple[Curve, int]]:
    """The runs that diverged, and where."""
    for curve in group.curves:
        end = curve.diverged_at if curve.is_test else None
        if end is not None:
            yield curve, end


def draw_by_rate(axes: Any, group: Group, look: Look, beta: float, label: str | None = None) -> None:
    draw_raw(axes, group, look, lambda curve: curve.lrs)
    draw_line(axes, group, look, label, lambda curve: (curve.lrs, smooth(curve.losses, beta)), linewidth=2)
    for curve, end in ends(group):
        axes.axvline(curve.lrs[end], color=look[0], linestyle=":")
        draw_cross(axes, curve.lrs[end], 0.97, look[0], transform=axes.get_xaxis_transform())
    for curve in group.curves:
        used = dict(zip(curve.steps, curve.lrs))
        skipped = [used[step] for step in curve.skipped if step in used]
        axes.plot(skipped, [0.02] * len(skipped), "^", color=look[0], transform=axes.get_xaxis_transform())


def draw_raw(axes: Any, group: Group, look: Look, x: Callable[[Curve], Sequence[float]]) -> None:
    for curve in group.curves:
        axes.plot(x(curve), curve.losses, color=look[0], alpha=0.25, linewidth=0.8)


def draw_line(
    axes: Any, group: Group, look: Look, label: str | None, points: Callable[[Curve], Any], **options: Any
) -> None:
    """One line: the mean over the seeds, with a band from the lowest to the highest."""
    members = [tuple(map(list, points(curve))) for curve in group.curves if curve.validation or curve.steps]
    members = [member for member in members if member]
    if not members:
        return
    xs = max((member[0] for member in members), key=len)
    columns = [[member[1][k] for member in members if k < len(member[1])] for k in range(len(xs))]
    color, dash = look
    axes.plot(xs, [fmean(column) for column in columns], color=color, linestyle=dash, label=label, **options)
    if len(members) > 1:
        axes.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.2, linewidth=0)


def draw_cross(axes: Any, x: float, y: float, color: str, **options: Any) -> None:
    axes.plot([x], [y], marker="X", markersize=9, color=color, linestyle="none", zorder=5, **options)


def kind_of(curves: Sequence[Curve]) -> str:
    return "validation" if any(curve.validation for curve in curves) else "training"


def bound_losses(axes: Any, curves: Sequence[Curve], kind: str) -> None:
    """Keep a diverging end from flattening the rest: show up to a little above where the runs began."""
    finite = [[loss for loss in curve.losses if math.isfinite(loss)] for curve in curves]
    lows = [value for values in finite for value in smooth(values)]
    starts = [max(values[:5]) for values in finite if values]
    if kind == "validation":
        lows = [loss for curve in curves for _, loss in curve.validation if math.isfinite(loss)]
    if not lows or not starts:
        return
    low, high = min(lows), max(starts)
    room = 0.12 * ((high - low) or 1.0)
    bottom = low - room
    axes.set_ylim(0.0 if bottom < 0 <= low else bottom, high + room)


def finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
