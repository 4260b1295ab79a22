"""The record of one run, and how it is read: smoothing, divergence, and the rules of other tools.

Losses are recorded as measured and smoothed where they are read or drawn. A live run and every later reader decide with
one detector whether it diverged. The project's own reading is in `suggest`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, TypeAdapter

__all__ = ["RULES", "SMOOTHING", "Curve", "DivergenceDetector", "Kind", "Mark", "divergence", "ema", "marks", "smooth"]

Kind = Literal["linear", "exponential", "fixed", "cycle", "decay"]
# JSON has no nan and no infinity: these become strings.
Number = Annotated[float, PlainSerializer(lambda x: x if math.isfinite(x) else str(x), when_used="json")]

SMOOTHING = 0.8  # weight of the past in the moving average of the loss: a memory of 5 steps ...
MEMORY_SHARE = 0.05  # ... or of this share of the steps so far, once that is longer

START_STEPS = 5  # the run starts from the median loss of this many steps
NOISE_STEPS = 10  # steps from which the batch noise is known well enough
CHANGE_CAP = 4.0  # a change above this many times the batch noise before it counts as that many
GIVEN_BACK = 0.5  # diverged: the loss has given back this share of its drop ...
DIVERGENCE_NOISE = 8.0  # ... and more than this many times its batch noise
DESCENT_NOISE = 6.0  # a drop below this many times the batch noise is no descent

RULES = ("steepest", "valley", "minimum / 10", "last stable")
MINIMUM_FACTOR = 10.0
STABLE = 0.1  # a loss that has given back this share of its drop is no longer stable


@dataclass(frozen=True, slots=True)
class Curve:
    """The record of one short run, one entry per optimizer step; columns of unequal length raise ValueError."""

    name: str  # "rate 5", "fixed 0.001"
    rate: float | None  # a range test's `lr_range_test_step_rate`; None for a run of another kind
    steps: tuple[int, ...]  # index of the optimizer step, from 0
    lrs: tuple[Number, ...]  # of the first parameter group; exponential growth may reach infinity
    losses: tuple[Number, ...]  # before the step was applied; nan, inf and negative values are allowed
    validation: tuple[tuple[int, Number], ...] = ()  # (steps done, validation loss); shown only, no rule reads it
    kind: Kind = "linear"  # grows by equal amounts or equal factors, stays, goes as 1Cycle, or decays to zero
    seed: int = 0  # of the order of the data and of dropout; other seeds show the noise of the answer
    skipped: tuple[int, ...] = ()  # the entries of `steps` that the loss scaler skipped
    train_batch_size: int | None = None  # None for the record's own
    settings: tuple[tuple[str, float], ...] = ()  # that differ from the config's: (("weight_decay", 1e-4),)
    fitted: tuple[Number, Number] | None = None  # losses before and after it, measured like validation losses, on the
    # batches that it started with; None if they were not
    part: int | None = None  # optimizer steps after which it saw the same samples again; None for all of the data

    def __post_init__(self) -> None:
        lengths = len(self.steps), len(self.lrs), len(self.losses)
        if len(set(lengths)) > 1:
            raise ValueError("curve {!r} has {} steps, {} LRs and {} losses".format(self.name, *lengths))

    @property
    def is_test(self) -> bool:
        """Whether it is a range test, in which the LR grows."""
        return self.kind == "exponential" or (self.kind == "linear" and self.rate is not None)

    @property
    def diverged_at(self) -> int | None:
        """Index into `steps` of the step at which the run diverged; None if it did not."""
        taken = self.taken()
        end = divergence(taken.losses)
        return None if end is None else self.steps.index(taken.steps[end])

    def taken(self) -> Curve:
        """The same record without the steps that the loss scaler skipped."""
        rows = [row for row in zip(self.steps, self.lrs, self.losses) if row[0] not in self.skipped]
        steps, lrs, losses = zip(*rows) if rows else ((), (), ())
        return replace(self, steps=steps, lrs=lrs, losses=losses, skipped=())

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        value: dict[str, Any] = _CURVE.dump_python(self, mode="json")
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Curve:
        """The inverse of `to_json`; raises ValueError, KeyError or TypeError if `value` is not a record."""
        kind = "fixed" if value["rate"] is None else "linear"  # records of earlier versions lack it
        return _CURVE.validate_python({"kind": kind, **value})


_CURVE = TypeAdapter(Curve)


# -- smoothing -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Smoother:
    """Median of the last three losses, then a moving average whose memory grows with the run."""

    beta: float
    filtered: float = math.nan  # the median of the last three
    smoothed: float = math.nan
    _count: int = 0
    _window: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    _weight: float = 0.0

    def update(self, loss: float) -> float:
        """Take the next loss; returns the smoothed one."""
        if not math.isfinite(loss):
            return self.smoothed
        self._window.append(loss)
        self.filtered = sorted(self._window)[1] if len(self._window) == 3 else self._window[0]
        self._count += 1
        new = min(1 - self.beta, 1 / (MEMORY_SHARE * self._count))
        if self._count in (1, 3):  # an outlier as the first loss shows as one only at the third
            self.smoothed, self._weight = self.filtered, new
        else:
            self._weight = (1 - new) * self._weight + new
            self.smoothed += new / self._weight * (self.filtered - self.smoothed)
        return self.smoothed


def smooth(losses: Iterable[float], beta: float = SMOOTHING) -> list[float]:
    """Smooth a loss curve: the median of the last three values, then an exponential moving average.

    The median drops a single outlier entirely. The average begins at the first loss, and its memory grows with the
    run: 1 / (1 - beta) steps, or 5% of the steps so far if that is longer. A value that is not finite repeats the
    smoothed loss before it (nan if there is none). `beta` is the weight of the past, in [0, 1).

    >>> smooth([2.0, 2.0, 50.0, 2.0, 1.0], beta=0.0)
    [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    smoother = _Smoother(beta)
    return [smoother.update(loss) for loss in losses]


def ema(losses: Iterable[float], beta: float = SMOOTHING) -> list[float]:
    """The bias-corrected exponential moving average; a value that is not finite repeats the average before it.

    >>> [round(value, 3) for value in ema([4.0, 2.0, 2.0], beta=0.5)]
    [4.0, 2.667, 2.286]
    """
    averages, average, weight = [], math.nan, 0.0
    for loss in losses:
        if math.isfinite(loss):
            weight = beta * weight + 1 - beta
            average = loss if math.isnan(average) else average + (1 - beta) / weight * (loss - average)
        averages.append(average)
    return averages


# -- divergence ----------------------------------------------------------------------------------------


class DivergenceDetector:
    """Decides, step by step, whether a run has diverged; constant time per step.

    It has when a loss is not finite, or when (from the tenth step on) the smoothed loss is above its lowest by more
    than half of the drop from start to lowest, and by more than eight times the batch noise. Once diverged it stays
    so. Batch noise is the mean change of the median-filtered loss from one step to the next; a change counts at most
    four times the noise before it, so that the swings of a diverging run do not pass for noise.

    Do not pass the loss of a step that a loss scaler skipped.
    """

    def __init__(self) -> None:
        self.diverged = False
        self.num_steps = 0  # losses taken
        self.best_index = 0  # step with the lowest smoothed loss
        self.start = 0.0  # median of the first five losses, from which drop and rise are measured
        self.drop = self.noise = 0.0  # from the start to the lowest smoothed loss; the batch noise up to there
        self._first: list[float] = []
        self._smoother = _Smoother(SMOOTHING)
        self._best = math.inf
        self._noise = 0.0

    @property
    def descended(self) -> bool:
        """Whether the drop is more than batch noise."""
        return self.drop > DESCENT_NOISE * self.noise

    def update(self, loss: float) -> bool:
        """Take the next training loss; returns whether the run has diverged."""
        self.num_steps += 1
        if self.diverged or not math.isfinite(loss):
            self.diverged = True
        elif self.num_steps > START_STEPS:
            self.diverged = self._take(loss, self.num_steps - 1)
        else:
            self._first.append(loss)
            if self.num_steps == START_STEPS:
                self.start = median(self._first)
                for index, first in enumerate(self._first):
                    self._take(first, index)
        return self.diverged

    def _take(self, loss: float, index: int) -> bool:
        before = self._smoother.filtered
        smoothed = self._smoother.update(loss - self.start)  # so that a constant in the losses cancels
        if index > 2:  # the median has its three losses, now and before
            change = abs(self._smoother.filtered - before)
            if index >= NOISE_STEPS and self._noise > 0:
                change = min(change, CHANGE_CAP * self._noise)
            self._noise += (change - self._noise) / (index - 2)
        if index < START_STEPS or smoothed < self._best:
            self._best, self.best_index = smoothed, index
            self.drop = max(0.0, -smoothed)
        if index < NOISE_STEPS or self.best_index == index:
            self.noise = self._noise
        risen = smoothed - self._best > max(GIVEN_BACK * self.drop, DIVERGENCE_NOISE * self._noise)
        return risen and self.num_steps >= NOISE_STEPS


def divergence(losses: Iterable[float]) -> int | None:
    """Index of the step at which a run diverged, by `DivergenceDetector`; None if it never does."""
    detector = DivergenceDetector()
    return next((index for index, loss in enumerate(losses) if detector.update(loss)), None)


# -- the rules of other tools --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    """One rule's answer on one range test. No rule is best everywhere; their spread shows how uncertain each is."""

    rule: str  # one of `RULES`, or "redline" for the suggestion
    lr: float | None  # None where the rule has no answer
    why: str  # one sentence with its figures
    curve: str  # name of the test that it read


def marks(curves: Sequence[Curve], *, beta: float = SMOOTHING) -> tuple[Mark, ...]:
    """The answer of each rule on the test that is widest in LR, an exponential one where there is one.

    The rules were made for tests that grow by equal factors and reach divergence; on a linear test they mean less.
    Of several seeds the first is read. `beta` is the weight of the past in the moving average of the losses, in [0, 1).
    """
    taken = [curve.taken() for curve in curves if curve.is_test]
    tests = [curve for curve in taken if len(curve.losses) >= 3 and min(curve.lrs) > 0]
    if not tests:
        return ()
    sweeps = [curve for curve in tests if curve.kind == "exponential"]
    curve = max(sweeps or tests, key=lambda each: (max(each.lrs) / min(each.lrs), -each.seed))
    end = divergence(curve.losses)
    averages = ema(curve.losses if end is None else curve.losses[: end + 1], beta)
    points = [(lr, loss) for lr, loss in zip(curve.lrs, averages) if math.isfinite(loss)]
    answers: list[tuple[float | None, str]]
    if len(points) < 3 or min(loss for _, loss in points[1:]) >= points[0][1]:
        answers = [(None, f"The smoothed loss of {curve.name} never falls below its first value.")] * len(RULES)
    elif points[-1][0] <= points[0][0]:  # a staircase that ended on its first stair
        answers = [(None, f"The learning rate of {curve.name} never grows.")] * len(RULES)
    else:
        answers = [rule(*zip(*points)) for rule in (_steepest, _valley, _minimum, _last_stable)]
    return tuple(Mark(rule, lr, why, curve.name) for rule, (lr, why) in zip(RULES, answers))


def _steepest(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """Where the loss falls fastest with the logarithm of the LR, as in pytorch-lr-finder."""
    logs = [math.log(lr) for lr in lrs]
    inner = [k for k in range(1, len(lrs) - 1) if logs[k + 1] > logs[k - 1]]  # a staircase repeats its LRs
    slope, k = min(((losses[k + 1] - losses[k - 1]) / (logs[k + 1] - logs[k - 1]), k) for k in inner)
    return lrs[k], f"The smoothed loss falls fastest at {lrs[k]:.2g}: by {-slope * math.log(2):.2g} per doubling."


def _valley(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The middle of the longest strictly falling subsequence, found by patience sorting, as in fastai's default."""
    tails: list[float] = []  # negated loss that the best descent of each length ends with
    ends: list[int] = []
    before: list[int | None] = []
    for index, loss in enumerate(losses):
        place = bisect_left(tails, -loss)
        before.append(ends[place - 1] if place else None)
        tails[place : place + 1] = [-loss]
        ends[place : place + 1] = [index]
    last = first = ends[-1]
    while (earlier := before[first]) is not None:
        first = earlier
    k = first + (last - first) // 2
    return lrs[k], f"The middle of the longest descent, from {lrs[first]:.2g} to {lrs[last]:.2g}."


def _minimum(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    lr = lrs[losses.index(min(losses))]
    return lr / MINIMUM_FACTOR, f"A tenth of {lr:.2g}, where the smoothed loss is lowest."


def _last_stable(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    k = low = losses.index(min(losses))
    limit = losses[low] + STABLE * (losses[0] - losses[low])
    while k + 1 < len(losses) and losses[k + 1] <= limit:
        k += 1
    return lrs[k], f"Up to {lrs[k]:.2g} the smoothed loss stays within {STABLE:.0%} of its drop above its lowest."
