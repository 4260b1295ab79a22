"""Trials, short trainings that decide: which peak learning rate, then which schedule. Pure numbers.

A range test gives the order of magnitude of the peak only: part of its falling loss is plain training progress, and it
does not stay long enough at any learning rate to become unstable there. The trials of `search` find the peak; trials of
one length from there compare schedules, and the config's own schedule and learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from redline.range_test.curve import Curve
from redline.range_test.suggest import Refusal, Suggestion, cycle_at
from redline.tuning.search import NOISES, Outcome, Peak, find_peak, spread_of

__all__ = [
    "SCHEDULES",
    "Candidate",
    "Trial",
    "Verdict",
    "answer_of_search",
    "candidates_of",
    "judge",
    "outcomes_of",
    "trial_of",
]

Schedule = Literal["OneCycle", "WarmupDecayLR", "WarmupCosineLR", "WarmupStableDecayLR", "own"]

SCHEDULES: Mapping[str, Schedule] = {
    "linear": "WarmupDecayLR",
    "onecycle": "OneCycle",
    "cosine": "WarmupCosineLR",
    "wsd": "WarmupStableDecayLR",
}
# Which one wins a tie, first to last: in full trainings linear decay ended lowest on nearly all tasks.
PREFERENCE: tuple[Schedule, ...] = ("WarmupDecayLR", "WarmupCosineLR", "WarmupStableDecayLR", "OneCycle", "own")
WARMUP_SHARE = 0.02  # of the steps of a decay
DECAY_SHARE = 0.2  # of the steps of a schedule that holds its peak: 10 to 20% in https://arxiv.org/abs/2405.18392
COSINE_END = 0.0001  # of the peak: DeepSpeed's default
TAIL = 0.2  # the last training losses of a trial, as a fraction, whose mean is its result without validation data
LEAST_TAIL = 5
LEAST_LATER = 8  # losses from which the noise of a short trial is estimated
FAIR_SHARE = 0.05  # of the planned steps: in a shorter trial a held learning rate has an advantage that it loses later
FEW_EPOCHS = 2.0  # a training that sees its data so often may overfit
LEAST_FITTED = 8  # steps of a trial that tells what it learned by heart: in fewer ones it learns its own batches only


@dataclass(frozen=True, slots=True)
class Trial:
    """A short training with a schedule, and what it came to."""

    curve: Curve  # its record
    schedule: Schedule
    lr: float  # its highest (first parameter group)
    steps: int  # planned
    loss: float  # the last validation loss, or without validation data the mean of the last training losses
    diverged: bool  # whether it ended early, or with a loss that is not finite
    noise: float = 0.0  # standard error of `loss` from the later half of the training losses; 0 if unknown
    why: str = ""  # where the learning rate comes from, in a sentence


def trial_of(curve: Curve, schedule: Schedule, lr: float, why: str, *, steps: int) -> Trial:
    """A run's record as a trial; one that made fewer optimizer steps than `steps` has diverged."""
    losses = curve.taken().losses
    loss = curve.validation[-1][1] if curve.validation else _last_losses(losses)
    diverged = len(curve.losses) < steps or not math.isfinite(loss)
    return Trial(curve, schedule, lr, steps, loss, diverged, 0.0 if diverged else _standard_error(losses), why)


def _last_losses(losses: Sequence[float]) -> float:
    """The mean training loss at the end; nan without any."""
    last = losses[-max(LEAST_TAIL, math.ceil(TAIL * len(losses))) :]
    return sum(last) / len(last) if last else math.nan


def _standard_error(losses: Sequence[float]) -> float:
    """Of the mean of the later half."""
    later = losses[-max(LEAST_LATER, len(losses) // 2) :]
    return _noise_of(later) / math.sqrt(max(1, len(later)))


def _noise_of(losses: Sequence[float]) -> float:
    """Standard error of one loss: what is left of a series after its trend and its curvature are removed.

    >>> _noise_of([4.0, 3.0, 2.0, 1.0]), round(_noise_of([0.1, -0.1] * 50), 2)
    (0.0, 0.18)
    """
    # Third differences of independent values have 20 times their variance (1 + 9 + 9 + 1).
    rests = [a - 3 * b + 3 * c - d for a, b, c, d in zip(losses, losses[1:], losses[2:], losses[3:])]
    rests = [rest for rest in rests if math.isfinite(rest)]
    return math.sqrt(sum(rest * rest for rest in rests) / len(rests) / 20) if rests else 0.0


# -- the peak --------------------------------------------------------------------------------------------


def outcomes_of(trials: Sequence[Trial], steps_per_epoch: float | None = None) -> list[Outcome]:
    """The search's trials as numbers."""
    return [
        Outcome(
            each.lr,
            each.steps,
            math.inf if each.diverged else each.loss,
            each.noise,
            _paired_noise(each, trials),
            each.curve.seed,
            _carried_over(each),
            each.curve.validation[0][1] if each.curve.validation else math.inf,
            max(1.0, each.steps / (each.curve.part or steps_per_epoch or math.inf)),
        )
        for each in trials
    ]


def _carried_over(trial: Trial) -> float | None:
    """Of how far the loss on a trial's own batches fell, the part by which the validation loss did; None if unknown."""
    if not trial.curve.validation or trial.curve.fitted is None or trial.steps < LEAST_FITTED:
        return None
    initial, (before, after) = trial.curve.validation[0][1], trial.curve.fitted
    # Of few samples, the initial loss is that of all by chance only.
    learned = min(initial, before) - after
    if learned <= 0:  # nothing by heart, if nothing else happened
        return 1.0 if trial.loss <= initial else -math.inf
    return (initial - trial.loss) / learned


def _paired_noise(trial: Trial, trials: Sequence[Trial]) -> float:
    """Standard error of the difference from the trial at the next lower rate, or from the next higher if it is lowest.

    Both have seen the same batches, so that what differs between batches is in neither. Without such a trial its own.
    """
    sound = [one for one in trials if not one.diverged]
    like = [one for one in sound if (one.steps, one.curve.seed) == (trial.steps, trial.curve.seed)]
    ordered = sorted(like, key=lambda one: one.lr)
    if trial not in ordered or len(ordered) < 2:
        return trial.noise
    place = ordered.index(trial)
    other = ordered[place - 1 if place else 1]
    return _standard_error([a - b for a, b in zip(trial.curve.taken().losses, other.curve.taken().losses)])


def answer_of_search(
    search: Sequence[Trial], *, own_lr: float | None, momentum: float, steps: int, steps_per_epoch: float | None = None
) -> Suggestion | Refusal:
    """What the search answers for a training of `steps`."""
    outcomes = outcomes_of(search, steps_per_epoch)
    low, high = min(search, key=lambda each: each.lr).lr, max(search, key=lambda each: each.lr).lr
    what = f"{len(outcomes)} trials between learning rates {low:.2g} and {high:.2g}"
    start_lower = f"Start lower: give the config's optimizer an lr of {low / 1000:.1g}."
    peak = find_peak(outcomes, steps, own=own_lr, momentum=momentum, epoch=steps_per_epoch)
    if peak is None:
        return Refusal(f"All of {what} diverged.", start_lower)
    longest = peak.steps
    best = min(search, key=lambda each: (each.diverged, each.steps != longest, each.loss))
    fall, noise = _fall_of(best), _least_fall(best, outcomes)
    if fall <= 0:
        losses = best.curve.taken().losses  # none where the loss scaler skipped all steps
        rises = best.lr == low and bool(losses) and min(losses[len(losses) // 2 :]) > losses[0]
        return Refusal(
            f"Of {what}, even the best ended {abs(fall):.2g} above the loss of the initial weights.",
            start_lower if rises else _remedy(best),
        )
    notes: tuple[str, ...] = ()
    if fall <= noise:
        notes = (
            f"The best trial lowered the loss by {fall:.2g}, within the noise of {noise:.2g}: trials are too short.",
        )
        if own_lr is not None:
            peak = peak._replace(lr=own_lr, is_own=True)
    why = _why(peak, what, steps, outcomes, momentum)
    return cycle_at(
        peak.lr,
        why,
        train_steps=steps,
        low_lr=min(peak.lr, peak.low),
        high_lr=max(peak.lr, peak.best),
        curve="search",
        diverged_at_lr=min((each.lr for each in search if each.diverged and each.lr > peak.best), default=None),
        notes=notes,
    )


def _remedy(best: Trial) -> str:
    """What to do where even the best trial ended above the loss of the initial weights."""
    if best.curve.fitted is not None and best.curve.fitted[1] < best.curve.fitted[0]:
        return (
            "The loss on the trials' own batches fell, so what they learned is not true of the validation data: check "
            "that both are alike, or train on more data, for fewer epochs, or with more weight decay or dropout."
        )
    return (
        "Check that gradients reach the parameters and that the model is not already trained, or allow longer trials "
        "with a larger budget."
    )


def _fall_of(trial: Trial) -> float:
    """How far the loss fell, from the initial weights."""
    if trial.curve.validation:
        return trial.curve.validation[0][1] - trial.loss
    return trial.curve.losses[0] - trial.loss


def _least_fall(trial: Trial, outcomes: Sequence[Outcome]) -> float:
    """The noise that a fall has to exceed: of the same validation data, or of the first batch against the last."""
    if not trial.curve.validation:
        return _noise_of(trial.curve.losses)
    paired = max(one.paired for one in outcomes if (one.lr, one.steps) == (trial.lr, trial.steps))
    spread = spread_of(outcomes)
    return paired if spread is None else spread


def _why(peak: Peak, what: str, steps: int, outcomes: Sequence[Outcome], momentum: float) -> str:
    why = f"Of {what}, those of {peak.steps} steps ended lowest at {peak.best:.2g}"
    if peak.low < 0.95 * peak.best:
        why += f", and as low within noise down to {peak.low:.2g}"
    if peak.is_own:
        why += f"; the config's own {peak.lr:.2g} is kept."
    elif peak.by_heart:
        best = next(one for one in outcomes if (one.steps, one.lr) == (peak.steps, peak.best))
        part = min(1.0, max(0.0, best.carried or 0.0))
        why += (
            f"; {part:.0%} of what it learned of its own batches was true of the validation data, too. The training "
            f"sees its data more often, so the peak is lower: {peak.lr:.2g}."
        )
    elif peak.unseen:
        why += f"; nothing higher was tried, which may be better or diverge, so the answer is lower: {peak.lr:.2g}."
    elif peak.lr < 0.95 * peak.low:
        why += f"; {'momentum is built up later, and ' if momentum else ''}a longer training takes less: {peak.lr:.2g}."
    else:
        why += f"; {peak.lr:.2g} is between these." if peak.lr < 0.95 * peak.best else "."
    if (spread := spread_of(outcomes)) is not None:
        why += f" Two orders of the data differed by {spread:.2g}."
    if peak.best == min(one.lr for one in outcomes):
        why += " It is the lowest one tried."
    return why


def notes_on_epochs(steps: int, longest: int, steps_per_epoch: float) -> Iterator[str]:
    """What the trials, the longest of which had `longest` steps, show of a training of `steps` that may overfit."""
    planned = steps / steps_per_epoch
    if planned < FEW_EPOCHS or longest >= steps:
        return
    yield (
        f"The training sees the data {planned:.0f} times; what it learns by heart, trials of {longest} steps show in "
        "small only. Watch the validation loss, and keep the best checkpoint or stop early."
    )


# -- the schedule ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule to try, and then to train with.

    It writes its section of a config for a trial of fifty steps and for the training of fifty thousand, so that what
    was tried is what is trained.
    """

    schedule: Schedule
    lr: float  # its highest, of the first parameter group
    why: str  # where that comes from, in a sentence
    suggestion: Suggestion  # the answer of the search, which has the shape of a cycle

    @property
    def name(self) -> str:
        return f"{self.schedule} {self.lr:g}"

    def section(self, steps: int, ratios: Sequence[float] = (1.0,)) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The `scheduler` section for a training of `steps` >= 2, and a sentence on each of its numbers.

        There is none for the config's own. `ratios` are the parameter groups' learning rates relative to the
        first one's.
        """
        if self.schedule == "own":
            return None, {"lr": self.why}
        rows = {"OneCycle": self._cycle, "WarmupCosineLR": self._cosine}.get(self.schedule, self._decay)(steps)
        params = {key: value for key, value, _ in rows}
        if any(ratio != 1 for ratio in ratios):
            for key in params.keys() & {"warmup_max_lr", "cycle_min_lr", "cycle_max_lr"}:
                params[key] = [float(f"{params[key] * ratio:.6g}") for ratio in ratios]
        return {"type": self.schedule, "params": params}, {key: why for key, _, why in rows if why}

    def _decay(self, steps: int) -> list[tuple[str, Any, str]]:
        warmup = min(steps, max(2, round(WARMUP_SHARE * steps)))
        held = f"{DECAY_SHARE:.0%} of them; until then it holds." if self.schedule == "WarmupStableDecayLR" else ""
        return [
            ("warmup_min_lr", 0.0, ""),
            ("warmup_max_lr", self.lr, self.why),
            ("warmup_num_steps", warmup, f"{WARMUP_SHARE:.0%} of {steps} planned steps, at least 2."),
            ("warmup_type", "linear", ""),
            ("total_num_steps", steps, "The planned steps: the learning rate ends at zero."),
            *([("decay_num_steps", max(1, round(DECAY_SHARE * steps)), held)] if held else []),
        ]

    def _cosine(self, steps: int) -> list[tuple[str, Any, str]]:
        """It multiplies the optimizer's learning rate, which has to be the peak."""
        warmup = [row for row in self._decay(steps) if row[0] not in ("warmup_min_lr", "warmup_max_lr")]
        return [("warmup_min_ratio", 0.0, ""), *warmup, ("cos_min_ratio", COSINE_END, "")]

    def _cycle(self, steps: int) -> list[tuple[str, Any, str]]:
        tests = self.suggestion
        length = tests.cycle_first_step_size + tests.cycle_second_step_size
        rising = tests.cycle_first_step_size / length
        first = min(steps - 1, max(1, round(rising * steps)))
        low, _, up, down = (tests.reasons.get(key, "") for key in tests.params())
        if self.lr != tests.cycle_max_lr:
            tested = f"{tests.cycle_min_lr:g} is below {tests.cycle_max_lr:g}, which the tests suggest"
            low = f"As far below the maximum as {tested}."
        if steps != length:
            up = f"{rising:.0%} of {steps} steps, as the tests suggest."
            down = f"The rest of {steps} steps: the run ends at the minimum."
        return [
            # A peak that was changed for another batch size keeps its distance from the minimum.
            ("cycle_min_lr", float(f"{tests.cycle_min_lr * self.lr / tests.cycle_max_lr:.2g}"), low),
            ("cycle_max_lr", self.lr, self.why),
            ("cycle_first_step_size", first, up),
            ("cycle_second_step_size", steps - first, down),
        ]


def candidates_of(suggestion: Suggestion, own_lr: float | None, schedules: Sequence[Schedule]) -> list[Candidate]:
    """The schedules to try, and the config's own with its learning rate `own_lr`, if it names one."""
    peak, why = suggestion.cycle_max_lr, suggestion.reasons.get("cycle_max_lr", "")
    found = [Candidate(schedule, peak, why, suggestion) for schedule in schedules]
    if own_lr is not None:
        found.append(Candidate("own", own_lr, "The config's own schedule and learning rate.", suggestion))
    return found


class Verdict(NamedTuple):
    """Which trial wins, and why."""

    winner: int | None  # its index; None where all diverged
    tied: tuple[int, ...]  # indices of the trials that are as good within noise, the winner's among them
    why: str  # a sentence


def judge(trials: Sequence[Trial], steps: int, spread: float | None = None) -> Verdict:
    """The trial with the lowest loss; of those that are as good within noise, the preferred schedule.

    A short trial squeezes a schedule that decays into few steps, and the config's own, which may hold its learning
    rate, covers twice the distance. So that wins only in trials that are long enough for a training of `steps`, or if
    all others diverged. `spread` is the standard deviation of a loss over two orders of the data, if it was measured.
    """
    sound = [index for index, trial in enumerate(trials) if not trial.diverged]
    if not sound:
        return Verdict(None, (), f"All {len(trials)} trials diverged." if trials else "There was no trial.")
    if trials[sound[0]].steps < FAIR_SHARE * steps:
        sound = [index for index in sound if trials[index].schedule != "own"] or sound
    lowest = trials[min(sound, key=lambda index: trials[index].loss)]

    def margin(other: Trial) -> float:
        return NOISES * (math.hypot(lowest.noise, other.noise) if spread is None else math.sqrt(2) * spread)

    tied = [index for index in sound if trials[index].loss - lowest.loss <= margin(trials[index])]
    winner = min(tied, key=lambda index: (PREFERENCE.index(trials[index].schedule), trials[index].loss))
    if len(tied) > 1:
        names = ", ".join(f"{trials[index].curve.name} ({trials[index].loss:.4g})" for index in tied)
        why = f"A tie within noise between {names}; {trials[winner].schedule} is preferred."
    elif len(sound) > 1:
        why = f"Its loss, {lowest.loss:.4g}, is the lowest by more than noise."
    else:
        why = "No other schedule ended without diverging."
    return Verdict(winner, tuple(tied), why)
