"""The learning rate and momentum of a config over a training that has not begun.

The real optimizer and schedule are built over parameters of one number and stepped; so torch's and registered schedules
are shown as well as ours, with whatever they do to each parameter group.
"""

from __future__ import annotations

import csv
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from redline.build import build_schedule
from redline.config import EngineConfig
from redline.errors import EngineError
from redline.optimizers import build_optimizer
from redline.reports.figure import save_column
from redline.reports.model import Axis, Line, Panel
from redline.reports.terminal import draw_panel
from redline.schedulers.schedule import length_of

__all__ = ["Trace", "trace_schedule"]

MAX_STEPS = 5_000_000  # two minutes, and half a GiB of numbers


@dataclass(frozen=True, slots=True)
class Trace:
    """Learning rates and momenta of the first steps of a training."""

    name: str  # of the schedule
    lrs: tuple[tuple[float, ...], ...]  # for each parameter group, the learning rate of each step
    momenta: tuple[tuple[float, ...], ...]  # the same of momentum or first beta; empty without one

    def save_csv(self, path: Path) -> Path:
        """Write a row for each step: its index, then learning rate and momentum of each group."""
        columns = {f"lr_{k}" if len(self.lrs) > 1 else "lr": values for k, values in enumerate(self.lrs)}
        columns |= {f"momentum_{k}" if len(self.lrs) > 1 else "momentum": v for k, v in enumerate(self.momenta)}
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *columns])
            writer.writerows((step, *row) for step, row in enumerate(zip(*columns.values())))
        return path

    def save_picture(self, path: Path) -> Path:
        """Draw the learning rate, and a momentum that changes, into a PNG, SVG or PDF file; as `save_figure`."""
        return save_column(self._panels(), path, self.name)

    def to_text(self) -> str:
        """Learning rate and a momentum that changes, of the first group, as charts for a terminal."""
        charts = [draw_panel(replace(panel, lines=panel.lines[:1]), height=14) for panel in self._panels()]
        return "\n\n".join(dict.fromkeys(charts))  # without plotext, the remedy once

    def _panels(self) -> list[Panel]:
        panels = []
        for title, groups in (("learning rate", self.lrs), ("momentum", self.momenta)):
            lines = tuple(Line(f"group {k}", k, range(len(values)), values) for k, values in enumerate(groups))
            if any(min(values) < max(values) for values in groups) or title == "learning rate":
                panels.append(Panel("schedule", f"{self.name}: {title} by step", Axis("step"), Axis(title), lines))
        return panels


def trace_schedule(config: EngineConfig, steps: int | None = None) -> Trace:
    """The effect of the config's schedule on its optimizer.

    Args:
        config: one without an optimizer is shown with Adam's defaults.
        steps: optimizer steps; None for the schedule's own length where it has one, else 1,000.

    Raises:
        EngineError: optimizer or schedule refuse their arguments, or there are more than `MAX_STEPS` steps.
    """
    given = {} if config.scheduler is None else config.scheduler.arguments()
    num_groups = max((len(value) for value in given.values() if isinstance(value, (list, tuple))), default=1)
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
    chosen = config.optimizer
    name, arguments = ("Adam", {}) if chosen is None else (chosen.type, chosen.arguments())
    optimizer = build_optimizer(name, arguments, parameters)
    schedule = build_schedule(config, optimizer)
    if steps is None:  # a tenth more than the steps after which a schedule only repeats its last values
        length = length_of(schedule)
        steps = max(2, round(1.1 * length)) if length else 1000
        if length and hasattr(schedule, "T_max"):  # a cosine would climb again
            steps = length + 1
    if steps > MAX_STEPS:
        raise EngineError(f"steps: got {steps:,}; at most {MAX_STEPS:,} can be drawn")

    lrs: list[list[float]] = [[] for _ in optimizer.param_groups]
    momenta: list[list[float]] = [[] for _ in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, since the optimizer is never stepped
        for _ in range(steps):
            for group, group_lrs, group_momenta in zip(optimizer.param_groups, lrs, momenta):
                group_lrs.append(float(group["lr"]))
                momentum = group["betas"][0] if "betas" in group else group.get("momentum")
                if momentum is not None:
                    group_momenta.append(float(momentum))
            try:
                if schedule is not None:
                    schedule.step()
            except ValueError:  # torch's OneCycleLR ends with an error; so does the trace
                break
    shown = "fixed learning rate" if config.scheduler is None else config.scheduler.type
    return Trace(shown, tuple(map(tuple, lrs)), tuple(tuple(values) for values in momenta if values))
