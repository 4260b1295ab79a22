"""The plots of the two tutorials' pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image  # a dependency of matplotlib

from redline.range_test import Suggestion
from redline.range_test.curve import divergence
from tutorial.runs import Method
from tutorial.tables import Outcome

# Okabe and Ito's colors, which color-blind readers can tell apart.
TESTS = {"best fixed": "#0072B2", "slow": "#E69F00", "fast": "#555555"}  # blue, orange and gray, as in the tutorial
METHODS = {
    "small batch": "#999999",
    "Fixed": "#0072B2",
    "LinearScale": "#D55E00",
    "best": "#56B4E9",
    "1Cycle": "#009E73",
    "linear decay": "#CC79A7",
}
Runs = Sequence[Sequence[tuple[int, float]]]  # one list of (step, loss) per seed


def draw_tests(outcome: Outcome, path: Path) -> None:
    """Validation loss and learning rate against steps; a cross where the test of a seed diverged."""
    figure, (losses, lrs) = canvas(2)
    fixed = held_out(outcome.fixed)
    band(losses, fixed, "#0072B2", f"fixed {outcome.fixed.lr:g}, best for the small batch", linestyle=":")
    for (kind, color), curves in zip(TESTS.items(), outcome.tests()):
        label = f"{kind}, {curves[0].name}" if curves[0].is_test else f"{curves[0].name}, best for this batch"
        band(losses, [curve.validation for curve in curves], color, label)
        longest = max(curves, key=lambda curve: len(curve.lrs))
        lrs.plot(longest.steps, longest.lrs, color=color)
        for curve in curves:
            end = divergence(curve.losses) if curve.is_test else None
            if end is not None:
                cross = {"marker": "x", "color": color, "linestyle": "none", "zorder": 5}
                lrs.plot([curve.steps[end]], [curve.lrs[end]], **cross)
                losses.plot([curve.steps[end]], [0.97], transform=losses.get_xaxis_transform(), **cross)
    answer = outcome.result.suggestion
    if isinstance(answer, Suggestion):
        lrs.axhspan(answer.cycle_min_lr, answer.cycle_max_lr, color="#F0E442", alpha=0.3, linewidth=0)
        lrs.set_title("learning rate (yellow: the suggested 1Cycle's)")
    lrs.set_yscale("log")
    bound(losses, [*fixed, *(curve.validation for curves in outcome.tests() for curve in curves)])
    finish(figure, f"Range tests: {outcome.task.title}, batch size {outcome.result.train_batch_size}", path)


def draw_methods(outcome: Outcome, path: Path) -> None:
    """Validation loss against steps and against samples, and learning rate against steps."""
    figure, (by_step, by_sample, lrs) = canvas(3)
    for name, color in METHODS.items():
        method = outcome.method(name)
        if method is None:
            continue
        label = f"{method.name} (batch size {method.batch})" if name == "small batch" else method.name
        band(by_sample, held_out(method, scale=method.batch), color, label)
        if method.batch == outcome.result.train_batch_size:
            band(by_step, held_out(method), color, None)
            lrs.plot(method.runs[0].lrs, color=color)
    by_sample.set_xlabel("samples")
    by_sample.set_title("validation loss by samples")
    for axes in (by_step, by_sample):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        bound(axes, [run for method in outcome.methods if method.runs[0].lrs for run in held_out(method)])
    finish(figure, f"Eight times the batch: {outcome.task.title}", path)


def held_out(method: Method, scale: int = 1) -> list[list[tuple[int, float]]]:
    return [[(scale * step, loss) for step, loss, _ in run.held_out] for run in method.runs]


def canvas(panels: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6 * panels, 4.4), layout="constrained")  # not pyplot, which would need a display
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, panels)
    plots[0].set_title("validation loss")
    plots[-1].set_title("learning rate")
    for axes in plots:
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    return figure, plots


def band(axes: Any, runs: Runs, color: str, label: str | None, **style: Any) -> None:
    """Mean and standard deviation over the seeds, as far as all of them go."""
    rows = list(zip(*runs))
    steps = [row[0][0] for row in rows]
    middle = [mean(loss for _, loss in row) for row in rows]
    around = [stdev([loss for _, loss in row]) if len(row) > 1 else 0.0 for row in rows]
    axes.plot(steps, middle, color=color, label=label, **style)
    low, high = ([m + sign * a for m, a in zip(middle, around)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def bound(axes: Any, runs: Runs) -> None:
    """Keep a loss that diverges from flattening the rest."""
    axes.set_ylim(0.9 * min(loss for run in runs for _, loss in run), 1.1 * max(run[0][1] for run in runs))


def finish(figure: Figure, title: str, path: Path) -> None:
    handles, labels = zip(*[pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())])
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the bytes
