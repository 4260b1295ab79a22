"""What a range test found: its curves, what they were measured with, and what they suggest.

Owns the files that a test is kept in (`range_test.json`, `range_test.csv`), the config it suggests, and what goes to
the monitors that the config names.
"""

from __future__ import annotations

import copy
import csv
import inspect
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from redline.engine import Engine
from redline.errors import RangeTestError
from redline.monitoring.metrics import MetricsLogger
from redline.monitoring.writers import CurveReport, Line, Scalar
from redline.optimizers import known
from redline.range_test.curve import SMOOTHING, Curve
from redline.range_test.suggest import Refusal, Suggestion, suggest

__all__ = [
    "RECORDS", "RangeTestResult", "adapt_config", "check_out", "curve_report_of", "publish", "write_curves",
    "write_text",
]  # fmt: skip

JSON_NAME, CSV_NAME, CONFIG_NAME = "range_test.json", "range_test.csv", "one_cycle.json"
RECORDS = (JSON_NAME, CONFIG_NAME, "tune.json", "tuned.json")  # what is replaced only on request
CSV_COLUMNS = ("run", "step", "lr", "loss", "validation_loss")


@dataclass(frozen=True)
class RangeTestResult:
    """The outcome of a range test as a value; nothing is drawn or written unless asked."""

    curves: tuple[Curve, ...]  # one per run, those at a fixed learning rate among them
    config: dict[str, Any]  # that the test ran with, as it was given; the suggestion is written into a copy
    train_batch_size: int  # samples per step at which the curves were measured; 0 where it is unknown
    world_size: int
    optimizer: str  # class name
    train_steps: int  # optimizer steps of the planned training
    group_ratios: tuple[float, ...] = (1.0,)  # each parameter group's LR as a multiple of the first one's
    settings: tuple[tuple[str, float], ...] = ()  # of the optimizer that differ from the config's
    beta: float = SMOOTHING  # weight of the past in the smoothing of the losses as they are read; not saved

    @classmethod
    def of(
        cls, engine: Engine, curves: Sequence[Curve], *, train_steps: int, group_ratios: Sequence[float]
    ) -> RangeTestResult:
        """The result of these curves, measured with this engine."""
        return cls(
            curves=tuple(curves),
            config=engine.config.document(),
            train_batch_size=engine.train_batch_size(),
            world_size=engine.world_size,
            optimizer=type(engine.optimizer).__name__,
            train_steps=train_steps,
            group_ratios=tuple(group_ratios),
        )

    @cached_property
    def suggestion(self) -> Suggestion | Refusal:
        """The boundaries for a 1Cycle schedule with their reasons, or why there are none.

        Of the curves at the result's own batch size and settings; see `select` for the others.
        """
        curves = self._measured_at(self.train_batch_size, self.settings)
        return suggest(curves, train_steps=self.train_steps, beta=self.beta)

    @cached_property
    def batches(self) -> tuple[tuple[int, Suggestion | Refusal], ...]:
        """The answer at each batch size that was tested with the config's settings, where there are at least two."""
        tests = [curve for curve in self.curves if curve.is_test and not curve.settings]
        sizes = sorted({curve.train_batch_size or self.train_batch_size for curve in tests})
        if len(sizes) < 2:
            return ()
        answers = [suggest(self._measured_at(size, ()), train_steps=self.train_steps) for size in sizes]
        return tuple(zip(sizes, answers))

    @property
    def has_suggestion(self) -> bool:
        """Whether there is a schedule to train with."""
        return isinstance(self.suggestion, Suggestion)

    # -- other readings of the same curves ---------------------------------------------------------

    def select(
        self, train_batch_size: int | None = None, settings: Mapping[str, float] | None = None
    ) -> RangeTestResult:
        """The curves of one batch size and of certain optimizer settings as a result of their own.

        Args:
            train_batch_size: samples per step; None for the result's own.
            settings: such as ``{"weight_decay": 1e-4}``; None for the result's own.

        Raises:
            RangeTestError: nothing was measured there; the message lists what was.
        """
        size = self.train_batch_size if train_batch_size is None else train_batch_size
        wanted = self.settings if settings is None else tuple(sorted(settings.items()))
        curves = self._measured_at(size, wanted)
        if not any(curve.is_test for curve in curves):
            measured = {(curve.train_batch_size or self.train_batch_size, curve.settings) for curve in self.curves}
            known = "; ".join(f"batch size {size}, settings {dict(each)}" for size, each in sorted(measured))
            raise RangeTestError(f"select: no test at batch size {size}, settings {dict(wanted)}; there are: {known}")
        config = adapt_config(self.config, (self.train_batch_size, size), self.world_size, dict(wanted))
        return replace(self, curves=curves, config=config, train_batch_size=size, settings=wanted)

    def planned_for(self, train_steps: int) -> RangeTestResult:
        """The same curves, read for a training of another length."""
        return replace(self, train_steps=train_steps)

    def smoothed_by(self, beta: float) -> RangeTestResult:
        """The same curves, read with another smoothing: `beta` is the weight of the past, in [0, 1)."""
        return replace(self, beta=beta)

    def _measured_at(self, train_batch_size: int, settings: tuple[tuple[str, float], ...]) -> tuple[Curve, ...]:
        return tuple(
            curve
            for curve in self.curves
            if (curve.train_batch_size or self.train_batch_size) == train_batch_size
            and (curve.settings or self.settings) == settings
        )

    # -- what it suggests --------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The test's config with the suggested ``OneCycle`` as its schedule, ready to train with.

        The reason for each number is under ``_range_test``, a key that the engine ignores.

        Raises:
            RangeTestError: there is no suggestion; the message says why and what to do.
        """
        answer = self.suggestion
        if isinstance(answer, Refusal):
            raise RangeTestError(f"no schedule can be suggested. {answer.reason} {answer.remedy}")
        params: dict[str, Any] = answer.params()
        if any(ratio != 1 for ratio in self.group_ratios):
            for key in ("cycle_min_lr", "cycle_max_lr"):
                params[key] = [float(f"{params[key] * ratio:.6g}") for ratio in self.group_ratios]
        if "momentum" in dict(self.settings):
            params["cycle_momentum"] = False  # measured at a constant momentum
        config = copy.deepcopy({key: value for key, value in self.config.items() if key != "_tune"})
        config["scheduler"] = {"type": "OneCycle", "params": params}
        config["_range_test"] = {
            "reasons": answer.reasons,
            "notes": list(answer.notes),
            **({"train_batch_size": self.train_batch_size} if self.train_batch_size else {}),
            "train_steps": self.train_steps,
        }
        return config

    def summary(self) -> str:
        """The suggestion in words, a line for each number; or the refusal."""
        answer = self.suggestion
        if isinstance(answer, Refusal):
            lines = [f"No suggestion. {answer.reason}", answer.remedy]
        else:
            where = f" at batch size {self.train_batch_size}" if self.train_batch_size else ""
            lines = [f"Suggested OneCycle for {self.train_steps} steps{where}:"]
            lines += [f"  {key} = {value:g}  {answer.reasons[key]}" for key, value in answer.params().items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in answer.notes)])

    def plot(self, path: str | Path | None = None, *, ax: Any = None) -> Any:
        """Draw the curves; needs matplotlib (``pip install 'redline[plot]'``).

        Args:
            path: a PNG, SVG or PDF file for the whole picture; None draws the loss by learning rate, inline in a
                notebook.
            ax: matplotlib's axes to draw on; None for new ones.

        Returns:
            The path, or else the axes.
        """
        from redline.reports import plot_report, report_of  # reports import results; only this goes the other way

        return plot_report(report_of(self), path, ax)

    def __repr__(self) -> str:
        answer = self.suggestion
        found = f"{answer.cycle_min_lr:g} to {answer.cycle_max_lr:g}" if isinstance(answer, Suggestion) else "none"
        return f"<RangeTestResult of {len(self.curves)} runs, suggested learning rates: {found}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the suggestion and the picture."""
        from redline.reports import report_of
        from redline.reports.html import render_cell

        return render_cell(report_of(self))

    # -- files -------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write JSON, CSV and, if there is a suggestion, the config; files of an earlier test are replaced.

        Returns:
            The files written, by kind: "json", "csv", "config".
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = {"json": folder / JSON_NAME, "csv": folder / CSV_NAME}
        write_text(written["json"], json.dumps(self.to_json(), indent=2) + "\n")
        write_curves(written["csv"], self.curves)
        config = folder / CONFIG_NAME
        if self.has_suggestion:
            write_text(config, json.dumps(self.to_config(), indent=2) + "\n")
            written["config"] = config
        else:
            config.unlink(missing_ok=True)  # the suggestion of an earlier test
        return written

    @classmethod
    def load(cls, directory: str | Path) -> RangeTestResult:
        """Read a test that `save` wrote.

        Raises:
            RangeTestError: there is none in that directory, or it is damaged.
        """
        path = Path(directory) / JSON_NAME
        try:
            return cls.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            message = f"{directory}: there is no {JSON_NAME}; give the folder that a range test wrote"
            raise RangeTestError(message) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise RangeTestError(f"{path}: not a record of a range test ({reason})") from error

    def to_json(self) -> dict[str, Any]:
        """All fields but `beta` and what only trials measure, and the suggestion, as plain values."""
        left_out: dict[str, Any] = {"beta": True, "curves": {"__all__": {"fitted", "part"}}}
        fields: dict[str, Any] = _RESULT.dump_python(self, mode="json", exclude=left_out)
        return fields | {"suggestion": asdict(self.suggestion)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RangeTestResult:
        """The inverse of `to_json`; raises ValueError, KeyError or TypeError if `value` is something else."""
        return _RESULT.validate_python({**value, "curves": [Curve.from_json(curve) for curve in value["curves"]]})


_RESULT = TypeAdapter(RangeTestResult)


def adapt_config(
    config: Mapping[str, Any], batch_sizes: tuple[int, int], world_size: int, settings: Mapping[str, float]
) -> dict[str, Any]:
    """A copy of a config with another batch size, by accumulation, and other settings of its optimizer, if it has one.

    `batch_sizes` are the samples per step under that config, and those wanted.
    """
    new = copy.deepcopy(dict(config))
    before, wanted = batch_sizes
    if wanted != before:
        accumulation = new.pop("gradient_accumulation_steps", None)
        micro_batch = new.get("train_micro_batch_size_per_gpu")
        if not isinstance(micro_batch, int):  # left out, or "auto"
            micro_batch = before // (world_size * (accumulation if isinstance(accumulation, int) else 1))
        new |= {"train_batch_size": wanted, "train_micro_batch_size_per_gpu": micro_batch}
    if settings and new.get("optimizer"):
        params = new["optimizer"]["params"] = {**(new["optimizer"].get("params") or {})}
        params |= settings
        if "momentum" in settings and _takes_betas(new["optimizer"]["type"]):
            params["betas"] = [params.pop("momentum"), params.get("betas", (0.9, 0.999))[1]]
    return new


def _takes_betas(optimizer: str) -> bool:
    cls = known().get(optimizer)  # None for those that are DeepSpeed's, or in lower case
    return optimizer != "Muon" if cls is None else "betas" in inspect.signature(cls).parameters


def write_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Write a CSV with a row for each step of each run; a validation loss is in the row of the step before it."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(CSV_COLUMNS)
    for curve in curves:
        after = {steps - 1: loss for steps, loss in curve.validation}
        if -1 in after:
            writer.writerow((curve.name, -1, "", "", after[-1]))
        for step, lr, loss in zip(curve.steps, curve.lrs, curve.losses):
            writer.writerow((curve.name, step, lr, loss, after.get(step, "")))
    write_text(path, file.getvalue())


def check_out(directory: str | Path, *, force: bool) -> None:
    """Refuse a folder that holds results, before there are others to write there; `force` allows to replace them."""
    if Path(directory).suffix.lower() in (".png", ".svg", ".pdf", ".html", ".json", ".csv"):
        raise RangeTestError(f"out: {directory}: give a folder, for several files")
    found = [name for name in RECORDS if (Path(directory) / name).exists()]
    if found and not force:
        raise RangeTestError(
            f"out: {directory} holds earlier results ({', '.join(found)}); give another folder, or replace them with "
            "--force (force=True)"
        )


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file, then rename, so that a full disk leaves the previous file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")  # a CSV has its own line ends
    temporary.replace(path)


# -- monitors ------------------------------------------------------------------------------------------


def publish(
    engine: Engine, groups: Mapping[str, Sequence[Curve]], answer: Suggestion | Refusal, notes: Sequence[str] = ()
) -> None:
    """Send curves and their answer to TensorBoard, Weights & Biases, CSV files and Comet, on rank 0.

    `groups` are curves by the first part of their name: "RangeTest", "Search" or "Trials". They are charted against the
    step as ``RangeTest/rate 5/loss`` and ``.../lr``: the charts of the training stay untouched.
    """
    for callback in engine.callbacks:
        if isinstance(callback, MetricsLogger):
            callback.log_report(curve_report_of(groups, answer, notes))


def curve_report_of(
    groups: Mapping[str, Sequence[Curve]], answer: Suggestion | Refusal, notes: Sequence[str] = ()
) -> CurveReport:
    """The same as a monitor takes it; arguments as in `publish`."""
    scalars: list[Scalar] = []
    for name, curve in ((f"{group}/{each.name}", each) for group, curves in groups.items() for each in curves):
        for step, lr, loss in zip(curve.steps, curve.lrs, curve.losses):
            scalars += [Scalar(f"{name}/loss", loss, step), Scalar(f"{name}/lr", lr, step)]
        scalars += [Scalar(f"{name}/validation_loss", loss, steps) for steps, loss in curve.validation]
    lines = []
    for curve in (each for each in groups["RangeTest"] if each.is_test):
        points = [point for point in zip(curve.lrs, curve.losses) if math.isfinite(point[1])]
        lines.append(Line(curve.name, [lr for lr, _ in points], [loss for _, loss in points]))
    if isinstance(answer, Refusal):
        numbers: dict[str, float | int] = {}
        text = [f"**No suggestion.** {answer.reason} {answer.remedy}"]
    else:
        numbers = answer.params()
        rows = [f"| `{key}` | {value:g} | {answer.reasons[key]} |" for key, value in numbers.items()]
        text = ["| key | value | where it comes from |", "| --- | --- | --- |", *rows]
    text += ["", *(f"- {note}" for note in (*answer.notes, *notes))]
    return CurveReport("RangeTest", scalars, lines, ("lr", "loss"), numbers, "\n".join(text).rstrip())
