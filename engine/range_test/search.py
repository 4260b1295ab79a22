"""Where a schedule's peak lies, by short trainings: which peak to try next, and what the tries say. Pure numbers.

A range test tells the order of magnitude: its loss falls because training goes on, too, and a fast test does not stay
long enough at any rate to be thrown off by it. Short trainings say more for the same price: each is a linear decay of a
hundredth of the planned updates or so, from the same weights and the same batches, so that the difference between two
of them is the rate's. What is best for so few updates is a little high for many, and with heavy-ball momentum more so,
since it takes some 1 / (1 - momentum) updates to get under way; both are corrected for.

The constants were fitted on the tasks of scripts/quality that are not kept aside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LEAST_UPDATES", "SURE", "Try", "find_peak", "for_long_training", "next_peak", "warmth"]

LEAST_UPDATES = 8  # of a try
FACTOR = 4.0  # between neighbouring tries, at first
SHORT_RUNS = 0.8  # what is best for a long training, as a share of what is best for a short one
MOMENTUM_POWER = 0.75  # how far the momentum that is not there yet counts
SURE = 2.0  # the best peak of a long training lies within this factor, most often


@dataclass(frozen=True, slots=True)
class Try:
    """A short training with a linear decay.

    Attributes:
        lr: its peak.
        losses: what it is judged by, lower is better: the validation loss at its end, the mean of its later training
            losses, or both; inf where it diverged.
    """

    lr: float
    losses: tuple[float, ...]


def next_peak(tries: Sequence[Try], first: float) -> float:
    """The peak to try next, so that the best one is between two that are worse.

    >>> next_peak([], 0.1), next_peak([Try(0.1, (2.0,))], 0.1)
    (0.1, 0.025)
    >>> next_peak([Try(0.1, (2.0,)), Try(0.025, (2.2,))], 0.1)
    0.4

    Args:
        tries: so far.
        first: what a range test suggests.
    """
    if not tries:
        return first
    ordered = sorted(tries, key=lambda one: one.lr)
    best = min(range(len(ordered)), key=lambda index: ordered[index].losses[0])
    if best == 0:
        return _rounded(ordered[0].lr / FACTOR)
    if best == len(ordered) - 1:
        return _rounded(ordered[-1].lr * FACTOR)
    # Half-way, in the logarithm, into the wider gap beside the best; of two alike into the more promising.
    peak = ordered[best].lr
    beside = (ordered[best - 1], ordered[best + 1])
    other = max(beside, key=lambda one: (round(abs(math.log(one.lr / peak)), 1), -one.losses[0]))
    return _rounded(math.sqrt(peak * other.lr))


def find_peak(tries: Sequence[Try], start: float) -> float | None:
    """The peak at which so short a training ends best, between the tries; None where every one ended above its start.

    A parabola through the best and its neighbours, over the logarithm of the peak, for each of the losses; of their
    answers the geometric mean.

    Args:
        tries: two at least.
        start: the loss that all of them started from.
    """
    answers = []
    for index in range(len(tries[0].losses)):
        points = sorted((math.log(one.lr), one.losses[index]) for one in tries)
        lowest = min(loss for _, loss in points)
        if not lowest < start:
            return None
        # How far a loss has gone past the start is chance; the parabola is to see that it has.
        cap = start + (start - lowest)
        answers.append(_vertex([(x, min(loss, cap)) for x, loss in points]))
    return math.exp(sum(answers) / len(answers))


def _vertex(points: Sequence[tuple[float, float]]) -> float:
    """Place of the lowest point of a parabola through the lowest one and its neighbours."""
    best = min(range(len(points)), key=lambda index: points[index][1])
    if not 0 < best < len(points) - 1:
        return points[best][0]
    (x0, y0), (x1, y1), (x2, y2) = points[best - 1 : best + 2]
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:
        return x1
    vertex = x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)
    return max((x0 + x1) / 2, min((x1 + x2) / 2, vertex))


def warmth(updates: int, momentum: float) -> float:
    """How far heavy-ball momentum gets under way in so many updates: its mean step as a share of its last one.

    >>> warmth(10, 0.0), round(warmth(10, 0.9), 2), round(warmth(1000, 0.9), 2)
    (1.0, 0.41, 0.99)
    """
    lost: float = sum(momentum**k for k in range(1, updates + 1))
    return 1 - lost / updates


def for_long_training(peak: float, updates: int, momentum: float) -> float:
    """The peak for a long training, from what is best for a short one.

    Args:
        peak: of tries of so many `updates`.
        updates: likewise.
        momentum: of a heavy ball (SGD's); 0 for optimizers that correct for its start, as Adam does.
    """
    lasting: float = warmth(updates, momentum) ** MOMENTUM_POWER
    return peak * SHORT_RUNS * lasting


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
