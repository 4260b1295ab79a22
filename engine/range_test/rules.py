"""Rules that read a learning rate from one range test: other tools' and the literature's, beside the project's own.

No rule is best everywhere, and their spread tells how sure one may be; so a report draws each by its name. The
project's own answer is `analysis.suggest`, which reads several tests at once. Pure functions of numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from engine.range_test.curve import Curve, Kind
from engine.range_test.divergence import divergence
from engine.range_test.smoothing import SMOOTHING, ema

__all__ = ["RULES", "Mark", "marks"]

RULES = ("steepest", "valley", "minimum / 10", "last stable")
MINIMUM_FACTOR = 10.0
STABLE = 0.1  # a loss that has given back this share of its drop is no longer stable


@dataclass(frozen=True, slots=True)
class Mark:
    """One rule's answer on one range test.

    Attributes:
        rule: its name, one of `RULES`.
        lr: learning rate; None where the rule has no answer.
        why: one sentence with its figures.
        curve: name of the test that it read.
    """

    rule: str
    lr: float | None
    why: str
    curve: str


def marks(curves: Sequence[Curve], *, beta: float = SMOOTHING) -> tuple[Mark, ...]:
    """What each rule says of the test that is widest in learning rates: an exponential one, where there is one.

    The rules were made for tests that grow by equal factors and reach divergence; on a linear test they are drawn, too,
    and say less.

    Args:
        curves: of one or several tests; of several seeds the first is read.
        beta: weight of the past in the bias-corrected moving average of the losses, in [0, 1).
    """
    taken = [curve.taken() for curve in curves if curve.is_test]
    tests = [curve for curve in taken if len(curve.losses) >= 3 and min(curve.lrs) > 0]
    if not tests:
        return ()
    preferred: Kind = "exponential" if any(curve.kind == "exponential" for curve in tests) else "linear"
    curve = max((c for c in tests if c.kind == preferred), key=lambda c: (max(c.lrs) / min(c.lrs), -c.seed))
    end = divergence(curve.losses)
    stop = len(curve.losses) if end is None else end + 1
    lrs, losses = curve.lrs[:stop], ema(curve.losses[:stop], beta)
    known = [(lr, loss) for lr, loss in zip(lrs, losses) if math.isfinite(loss)]
    if len(known) < 3 or min(loss for _, loss in known[1:]) >= known[0][1]:
        why = f"The smoothed loss of {curve.name} never falls below its first value."
        return tuple(Mark(rule, None, why, curve.name) for rule in RULES)
    if known[-1][0] <= known[0][0]:  # a staircase that ended on its first stair
        why = f"The learning rate of {curve.name} never grows."
        return tuple(Mark(rule, None, why, curve.name) for rule in RULES)
    lrs, losses = tuple(lr for lr, _ in known), [loss for _, loss in known]
    found = (_steepest(lrs, losses), _valley(lrs, losses), _minimum(lrs, losses), _last_stable(lrs, losses))
    return tuple(Mark(rule, lr, why, curve.name) for rule, (lr, why) in zip(RULES, found))


def _steepest(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """Where the loss falls fastest with the logarithm of the LR, as pytorch-lr-finder has it."""
    logs = [math.log(lr) for lr in lrs]
    inner = [k for k in range(1, len(lrs) - 1) if logs[k + 1] > logs[k - 1]]  # a staircase repeats its LRs
    slopes = {k: (losses[k + 1] - losses[k - 1]) / (logs[k + 1] - logs[k - 1]) for k in inner}
    k = min(slopes, key=slopes.__getitem__)
    return lrs[k], f"The smoothed loss falls fastest at {lrs[k]:.2g}: by {-slopes[k] * math.log(2):.2g} a doubling."


def _valley(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    """The middle of the longest descent, as in fastai's default."""
    first, last = _longest_descent(losses)
    k = first + (last - first) // 2
    return lrs[k], f"The middle of the longest descent, from {lrs[first]:.2g} to {lrs[last]:.2g}."


def _longest_descent(losses: Sequence[float]) -> tuple[int, int]:
    """Ends of the longest strictly falling subsequence, by patience sorting.

    >>> _longest_descent([5.0, 6.0, 4.0, 4.5, 3.0, 9.0])  # 6, 4.5, 3
    (1, 4)
    """
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
    return first, last


def _minimum(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    k = min(range(len(losses)), key=losses.__getitem__)
    return lrs[k] / MINIMUM_FACTOR, f"A tenth of {lrs[k]:.2g}, where the smoothed loss is lowest."


def _last_stable(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, str]:
    low = min(range(len(losses)), key=losses.__getitem__)
    limit = losses[low] + STABLE * (losses[0] - losses[low])
    k = max(index for index in range(low, len(losses)) if all(loss <= limit for loss in losses[low : index + 1]))
    return lrs[k], f"Up to {lrs[k]:.2g} the smoothed loss stays within {STABLE:.0%} of its drop above its lowest."
