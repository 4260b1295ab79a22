"""What scripts/tutorials.py is made of, the part that draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image  # which matplotlib brings
from tutorial_runs import Method
from tutorial_tables import Outcome

from engine.range_test import Curve, Suggestion
from engine.range_test.divergence import divergence

# Okabe and Ito's colours, which colour-blind readers can tell apart.
TESTS = {"best fixed": "#0072B2", "slow": "#E69F00", "fast": "#555555"}  # as the tutorial has them: blue, orange, grey
METHODS = {
    "small batch": "#999999",
    "Fixed": "#0072B2",
    "LinearScale": "#D55E00",
    "best": "#56B4E9",
    "1Cycle": "#009E73",
    "linear decay": "#CC79A7",
}


def draw_tests(outcome: Outcome, path: Path) -> None:
    """Validation loss and learning rate against batches, as in the tutorial on range tests."""
    figure, (losses, rates) = canvas(2)
    fixed = [[(updates, loss) for updates, loss, _ in run.held_out] for run in outcome.fixed.runs]
    band(losses, fixed, "#0072B2", f"fixed {outcome.fixed.lr:g}, best for the small batch", linestyle=":")
    for (kind, color), curves in zip(TESTS.items(), outcome.tests()):
        label = f"{kind}, {curves[0].name}" if curves[0].is_test else f"{curves[0].name}, best for this batch"
        band(losses, [curve.validation for curve in curves], color, label)
        longest = max(curves, key=lambda curve: len(curve.lrs))
        rates.plot(longest.steps, longest.lrs, color=color)
        cross(losses, rates, curves, color)
    if isinstance(outcome.result.suggestion, Suggestion):
        answer = outcome.result.suggestion
        rates.axhspan(answer.cycle_min_lr, answer.cycle_max_lr, color="#F0E442", alpha=0.3, linewidth=0)
        rates.set_title("learning rate (yellow: the suggested 1Cycle's)")
    rates.set_yscale("log")
    bound(losses, [fixed, *([curve.validation for curve in curves] for curves in outcome.tests())])
    finish(figure, f"Range tests: {outcome.task.title}, batch size {outcome.result.train_batch_size}", path)


def cross(losses: Any, rates: Any, curves: Sequence[Curve], color: str) -> None:
    """A cross where a test of a seed has diverged."""
    for curve in curves:
        end = divergence(curve.losses) if curve.is_test else None
        if end is not None:
            options = {"marker": "x", "color": color, "linestyle": "none", "zorder": 5}
            rates.plot([curve.steps[end]], [curve.lrs[end]], **options)
            losses.plot([curve.steps[end]], [0.97], transform=losses.get_xaxis_transform(), **options)


def draw_methods(outcome: Outcome, path: Path) -> None:
    """Validation loss against batches and against samples, and learning rate against batches."""
    figure, (by_batch, by_sample, rates) = canvas(3)
    for name, color in METHODS.items():
        method = outcome.method(name)
        if method is None:
            continue
        label = f"{method.name} (batch size {method.batch})" if name == "small batch" else method.name
        band(by_sample, points(method, scale=method.batch), color, label)
        if method.batch == outcome.result.train_batch_size:
            band(by_batch, points(method), color, None)
            rates.plot(method.runs[0].lrs, color=color)
    by_sample.set_xlabel("samples")
    by_sample.set_title("validation loss by samples")
    for axes in (by_batch, by_sample):
        bound(axes, [points(method) for method in outcome.methods if method.runs[0].lrs], log=True)
    finish(figure, f"Eight times the batch: {outcome.task.title}", path)


def points(method: Method, scale: int = 1) -> list[list[tuple[int, float]]]:
    return [[(scale * updates, loss) for updates, loss, _ in run.held_out] for run in method.runs]


def canvas(panels: int) -> tuple[Figure, Any]:
    # A Figure of its own: pyplot would want a display.
    figure = Figure(figsize=(4.6 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, panels)
    for axes, title in ((plots[0], "validation loss"), (plots[-1], "learning rate")):
        axes.set_title(title)
    for axes in plots:
        axes.set_xlabel("batches (updates)")
        axes.grid(alpha=0.3)
    return figure, plots


def band(axes: Any, runs: Sequence[Sequence[tuple[int, float]]], color: str, label: str | None, **style: Any) -> None:
    """Mean and standard deviation over the seeds, as far as all of them go."""
    rows = list(zip(*runs))
    at = [row[0][0] for row in rows]
    middle = [mean(loss for _, loss in row) for row in rows]
    around = [stdev([loss for _, loss in row]) if len(row) > 1 else 0.0 for row in rows]
    axes.plot(at, middle, color=color, label=label, **style)
    low, high = ([m + sign * a for m, a in zip(middle, around)] for sign in (-1, 1))
    axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)


def bound(axes: Any, kinds: Sequence[Sequence[Sequence[tuple[int, float]]]], *, log: bool = False) -> None:
    """Keep a loss that diverges from flattening the rest."""
    losses = [loss for runs in kinds for run in runs for _, loss in run]
    low, start = min(losses), max(run[0][1] for runs in kinds for run in runs)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.set_ylim(low * 0.9, start * 1.1)


def finish(figure: Figure, title: str, path: Path) -> None:
    handles, labels = zip(
        *[pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())]  # one legend for all
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)  # colours, for a quarter of the bytes
    few.save(path, optimize=True)
