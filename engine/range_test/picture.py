"""The picture of a range test: loss against updates, learning rate against updates, loss against learning rate.

The first two are how DeepSpeed's tutorial shows its tests; the third is where the boundaries are read. Boundaries by
batch size, settings that were swept, the search for the peak and trials of schedules have panels in a second row,
where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import RangeTestError
from engine.range_test.contents import OURS, Contents, Group, Mark, groups_of, trial_groups
from engine.range_test.smoothing import smooth
from engine.range_test.strokes import (
    COLORS,
    Look,
    bound_losses,
    draw_by_rate,
    draw_cross,
    draw_line,
    draw_raw,
    ends,
    finish,
    kind_of,
    with_looks,
)
from engine.range_test.suggestion import Suggestion

__all__ = ["draw_range_test"]

_CYCLE = "#F0E442"
_EDGE = "#806600"
_RULE = "#333333"
_OURS = "#C8102E"  # our own rule


def draw_range_test(contents: Contents, path: Path) -> Path:
    """Draw all runs of a test into a file of the format that its name says.

    Raises:
        RangeTestError: matplotlib is missing, or knows no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RangeTestError("a picture needs matplotlib; install it with `pip install 'redline[plot]'`") from None

    more = list(_more(contents))
    # A Figure of its own: pyplot would want a display and would keep it for ever.
    figure = Figure(figsize=(12.5, 4.6 + 4.0 * bool(more)), layout="constrained")
    FigureCanvasAgg(figure)
    top, *below = figure.subfigures(2, 1, squeeze=False, height_ratios=(4.6, 4.0))[:, 0] if more else [figure]
    _draw_tests(top, contents)
    if more:
        for axes, (draw, *given) in zip(below[0].subplots(1, len(more), squeeze=False)[0], more):
            draw(axes, *given)
            axes.legend(fontsize=8)
    figure.suptitle(_title(contents))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise RangeTestError(f"{path}: {error}") from error
    return path


def _title(contents: Contents) -> str:
    facts = dict(contents.facts)
    words = [facts.get("optimizer", ""), f"batch size {facts['batch size']}" if "batch size" in facts else ""]
    if facts.get("processes", "1") != "1":
        words.append(f"{facts['processes']} processes")
    return ": ".join(filter(None, (contents.title, ", ".join(filter(None, words)))))


# -- the tests -----------------------------------------------------------------------------------------


def _draw_tests(figure: Any, contents: Contents) -> None:
    by_step, rates, by_rate = figure.subplots(1, 3)
    groups = [group for group in groups_of(contents.curves, contents.train_batch_size) if group.panel == ""]
    for group, look in with_looks(groups):
        _draw_by_step(by_step, group, look, contents.beta)
        for curve in group.curves[:1]:
            rates.plot(curve.steps, curve.lrs, color=look[0], linestyle=look[1])
        if group.curves[0].is_test:
            draw_by_rate(by_rate, group, look, contents.beta)
        for curve, end in ends(group):
            draw_cross(rates, curve.steps[end], curve.lrs[end], look[0])
    shown = [curve for group in groups for curve in group.curves]
    kind = kind_of(shown)
    finish(by_step, f"{kind.capitalize()} loss by update", "update (batch)", f"{kind} loss")
    finish(rates, "Learning rate by update", "update (batch)", "learning rate")
    finish(by_rate, "Training loss by learning rate", "learning rate", "training loss (bold: smoothed)")
    rates.set_yscale("log")
    by_rate.set_xscale("log")
    bound_losses(by_step, shown, kind)
    bound_losses(by_rate, [curve for curve in shown if curve.is_test], "training")
    if isinstance(contents.answer, Suggestion):
        _mark_cycle(rates, by_rate, contents.answer)
    _mark_rules(by_rate, contents.marks)
    figure.legend(*_legend(by_step, by_rate), loc="outside lower center", ncols=4, frameon=False)


def _draw_by_step(axes: Any, group: Group, look: Look, beta: float) -> None:
    label = group.label
    diverged = list(ends(group))
    if len(group.curves) == 1 and diverged:
        curve, end = diverged[0]
        label += f" (x: diverged at update {curve.steps[end]}, LR {curve.lrs[end]:.2g})"
    if any(curve.validation for curve in group.curves):
        draw_line(axes, group, look, label, lambda curve: zip(*curve.validation), marker="o", markersize=3)
    else:
        draw_raw(axes, group, look, lambda curve: curve.steps)
        draw_line(axes, group, look, label, lambda curve: (curve.steps, smooth(curve.losses, beta)))
    for curve, end in diverged:
        axes.axvline(curve.steps[end], color=look[0], linestyle=":")
        # At the upper edge: where the loss went is out of sight, more often than not.
        draw_cross(axes, curve.steps[end], 0.97, look[0], transform=axes.get_xaxis_transform())


def _mark_cycle(rates: Any, by_rate: Any, suggestion: Suggestion) -> None:
    low, high = suggestion.cycle_min_lr, suggestion.cycle_max_lr
    rates.axhspan(low, high, color=_CYCLE, alpha=0.3, linewidth=0)
    by_rate.axvspan(low, high, color=_CYCLE, alpha=0.3, linewidth=0, label=f"suggested 1Cycle: {low:.2g} to {high:.2g}")
    for rate in (low, high):
        rates.axhline(rate, color=_EDGE, linewidth=0.8)
        by_rate.axvline(rate, color=_EDGE, linewidth=0.8)


def _mark_rules(axes: Any, marks: Sequence[Mark]) -> None:
    """Each rule's answer as a line that is named above, in as many rows as it takes that no two names overlap."""
    left, right = axes.get_xlim()
    ends: list[float] = []
    for lr, rule in sorted((mark.lr, mark.rule) for mark in marks if mark.lr and left <= mark.lr <= right):
        at = math.log(lr / left) / math.log(right / left)
        wide = 0.016 * len(rule) + 0.02  # share of the axes that a name takes
        start = max(0.0, min(at - wide / 2, 1 - wide))
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[row : row + 1] = [start + wide]
        color = _OURS if rule == OURS else _RULE
        axes.axvline(lr, color=color, linestyle="-" if color == _OURS else (0, (5, 4)), linewidth=1)
        axes.text(start + wide / 2, 1.01 + 0.055 * row, rule, color=color, fontsize=7.5, ha="center",
                  transform=axes.transAxes)  # fmt: skip
    if ends:
        axes.set_title(axes.get_title(), pad=6 + 11 * len(ends))


# -- what there may be beside them ---------------------------------------------------------------------


def _more(contents: Contents) -> Iterator[tuple[Any, ...]]:
    """The panels of the second row: what draws each, and what it is given."""
    if len(contents.batches) > 1:
        yield _draw_batches, contents
    groups = groups_of(contents.curves, contents.train_batch_size)
    for panel in dict.fromkeys(group.panel for group in groups if group.panel):
        yield _draw_panel, [group for group in groups if group.panel == panel], panel, contents.beta
    if contents.search:
        yield _draw_search, contents
    if contents.trials:
        yield _draw_trials, contents


def _draw_batches(axes: Any, contents: Contents) -> None:
    answers = [(size, answer) for size, answer in contents.batches if isinstance(answer, Suggestion)]
    sizes = [size for size, _ in answers]
    for name, color in (("cycle_max_lr", COLORS[0]), ("cycle_min_lr", COLORS[1])):
        axes.plot(sizes, [getattr(answer, name) for _, answer in answers], color=color, marker="o", label=name)
    finish(axes, "Boundaries by batch size", "batch size", "learning rate")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)


def _draw_panel(axes: Any, groups: Sequence[Group], panel: str, beta: float) -> None:
    for group, look in with_looks(groups):
        draw_by_rate(axes, group, look, beta, group.label)
    finish(axes, f"Training loss by {panel.replace('_', ' ')}", "learning rate", "training loss")
    axes.set_xscale("log")
    bound_losses(axes, [curve for group in groups for curve in group.curves], "training")


def _draw_search(axes: Any, contents: Contents) -> None:
    tries = sorted(((trial.lr, came) for trial, came in contents.search), key=lambda each: each[0])
    told = [(lr, came) for lr, came in tries if math.isfinite(came)]
    if told:
        axes.plot(*zip(*told), color=COLORS[0], marker="o", label="short trainings")
    for lr, _ in (each for each in tries if not math.isfinite(each[1])):
        draw_cross(axes, lr, 0.97, COLORS[0], transform=axes.get_xaxis_transform())
    if isinstance(contents.answer, Suggestion):
        peak = contents.answer.cycle_max_lr
        axes.axvline(peak, color=_OURS, linewidth=1, label=f"for the whole training: {peak:g}")
    kind = kind_of([trial.curve for trial, _ in contents.search])
    finish(axes, "Search for the peak", "peak learning rate", f"{kind} loss, from the start")
    axes.set_xscale("log")
    low = min((came for _, came in told), default=0.0)
    if low < 0 < max(came for _, came in told) + low / 2:  # what went far above its start would flatten the rest
        axes.set_ylim(1.1 * low, -low / 2)


def _draw_trials(axes: Any, contents: Contents) -> None:
    groups = trial_groups(contents.trials)
    curves = [trial.curve for trial in contents.trials]
    kind, beta = kind_of(curves), contents.beta
    for index, (group, look) in enumerate(with_looks(groups)):
        best = index == contents.winner
        label = f"{group.label} (winner)" if best else group.label
        wide = {"linewidth": 3.0 if best else 1.4}
        if kind == "validation":
            draw_line(axes, group, look, label, lambda curve: zip(*curve.validation), **wide)
        else:
            draw_line(axes, group, look, label, lambda curve: (curve.steps, smooth(curve.losses, beta)), **wide)
    finish(axes, f"{kind.capitalize()} loss of the trials", "update (batch)", f"{kind} loss")
    bound_losses(axes, curves, kind)


# -- axes ----------------------------------------------------------------------------------------------


def _legend(*plots: Any) -> tuple[list[Any], list[str]]:
    """One legend for all plots, so that it covers none."""
    handles: list[Any] = []
    labels: list[str] = []
    for axes in plots:
        more = axes.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    return handles, labels
