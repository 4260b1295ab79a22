"""Reading range tests: curves of loss and LR in, a 1Cycle schedule with a reason for each value out, or a refusal.

The loss of a range test falls because training goes on, whatever the LR: a slow test makes its drop at LRs below the
best, a fast one above. So the maximum is taken from between a slow and a fast test, not from the bottom of one curve.

Every rule uses differences of losses only, relative to the drop that the test itself made or to its own batch noise.
So a constant added to the loss, or a positive factor on it, changes no suggestion, and negative losses are fine.

The idea of the test: Smith, https://arxiv.org/abs/1506.01186 and https://arxiv.org/abs/1803.09820.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context

from redline.range_test.curve import SMOOTHING, Curve, DivergenceDetector, ema, smooth

__all__ = [
    "CYCLE_RATIO", "MIN_STEPS", "MIN_SWEEP_STEPS", "RISING_SHARE", "Refusal", "Suggestion", "cycle_at", "rough_maximum",
    "round_down", "suggest",
]  # fmt: skip

# The shares were fitted on twelve small tasks, each with Adam and SGD. The optimum is wide: with the bracket at 80% or
# at 95% of the drop, the runs that followed ended within 10% of each other in validation loss.
MIN_STEPS = 20  # a shorter test that has not diverged is not read
LEARNED = 0.8  # a test that made less than this share of the deepest drop was too fast or too slow to count
UNDER_WAY = 0.1  # share of the drop at which descent is under way
MOSTLY_DONE = 0.95  # share of the drop that brackets the maximum, by tests at several rates
ALONE = 0.8  # the same where all tests ran at one rate ...
ALONE_DIVERGED = 0.5  # ... and for one that diverged
DIVERGENCE_MARGIN = 3.0  # the maximum lies at least this factor below the lowest LR at which a test diverged
BRACKET_MARGIN = 1.5  # how far the maximum may be off between tests that agree
DISAGREEMENT = 10.0  # tests whose brackets differ by more than this factor are reported
FAR = 10.0  # a test whose loss had not risen at this many times its first LR did not start too high
CYCLE_RATIO = 30.0  # cycle_max_lr / cycle_min_lr, at least: the cycle ends at its minimum, and must end low
RISING_SHARE = 0.2  # share of the planned steps in which the LR rises
MOST_RISING_SHARE = 0.5  # the LR rises for no more of the planned steps, however long the test took to climb

SWEEP_FACTOR = 8.0  # the loss of an exponential test is lowest this factor above the maximum ...
SWEEP_MARGIN = 4.0  # ... within this factor
MIN_SWEEP_STEPS = 12  # of an exponential test
ROUGH_FACTOR = 100.0  # from the end of a test to the LR at which a search begins, if nothing else is known


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Values for a ``OneCycle`` block, each with its reason."""

    cycle_min_lr: float  # at both ends of the cycle
    cycle_max_lr: float  # at its peak
    cycle_first_step_size: int  # steps in which the LR rises
    cycle_second_step_size: int  # steps in which it falls
    reasons: dict[str, str]  # one sentence for each key of `params`
    curve: str  # name of the test that set the maximum, or of the two that bracket it
    low_lr: float  # the range in which the best maximum probably lies
    high_lr: float
    diverged_at_lr: float | None = None  # lowest LR at which a test diverged; None if none did
    notes: tuple[str, ...] = ()  # what to know before relying on the numbers, one sentence or two each

    def params(self) -> dict[str, float | int]:
        """The ``params`` of the config's ``OneCycle`` block."""
        return {
            "cycle_min_lr": self.cycle_min_lr,
            "cycle_max_lr": self.cycle_max_lr,
            "cycle_first_step_size": self.cycle_first_step_size,
            "cycle_second_step_size": self.cycle_second_step_size,
        }


@dataclass(frozen=True, slots=True)
class Refusal:
    """No suggestion: one sentence on why, one on what to do, and notes as in `Suggestion`."""

    reason: str
    remedy: str
    notes: tuple[str, ...] = ()


def cycle_at(
    max_lr: float,
    why: str,
    *,
    train_steps: int,
    low_lr: float,
    high_lr: float,
    curve: str,
    diverged_at_lr: float | None,
    minimum: tuple[float, str] | None = None,
    rise: tuple[int, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Suggestion:
    """A cycle around a maximum, which is explained by `why`; other arguments as in `Suggestion`.

    `minimum` and `rise`, the steps in which the LR rises, come with their reasons; without them they are 1/30 of the
    maximum, and 20% of the planned steps.
    """
    end = f"1/{CYCLE_RATIO:.0f} of the maximum: the cycle ends here, and must end low."
    min_lr, why_min = minimum or (round_down(max_lr / CYCLE_RATIO), end)
    share = max(1, round(RISING_SHARE * train_steps))
    first, why_first = rise or (share, f"{share / train_steps:.0%} of {train_steps} planned steps.")
    reasons = {
        "cycle_min_lr": why_min,
        "cycle_max_lr": why,
        "cycle_first_step_size": why_first,
        "cycle_second_step_size": f"The rest of {train_steps} planned steps: the run ends at the minimum.",
    }
    return Suggestion(
        min_lr, max_lr, first, train_steps - first, reasons, curve, low_lr, high_lr, diverged_at_lr, notes
    )


def round_down(value: float) -> float:
    """Two significant digits, downwards, so that a bound stays a bound."""
    return float(Context(prec=2, rounding=ROUND_FLOOR).create_decimal(repr(value)))


def suggest(curves: Sequence[Curve], *, train_steps: int, beta: float = SMOOTHING) -> Suggestion | Refusal:
    """Turn the record of one or several range tests into a ``OneCycle`` schedule, or explain why that is not possible.

    The maximum is the geometric mean of the lowest and the highest LR at which the tests had made 95% of their drop;
    tests with less than 80% of the deepest drop are left out. Where all tests ran at one rate, 80% counts instead of
    95, and 50% in a test that diverged. It is never above a third of the LR at which a test diverged. The minimum is
    where descent is under way (10% of the drop), and at most a thirtieth of the maximum. The LR rises for 20% of the
    planned steps, or for as long as the test took to climb there if that is longer, up to a half.
    Of exponential tests alone, the maximum is an eighth of the LR at which the smoothed loss is lowest; next to linear
    ones they are read only where all of these are too short or stay flat.

    Runs at a fixed LR are not read. Whether a test diverged does not depend on `beta`, the weight of the past in the
    smoothing of the losses.
    """
    tests, notes = _choose([_Test(curve.taken(), beta) for curve in curves if curve.is_test])
    if refusal := _refuse_unread(tests, train_steps):
        return refusal
    readable = [test for test in tests if not test.unreadable]
    if not readable:
        reason = f"The test is too short to be read: {max(len(test.lrs) for test in tests)} steps."
        return Refusal(reason, f"Run at least {MIN_STEPS} steps; 100 give a clear picture.", notes)
    descended = [test for test in readable if test.descended]
    if not descended:
        return _refuse_no_descent(readable, notes)
    deepest = max(test.drop for test in descended)
    learned = [test for test in descended if test.drop >= LEARNED * deepest]
    maximum = (_bracket if tests[0].kind == "linear" else _read_sweeps)(learned, readable)
    at = maximum.diverged_at_lr
    return cycle_at(
        maximum.lr,
        maximum.why,
        train_steps=train_steps,
        low_lr=round_down(min(maximum.lr, maximum.low_lr) / maximum.margin),
        high_lr=round_down(max(maximum.lr, min(maximum.high_lr, at / DIVERGENCE_MARGIN)) * maximum.margin),
        curve=maximum.names,
        diverged_at_lr=at if at < math.inf else None,
        minimum=_minimum(learned, maximum),
        rise=_rise(maximum, train_steps) if tests[0].kind == "linear" else None,
        notes=tuple(dict.fromkeys((*_notes(maximum, readable, learned), *notes))),
    )


def rough_maximum(curves: Sequence[Curve]) -> float | None:
    """Where a search begins if `suggest` refuses: a hundredth of the LR at which the first test ended or diverged."""
    for curve in (each.taken() for each in curves):
        if curve.is_test and curve.losses and math.isfinite(curve.losses[0]):
            end = curve.diverged_at
            return curve.lrs[-1 if end is None else end] / ROUGH_FACTOR
    return None


# -- one test ------------------------------------------------------------------------------------------


class _Test:
    """One test, read up to its divergence."""

    def __init__(self, curve: Curve, beta: float) -> None:
        detector = DivergenceDetector()
        self.name, self.kind, self.rate = curve.name, curve.kind, curve.rate
        self.lrs, self.losses = curve.lrs, curve.losses
        self.end = next((index for index, loss in enumerate(curve.losses) if detector.update(loss)), None)
        self.diverged_at_lr = math.inf if self.end is None else curve.lrs[self.end]
        self.descended = detector.descended
        # Up to the lowest, relative to the start.
        self._smoothed = smooth((loss - detector.start for loss in curve.losses[: detector.best_index + 1]), beta)
        self.drop = max(0.0, -self._smoothed[-1]) if self._smoothed else 0.0
        self._beta = beta

    @property
    def unreadable(self) -> str | None:
        """Why the test is left out; None for one that can be read."""
        if self.losses and not math.isfinite(self.losses[0]):
            return f"its first loss is {self.losses[0]}"
        least = MIN_STEPS if self.kind == "linear" else MIN_SWEEP_STEPS
        return f"{len(self.losses)} steps are too few" if len(self.losses) < least and self.end is None else None

    def reached(self, share: float) -> float:
        """LR at which the smoothed loss had made this share of its drop."""
        last = len(self._smoothed) - 1
        # From 2 on: the first median of three.
        made = (k for k in range(2, last) if -self._smoothed[k] >= share * self.drop)
        return self.lrs[next(made, last)]

    def lowest_at(self) -> float:
        """LR at which the moving average of the losses is lowest."""
        averages = ema(self.losses[: self.end], self._beta)
        return self.lrs[averages.index(min(averages))]


def _choose(tests: list[_Test]) -> tuple[list[_Test], tuple[str, ...]]:
    """The tests to read, all of one kind, and a note on each that is not.

    An exponential test shows the order of magnitude only: it is read where no linear one can be.
    """
    linear = [test for test in tests if test.kind == "linear"]
    sweeps = [test for test in tests if test.kind == "exponential" and not test.unreadable]
    is_informative = any(not test.unreadable and (test.descended or test.end is not None) for test in linear)
    if linear and sweeps and not is_informative:
        return sweeps, tuple(f"{test.name} is not read: {test.unreadable or 'it stays flat'}." for test in linear)
    chosen = linear or tests
    return chosen, tuple(f"{test.name} is not read: {test.unreadable}." for test in chosen if test.unreadable)


# -- the numbers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Maximum:
    """The maximum LR and where it comes from."""

    lr: float
    why: str
    low: _Test  # the test that had made its drop at the lowest LR ...
    low_lr: float
    high: _Test  # ... and the one at the highest; the same where there is one test
    high_lr: float
    diverged_at_lr: float  # the lowest of all tests
    margin: float  # the best maximum lies within this factor

    @property
    def names(self) -> str:
        return self.low.name if self.low is self.high else f"{self.low.name} and {self.high.name}"


def _bracket(learned: Sequence[_Test], readable: Sequence[_Test]) -> _Maximum:
    """The maximum between a slow and a fast linear test."""
    several_rates = len({test.rate for test in learned}) > 1

    def share(test: _Test) -> float:
        alone = ALONE if test.end is None else ALONE_DIVERGED
        return MOSTLY_DONE if several_rates else alone

    def place(test: _Test) -> float:
        return test.reached(share(test))

    low, high = min(learned, key=place), max(learned, key=place)
    low_lr, high_lr = place(low), place(high)
    why = f"{low.name} had made {share(low):.0%} of its drop at {low_lr:.2g}"
    if low is not high:
        why = (
            f"Geometric mean of {low_lr:.2g} and {high_lr:.2g}, where {low.name} had made {share(low):.0%} and "
            f"{high.name} {share(high):.0%} of its drop"
        )
    lr = math.sqrt(low_lr) * math.sqrt(high_lr)
    first = min(readable, key=lambda test: (test.diverged_at_lr, test.name))
    at, ceiling = first.diverged_at_lr, first.diverged_at_lr / DIVERGENCE_MARGIN
    bound = f"{first.name} diverged at {at:.2g}" if at < math.inf else "no test diverged"
    if lr > ceiling:
        bound = f"lowered to a third of {at:.2g}, where {first.name} diverged"
    return _Maximum(round_down(min(lr, ceiling)), f"{why}; {bound}.", low, low_lr, high, high_lr, at, BRACKET_MARGIN)


def _read_sweeps(learned: Sequence[_Test], readable: Sequence[_Test]) -> _Maximum:
    """A share of the LR at which an exponential test's loss is lowest; of several tests the geometric mean."""
    low, high = min(learned, key=_Test.lowest_at), max(learned, key=_Test.lowest_at)
    low_lr, high_lr = low.lowest_at(), high.lowest_at()
    middle = math.exp(sum(math.log(test.lowest_at()) for test in learned) / len(learned))
    spread = "" if len(learned) == 1 else f" (from {low_lr:.2g} to {high_lr:.2g} over {len(learned)} tests)"
    why = (
        f"An eighth of {middle:.2g}{spread}, where the smoothed loss of {low.name} is lowest: a sweep passes each "
        "learning rate too fast to diverge at it."
    )
    lr, low_lr, high_lr = round_down(middle / SWEEP_FACTOR), low_lr / SWEEP_FACTOR, high_lr / SWEEP_FACTOR
    return _Maximum(lr, why, low, low_lr, high, high_lr, min(test.diverged_at_lr for test in readable), SWEEP_MARGIN)


def _minimum(learned: Sequence[_Test], maximum: _Maximum) -> tuple[float, str]:
    first = min(learned, key=lambda test: test.reached(UNDER_WAY))
    under_way, ceiling = first.reached(UNDER_WAY), maximum.lr / CYCLE_RATIO
    why = f"Descent is under way at {under_way:.2g}, where {first.name} had made {UNDER_WAY:.0%} of its drop"
    if under_way > ceiling:
        why += f"; lowered to 1/{CYCLE_RATIO:.0f} of the maximum, because the cycle ends here"
    return round_down(min(under_way, ceiling)), f"{why}."


def _rise(maximum: _Maximum, train_steps: int) -> tuple[int, str]:
    lrs = maximum.high.lrs
    climbed = next((k for k, lr in enumerate(lrs) if lr >= maximum.lr), len(lrs))
    most = max(1, math.floor(MOST_RISING_SHARE * train_steps))
    rise = min(max(1, round(RISING_SHARE * train_steps), climbed), most)
    end = "the maximum, more than half of the run." if climbed > most else "the maximum."
    took = f"{maximum.high.name} took {climbed} to climb to {end}"
    return rise, f"{rise / train_steps:.0%} of {train_steps} planned steps; {took}"


def _notes(maximum: _Maximum, readable: Sequence[_Test], learned: Sequence[_Test]) -> Iterator[str]:
    if maximum.diverged_at_lr == math.inf and maximum.low.kind == "linear":
        yield (
            "The test ended before it diverged: the maximum is a lower bound. More steps or a higher rate would show "
            "how far the learning rate can go."
        )
    if maximum.high_lr > DISAGREEMENT * maximum.low_lr:
        yield (
            f"The tests disagree by a factor of {maximum.high_lr / maximum.low_lr:.0f} on where the drop is made "
            f"({maximum.names}): the maximum is uncertain by about its square root. Rates closer together would help."
        )
    for test in readable:
        if not test.descended:
            how = "diverged before it fell" if test.end is not None else "stayed flat"
            yield f"{test.name} {how}: it sets no learning rate."
        elif test not in learned:
            yield f"{test.name} made less than {LEARNED:.0%} of the deepest drop: it sets no learning rate."
    if maximum.low_lr < 2 * maximum.low.lrs[0]:
        yield (
            f"{maximum.low.name} made its drop near its first learning rate, {maximum.low.lrs[0]:.2g}: start "
            "the test lower to see where descent begins."
        )


# -- refusals ------------------------------------------------------------------------------------------


def _refuse_unread(tests: Sequence[_Test], train_steps: int) -> Refusal | None:
    if train_steps < 2:
        reason = f"A training run of {train_steps} steps has no room for a cycle."
        return Refusal(reason, "Plan for at least 2 steps, one up and one down.")
    if not tests:
        reason = "The record has no range test; runs at a fixed learning rate show nothing about others."
        return Refusal(reason, "Run a range test, best at several rates, such as 5, 50 and 500.")
    if bad := [test for test in tests if not all(0 < lr < math.inf for lr in test.lrs)]:
        reason = f"The record of {bad[0].name} has a learning rate that is not a positive number."
        return Refusal(reason, "Run the range test with lr_range_test_min_lr above 0.")
    first = [test.losses[0] if test.losses else 0.0 for test in tests]
    if not any(map(math.isfinite, first)):
        reason = f"The first loss is {first[0]}, before any step was taken: no learning rate is the cause."
        remedy = "Look for bad values in the data, the initial weights or the loss function, then test again."
        return Refusal(reason, remedy)
    return None


def _refuse_no_descent(readable: Sequence[_Test], notes: tuple[str, ...]) -> Refusal:
    lowest, highest = min(test.lrs[0] for test in readable), max(max(test.lrs) for test in readable)
    what = "The loss does not fall by more than its batch noise"
    at = min(test.diverged_at_lr for test in readable)
    if at == math.inf:
        remedy = (
            "Let the test end higher (rate, lr_range_test_min_lr) or last longer; if the curve stays flat, check that "
            "gradients reach the parameters and that the model is not already trained."
        )
        return Refusal(f"{what} between learning rates {lowest:.2g} and {highest:.2g}.", remedy, notes)
    remedy = f"Start lower, for example with lr_range_test_min_lr {lowest / 100:.1g}, or use a lower rate."
    # The highest learning rate at which a loss was no higher than its first: far from the start, it stayed flat.
    held = max(lr for test in readable for loss, lr in zip(test.losses, test.lrs) if loss <= test.losses[0])
    if held > FAR * lowest or any(test.end is None for test in readable):
        remedy = (
            "Use more steps, or a rate in between, so that the loss has time to fall. A model that is already "
            "trained stays flat: redline tune compares the ends of short trainings instead."
        )
    return Refusal(f"{what} from {lowest:.2g} on, where the tests start, and diverges at {at:.2g}.", remedy, notes)
