"""A config's learning rate and momentum over a training that has not begun.

The real optimizer and schedule are built over parameters of one number and stepped; so torch's and
registered schedules are shown as well as ours, with whatever they do to each parameter group.
"""

from __future__ import annotations

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.build import build_schedule
from engine.errors import EngineError
from engine.optimizers import build_optimizer
from engine.textplot import draw_text
from schedulers.forecast import length_of

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["Trace", "trace_schedule"]


@dataclass(frozen=True, slots=True)
class Trace:
    """Rates and momenta of the first updates of a training.

    Attributes:
        name: of the schedule.
        lrs: for each parameter group, the rate of each update.
        momenta: likewise the momentum or first beta; empty where the optimizer has none.
    """

    name: str
    lrs: tuple[tuple[float, ...], ...]
    momenta: tuple[tuple[float, ...], ...]

    def save_csv(self, path: Path) -> Path:
        """Write one row for each update: step, then rate and momentum of each group."""
        columns = {f"lr_{i}" if len(self.lrs) > 1 else "lr": values for i, values in enumerate(self.lrs)}
        columns |= {f"momentum_{i}" if len(self.lrs) > 1 else "momentum": v for i, v in enumerate(self.momenta)}
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *columns])
            writer.writerows((step, *row) for step, row in enumerate(zip(*columns.values())))
        return path

    def save_picture(self, path: Path) -> Path:
        """Draw rate and momentum into a PNG, SVG or PDF file.

        Raises:
            EngineError: matplotlib is missing, or knows no such format.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise EngineError("a picture needs matplotlib; install it with `pip install 'redline[plot]'`") from None
        rows = 2 if self.momenta else 1
        figure = Figure(figsize=(9, 3.2 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axis, label, groups in zip(axes, ("learning rate", "momentum"), (self.lrs, self.momenta)):
            for index, values in enumerate(groups):
                axis.plot(values, label=f"group {index}")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if len(groups) > 1:
                axis.legend()
        axes[-1].set_xlabel("update")
        figure.suptitle(self.name)
        try:
            figure.savefig(path, dpi=110)
        except ValueError as error:
            raise EngineError(f"{path}: {error}") from error
        return path

    def to_text(self) -> str:
        """Rate and momentum of the first group as charts for a terminal."""
        charts = [draw_text(range(len(self.lrs[0])), self.lrs[0], title=f"{self.name}: learning rate by update")]
        if self.momenta:
            charts.append(draw_text(range(len(self.momenta[0])), self.momenta[0], title="momentum by update", height=6))
        return "\n\n".join(charts)


def trace_schedule(config: EngineConfig, steps: int | None = None) -> Trace:
    """What the config's schedule does to its optimizer.

    Args:
        config: one without an optimizer is shown with Adam's defaults.
        steps: updates; None takes the schedule's own length where it has one, else 1,000.

    Raises:
        EngineError: optimizer or schedule refuse their arguments.
    """
    given = {} if config.scheduler is None else config.scheduler.arguments()
    num_groups = max((len(value) for value in given.values() if isinstance(value, (list, tuple))), default=1)
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
    chosen = config.optimizer
    name, arguments = ("Adam", {}) if chosen is None else (chosen.type, chosen.arguments())
    optimizer = build_optimizer(name, arguments, parameters)
    schedule = build_schedule(config, optimizer)
    steps = _own_length(schedule) if steps is None else steps

    lrs: list[list[float]] = [[] for _ in optimizer.param_groups]
    momenta: list[list[float]] = [[] for _ in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about an optimizer that is not stepped
        for _ in range(steps):
            for group, group_lrs, group_momenta in zip(optimizer.param_groups, lrs, momenta):
                group_lrs.append(float(group["lr"]))
                momentum = group["betas"][0] if "betas" in group else group.get("momentum")
                if momentum is not None:
                    group_momenta.append(float(momentum))
            if schedule is not None:
                try:
                    schedule.step()
                except ValueError:  # torch's OneCycleLR ends with an error; the trace ends with it
                    break
    shown = "fixed learning rate" if config.scheduler is None else config.scheduler.type
    return Trace(shown, tuple(map(tuple, lrs)), tuple(tuple(values) for values in momenta if values))


def _own_length(schedule: Any) -> int:
    """A tenth more than the updates after which a schedule only repeats its last values."""
    length = length_of(schedule)
    return 1000 if not length else max(2, round(1.1 * length))
