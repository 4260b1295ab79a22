"""What a tuning found: range tests, trials, and the config of the winner; as a value and on disk.

`tune.json` holds all of it, `tune.csv` the curves, `tuned.json` the config to train with.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from redline.errors import RangeTestError
from redline.range_test.curve import Curve, smooth
from redline.range_test.result import RangeTestResult, write_curves, write_text
from redline.range_test.suggest import Refusal, Suggestion, suggest
from redline.tuning.batch_sizes import ScaledLR, batch_keys, lr_at_batch, steps_at_batch
from redline.tuning.search import spread_of
from redline.tuning.trials import (
    Candidate,
    Schedule,
    Trial,
    Verdict,
    answer_of_search,
    candidates_of,
    judge,
    notes_on_epochs,
    outcomes_of,
)

__all__ = ["Tuning", "is_tuning", "load_tuning", "save_tuning"]

JSON_NAME, CSV_NAME, CONFIG_NAME = "tune.json", "tune.csv", "tuned.json"
TRAINED = "trained"  # folder for the checkpoint of the best training in full, next to them


class Setting(NamedTuple):
    """The outcome of a test with another optimizer setting."""

    name: str
    value: float
    answer: Suggestion | Refusal  # of this test alone
    lowest: float  # smoothed training loss


@dataclass(frozen=True)
class Tuning:
    """The outcome of a tuning."""

    test: RangeTestResult  # the range tests, of all seeds
    steps: int  # optimizer steps of the planned training
    budget: float  # fraction of them that the tuning was allowed
    spent: int = 0  # its cost, in steps at the config's batch size
    updates: int = 0  # optimizer steps made, at any batch size
    seconds: float = 0.0  # its duration
    stopped: str | None = None  # the stage in which it was interrupted, and by what; None if it is complete
    micro_batch: int = 1  # samples of one forward on one rank, a size that is known to fit
    own_lr: float | None = None  # the learning rate that the config names, if any
    momentum: float = 0.0  # SGD's heavy-ball momentum; 0 for other optimizers
    target_batch_size: int | None = None  # what the config is written for; None for its own
    target_processes: int | None = None  # ranks that the config is written for, likewise
    schedules: tuple[Schedule, ...] = ("WarmupDecayLR", "OneCycle")  # to try and, the first one, to prefer
    steps_per_epoch: float | None = None  # optimizer steps in which the data is seen once; None if unknown
    validation_cost: int = 0  # the part of `spent` that validations took
    left_out: tuple[str, ...] = ()  # what was not done, and why: a sentence each
    search: tuple[Trial, ...] = ()  # short trainings that vary the peak learning rate
    trials: tuple[Trial, ...] = ()  # short trainings with the schedules to compare, and with the config's own
    comparisons: tuple[Curve, ...] = ()  # shorter tests, all of one length, at several batch sizes and settings

    def with_test(self, curve: Curve) -> Tuning:
        """The same record with one more range test."""
        return replace(self, test=replace(self.test, curves=(*self.test.curves, curve)))

    def planned_for(self, steps: int) -> Tuning:
        """The same record, read for a training of another length."""
        return replace(self, steps=steps, test=self.test.planned_for(steps))

    # -- the answer --------------------------------------------------------------------------------

    @cached_property
    def answer(self) -> Suggestion | Refusal:
        """What the search answers; without one, what the tests at the config's own batch size suggest."""
        if not self.search or self.steps < 2:
            return self.test.suggestion
        return answer_of_search(
            self.search,
            own_lr=self.own_lr,
            momentum=self.momentum,
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
        )

    @cached_property
    def verdict(self) -> Verdict:
        """Which schedule trial wins, and why."""
        return judge(self.trials, self.steps, spread_of(outcomes_of(self.search)))

    @property
    def winner(self) -> Trial | None:
        """The trial that wins; None without trials, or where all diverged."""
        return None if self.verdict.winner is None else self.trials[self.verdict.winner]

    @cached_property
    def choice(self) -> Candidate | Refusal:
        """The schedule to train with: the winner's, or without trials the most promising one; or why there is none."""
        if isinstance(self.answer, Refusal):
            return self.answer
        if self.winner is not None:
            return Candidate(self.winner.schedule, self.winner.lr, self.winner.why, self.answer)
        if not self.trials:
            return candidates_of(self.answer, self.own_lr, self.schedules)[0]
        lowest = min(trial.lr for trial in self.trials)
        return Refusal(
            f"All {len(self.trials)} schedule trials diverged, the lowest at {lowest:.2g}.",
            f"Start lower: an LRRangeTest with lr_range_test_min_lr {lowest / 1000:.1g} in the config.",
        )

    @property
    def refusal(self) -> Refusal | None:
        """Why there is no config; None where there is one."""
        return self.choice if isinstance(self.choice, Refusal) else None

    def notes(self) -> Iterator[str]:
        """What to know before trusting the answer, a sentence or two each."""
        if self.stopped is not None:
            yield f"Interrupted {self.stopped}; this is what is known so far."
        yield from self.answer.notes
        if self.search and self.steps_per_epoch is not None:
            longest = max(trial.steps for trial in (*self.search, *self.trials))
            yield from notes_on_epochs(self.steps, longest, self.steps_per_epoch)
        if any(trial.steps >= self.steps for trial in self.search):
            yield f"The best training in full is kept: load_checkpoint reads it from the folder {TRAINED}."
        if (scaled := self.scaled) is not None and scaled.how != "measured":
            yield scaled.why
        yield from self.left_out

    # -- shown and saved; `report` imports this file, so these import it when they are called --------

    def summary(self) -> str:
        """What was found, in words."""
        from redline.tuning.report import summarize

        return summarize(self, chart=False)

    def plot(self, path: str | Path | None = None, *, ax: Any = None) -> Any:
        """Draw the tuning into a file, or without a path onto axes; as `RangeTestResult.plot`."""
        from redline.reports import plot_report
        from redline.tuning.report import report_of

        return plot_report(report_of(self), path, ax)

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write JSON, CSV and, if there is one, the config; returns their paths by kind."""
        return save_tuning(self, directory)

    def __repr__(self) -> str:
        choice = self.choice
        found = choice.name if isinstance(choice, Candidate) else "no config"
        return f"<Tuning of {self.spent} steps for {self.steps}: {found}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the answer and the picture."""
        from redline.reports.html import render_cell
        from redline.tuning.report import report_of

        return render_cell(report_of(self))

    # -- other batch sizes and settings ------------------------------------------------------------

    @cached_property
    def batches(self) -> tuple[tuple[int, Suggestion | Refusal], ...]:
        """What the comparisons suggest at each batch size, from the smallest up."""
        own, by_size = self.test.train_batch_size, defaultdict(list)
        for curve in self.comparisons:
            if curve.train_batch_size:
                by_size[curve.train_batch_size].append(replace(curve, train_batch_size=None))
        return tuple(
            (size, suggest(curves, train_steps=steps_at_batch(self.steps, own, size)))
            for size, curves in sorted(by_size.items())
        )

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The outcome of the comparisons with other optimizer settings."""
        found = []
        for curve in self.comparisons:
            lowest = min((loss for loss in smooth(curve.losses) if math.isfinite(loss)), default=math.nan)
            for name, value in curve.settings:
                answer = suggest([replace(curve, settings=())], train_steps=self.steps)
                found.append(Setting(name, value, answer, lowest))
        return tuple(found)

    @property
    def scaled(self) -> ScaledLR | None:
        """The suggested peak at the target's batch size; None where that is the config's own.

        The comparisons give the factor by which it differs.
        """
        own, target = self.test.train_batch_size, self.target_batch_size
        if target is None or target == own or not isinstance(self.answer, Suggestion):
            return None
        peak = self.answer.cycle_max_lr
        measured = {size: answer.cycle_max_lr for size, answer in self.batches if isinstance(answer, Suggestion)}
        if own in measured:
            factor = peak / measured[own]
            return lr_at_batch({size: lr * factor for size, lr in measured.items()} | {own: peak}, target)
        scaled = lr_at_batch({own: peak}, target)
        if measured:
            others = ", ".join(map(str, measured))
            unused = f"(The tests at {others} were not used: the one at {own}, to compare with, gave no answer.)"
            scaled = scaled._replace(why=f"{scaled.why} {unused}")
        return scaled

    # -- the config --------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """The config to train with: the base with the chosen schedule, for the planned steps.

        Where each number comes from is under ``_range_test`` and ``_tune``, which engines skip.

        Raises:
            RangeTestError: There is none; the message says why and what to do.
        """
        choice = self.choice
        if isinstance(choice, Refusal):
            raise RangeTestError(f"no config can be suggested. {choice.reason} {choice.remedy}")
        own = self.test.train_batch_size
        config = copy.deepcopy({k: v for k, v in self.test.config.items() if k not in ("_range_test", "_tune")})
        steps, measured_at = self.steps, own
        if self.target_batch_size is not None or self.target_processes is not None:
            ranks = self.target_processes or self.test.world_size
            config |= batch_keys(self.target_batch_size or own, ranks, self.micro_batch)
            steps = steps_at_batch(self.steps, own, config["train_batch_size"])
        if (scaled := self.scaled) is not None:
            factor = scaled.lr / choice.suggestion.cycle_max_lr
            choice = replace(choice, lr=float(f"{choice.lr * factor:.2g}"), why=f"{scaled.why} {choice.why}")
            # An extrapolated learning rate is known to hold only where it was measured.
            measured_at = scaled.measured_at if scaled.how == "extrapolated" else config["train_batch_size"]
        section, reasons = choice.section(steps, self.test.group_ratios)
        own_type = (config.get("scheduler") or {}).get("type")
        if section is not None:
            config["scheduler"] = section
        elif own_type == "LRRangeTest":
            del config["scheduler"]
        holds = section is None and own_type in (None, "LRRangeTest")
        optimizer = config.get("optimizer")
        if isinstance(optimizer, dict) and (holds or choice.schedule == "WarmupCosineLR"):
            optimizer["params"] = {**(optimizer.get("params") or {}), "lr": choice.lr}
        config["_range_test"] = {
            "reasons": reasons,
            "notes": list(self.notes()),
            "train_batch_size": measured_at,
            "train_steps": steps,
        }
        config["_tune"] = self._origin(choice)
        return config

    def _origin(self, choice: Candidate) -> dict[str, Any]:
        """The ``_tune`` section: how the schedule was found."""
        if self.trials:
            why = self.verdict.why
        elif not self.search:
            why = "No schedule was tried: this is what the tests suggest."
        else:
            why = "No schedule was tried in full: this one ended lowest on most of the tasks that were measured."
        losses = {trial.curve.name: None if trial.diverged else float(f"{trial.loss:.4g}") for trial in self.trials}
        origin: dict[str, Any] = {
            "schedule": choice.schedule,
            "lr": choice.lr,
            "why": why,
            "trials": losses,
            "spent": f"{self.spent} of {self.steps} planned steps",
            "measured_at_batch_sizes": [size for size, _ in self.batches] or [self.test.train_batch_size],
        }
        if self.stopped is not None:
            origin["stopped"] = self.stopped
        ratios = self.test.group_ratios
        if choice.schedule == "own" and any(ratio != 1 for ratio in ratios):
            lrs = ", ".join(f"{choice.lr * ratio:.6g}" for ratio in ratios)
            origin["to_do"] = f"Give your script's parameter groups the learning rates {lrs}, in this order."
        elif choice.schedule == "own" and "optimizer" not in self.test.config:
            origin["to_do"] = f"Give your script's own optimizer the learning rate {choice.lr:g}."
        return origin


# -- on disk ---------------------------------------------------------------------------------------


def is_tuning(directory: str | Path) -> bool:
    """Whether a folder holds a tuning, not a single range test."""
    return (Path(directory) / JSON_NAME).is_file()


def save_tuning(tuning: Tuning, directory: str | Path) -> dict[str, Path]:
    """Write JSON, CSV and, if there is one, the config; returns their paths by kind ("json", "csv", "config")."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"json": folder / JSON_NAME, "csv": folder / CSV_NAME}
    value = {
        **{field.name: getattr(tuning, field.name) for field in fields(tuning)},
        "winner": tuning.verdict.winner,
        "why": tuning.verdict.why,
        "search": [_trial_to_json(trial) for trial in tuning.search],
        "trials": [_trial_to_json(trial) for trial in tuning.trials],
        "comparisons": [curve.to_json() for curve in tuning.comparisons],
        "test": tuning.test.to_json(),
    }
    write_text(written["json"], json.dumps(value, indent=2) + "\n")
    trials = (trial.curve for trial in (*tuning.search, *tuning.trials))
    write_curves(written["csv"], [*tuning.test.curves, *tuning.comparisons, *trials])
    config = folder / CONFIG_NAME
    if tuning.refusal is None:
        write_text(config, json.dumps(tuning.to_config(), indent=2) + "\n")
        written["config"] = config
    else:
        config.unlink(missing_ok=True)  # an earlier tuning's
    return written


def load_tuning(directory: str | Path) -> Tuning:
    """Read a tuning that :func:`save_tuning` wrote.

    Raises:
        RangeTestError: There is none in that directory, or it is damaged.
    """
    path = Path(directory) / JSON_NAME
    try:
        value = json.loads(path.read_text())
        known = {field.name: value[field.name] for field in fields(Tuning) if field.name in value}
        return Tuning(
            **known
            | {
                "test": RangeTestResult.from_json(value["test"]),
                "search": tuple(map(_trial_from_json, value["search"])),
                "trials": tuple(map(_trial_from_json, value["trials"])),
                "comparisons": tuple(map(Curve.from_json, value["comparisons"])),
                "left_out": tuple(value["left_out"]),
                "schedules": tuple(value.get("schedules", ("WarmupDecayLR",))),
            }
        )
    except FileNotFoundError:
        raise RangeTestError(f"{directory}: there is no {JSON_NAME}; give the folder that a tuning wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RangeTestError(f"{path}: is not the record of a tuning ({error})") from error


def _trial_to_json(trial: Trial) -> dict[str, Any]:
    value = {field.name: getattr(trial, field.name) for field in fields(trial)} | {"curve": trial.curve.to_json()}
    for name in ("loss", "noise"):
        value[name] = value[name] if math.isfinite(value[name]) else str(value[name])  # JSON has no nan and no inf
    return value


def _trial_from_json(value: dict[str, Any]) -> Trial:
    value = {"steps": len(value["curve"]["steps"]), **value, "curve": Curve.from_json(value["curve"])}
    value["schedule"] = "own" if value["schedule"] == "fixed" else value["schedule"]  # records of version 0.1.0
    return Trial(**(value | {name: float(value[name]) for name in ("loss", "noise")}))
