"""What a range test found: its curves, what they were measured with, and what they suggest.

Owns the form in which a test is kept (`range_test.json`, `range_test.csv`) and the config it suggests.
"""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.engine import Engine
from engine.errors import RangeTestError
from engine.range_test.adapt import adapt
from engine.range_test.analysis import suggest
from engine.range_test.curve import Curve
from engine.range_test.smoothing import SMOOTHING
from engine.range_test.suggestion import Refusal, Suggestion

__all__ = ["RangeTestResult", "curve_from_json", "curve_to_json", "write_curves", "write_text"]

JSON_NAME = "range_test.json"
CSV_NAME = "range_test.csv"
CONFIG_NAME = "one_cycle.json"

CSV_COLUMNS = ("run", "step", "lr", "loss", "validation_loss")


@dataclass(frozen=True)
class RangeTestResult:
    """The outcome of a range test as a value; nothing is drawn or written unless asked.

    Attributes:
        curves: one per run, the fixed learning rate's among them.
        config: the config that the test ran with, as it was given; the suggestion is written into a copy.
        train_batch_size: samples of one update at which the curves were measured; 0 where nobody knows.
        world_size: processes that took part.
        optimizer: class name.
        train_steps: updates of the planned training.
        group_ratios: learning rate of each parameter group as a multiple of the first one's, which the curves show.
        settings: what the optimizer was given for the test that is not the config's: ``(("weight_decay", 1e-4),)``.
        beta: weight of the past in the smoothing of the losses: of the reading, not of the record.
    """

    curves: tuple[Curve, ...]
    config: dict[str, Any]
    train_batch_size: int
    world_size: int
    optimizer: str
    train_steps: int
    group_ratios: tuple[float, ...] = (1.0,)
    settings: tuple[tuple[str, float], ...] = ()
    beta: float = SMOOTHING

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

    def select(
        self, train_batch_size: int | None = None, settings: Mapping[str, float] | None = None
    ) -> RangeTestResult:
        """What was measured at a batch size and with settings of the optimizer, as a test of its own.

        Suggestion and config are of these.

        Args:
            train_batch_size: samples of an update; None for the result's own.
            settings: such as ``{"weight_decay": 1e-4}``; None for the result's own.

        Raises:
            RangeTestError: nothing was measured there; the message says where something was.
        """
        size = self.train_batch_size if train_batch_size is None else train_batch_size
        wanted = self.settings if settings is None else tuple(sorted(settings.items()))
        curves = self._measured_at(size, wanted)
        if not any(curve.is_test for curve in curves):
            there = {(curve.train_batch_size or self.train_batch_size, curve.settings) for curve in self.curves}
            known = "; ".join(f"batch size {size}, settings {dict(each)}" for size, each in sorted(there))
            raise RangeTestError(f"select: no test at batch size {size}, settings {dict(wanted)}; there are: {known}")
        config = adapt(self.config, (self.train_batch_size, size), self.world_size, dict(wanted))
        return replace(self, curves=curves, config=config, train_batch_size=size, settings=wanted)

    def _measured_at(self, train_batch_size: int, settings: tuple[tuple[str, float], ...]) -> tuple[Curve, ...]:
        return tuple(
            curve
            for curve in self.curves
            if (curve.train_batch_size or self.train_batch_size) == train_batch_size
            and (curve.settings or self.settings) == settings
        )

    @property
    def has_suggestion(self) -> bool:
        """Whether there is a schedule to train with."""
        return isinstance(self.suggestion, Suggestion)

    def to_config(self) -> dict[str, Any]:
        """The test's config with the suggested ``OneCycle`` as its schedule, ready to train with.

        Under ``_range_test`` it says where each number comes from; engines skip that key.

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
        if any(name == "momentum" for name, _ in self.settings):
            params["cycle_momentum"] = False  # measured at one that does not move
        config = copy.deepcopy(self.config)
        config["scheduler"] = {"type": "OneCycle", "params": params}
        config["_range_test"] = {
            "reasons": answer.reasons,
            "notes": list(answer.notes),
            **({"train_batch_size": self.train_batch_size} if self.train_batch_size else {}),
            "train_steps": self.train_steps,
        }
        return config

    def planned_for(self, train_steps: int) -> RangeTestResult:
        """The same curves, read for a training of another length."""
        return replace(self, train_steps=train_steps)

    def smoothed_by(self, beta: float) -> RangeTestResult:
        """The same curves, read with another smoothing: `beta` is the weight of the past, in [0, 1)."""
        return replace(self, beta=beta)

    def plot(self, path: str | Path) -> Path:
        """Draw the curves into a PNG, SVG or PDF file; needs matplotlib (``pip install 'redline[plot]'``)."""
        from engine.range_test.contents import contents_of
        from engine.range_test.picture import draw_range_test

        return draw_range_test(contents_of(self), Path(path))

    def summary(self) -> str:
        """The suggestion in words, a line for each number; or the refusal."""
        answer = self.suggestion
        if isinstance(answer, Refusal):
            lines = [f"No suggestion. {answer.reason}", answer.remedy]
        else:
            where = f" at batch size {self.train_batch_size}" if self.train_batch_size else ""
            lines = [f"Suggested OneCycle for {self.train_steps} updates{where}:"]
            for key, value in answer.params().items():
                lines.append(f"  {key} = {value:g}  {answer.reasons.get(key, '')}".rstrip())
        return "\n".join([*lines, *(f"Note: {note}" for note in answer.notes)])

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write JSON, CSV and, if there is a suggestion, the config; an earlier test's files are replaced.

        Returns:
            What was written, by kind: "json", "csv", "config".
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
            config.unlink(missing_ok=True)  # an earlier test's suggestion is not this one's
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
            raise RangeTestError(
                f"{directory}: there is no {JSON_NAME}; give the folder that a range test wrote"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RangeTestError(f"{path}: is no record of a range test ({error})") from error

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "train_batch_size": self.train_batch_size,
            "world_size": self.world_size,
            "optimizer": self.optimizer,
            "train_steps": self.train_steps,
            "group_ratios": self.group_ratios,
            "settings": self.settings,
            "suggestion": asdict(self.suggestion),
            "config": self.config,
            "curves": [curve_to_json(curve) for curve in self.curves],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RangeTestResult:
        """What `to_json` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        curves = tuple(curve_from_json(curve) for curve in value["curves"])
        names = ("config", "train_batch_size", "world_size", "optimizer", "train_steps")
        ratios = tuple(value["group_ratios"])
        settings = tuple((name, setting) for name, setting in value.get("settings", ()))
        return cls(curves=curves, group_ratios=ratios, settings=settings, **{name: value[name] for name in names})


def write_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Write a CSV with a row for each update of each run."""
    with _replacing(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for curve in curves:
            writer.writerows(_rows(curve))
    _replacing(path).replace(path)


def _rows(curve: Curve) -> list[tuple[Any, ...]]:
    """A row for each update; a validation loss stands in the row of the update it was measured after."""
    after = {updates - 1: loss for updates, loss in curve.validation}
    rows: list[tuple[Any, ...]] = [(curve.name, -1, "", "", after[-1])] if -1 in after else []
    for step, lr, loss in zip(curve.steps, curve.lrs, curve.losses):
        rows.append((curve.name, step, lr, loss, after.get(step, "")))
    return rows


def curve_to_json(curve: Curve) -> dict[str, Any]:
    """A curve as plain values. JSON knows no nan and no infinity: they become strings."""
    return asdict(curve) | {
        "lrs": [_number(lr) for lr in curve.lrs],  # by powers, one that nobody stopped ends at infinity
        "losses": [_number(loss) for loss in curve.losses],
        "validation": [[updates, _number(loss)] for updates, loss in curve.validation],
    }


def curve_from_json(value: dict[str, Any]) -> Curve:
    """What `curve_to_json` gave."""
    return Curve(
        name=value["name"],
        rate=value["rate"],
        steps=tuple(value["steps"]),
        lrs=tuple(float(lr) for lr in value["lrs"]),
        losses=tuple(float(loss) for loss in value["losses"]),
        validation=tuple((updates, float(loss)) for updates, loss in value["validation"]),
        kind=value.get("kind", "fixed" if value["rate"] is None else "linear"),
        seed=value.get("seed", 0),
        skipped=tuple(value.get("skipped", ())),
        train_batch_size=value.get("train_batch_size"),
        settings=tuple((name, setting) for name, setting in value.get("settings", ())),
    )


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a full disk leaves the file that was there."""
    _replacing(path).write_text(text)
    _replacing(path).replace(path)


def _replacing(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
