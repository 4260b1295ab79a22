"""What a tuning found: the tests, the trials, and the config of the winner."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engine.errors import RangeTestError
from engine.range_test.analysis import suggest
from engine.range_test.curve import Curve
from engine.range_test.result import RangeTestResult
from engine.range_test.search import SURE, Try, find_peak, for_long_training, is_chance
from engine.range_test.smoothing import smooth
from engine.range_test.suggestion import Refusal, Suggestion, cycle_at
from engine.tuning.batch import Scaled, lr_at_batch, share_out_batch, steps_at_batch
from engine.tuning.candidates import PREFERENCE, Candidate, candidates_of
from engine.tuning.trials import Trial, Verdict, judge, noise_of

__all__ = ["Setting", "Tuning", "tries_of"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a test with another setting came to.

    Attributes:
        name, value: the setting.
        answer: what this test alone suggests.
        lowest: its lowest smoothed training loss.
    """

    name: str
    value: float
    answer: Suggestion | Refusal
    lowest: float


@dataclass(frozen=True)
class Tuning:
    """The outcome of a tuning as a value.

    Attributes:
        test: the range tests, of all seeds.
        comparisons: shorter tests, all of one length, at several batch sizes and settings.
        search: short trainings that find the peak.
        trials: short trainings with the schedules that the tests suggest, and with fixed rates.
        steps: updates of the planned training.
        budget: share of them that the tuning might take.
        spent: what it took, in updates of the config's batch size.
        updates: updates made, at whatever batch size.
        seconds: how long it took.
        stopped: the stage at which it was interrupted, and by what; None if it came to its end.
        left_out: what was not done, and why: a sentence each.
        micro_batch: samples of a forward on one process, which are known to fit.
        own_lr: the rate that the config names, if any.
        momentum: of the optimizer, where it is a heavy ball's; 0 for others.
        target_batch_size, target_processes: what the config is for, where it is another batch or number of processes.
    """

    test: RangeTestResult
    trials: tuple[Trial, ...]
    steps: int
    budget: float
    spent: int
    updates: int
    seconds: float
    stopped: str | None = None
    left_out: tuple[str, ...] = ()
    comparisons: tuple[Curve, ...] = ()
    micro_batch: int = 1
    own_lr: float | None = None
    target_batch_size: int | None = None
    target_processes: int | None = None
    search: tuple[Trial, ...] = ()
    momentum: float = 0.0

    # -- what it says ----------------------------------------------------------------------------

    @cached_property
    def answer(self) -> Suggestion | Refusal:
        """What the tests at the config's own batch size and settings suggest, with the peak that the search found."""
        answer = self.test.suggestion
        if len(self.search) < 3 or self.steps < 2:
            return answer
        tries = tries_of(self.search)
        peaks, updates = [one.lr for one in tries], max(len(trial.curve.taken().losses) for trial in self.search)
        told = f"{len(peaks)} short trainings, of {updates} updates each and with peaks from {min(peaks):.2g} to "
        told += f"{max(peaks):.2g}"
        best = find_peak(tries)
        if best is None:
            return Refusal(
                f"None of {told}, ended below its start.",
                "Check that gradients reach the parameters, and that the model is not trained already; or give the "
                "search longer trainings: a larger budget.",
            )
        if isinstance(answer, Refusal) and is_chance(tries, updates):
            fall = -min(one.loss for one in tries)
            return Refusal(
                f"{answer.reason} Nor does the search find more: of {told}, the best came down by {fall:.2g}, which is "
                "within the batch noise.",
                answer.remedy,
                answer.notes,
            )
        peak = float(f"{for_long_training(best, tries, updates, self.momentum, self.steps):.2g}")
        found = cycle_at(
            peak,
            f"Of {told}, {best:.2g} is the lowest peak that comes close to the best" + _moved(best, peak),
            train_steps=self.steps,
            low_lr=float(f"{peak / SURE:.2g}"),
            high_lr=float(f"{peak * SURE:.2g}"),
            curve="search",
            diverged_at_lr=None if isinstance(answer, Refusal) else answer.diverged_at_lr,
        )
        if isinstance(answer, Refusal):
            return replace(found, notes=(f"The tests gave no answer, which is the search's alone. {answer.reason}",))
        return found

    @cached_property
    def verdict(self) -> Verdict:
        """Which trial wins, and why."""
        return judge(self.trials, self.steps)

    @property
    def winner(self) -> Trial | None:
        """The trial that wins; None without trials, or where all diverged."""
        return None if self.verdict.winner is None else self.trials[self.verdict.winner]

    @property
    def refusal(self) -> Refusal | None:
        """Why there is no config; None where there is one."""
        if isinstance(self.answer, Refusal):
            return self.answer
        if self.trials and all(trial.diverged for trial in self.trials):
            lowest = min(self.trials, key=lambda trial: trial.lr)
            return Refusal(
                f"All {len(self.trials)} trials diverged, at {lowest.lr:.2g} too: nothing that was tried trains.",
                f"Start lower: an LRRangeTest with lr_range_test_min_lr {lowest.lr / 1000:.1g} in the config.",
            )
        return None

    @property
    def choice(self) -> Candidate | None:
        """The schedule to train with: the winner's, or without trials the one that the tests suggest."""
        if self.refusal is not None or not isinstance(self.answer, Suggestion):
            return None
        if self.winner is not None:
            why = self.winner.why
            return Candidate(self.winner.schedule, self.winner.lr, why, self.answer)
        candidates = candidates_of(self.answer, self.own_lr)
        return min(candidates, key=lambda candidate: PREFERENCE.index(candidate.schedule))

    @cached_property
    def batches(self) -> tuple[tuple[int, Suggestion | Refusal], ...]:
        """What short tests of one length suggest at each batch size, from the smallest up: for comparison."""
        sizes = sorted({curve.train_batch_size for curve in self.comparisons if curve.train_batch_size is not None})
        return tuple((size, self._at_batch(size)) for size in sizes)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """What the tests with other settings came to."""
        found = []
        for curve in self.comparisons:
            for name, value in curve.settings:
                answer = suggest([_plain(curve)], train_steps=self.steps)
                losses = [loss for loss in smooth(curve.losses) if math.isfinite(loss)]
                found.append(Setting(name, value, answer, min(losses, default=math.nan)))
        return tuple(found)

    def _at_batch(self, size: int) -> Suggestion | Refusal:
        curves = [_plain(curve) for curve in self.comparisons if curve.train_batch_size == size]
        return suggest(curves, train_steps=steps_at_batch(self.steps, self.test.train_batch_size, size))

    def planned_for(self, steps: int) -> Tuning:
        """The same record, read for a training of another length."""
        return replace(self, steps=steps, test=self.test.planned_for(steps))

    # -- the config ------------------------------------------------------------------------------

    @property
    def scaled(self) -> Scaled | None:
        """The suggested maximum at the target's batch size; None where that is the config's own.

        The tests that compare batch sizes tell the factor by which it differs.
        """
        own, target = self.test.train_batch_size, self.target_batch_size
        if target is None or target == own or not isinstance(self.answer, Suggestion):
            return None
        measured = {size: answer.cycle_max_lr for size, answer in self.batches if isinstance(answer, Suggestion)}
        if own in measured:
            factor = self.answer.cycle_max_lr / measured[own]
            measured = {size: lr * factor for size, lr in measured.items()}
            return lr_at_batch({**measured, own: self.answer.cycle_max_lr}, target)
        scaled = lr_at_batch({own: self.answer.cycle_max_lr}, target)
        if not measured:
            return scaled
        others = ", ".join(map(str, measured))
        why = f"{scaled.why} (The test at {own} gave no answer, with which those at {others} would be compared.)"
        return replace(scaled, why=why)

    def to_config(self) -> dict[str, Any]:
        """The config to train with: the base with the winner's schedule, for the planned updates.

        Where each number comes from is under ``_range_test`` and ``_tune``, which engines skip.

        Raises:
            RangeTestError: there is none; the message says why and what to do.
        """
        choice = self.choice
        if choice is None:
            refusal = self.refusal
            assert refusal is not None
            raise RangeTestError(f"no config can be suggested. {refusal.reason} {refusal.remedy}")
        config = {
            key: value for key, value in copy.deepcopy(self.test.config).items() if key not in ("_range_test", "_tune")
        }
        steps, scaled = self.steps, self.scaled
        if self.target_batch_size is not None or self.target_processes is not None:
            config.update(self._batch_keys())
            steps = steps_at_batch(self.steps, self.test.train_batch_size, config["train_batch_size"])
        if scaled is not None:
            factor = scaled.lr / choice.suggestion.cycle_max_lr
            choice = replace(choice, lr=float(f"{choice.lr * factor:.2g}"), why=f"{scaled.why} {choice.why}")
        self._write_schedule(config, choice, steps)
        config["_range_test"] = {
            "reasons": choice.reasons(steps),
            "notes": [*choice.suggestion.notes, *self.left_out],
            "train_batch_size": self._holds_for(scaled),
            "train_steps": steps,
        }
        config["_tune"] = self._how(choice)
        return config

    def _write_schedule(self, config: dict[str, Any], choice: Candidate, steps: int) -> None:
        section = choice.section(steps, self.test.group_ratios)
        if section is not None:
            config["scheduler"] = section
            return
        config.pop("scheduler", None)
        if isinstance(optimizer := config.get("optimizer"), dict):
            optimizer["params"] = {**(optimizer.get("params") or {}), "lr": choice.lr}

    def _batch_keys(self) -> dict[str, int]:
        processes = self.target_processes or self.test.world_size
        return share_out_batch(self.target_batch_size or self.test.train_batch_size, processes, self.micro_batch)

    def _holds_for(self, scaled: Scaled | None) -> int:
        """The batch size at which the config's rates are known to hold: what training is compared with."""
        if scaled is None:
            return self.test.train_batch_size
        return scaled.measured_at if scaled.how == "extrapolated" else (self.target_batch_size or scaled.measured_at)

    @property
    def _why_untried(self) -> str:
        if len(self.search) < 3:
            return "No schedule was tried: this is what the tests suggest."
        return "No schedule was tried in whole: this one ended lowest on most of the tasks that were measured."

    def _how(self, choice: Candidate) -> dict[str, Any]:
        how: dict[str, Any] = {
            "schedule": choice.schedule,
            "lr": choice.lr,
            "why": self.verdict.why if self.trials else self._why_untried,
            "trials": {
                trial.curve.name: None if trial.diverged else float(f"{trial.loss:.4g}") for trial in self.trials
            },
            "spent": f"{self.spent} of {self.steps} planned updates",
            "measured_at_batch_sizes": [size for size, _ in self.batches] or [self.test.train_batch_size],
        }
        if self.stopped is not None:
            how["stopped"] = self.stopped
        ratios = self.test.group_ratios
        if choice.schedule == "fixed" and any(ratio != 1 for ratio in ratios):
            rates = ", ".join(f"{choice.lr * ratio:.6g}" for ratio in ratios)
            how["to_do"] = f"Give your script's parameter groups the learning rates {rates}, in this order."
        elif choice.schedule == "fixed" and "optimizer" not in self.test.config:
            how["to_do"] = f"Give your script's own optimizer the learning rate {choice.lr:g}."
        return how

    # -- in words --------------------------------------------------------------------------------

    def notes(self) -> Iterator[str]:
        """What to know before trusting it, a sentence or two each."""
        if self.stopped is not None:
            yield f"Interrupted: {self.stopped}. This is what is known so far."
        yield from self.answer.notes
        if (scaled := self.scaled) is not None and scaled.how != "measured":
            yield scaled.why
        yield from self.left_out


def _moved(best: float, peak: float) -> str:
    """Why the peak is not what is best for the search's trainings."""
    if peak > 1.1 * best:
        return f"; they hold their rate, and a schedule that comes down bears more: {peak:.2g}."
    if peak > 0.9 * best:
        return "."
    return f"; {peak:.2g} is for a training that is much longer, and keeps its distance from what was thrown off."


def _plain(curve: Curve) -> Curve:
    """A test read by itself, as if its batch and settings were the record's own."""
    return replace(curve, train_batch_size=None, settings=())


def tries_of(trials: Sequence[Trial]) -> list[Try]:
    """How far short trainings have come: by their validation loss, or without such by their later training losses.

    All begin at the same weights and see the same batches, so that a difference between them is not chance. They are
    counted from the loss before the first update.
    """
    return [
        Try(trial.lr, math.inf if trial.diverged else _came_to(trial.curve), noise_of(trial.curve.losses))
        for trial in trials
    ]


def _came_to(curve: Curve) -> float:
    before = curve.validation[0][1] if curve.validation else curve.losses[0]
    came = (curve.validation[-1][1] if curve.validation else _later(curve)) - before
    return came if math.isfinite(came) else math.inf


def _later(curve: Curve) -> float:
    """Mean of the losses in a run's later half; updates that the loss scaler skipped do not count."""
    middle, taken = len(curve.losses) // 2, curve.taken()
    losses = [loss for step, loss in zip(taken.steps, taken.losses) if step >= curve.steps[middle]]
    return sum(losses) / len(losses) if losses else math.nan
