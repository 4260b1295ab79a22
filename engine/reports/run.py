"""A training run: its loss, learning rate, gradient norm and throughput, from the CSV files that it has written."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redline.errors import RangeTestError
from redline.range_test.curve import smooth
from redline.range_test.result import write_text
from redline.reports.figure import save_column
from redline.reports.model import Axis, Line, Panel, color_of
from redline.reports.terminal import draw_panel

__all__ = ["RunRecord", "is_run", "load_run", "show_run"]

# By the end of a file's name: the title of a panel, and whether its axis is logarithmic.
NUMBERS = {
    "train_loss": ("training loss", False),
    "lr": ("learning rate", False),
    "grad_norm": ("gradient norm before clipping", True),
    "loss_scale": ("loss scale", True),
    "skipped_steps": ("skipped steps", False),
    "samples_per_second": ("samples per second", False),
}
PREFIX = "Train_Samples_"
PICTURE_NAME, PAGE_NAME = "training.png", "training.html"


def is_run(folder: Path) -> bool:
    """Whether a training run has written its numbers there."""
    return (folder / f"{PREFIX}train_loss.csv").is_file()


def load_run(folder: Path) -> RunRecord:
    """The numbers in the folder of `redline.log_dir`, or of DeepSpeed's `csv_monitor`."""
    series = {}
    for name, path in ((name, folder / f"{PREFIX}{name}.csv") for name in NUMBERS):
        if not path.is_file():
            continue
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == 2 and row[0] != "step"]
            points = {int(samples): float(value) for samples, value in rows}  # a repeated step counts once
        except (OSError, ValueError) as error:
            raise RangeTestError(f"{path}: cannot be read as a step and a number in each row: {error}") from error
        series[name] = (list(points), list(points.values()))
    if not series.get("train_loss", ([], []))[0]:
        raise RangeTestError(f"{folder}: it has no training loss")
    return RunRecord(folder.resolve().name, series)


def show_run(folder: Path, out: Path, *, beta: float) -> str:
    """Write picture and page of a run, as far as matplotlib and plotly are there; returns a chart and lines."""
    record = load_run(folder)
    out.mkdir(parents=True, exist_ok=True)
    panels = record.panels(beta)
    written, lines = [], []
    for save, name in ((save_column, PICTURE_NAME), (_save_page, PAGE_NAME)):
        try:
            written.append(save(panels, out / name, record.name).name)
        except RangeTestError as error:
            lines.append(f"No {name}: {error}.")
    if written:
        lines.append(f"Written to {out}: {', '.join(written)}")
    return "\n".join([draw_panel(record.panels(beta=0.0)[0]), "", record.summary(), *lines])


@dataclass(frozen=True)
class RunRecord:
    """The numbers of a training run, by name: samples so far, and values."""

    name: str
    series: dict[str, tuple[list[int], list[float]]]

    def summary(self) -> str:
        """What became of the run, in lines for people."""
        samples, losses = self.series["train_loss"]
        finite = [loss for loss in losses if math.isfinite(loss)]
        lines = [f"{self.name}: {len(losses):,} optimizer steps, {samples[-1]:,} samples"]
        if finite:
            lines.append(f"training loss: first {losses[0]:.4g}, lowest {min(finite):.4g}, last {losses[-1]:.4g}")
        if len(finite) < len(losses):
            lines.append(f"{len(losses) - len(finite)} losses are not finite")
        if "skipped_steps" in self.series:
            lines.append(f"skipped steps: {self.series['skipped_steps'][1][-1]:g}")
        if "samples_per_second" in self.series:
            speeds = sorted(self.series["samples_per_second"][1])
            lines.append(f"samples per second: {speeds[len(speeds) // 2]:.4g} in the median")
        return "\n".join(lines)

    def panels(self, beta: float) -> list[Panel]:
        """A chart by samples for each of the numbers; `beta` is the weight of the past in the smoothed loss."""
        panels = []
        for look, (name, (samples, values)) in enumerate(self.series.items()):
            title, log = NUMBERS[name]
            line = Line(title, look, samples, values)
            if name == "train_loss" and beta:
                line = Line(title, look, samples, smooth(values, beta), raw=((samples, values),))
            log = log and all(value > 0 for value in values)
            panels.append(Panel("schedule", title, Axis("samples"), Axis("", log=log), (line,)))
        return panels


def _save_page(panels: Sequence[Panel], path: Path, title: str) -> Path:
    """Write panels as an interactive page that needs no network, by plotly."""
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise RangeTestError("a page needs plotly; install it with `pip install 'redline[report]'`") from None
    titles = [panel.title for panel in panels]
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.04, subplot_titles=titles)
    for row, panel in enumerate(panels, 1):
        place: dict[str, Any] = {"row": row, "col": 1}
        for line in panel.lines:
            look = {"line_color": color_of(line.look), "mode": "lines", **place}
            for x, y in line.raw:
                figure.add_scatter(x=x, y=y, opacity=0.3, hoverinfo="skip", **look)
            figure.add_scatter(x=line.x, y=line.y, name=panel.title, **look)
        if panel.y.log:
            figure.update_yaxes(type="log", dtick="D1", **place)
    figure.update_xaxes(title_text="samples", row=len(panels), col=1)
    figure.update_layout(title=title, height=260 * len(panels), showlegend=False, template="plotly_white")
    write_text(path, str(figure.to_html(include_plotlyjs=True)))
    return path
