"""The four places that points can be written to; each imports its package when it is made."""

from __future__ import annotations

import csv
import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.watch.monitor import Point, Record, Writer

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.config.sections.records import CometConfig, CsvMonitorConfig, TensorBoardConfig, WandbConfig

__all__ = [
    "CometWriter",
    "CsvWriter",
    "TensorBoardWriter",
    "WandbWriter",
    "build_writers",
    "check_packages",
    "wants_writers",
]

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # by section, which is the extra, too


def wants_writers(config: EngineConfig) -> bool:
    """Whether a config has a monitor that is on."""
    return any(section is not None and section.enabled for section in _sections(config).values())


def check_packages(config: EngineConfig) -> None:
    """See on every process whether the packages are there that rank zero will need.

    Raises:
        EngineError: one is missing.
    """
    for name, section in _sections(config).items():
        package = _PACKAGES.get(name)
        if section is not None and section.enabled and package and importlib.util.find_spec(package) is None:
            raise EngineError(f"{name}: it needs {package}; install it with `pip install 'redline[{name}]'`")


def build_writers(config: EngineConfig) -> list[Writer]:
    """The writers that are on."""
    makers = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter, "csv_monitor": CsvWriter, "comet": CometWriter}
    return [
        makers[name](section) for name, section in _sections(config).items() if section is not None and section.enabled
    ]


def _sections(config: EngineConfig) -> dict[str, Any]:
    return {
        "tensorboard": config.tensorboard,
        "wandb": config.wandb,
        "csv_monitor": config.csv_monitor,
        "comet": config.comet,
    }


class CsvWriter:
    """One file for each number, ``output_path/job_name/Train_Samples_lr.csv``, with the columns step and lr.

    Files are DeepSpeed's; its header comes anew with every start, here a file has one.
    """

    name = "csv_monitor"

    def __init__(self, config: CsvMonitorConfig) -> None:
        self._folder = Path(config.output_path) / config.job_name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(f"csv_monitor: cannot write to {self._folder}: {error.strerror or error}") from error

    def write(self, points: list[Point]) -> None:
        for name, ours in _by_name(points).items():
            with self._path(name).open("a", newline="", encoding="utf-8") as file:
                rows = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    rows.writerow(["step", name.rpartition("/")[2]])
                rows.writerows((point.samples, point.value) for point in ours)

    def show(self, record: Record) -> None:
        for name in _by_name(record.points):
            self._path(name).unlink(missing_ok=True)  # an earlier test's; its updates would be counted twice
        self.write(record.points)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"

    def close(self) -> None:
        """Nothing is open between two writes."""


class TensorBoardWriter:
    """Event files in ``output_path/job_name``."""

    name = "tensorboard"

    def __init__(self, config: TensorBoardConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(Path(config.output_path) / config.job_name))

    def write(self, points: list[Point]) -> None:
        for point in points:
            self._writer.add_scalar(point.name, point.value, point.samples)
        self._writer.flush()

    def show(self, record: Record) -> None:
        self._writer.add_text(f"{record.title}/suggestion", record.text)
        self.write(record.points)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases; its own environment variables (WANDB_MODE, WANDB_DIR, ...) hold."""

    name = "wandb"

    def __init__(self, config: WandbConfig) -> None:
        import wandb

        self._run: Any = wandb.init(project=config.project, group=config.group, entity=config.team)

    def write(self, points: list[Point]) -> None:
        together: dict[int, dict[str, float]] = defaultdict(dict)  # a step is complete when a later one comes
        for point in points:
            together[point.samples][point.name] = point.value
        for samples, values in together.items():
            self._run.log(values, step=samples)

    def show(self, record: Record) -> None:
        """As a chart, a table and numbers of the run, all at the step it is at: its steps never go back."""
        import wandb

        x, y = record.axes
        rows = [[line.name, *pair] for line in record.lines for pair in zip(line.x, line.y)]
        chart = wandb.plot.line_series(
            xs=[line.x for line in record.lines],
            ys=[line.y for line in record.lines],
            keys=[line.name for line in record.lines],
            title=f"{record.title}: {y} by {x}",
            xname=x,
        )
        table = wandb.Table(columns=["run", x, y], data=rows)
        self._run.log({f"{record.title}/{y} by {x}": chart, f"{record.title}/curves": table})
        self._run.summary.update({f"{record.title}/{name}": value for name, value in record.numbers.items()})

    def close(self) -> None:
        self._run.finish()


class CometWriter:
    """An experiment of Comet: each number once in `samples_log_interval` samples, as DeepSpeed thins them out."""

    name = "comet"

    def __init__(self, config: CometConfig) -> None:
        import comet_ml

        self._every = config.samples_log_interval
        self._last: dict[str, int] = {}  # samples at which a name was last sent
        self._experiment: Any = comet_ml.start(
            api_key=config.api_key,
            project=config.project,
            workspace=config.workspace,
            experiment_key=config.experiment_key,
            mode=config.mode,
            online=config.online,
        )
        if config.experiment_name is not None:
            self._experiment.set_name(config.experiment_name)

    def write(self, points: list[Point]) -> None:
        for point in points:
            if point.name in self._last and point.samples - self._last[point.name] < self._every:
                continue
            self._last[point.name] = point.samples
            self._experiment.log_metric(point.name, point.value, step=point.samples)

    def show(self, record: Record) -> None:
        for point in record.points:  # all of them: they are few, and counted in updates
            self._experiment.log_metric(point.name, point.value, step=point.samples)
        self._experiment.log_others({f"{record.title}/{name}": value for name, value in record.numbers.items()})
        self._experiment.log_text(record.text)

    def close(self) -> None:
        self._experiment.end()


def _by_name(points: Iterable[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        found[point.name].append(point)
    return found
