"""Trials of schedules, judged: what each came to, how sure that is, and which one wins. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.range_test.curve import Curve
from engine.range_test.smoothing import smooth
from engine.tuning.candidates import PREFERENCE, Schedule

__all__ = ["Trial", "Verdict", "judge", "trial_of"]

TAIL = 0.2  # share of a trial whose training losses are its end
LATE = 0.4  # share of a trial whose validation losses tell their noise
NOISES = 2.0  # trials that differ by less than so many times their noise are tied ...
TIED_SHARE = 0.005  # ... and so are those that differ by less than this share of the best one's drop


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
        loss, noise = validation[-1], _noise_of(validation[math.floor((1 - LATE) * len(validation)) :])
    else:
        last = curve.taken().losses[-max(5, math.ceil(TAIL * len(curve.losses))) :]
        loss = sum(last) / len(last) if last else math.nan
        noise = _noise_of(last) / math.sqrt(max(1, len(last)))
    diverged = len(curve.losses) < updates or not math.isfinite(loss)
    return Trial(curve, schedule, lr, loss, diverged, 0.0 if diverged else noise, why)


def judge(trials: Sequence[Trial]) -> Verdict:
    """The trial with the lowest loss at its end; among those that are as good within noise, the preferred schedule."""
    sound = [index for index, trial in enumerate(trials) if not trial.diverged]
    if not sound:
        return Verdict(None, (), f"All {len(trials)} trials diverged." if trials else "There was no trial.")
    best = min(sound, key=lambda index: trials[index].loss)
    lowest = trials[best]
    tied = [index for index in sound if trials[index].loss - lowest.loss <= _margin(lowest, trials[index])]
    winner = min(tied, key=lambda index: (PREFERENCE.index(trials[index].schedule), trials[index].loss))
    others = len(sound) - len(tied)
    if len(tied) == 1:
        why = f"Its loss, {lowest.loss:.4g}, is the lowest by more than chance explains." if others else "It is alone."
    else:
        names = ", ".join(f"{trials[index].curve.name} ({trials[index].loss:.4g})" for index in tied)
        why = f"A tie within noise between {names}; {trials[winner].schedule} is preferred."
    return Verdict(winner, tuple(tied), why)


def _margin(best: Trial, other: Trial) -> float:
    start = [loss for loss in smooth(best.curve.losses[:5]) if math.isfinite(loss)]
    drop = max(0.0, (start[0] if start else best.loss) - best.loss)
    return max(NOISES * math.hypot(best.noise, other.noise), TIED_SHARE * drop)


def _noise_of(losses: Sequence[float]) -> float:
    """How far one of these losses is off by chance: what is left when its fall and its bend are taken out."""
    rests = [a - 3 * b + 3 * c - d for a, b, c, d in zip(losses, losses[1:], losses[2:], losses[3:])]
    return math.sqrt(sum(rest * rest for rest in rests) / len(rests) / 20) if rests else 0.0
