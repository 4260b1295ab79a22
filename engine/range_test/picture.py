"""The picture of a range test: loss against updates, learning rate against updates, loss against learning rate.

The first two are how DeepSpeed's tutorial shows its tests; the third is where the boundaries are read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import RangeTestError
from engine.range_test.analysis import Curve, Suggestion, divergence, smooth

if TYPE_CHECKING:
    from engine.range_test.result import RangeTestResult

__all__ = ["draw_range_test"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BASELINE = "#777777"
_CYCLE = "#F0E442"


def draw_range_test(result: RangeTestResult, path: Path) -> Path:
    """Draw all runs of a test into a file of the format that its name says.

    Raises:
        RangeTestError: matplotlib is missing, or knows no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RangeTestError("a picture needs matplotlib; install it with `pip install 'redline[plot]'`") from None

    # A Figure of its own: pyplot would want a display and would keep it for ever.
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, rates, by_rate = figure.subplots(1, 3)
    for curve, color in zip(result.curves, _colors(result.curves)):
        end = divergence(curve.losses) if curve.rate is not None else None
        _draw_by_step(by_step, curve, color, end)
        _draw_rate(rates, curve, color, end)
        if curve.rate is not None:
            _draw_by_rate(by_rate, curve, color, end)
    kind = "validation" if any(curve.validation for curve in result.curves) else "training"
    _finish(by_step, f"{kind.capitalize()} loss by update", "update (batch)", f"{kind} loss")
    _finish(rates, "Learning rate by update", "update (batch)", "learning rate")
    _finish(by_rate, "Training loss by learning rate", "learning rate", "training loss (bold: smoothed)")
    rates.set_yscale("log")
    by_rate.set_xscale("log")
    _bound_losses(by_step, result.curves, kind)
    _bound_losses(by_rate, [curve for curve in result.curves if curve.rate is not None], "training")
    if isinstance(result.suggestion, Suggestion):
        _mark(rates, by_rate, result.suggestion)
    figure.legend(*_legend(by_step, by_rate), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(result))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise RangeTestError(f"{path}: {error}") from error
    return path


def _colors(curves: tuple[Curve, ...]) -> list[str]:
    tests = iter(_COLORS * len(curves))
    return [_BASELINE if curve.rate is None else next(tests) for curve in curves]


def _title(result: RangeTestResult) -> str:
    title = f"Learning rate range test: {result.optimizer}, batch size {result.train_batch_size}"
    return title if result.world_size == 1 else f"{title}, {result.world_size} processes"


def _draw_by_step(axes: Any, curve: Curve, color: str, end: int | None) -> None:
    label = curve.name
    if end is not None:
        label += f" (x: diverged at update {curve.steps[end]}, LR {curve.lrs[end]:.2g})"
    if curve.validation:
        updates, losses = zip(*curve.validation)
        axes.plot(updates, losses, color=color, marker="o", markersize=3, label=label)
    else:
        axes.plot(curve.steps, curve.losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(curve.steps, smooth(curve.losses), color=color, label=label)
    if end is not None:
        axes.axvline(curve.steps[end], color=color, linestyle=":")
        # At the upper edge: where the loss went is out of sight, more often than not.
        _cross(axes, curve.steps[end], 0.97, color, transform=axes.get_xaxis_transform())


def _draw_rate(axes: Any, curve: Curve, color: str, end: int | None) -> None:
    axes.plot(curve.steps, curve.lrs, color=color)
    if end is not None:
        _cross(axes, curve.steps[end], curve.lrs[end], color)


def _draw_by_rate(axes: Any, curve: Curve, color: str, end: int | None) -> None:
    axes.plot(curve.lrs, curve.losses, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(curve.lrs, smooth(curve.losses), color=color, linewidth=2)
    if end is not None:
        axes.axvline(curve.lrs[end], color=color, linestyle=":")
        _cross(axes, curve.lrs[end], 0.97, color, transform=axes.get_xaxis_transform())


def _cross(axes: Any, x: float, y: float, color: str, **options: Any) -> None:
    axes.plot([x], [y], marker="X", markersize=9, color=color, linestyle="none", zorder=5, **options)


def _mark(rates: Any, by_rate: Any, suggestion: Suggestion) -> None:
    low, high = suggestion.cycle_min_lr, suggestion.cycle_max_lr
    rates.axhspan(low, high, color=_CYCLE, alpha=0.3, linewidth=0)
    by_rate.axvspan(low, high, color=_CYCLE, alpha=0.3, linewidth=0, label=f"suggested 1Cycle: {low:.2g} to {high:.2g}")
    for rate in (low, high):
        rates.axhline(rate, color="#806600", linewidth=0.8)
        by_rate.axvline(rate, color="#806600", linewidth=0.8)


def _legend(*plots: Any) -> tuple[list[Any], list[str]]:
    """One legend for all plots, so that it covers none."""
    handles: list[Any] = []
    labels: list[str] = []
    for axes in plots:
        more = axes.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    return handles, labels


def _bound_losses(axes: Any, curves: Any, kind: str) -> None:
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


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
