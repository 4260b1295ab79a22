"""Trials of schedules, judged: what each came to, how sure that is, and which one wins. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.range_test.curve import Curve
from engine.range_test.smoothing import smooth
from engine.tuning.candidates import PREFERENCE, Schedule

__all__ = ["Trial", "Verdict", "judge", "noise_of", "trial_of"]

TAIL = 0.2  # share of a trial whose training losses are its end
LATE = 0.4  # share of a trial whose validation losses tell their noise
NOISES = 2.0  # trials that differ by less than so many times their noise are tied ...
TIED_SHARE = 0.005  # ... and so are those that differ by less than this share of the best one's drop
FAIR_SHARE = 0.05  # of the planned updates: in a shorter trial a fixed rate has an advantage that it loses later


@dataclass(frozen=True, slots=True)
class Trial:
    """A short training with a schedule, and what it came to.

    Attributes:
        curve: its record.
        schedule: its name in a config, or "fixed".
        lr: its highest rate (first parameter group).
        loss: at its end: of the validation data, or without such the mean of the last training losses.
        diverged: whether it ended early, or with a loss that is no number.
        noise: how far `loss` would be off by chance; 0 where nothing tells.
        why: where the rate comes from, in a sentence.
    """

    curve: Curve
    schedule: Schedule
    lr: float
    loss: float
    diverged: bool
    noise: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which trial wins.

    Attributes:
        winner: its index; None where all diverged.
        tied: indices of the trials that are as good within noise, the winner's among them.
        why: a sentence.
    """

    winner: int | None
    tied: tuple[int, ...]
    why: str


def trial_of(curve: Curve, schedule: Schedule, lr: float, why: str, *, updates: int) -> Trial:
    """A record, judged.

    Args:
        curve: of the run.
        schedule: see :class:`Trial`.
        lr: likewise.
        why: likewise.
        updates: what the run was to make; one that made fewer has diverged.
    """
    validation = [loss for _, loss in curve.validation]
    if validation:
        loss, noise = validation[-1], noise_of(validation[math.floor((1 - LATE) * len(validation)) :])
    else:
        last = curve.taken().losses[-max(5, math.ceil(TAIL * len(curve.losses))) :]
        loss = sum(last) / len(last) if last else math.nan
        noise = noise_of(last) / math.sqrt(max(1, len(last)))
    diverged = len(curve.losses) < updates or not math.isfinite(loss)
    return Trial(curve, schedule, lr, loss, diverged, 0.0 if diverged else noise, why)


def judge(trials: Sequence[Trial], steps: int) -> Verdict:
    """The trial with the lowest loss at its end; among those that are as good within noise, the preferred schedule.

    A trial squeezes a schedule into few updates, of which it spends most below its peak. A fixed rate travels twice as
    far in them, which is what counts so early, and not at the end of a training. So it wins only if trials are long
    enough, or if no schedule is sound.

    Args:
        trials: all of one length.
        steps: updates of the planned training.
    """
    sound = [index for index, trial in enumerate(trials) if not trial.diverged]
    if not sound:
        return Verdict(None, (), f"All {len(trials)} trials diverged." if trials else "There was no trial.")
    length = max(len(trials[index].curve.losses) for index in sound)
    scheduled = [index for index in sound if trials[index].schedule != "fixed"]
    unfair = length < FAIR_SHARE * steps and bool(scheduled)
    rivals = scheduled if unfair else sound
    lowest = trials[min(rivals, key=lambda index: trials[index].loss)]
    tied = [index for index in rivals if trials[index].loss - lowest.loss <= _margin(lowest, trials[index])]
    winner = min(tied, key=lambda index: (PREFERENCE.index(trials[index].schedule), trials[index].loss))
    if len(tied) > 1:
        names = ", ".join(f"{trials[index].curve.name} ({trials[index].loss:.4g})" for index in tied)
        why = f"A tie within noise between {names}; {trials[winner].schedule} is preferred."
    elif len(rivals) > 1:
        why = f"Its loss, {lowest.loss:.4g}, is the lowest by more than chance explains."
    else:
        why = "No other came to its end."
    first = min((trials[index] for index in sound), key=lambda trial: trial.loss)
    if unfair and first.schedule == "fixed":
        why += (
            f" {first.curve.name} ended lower ({first.loss:.4g}), as fixed rates do in so short a trial, {length} of "
            f"{steps} updates: what a schedule gains by coming down shows at the end of a training."
        )
    return Verdict(winner, tuple(tied), why)


def _margin(best: Trial, other: Trial) -> float:
    start = [loss for loss in smooth(best.curve.losses[:5]) if math.isfinite(loss)]
    drop = max(0.0, (start[0] if start else best.loss) - best.loss)
    return max(NOISES * math.hypot(best.noise, other.noise), TIED_SHARE * drop)


def noise_of(losses: Sequence[float]) -> float:
    """How far one of these losses is off by chance: what is left when its fall and its bend are taken out.

    Args:
        losses: one after the other, four at least; values that are not finite tell nothing.

    >>> noise_of([4.0, 3.0, 2.0, 1.0]), round(noise_of([0.1, -0.1] * 50), 2)
    (0.0, 0.18)
    """
    rests = [a - 3 * b + 3 * c - d for a, b, c, d in zip(losses, losses[1:], losses[2:], losses[3:])]
    rests = [rest for rest in rests if math.isfinite(rest)]
    return math.sqrt(sum(rest * rest for rest in rests) / len(rests) / 20) if rests else 0.0
