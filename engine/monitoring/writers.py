"""What metrics are written to: TensorBoard, Weights & Biases, CSV files and Comet.

Names, files and x-axis are DeepSpeed's (`deepspeed/monitor/`): ``Train/Samples/train_loss``, ``lr`` and ``loss_scale``
against the samples that all ranks have trained on; ``grad_norm`` is ours. A step's learning rate is the one it ran
with; DeepSpeed writes the next one.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from redline.errors import EngineError
from redline.log import log

if TYPE_CHECKING:
    from redline.config import EngineConfig
    from redline.config.sections import CometConfig, TensorBoardConfig, WandbConfig

__all__ = ["CurveReport", "Line", "Scalar", "Writer", "build_writers"]


class Scalar(NamedTuple):
    """One number of a training run."""

    name: str
    value: float
    samples: int  # trained on so far


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: list[float]
    y: list[float]


class CurveReport(NamedTuple):
    """Curves that are not the training's own, such as a range test's; written at once."""

    title: str  # the first part of all names
    scalars: list[Scalar]  # the curves' points, whose `samples` count the curve's own steps
    lines: list[Line]  # the same as a chart, for writers that have charts
    axes: tuple[str, str]  # what the chart's x and y are
    numbers: dict[str, float | int]  # the results by name
    text: str  # the same as Markdown


class Writer:
    """What metrics are written to."""

    name: str

    def write(self, scalars: list[Scalar]) -> None:
        raise NotImplementedError

    def replace_after(self, samples: int) -> None:
        """The run was resumed there: replace what an earlier start has written of later samples.

        Nothing by default: each start of wandb's and Comet's is a run of its own.
        """

    def write_report(self, report: CurveReport) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write what is kept, and end; nothing by default."""


class TensorBoardWriter(Writer):
    """Event files in ``output_path/job_name``."""

    name = "tensorboard"

    def __init__(self, config: TensorBoardConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = str((Path(config.output_path) / config.job_name).absolute())
        self._writer: Any = SummaryWriter(log_dir=self._folder)

    def write(self, scalars: list[Scalar]) -> None:
        for scalar in scalars:
            self._writer.add_scalar(scalar.name, scalar.value, scalar.samples)
        self._writer.flush()

    def replace_after(self, samples: int) -> None:
        """Begin a new event file, whose first event tells TensorBoard to hide later points of the others."""
        self._writer.close()
        self._writer = type(self._writer)(log_dir=self._folder, purge_step=samples + 1)

    def write_report(self, report: CurveReport) -> None:
        self._writer.add_text(f"{report.title}/suggestion", report.text)
        self.write(report.scalars)

    def close(self) -> None:
        self._writer.close()


class WandbWriter(Writer):
    """A run of Weights & Biases, which also reads its own environment variables (WANDB_MODE, WANDB_DIR, ...)."""

    name = "wandb"
    _ids: ClassVar[set[str]] = set()  # of the runs that were made here

    def __init__(self, config: WandbConfig) -> None:
        import wandb

        # A run of the script's is used; one of another engine is not, nor that of an earlier run of a notebook's cell.
        new = wandb.run is not None and wandb.run.id in self._ids
        self._run: Any = wandb.init(
            project=config.project, group=config.group, entity=config.team, reinit="create_new" if new else None
        )
        self._ids.add(self._run.id)

    def write(self, scalars: list[Scalar]) -> None:
        by_samples: dict[int, dict[str, float]] = defaultdict(dict)  # wandb completes a step when a later one comes
        for scalar in scalars:
            by_samples[scalar.samples][scalar.name] = scalar.value
        for samples, values in by_samples.items():
            self._run.log(values, step=samples)

    def write_report(self, report: CurveReport) -> None:
        """Write a chart, a table and numbers of the run, all at its current step: its steps never go back."""
        import wandb

        x, y = report.axes
        chart = wandb.plot.line_series(
            xs=[line.x for line in report.lines],
            ys=[line.y for line in report.lines],
            keys=[line.name for line in report.lines],
            title=f"{report.title}: {y} by {x}",
            xname=x,
        )
        rows = [[line.name, *point] for line in report.lines for point in zip(line.x, line.y)]
        table = wandb.Table(columns=["run", x, y], data=rows)
        self._run.log({f"{report.title}/{y} by {x}": chart, f"{report.title}/curves": table})
        self._run.summary.update({f"{report.title}/{name}": value for name, value in report.numbers.items()})

    def close(self) -> None:
        self._run.finish()


class CsvWriter(Writer):
    """One file for each number, such as ``Train_Samples_lr.csv``, with the columns step and lr.

    DeepSpeed writes the header again at every start; here a file has one.
    """

    name = "csv_monitor"

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()  # the script may change its working directory
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, scalars: list[Scalar]) -> None:
        by_name: dict[str, list[Scalar]] = defaultdict(list)
        for scalar in scalars:
            by_name[scalar.name].append(scalar)
        for name, series in by_name.items():
            with self._path(name).open("a", newline="", encoding="utf-8") as file:
                rows = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    rows.writerow(["step", name.rpartition("/")[2]])
                rows.writerows((scalar.samples, scalar.value) for scalar in series)

    def replace_after(self, samples: int) -> None:
        """Remove later rows, and one that a kill has cut off; a whole file is kept under another name."""
        for path in self._folder.glob("Train_Samples_*.csv"):
            if samples == 0:  # it may also be of another run
                os.replace(path, path.with_suffix(".csv.earlier"))
                continue
            header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            kept = [row for row in rows if row.endswith("\n") and _samples(row) <= samples]
            if kept != rows:
                partial = path.with_suffix(".partial")
                partial.write_text(header + "".join(kept), encoding="utf-8")
                os.replace(partial, path)

    def write_report(self, report: CurveReport) -> None:
        for name in {scalar.name for scalar in report.scalars}:
            self._path(name).unlink(missing_ok=True)  # of an earlier test, whose steps would be counted twice
        self.write(report.scalars)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"


def _samples(row: str) -> float:
    """The first number of a row; infinity where there is none, as in a row that is damaged."""
    try:
        return int(row.partition(",")[0])
    except ValueError:
        return math.inf


class CometWriter(Writer):
    """An experiment of Comet: each number once in `samples_log_interval` samples, as in DeepSpeed."""

    name = "comet"
    _keys: ClassVar[set[str]] = set()  # of the experiments that were started here

    def __init__(self, config: CometConfig) -> None:
        import comet_ml

        self._interval = config.samples_log_interval
        self._last: dict[str, int] = {}  # samples at which a name was last sent
        names = ("api_key", "workspace", "project", "experiment_key", "mode", "online")
        self._experiment: Any = comet_ml.start(**{name: getattr(config, name) for name in names})
        if (key := self._experiment.get_key()) in self._keys:
            log.warning(
                "comet: engines of this process share one experiment, since Comet has one at a time, and their points "
                'are mixed; "mode": "create" ends the old one and starts another'
            )
        self._keys.add(key)
        if config.experiment_name is not None:
            self._experiment.set_name(config.experiment_name)

    def write(self, scalars: list[Scalar]) -> None:
        for scalar in scalars:
            if scalar.name not in self._last or scalar.samples - self._last[scalar.name] >= self._interval:
                self._last[scalar.name] = scalar.samples
                self._experiment.log_metric(scalar.name, scalar.value, step=scalar.samples)

    def write_report(self, report: CurveReport) -> None:
        for scalar in report.scalars:  # all of them: they are few, and counted in steps
            self._experiment.log_metric(scalar.name, scalar.value, step=scalar.samples)
        self._experiment.log_others({f"{report.title}/{name}": value for name, value in report.numbers.items()})
        self._experiment.log_text(report.text)

    def close(self) -> None:
        self._experiment.end()


# By section: its writer, and the package that this imports; the extra has the section's name.
_WRITERS: dict[str, tuple[Callable[[Any], Writer], str | None]] = {
    "tensorboard": (TensorBoardWriter, "tensorboard"),
    "wandb": (WandbWriter, "wandb"),
    "csv_monitor": (lambda config: CsvWriter(Path(config.output_path, config.job_name)), None),
    "comet": (CometWriter, "comet_ml"),
}


def build_writers(config: EngineConfig, *, rank: int) -> list[Writer]:
    """The writers that a config enables, on rank 0.

    Raises:
        EngineError: a package is not installed, which is checked on every rank; or a folder cannot be written to.
    """
    sections = {name: section for name in _WRITERS if (section := getattr(config, name)) and section.enabled}
    for name in sections:
        package = _WRITERS[name][1]
        if package is not None and importlib.util.find_spec(package) is None:
            raise EngineError(f"{name}: it needs {package}; install it with `pip install 'redline[{name}]'`")
    if rank:
        return []
    log_dir = config.redline.log_dir
    try:
        writers = [_WRITERS[name][0](section) for name, section in sections.items()]
        return writers if log_dir is None else [*writers, CsvWriter(log_dir)]
    except OSError as error:
        where = error.filename or " or ".join(sections)
        raise EngineError(f"monitors: cannot write to {where}: {error.strerror or error}") from error
