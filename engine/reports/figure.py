"""Charts as a picture, by matplotlib (the extra `plot`).

A range test has three panels in a row: loss and LR by step, as DeepSpeed's tutorial shows its tests, and the loss by
LR, where the boundaries are read. Whatever else was measured is in a second row.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redline.errors import RangeTestError
from redline.reports.model import OWN_RULE, Panel, Report, color_of, dash_of, panels_of

__all__ = ["picture_of", "plot_report", "save_column", "save_figure"]

SPAN, EDGE = "#F0E442", "#806600"  # of the suggested range
OWN, RULE = "#C8102E", "#333333"  # of the suggestion and of the other rules
DPI = 110
TESTS = ("loss", "schedule", "rate")  # panels of range tests, from left to right
TITLE_PAD, NAME_ROW = 6, 11  # points between axes and title, and of a row of rules' names
LINESTYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def save_figure(report: Report, path: str | Path) -> Path:
    """Draw a report into a file whose suffix gives the format: PNG, SVG or PDF."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _save(_figure_of(report), path)


def picture_of(report: Report) -> bytes:
    """The same as PNG, for a notebook."""
    file = io.BytesIO()
    _figure_of(report).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def plot_report(report: Report, path: str | Path | None = None, axes: Any = None) -> Any:
    """Draw a report into a file and return its path; without one its main panel on axes, and return these.

    The main panel is the loss by learning rate, of a tuning that of the search. Without axes pyplot makes new ones,
    which a notebook shows.
    """
    if path is not None:
        return save_figure(report, path)
    if axes is None:
        _, axes = _matplotlib("pyplot").subplots(figsize=(7.5, 4.6), layout="constrained")
    panels = panels_of(report)
    _draw(axes, next((panel for panel in panels if panel.name == "search"), panels[0]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best")
    return axes


def _figure_of(report: Report) -> Any:
    panels = panels_of(report)
    tests = {panel.name: panel for panel in panels if panel.name in TESTS}
    further = [panel for panel in panels if panel.name not in TESTS]
    heights = [4.6] * bool(tests) + [4.0] * bool(further)
    figure = _new_figure(12.5, sum(heights))
    rows = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if tests:
        row = rows.pop(0)
        by_step, _, by_lr = _draw_row(row, [tests[name] for name in TESTS])
        # One legend for all three, which covers none of them: the runs once, and the suggested range.
        shown = zip(by_step.get_legend_handles_labels(), by_lr.get_legend_handles_labels())
        handles, labels = (runs + span for runs, span in shown)
        row.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    if further:
        for axes, panel in zip(_draw_row(rows.pop(0), further, fontsize=10), further):
            if len(panel.lines) > 1:
                axes.legend(fontsize=7, loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.2))  # below all lines
    facts = dict(report.facts)
    words = [facts.get("optimizer"), f"batch size {facts['batch size']}" if "batch size" in facts else None]
    words.append(f"{facts['ranks']} ranks" if facts.get("ranks", "1") != "1" else None)
    figure.suptitle(": ".join(filter(None, (report.title, ", ".join(filter(None, words))))))
    return figure


def _draw_row(row: Any, panels: Sequence[Panel], fontsize: int | None = None) -> Any:
    """Draw panels next to each other, their titles as high as the highest one, above the names of rules."""
    all_axes = row.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels):
        _draw(axes, panel, named=panel.name != "rate")
    pad = max(TITLE_PAD + NAME_ROW * len({text.get_position()[1] for text in axes.texts}) for axes in all_axes)
    for axes in all_axes:
        axes.set_title(axes.get_title(), fontsize=fontsize or axes.title.get_fontsize(), pad=pad)
    return all_axes


def save_column(panels: Sequence[Panel], path: Path, title: str) -> Path:
    """Draw panels one below the other, over one x axis; see `save_figure`."""
    figure = _new_figure(9, 3.2 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        _draw(axes, panel)
        if len(panel.lines) > 1:
            axes.legend()
    figure.suptitle(title)
    return _save(figure, path)


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; not pyplot's, which needs a display and would keep it alive."""
    return _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


def _matplotlib(module: str) -> Any:
    try:
        importlib.import_module("matplotlib")
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError:
        raise RangeTestError("a picture needs matplotlib; install it with `pip install 'redline[plot]'`") from None


def _save(figure: Any, path: Path) -> Path:
    if path.is_dir():
        raise RangeTestError(f"{path}: is a folder; give a file, such as {path / 'picture.png'}")
    path = path if path.suffix else path.with_suffix(".png")
    try:
        figure.savefig(path, dpi=DPI)
    except ValueError as error:
        raise RangeTestError(f"{path}: {error}") from error
    return path


# -- one panel -----------------------------------------------------------------------------------------


def _draw(axes: Any, panel: Panel, *, named: bool = True) -> None:
    for line in panel.lines:
        color = color_of(line.look)
        for x, y in line.raw:
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        label = line.label
        if panel.name == "loss":  # which has no axis for the LR at which a run diverged
            ends = [sign.text for sign in panel.signs if sign.line == line.label and sign.diverged]
            label += f" (x: {ends[0]})" if len(ends) == 1 else ""
        axes.plot(
            line.x,
            line.y,
            label=label + " (winner)" * line.is_best if named else None,
            color=color,
            linestyle=LINESTYLES[dash_of(line.look)],
            linewidth=3 if line.is_best else 1.7,
            marker="o" if line.has_knots else None,
            markersize=4,
        )
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
    _draw_signs(axes, panel)
    axes.set(title=panel.title, xlabel=panel.x.title, ylabel=panel.y.title)
    axes.grid(alpha=0.3)
    for axis, shown, name in ((axes.xaxis, panel.x, "x"), (axes.yaxis, panel.y, "y")):
        if shown.log and len({value for line in panel.lines for value in getattr(line, name)}) != 1:  # as of one step
            _set_log(axis)
    if panel.y.bounds is not None:
        axes.set_ylim(*panel.y.bounds)
    if panel.name == "batch":
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.lines[0].x, [str(size) for size in panel.lines[0].x], minor=False)
    if panel.span is not None:
        low, high = panel.span
        fill, edge = (axes.axhspan, axes.axhline) if panel.span_on_y else (axes.axvspan, axes.axvline)
        fill(low, high, color=SPAN, alpha=0.3, linewidth=0, label=f"suggested 1Cycle: {low:.2g} to {high:.2g}")
        for at in panel.span:
            edge(at, color=EDGE, linewidth=0.8)
    _draw_marks(axes, panel)


def _set_log(axis: Any) -> None:
    """A logarithmic axis with labels at powers of ten, or where these are few at 1, 2 and 5 of each."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    if 0 < low < high < 50 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _draw_signs(axes: Any, panel: Panel) -> None:
    for sign in panel.signs:
        color, y = color_of(sign.look), sign.y
        marker, size, edge = ("X", 9, 0.97) if sign.diverged else ("^", 6, 0.02)
        place: dict[str, Any] = {}
        if y is None:
            y, place["transform"] = edge, axes.get_xaxis_transform()  # y as a share of the axes
            if sign.diverged:
                axes.axvline(sign.x, color=color, linestyle=":")
        axes.plot([sign.x], [y], marker, color=color, markersize=size, zorder=5, **place)


def _draw_marks(axes: Any, panel: Panel) -> None:
    """Each rule's answer as a line with its name above, in as many rows as it takes that no two names overlap."""
    left, right = axes.get_xlim()
    ends: list[float] = []  # of the names in each row
    for lr, rule in sorted((mark.lr, mark.rule) for mark in panel.marks if mark.lr and left <= mark.lr <= right):
        at = math.log(lr / left) / math.log(right / left)
        width = 0.016 * len(rule) + 0.02  # of a name, as a share of the axes
        start = max(0.0, min(at - width / 2, 1 - width))
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[row : row + 1] = [start + width]
        color, style = (OWN, "-") if rule == OWN_RULE else (RULE, (0, (5, 4)))
        axes.axvline(lr, color=color, linestyle=style, linewidth=1)
        place = {"transform": axes.transAxes, "ha": "center", "fontsize": 7.5}
        axes.text(start + width / 2, 1.01 + 0.055 * row, rule, color=color, **place)
    if ends:
        axes.set_title(axes.get_title(), pad=TITLE_PAD + NAME_ROW * len(ends))
