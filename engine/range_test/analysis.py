"""Reading a learning rate range test: the loss against the LR in, the boundaries of a 1Cycle schedule out.

Owns the rules: which numbers for DeepSpeed's ``OneCycle`` follow from the record, each with its reason, or why none do.
Pure functions of numbers; running the test and drawing it are left to others.

The loss of a range test falls because training goes on, whatever the LR: a slow test makes its drop at LRs below the
best, a fast one above. So the maximum is taken from between a slow and a fast test, not from the bottom of one curve.

Every rule uses differences of losses only, measured by the drop that the test itself made or by its own batch noise.
So a constant added to the loss, or a positive factor on it, changes no suggestion, and negative losses are fine.

The idea of the test: Smith, https://arxiv.org/abs/1506.01186 and https://arxiv.org/abs/1803.09820.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.range_test.curve import Curve
from engine.range_test.divergence import DivergenceDetector, divergence
from engine.range_test.smoothing import SMOOTHING, ema, smooth
from engine.range_test.suggestion import CYCLE_RATIO, RISING_SHARE, Refusal, Suggestion, round_down

__all__ = ["LEAST_SWEEP", "MIN_UPDATES", "rough_maximum", "suggest"]

# The shares were fitted on twelve small tasks, each with Adam and SGD. The optimum is wide: with the bracket at 80% or
# at 95% of the drop, the runs that followed ended within 10% of each other in validation loss.
MIN_UPDATES = 20  # a shorter test that has not diverged is not read
LEARNED = 0.8  # a test that made less than this share of the deepest drop was too fast or too slow to count
UNDER_WAY = 0.1  # share of the drop at which descent is under way
MOSTLY_DONE = 0.95  # share of the drop that brackets the maximum, by tests at several rates
ALONE = 0.8  # the same where all tests ran at one rate ...
ALONE_DIVERGED = 0.5  # ... and for one that diverged
DIVERGENCE_MARGIN = 3.0  # the maximum lies at least this factor below the lowest LR at which a test diverged
MOST_RISING_SHARE = 0.5  # the LR rises for no more of the planned updates, however many the test needed to climb
SWEEP_FACTOR = 8.0  # its lowest loss lies so far above the maximum ...
SWEEP_SURE = 4.0  # ... within this factor
LEAST_SWEEP = 12  # updates of an exponential test
ROUGH_FACTOR = 100.0  # from where a test ends to where a search begins, if no more is known
BRACKET_SURE = 1.5  # how far the maximum may be off between tests that agree
DISAGREEMENT = 10.0  # tests whose brackets differ by more than this factor are reported


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one test says, up to its divergence."""

    curve: Curve
    descended: bool
    drop: float
    smoothed: list[float]  # up to the lowest, relative to the start
    end: int | None  # update at which it diverged
    beta: float = SMOOTHING

    def reached(self, share: float) -> float:
        """LR at which the smoothed loss had made this share of its drop."""
        last = len(self.smoothed) - 1
        # from 2 on, where the first median of three stands
        made = (k for k in range(2, last) if -self.smoothed[k] >= share * self.drop)
        return self.curve.lrs[next(made, last)]

    def updates_to(self, lr: float) -> int:
        """Updates that the test took to climb to an LR."""
        return next((k for k, used in enumerate(self.curve.lrs) if used >= lr), len(self.curve.lrs))

    @property
    def diverged_at_lr(self) -> float | None:
        return None if self.end is None else self.curve.lrs[self.end]


def _read(curve: Curve, beta: float) -> _Reading:
    detector = DivergenceDetector()
    end = next((index for index, loss in enumerate(curve.losses) if detector.update(loss)), None)
    smoothed = smooth((loss - detector.start for loss in curve.losses[: detector.best_index + 1]), beta)
    drop = max(0.0, -smoothed[-1]) if smoothed else 0.0
    return _Reading(curve, detector.descended, drop, smoothed, end, beta)


def suggest(curves: Sequence[Curve], *, train_steps: int, beta: float = SMOOTHING) -> Suggestion | Refusal:
    """Turns the record of one or several range tests into a ``OneCycle`` schedule, or says why it cannot.

    The maximum is the geometric middle between the lowest and the highest LR at which the tests had made 95% of
    their drop; tests with less than 80% of the deepest drop are left out. Where all tests ran at one rate, 80% counts
    instead of 95, and 50% in a test that diverged. It never lies above a third of the LR at which a test diverged.
    The minimum is where descent is under way (10% of the drop), and at most a thirtieth of the maximum. The LR rises
    for 20% of the planned updates, or for as long as the test took to climb there if that is longer, up to a half.
    Of exponential tests alone, the maximum is an eighth of the LR at which the smoothed loss is lowest; beside linear
    ones they are read only where all of these are too short or stay flat, as one that was broken off does.

    Args:
        curves: range tests, and runs at a fixed LR beside them, which are for the eye only.
        train_steps: planned length of the training run, in updates.
        beta: weight of the past in the smoothing of the losses, in [0, 1). Whether a test diverged is a matter of the
            record, and does not depend on it.
    """
    tests = [curve.taken() for curve in curves if curve.is_test]
    tests, passed_over = _choose(tests)
    if refusal := _refuse_unread(curves, tests, train_steps):
        return refusal
    unread = tuple(f"{curve.name} is not read: {why}." for curve in tests if (why := _unreadable(curve))) + passed_over
    readings = [_read(curve, beta) for curve in tests if not _unreadable(curve)]
    if not readings:
        longest = max(len(curve.losses) for curve in tests)
        return Refusal(
            f"The test is too short to be read: {longest} updates.",
            f"Run at least {MIN_UPDATES} updates; 100 give a clear picture.",
            unread,
        )
    descended = [reading for reading in readings if reading.descended]
    if not descended:
        return _refuse_no_descent(readings, unread)
    deepest = max(reading.drop for reading in descended)
    learned = [reading for reading in descended if reading.drop >= LEARNED * deepest]
    maximum = (_find_maximum if tests[0].kind == "linear" else _find_by_sweep)(learned, readings)
    min_lr, why_min = _find_minimum(learned, maximum)
    first, why_first = _find_rise(maximum, train_steps)
    return Suggestion(
        cycle_min_lr=min_lr,
        cycle_max_lr=maximum.lr,
        cycle_first_step_size=first,
        cycle_second_step_size=train_steps - first,
        reasons={
            "cycle_min_lr": why_min,
            "cycle_max_lr": maximum.why,
            "cycle_first_step_size": why_first,
            "cycle_second_step_size": f"The rest of {train_steps} planned updates: the run ends at the minimum.",
        },
        curve=maximum.low.curve.name if maximum.low is maximum.high else maximum.names,
        low_lr=round_down(min(maximum.lr, maximum.low_lr) / maximum.sure),
        high_lr=round_down(max(maximum.lr, min(maximum.high_lr, maximum.ceiling)) * maximum.sure),
        diverged_at_lr=maximum.diverged_at_lr,
        notes=tuple(dict.fromkeys((*_notes(maximum, readings, learned), *unread))),
    )


def rough_maximum(curves: Sequence[Curve]) -> float | None:
    """A first guess at the maximum where `suggest` refuses, for a search to begin at.

    Returns:
        A hundredth of the LR at which the first test ended or diverged; None where its first loss is not finite.
    """
    for curve in (each.taken() for each in curves):
        if curve.is_test and curve.losses and math.isfinite(curve.losses[0]):
            end = curve.diverged_at
            return curve.lrs[-1 if end is None else end] / ROUGH_FACTOR
    return None


def _refuse_unread(curves: Sequence[Curve], tests: Sequence[Curve], train_steps: int) -> Refusal | None:
    if train_steps < 2:
        return Refusal(
            f"A training run of {train_steps} updates has no room for a cycle.",
            "Plan for at least 2 updates, one up and one down.",
        )
    if not tests:
        held = "only runs at a fixed learning rate, which say nothing about others" if curves else "no range test"
        return Refusal(f"The record holds {held}.", "Run a range test, best at several rates, such as 5, 50 and 500.")
    if bad := [curve for curve in tests if not all(0 < lr < math.inf for lr in curve.lrs)]:
        return Refusal(
            f"The record of {bad[0].name} holds a learning rate that is not a positive number.",
            "Run the range test with lr_range_test_min_lr above 0.",
        )
    if all(curve.losses and not math.isfinite(curve.losses[0]) for curve in tests):
        return Refusal(
            f"The first loss is {tests[0].losses[0]}, before any update was made: no learning rate is to blame.",
            "Look for bad values in the data, the initial weights or the loss function, then test again.",
        )
    return None


def _unreadable(curve: Curve) -> str | None:
    """Why a test is left out; None for one that can be read."""
    if curve.losses and not math.isfinite(curve.losses[0]):
        return f"its first loss is {curve.losses[0]}"
    least = MIN_UPDATES if curve.kind == "linear" else LEAST_SWEEP
    if len(curve.losses) < least and divergence(curve.losses) is None:
        return f"{len(curve.losses)} updates are too few"
    return None


def _choose(tests: list[Curve]) -> tuple[list[Curve], tuple[str, ...]]:
    """The tests to read, all of one kind where there are linear ones; and a sentence on each one passed over for them.

    An exponential test tells the order of magnitude only: it is read where no linear one tells anything.
    """
    linear = [curve for curve in tests if curve.kind == "linear"]
    sweeps = [curve for curve in tests if curve.kind == "exponential" and not _unreadable(curve)]
    if not linear or not sweeps or any(_tells(curve) for curve in linear):
        return linear or tests, ()
    return sweeps, tuple(f"{curve.name} is not read: {_unreadable(curve) or 'it stays flat'}." for curve in linear)


def _tells(curve: Curve) -> bool:
    """Whether a test can be read, and either falls or diverges."""
    if _unreadable(curve):
        return False
    reading = _read(curve, SMOOTHING)
    return reading.descended or reading.end is not None


def _refuse_no_descent(readings: Sequence[_Reading], notes: tuple[str, ...]) -> Refusal:
    lowest = min(reading.curve.lrs[0] for reading in readings)
    highest = max(max(reading.curve.lrs) for reading in readings)
    diverged_at = [reading.diverged_at_lr for reading in readings if reading.diverged_at_lr is not None]
    if len(diverged_at) == len(readings):
        return Refusal(
            f"The loss never falls, and diverges at {min(diverged_at):.2g}: {lowest:.2g}, where the test starts, is "
            "too high already, or the rate too fast.",
            f"Start lower, for example with lr_range_test_min_lr {lowest / 100:.1g}, or take a lower rate.",
            notes,
        )
    if diverged_at:
        return Refusal(
            f"No test shows descent: the slower ones stay flat, the faster ones diverge (at {min(diverged_at):.2g}).",
            "Take a rate in between and more updates, so that the loss has time to fall.",
            notes,
        )
    return Refusal(
        f"The loss does not fall by more than its batch noise between learning rates {lowest:.2g} and {highest:.2g}.",
        "Let the test end higher (rate, lr_range_test_min_lr) or last longer; if the curve stays flat, check that "
        "gradients reach the parameters and that the model is not trained already.",
        notes,
    )


@dataclass(frozen=True, slots=True)
class _Maximum:
    """The maximum LR and where it comes from."""

    lr: float
    why: str
    low: _Reading  # test that had made its drop at the lowest LR ...
    low_lr: float
    high: _Reading  # ... and at the highest; the same where there is one test
    high_lr: float
    diverged_at_lr: float | None
    sure: float = BRACKET_SURE  # the best maximum lies within this factor

    @property
    def ceiling(self) -> float:
        return math.inf if self.diverged_at_lr is None else self.diverged_at_lr / DIVERGENCE_MARGIN

    @property
    def names(self) -> str:
        return f"{self.low.curve.name} and {self.high.curve.name}"


def _find_maximum(learned: Sequence[_Reading], readings: Sequence[_Reading]) -> _Maximum:
    several_rates = len({reading.curve.rate for reading in learned}) > 1

    def share(reading: _Reading) -> float:
        if several_rates:
            return MOSTLY_DONE
        return ALONE if reading.end is None else ALONE_DIVERGED

    def done_at(reading: _Reading) -> float:
        return reading.reached(share(reading))

    low, high = min(learned, key=done_at), max(learned, key=done_at)
    low_lr, high_lr = done_at(low), done_at(high)
    if low is high:
        why = f"{low.curve.name} had made {share(low):.0%} of its drop at {low_lr:.2g}"
    else:
        why = (
            f"Geometric middle of {low_lr:.2g} and {high_lr:.2g}, where {low.curve.name} had made {share(low):.0%} "
            f"and {high.curve.name} {share(high):.0%} of its drop"
        )
    lr = math.sqrt(low_lr) * math.sqrt(high_lr)
    diverged = [(at, reading.curve.name) for reading in readings if (at := reading.diverged_at_lr) is not None]
    if not diverged:
        return _Maximum(round_down(lr), f"{why}; no test diverged.", low, low_lr, high, high_lr, None)
    at, name = min(diverged)
    ceiling = at / DIVERGENCE_MARGIN
    bound = f"lowered to a third of {at:.2g}, where {name} diverged" if lr > ceiling else f"{name} diverged at {at:.2g}"
    return _Maximum(round_down(min(lr, ceiling)), f"{why}; {bound}.", low, low_lr, high, high_lr, at)


def _find_by_sweep(learned: Sequence[_Reading], readings: Sequence[_Reading]) -> _Maximum:
    """A share of the LR at which an exponential test's loss is lowest; of several tests the geometric mean."""
    lowest = []
    for reading in learned:
        stop = len(reading.curve.losses) if reading.end is None else reading.end
        losses = ema(reading.curve.losses[:stop], reading.beta)
        lowest.append(reading.curve.lrs[min(range(stop), key=losses.__getitem__)])
    middle = math.exp(sum(map(math.log, lowest)) / len(lowest))
    diverged = [at for reading in readings if (at := reading.diverged_at_lr) is not None]
    order = sorted(range(len(learned)), key=lowest.__getitem__)
    first, last = order[0], order[-1]
    spread = "" if first == last else f" (from {lowest[first]:.2g} to {lowest[last]:.2g} over {len(learned)} tests)"
    return _Maximum(
        round_down(middle / SWEEP_FACTOR),
        f"An eighth of {middle:.2g}{spread}, where the smoothed loss of {learned[first].curve.name} is lowest: a sweep "
        "passes each rate too fast to be thrown off by it.",
        low=learned[first],
        low_lr=lowest[first] / SWEEP_FACTOR,
        high=learned[last],
        high_lr=lowest[last] / SWEEP_FACTOR,
        diverged_at_lr=min(diverged, default=None),
        sure=SWEEP_SURE,
    )


def _find_minimum(learned: Sequence[_Reading], maximum: _Maximum) -> tuple[float, str]:
    under_way, reading = min(((r.reached(UNDER_WAY), r) for r in learned), key=lambda pair: pair[0])
    why = f"Descent is under way at {under_way:.2g}, where {reading.curve.name} had made {UNDER_WAY:.0%} of its drop"
    ceiling = maximum.lr / CYCLE_RATIO
    if under_way > ceiling:
        why += f"; lowered to 1/{CYCLE_RATIO:.0f} of the maximum, because the cycle ends here"
    return round_down(min(under_way, ceiling)), f"{why}."


def _find_rise(maximum: _Maximum, train_steps: int) -> tuple[int, str]:
    share = max(1, round(RISING_SHARE * train_steps))
    if maximum.high.curve.kind == "exponential":
        return share, f"{share / train_steps:.0%} of {train_steps} planned updates."
    climbed = maximum.high.updates_to(maximum.lr)
    most = max(1, math.floor(MOST_RISING_SHARE * train_steps))
    first = min(max(share, climbed), most)
    why = f"{first / train_steps:.0%} of {train_steps} planned updates"
    name = maximum.high.curve.name
    if climbed > most:
        return first, f"{why}; {name} took {climbed} to climb to the maximum, more than half of the run."
    return first, f"{why}; {name} took {climbed} to climb to the maximum."


def _notes(maximum: _Maximum, readings: Sequence[_Reading], learned: Sequence[_Reading]) -> Iterator[str]:
    if maximum.diverged_at_lr is None and maximum.low.curve.kind == "linear":
        yield (
            "The test ended before it diverged: the maximum is a lower bound. More updates or a higher rate would show "
            "how far the learning rate can go."
        )
    if maximum.high_lr > DISAGREEMENT * maximum.low_lr:
        yield (
            f"The tests disagree by a factor of {maximum.high_lr / maximum.low_lr:.0f} on where the drop is made "
            f"({maximum.names}): the maximum is uncertain by about its square root. Rates that lie closer would help."
        )
    for reading in readings:
        if not reading.descended:
            how = "diverged before it fell" if reading.end is not None else "stayed flat"
            yield f"{reading.curve.name} {how}: it sets no learning rate."
        elif reading not in learned:
            yield f"{reading.curve.name} made less than {LEARNED:.0%} of the deepest drop: it sets no learning rate."
    if maximum.low_lr < 2 * maximum.low.curve.lrs[0]:
        yield (
            f"{maximum.low.curve.name} made its drop near its first learning rate, {maximum.low.curve.lrs[0]:.2g}: "
            "start the test lower to see where descent begins."
        )
