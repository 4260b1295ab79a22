"""Where a schedule's peak lies, by short trainings: which peak to try next, and what the tries say. Pure numbers.

A range test tells the order of magnitude: its loss falls because training goes on, too, and a fast test does not stay
long enough at any rate to be thrown off by it. Short trainings say more for the same price: each of a hundredth of the
planned updates or so, from the same weights and the same batches, so that the difference between two of them is the
rate's. They are linear decays; but with heavy-ball momentum they hold their rate, since a decay would be over before
what is too high shows.

A short training wants a higher peak than a long one: it has little time to travel, and little time to be thrown off.
So the answer is the lowest peak that comes close to the best one, not the best one. What throws a short training off
throws a long one off earlier, and with heavy-ball momentum, which takes some 1 / (1 - momentum) updates to get under
way, much earlier: the answer keeps its distance.

The constants were fitted on the tasks of scripts/quality that are not kept aside, at 360 to 8,000 updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LEAST_UPDATES", "SURE", "Try", "find_peak", "for_long_training", "is_chance", "next_peak", "warmth"]

LEAST_UPDATES = 4  # of a try
FACTOR = 4.0  # between neighbouring tries, at first
CLOSE = 0.985  # a peak is as good as the best one for a short training that comes down by this share of the best
HELD = 1.75  # a schedule that comes down at the end bears so many times the rate of tries that hold theirs
GIVEN_BACK = 0.5  # a try that holds its rate was thrown off if it came down by less than this share of the best ...
CLEAR = 10.0  # ... where the best came down by so many times the batch noise, so that a share of it is no chance ...
CLIFF_MARGIN = 4.0  # ... and the answer stays this factor below
TOLD = 8  # updates of a try from which its own losses tell the batch noise
NEXT_TO_NOTHING = 0.5  # of the batch noise: less is no descent, where the tests saw none
REACH = 130.0  # the answer holds for trainings of up to so many times the updates of a try ...
LONGER = 0.3  # ... and falls by this power of how much longer they are: 0.32 in https://arxiv.org/abs/2409.19913
SURE = 2.0  # the best peak of a long training lies within this factor, most often


@dataclass(frozen=True, slots=True)
class Try:
    """A short training.

    Attributes:
        lr: its highest rate.
        loss: what it came to, counted from where it began, lower is better; inf where it diverged.
        noise: how far the loss of a batch is off by chance.
    """

    lr: float
    loss: float
    noise: float = 0.0


def next_peak(tries: Sequence[Try], first: float) -> float:
    """The peak to try next, so that the best one is between two that are worse.

    >>> next_peak([], 0.1), next_peak([Try(0.1, -0.8)], 0.1)
    (0.1, 0.025)
    >>> next_peak([Try(0.1, -0.8), Try(0.025, -0.5)], 0.1)
    0.4

    Args:
        tries: so far.
        first: what a range test suggests.
    """
    if not tries:
        return first
    ordered = sorted(tries, key=lambda one: one.lr)
    best = min(range(len(ordered)), key=lambda index: ordered[index].loss)
    if best == 0:
        return _rounded(ordered[0].lr / FACTOR)
    if best == len(ordered) - 1:
        return _rounded(ordered[-1].lr * FACTOR)
    # Half-way, in the logarithm, into the wider gap beside the best; of two alike into the more promising.
    peak = ordered[best].lr
    beside = (ordered[best - 1], ordered[best + 1])
    other = max(beside, key=lambda one: (round(abs(math.log(one.lr / peak)), 1), -one.loss))
    return _rounded(math.sqrt(peak * other.lr))


def find_peak(tries: Sequence[Try]) -> float | None:
    """The lowest peak at which a short training comes close to the best of them; None where none ended below its start.

    Between two tries the loss is taken for straight over the logarithm of the peak.

    >>> round(find_peak([Try(0.01, 0.0), Try(0.1, -1.0), Try(1.0, -0.5)]), 3)
    0.097

    Args:
        tries: two at least.
    """
    ordered = sorted(tries, key=lambda one: one.lr)
    losses = [min(0.0, one.loss) for one in ordered]
    goal = CLOSE * min(losses)
    if not goal < 0:
        return None
    last = losses.index(min(losses))
    while last > 0 and losses[last - 1] <= goal:
        last -= 1
    if last == 0:
        return ordered[0].lr
    share = (goal - losses[last - 1]) / (losses[last] - losses[last - 1])
    return math.exp((1 - share) * math.log(ordered[last - 1].lr) + share * math.log(ordered[last].lr))


def is_chance(tries: Sequence[Try], updates: int) -> bool:
    """Whether the best try came down by next to nothing, as trainings of a finished model do.

    Args:
        tries: at least one.
        updates: of each of them; those of short ones do not tell.
    """
    fall = -min(one.loss for one in tries)
    return updates >= TOLD and fall < NEXT_TO_NOTHING * min(one.noise for one in tries)


def warmth(updates: int, momentum: float) -> float:
    """How far heavy-ball momentum gets under way in so many updates: its mean step as a share of its last one.

    >>> warmth(10, 0.0), round(warmth(10, 0.9), 2), round(warmth(1000, 0.9), 2)
    (1.0, 0.41, 0.99)
    """
    lost: float = sum(momentum**k for k in range(1, updates + 1))
    return 1 - lost / updates


def for_long_training(peak: float, tries: Sequence[Try], updates: int, momentum: float, steps: int) -> float:
    """The peak for a long training, from what is best for a short one.

    Args:
        peak: what `find_peak` found.
        tries: where.
        updates: of each of them.
        momentum: of a heavy ball (SGD's), with which tries hold their rate; 0 for optimizers that correct for its
            start, as Adam does.
        steps: updates of the long training.
    """
    best = min(tries, key=lambda one: one.loss)
    is_clear = -best.loss > CLEAR * min(one.noise for one in tries)
    thrown_off = GIVEN_BACK * best.loss if momentum and is_clear else 0.0
    cliff = min((one.lr for one in tries if one.loss > thrown_off and one.lr > best.lr), default=math.inf)
    highest = cliff * warmth(updates, momentum) / CLIFF_MARGIN
    longer = max(1.0, steps / (REACH * updates))
    return min(peak * (HELD if momentum else 1.0), highest) / math.pow(longer, LONGER)


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
