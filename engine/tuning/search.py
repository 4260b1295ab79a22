"""The search for the peak learning rate: which short training to make next, and what they all say. Pure numbers.

Each trial is a training in small: the schedule of the long one, a linear decay after 2% of warm-up, in a few steps,
from the same weights. The first one has the config's own learning rate. The next ones move by a factor until the best
one lies between two that are worse, upwards and downwards alike. Where the budget allows, longer trials then do the
same with a smaller factor around the best one; with a budget of several trainings the longest are trainings in full.

The peak is chosen by comparing losses of trials of one length. So a constant added to the loss changes nothing, and
with an optimizer that scales its own steps a factor does not either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Outcome", "Peak", "count_in_full", "divide_search", "find_peak", "next_trial", "spread_of"]

LEAST_STEPS = 10  # of the first trials, if longer ones are to follow: the order of shorter ones says too little
MOST_TRIALS = 8  # of one length
IN_FULL = 0.5  # trainings that the shorter trials get before any is made in full
WIDE, NARROW = 4.0, 2.0  # the factor between the first, short trials, and between longer ones
WIDE_TRIALS, NARROW_TRIALS = 5, 3  # how many of each a budget is divided for
GROWTH = 4  # how many times longer the next trials are
# For the following, what trainings at the answer lose against the best peak was compared on fifteen small tasks, at
# budgets of 5% to 100%. To lower all answers by a power of the length, as longer trainings often want, loses three
# times as much in the median (0.2, at 10%): with Adam the best of short trials is as often too low as too high.
# To smooth losses over neighbors and to follow how the optimum moves from one length to the next won on tables of
# trials, but in real searches it ended 13 and 15% above the best in the mean at 10 and 30%; this ends at 11 and 10%.
REACH = 130.0  # the answer holds for a training of up to this many times the steps of a trial; beyond, ...
LONGER = 0.3  # ... the peak falls by this power of the excess: 0.32 in https://arxiv.org/abs/2409.19913
HEAVY = 0.75  # heavy-ball momentum becomes unstable late: what short trials say is too high by this factor (0.6 to 1)
LIKE_BEST = 0.05  # of the rise to the next lower trial: what is above the best by less is as good (up to 0.1 is alike)
# Where the best of the first trials is the highest one tried as the budget ends, the next may be better or diverge, and
# nobody knows which: the answer is half a step lower. At a budget of 30% it takes the digits from 72% above the best of
# the grid to 5%, at 10 and 100% it changes nothing; for longer trials it loses 1%, since shorter ones went further.
UNSEEN = 0.5
# A training overfits as soon as it sees data again: a trial shows it by then at the earliest. At a budget of 100% this
# takes the development task that overfits from 57% above the best of the grid to 1%, and changes no other.
OVERFITS_FROM = 2.0  # epochs
NOISES = 2.0  # losses that differ by less than so many times their noise are alike
STEEP = 4.0  # a neighbor of the best counts as no more than so many times as far above it as the other one


class Outcome(NamedTuple):
    """What a short training came to."""

    lr: float  # its highest
    steps: int  # planned, so that trials that diverged are among those of their length
    loss: float  # at the end; inf if it diverged
    noise: float = 0.0  # standard error of that loss, from the training losses of the later half
    seed: int = 0  # of the order of the data
    training: float = 0.0  # the mean of its last training losses
    initial: float = math.inf  # the validation loss of the weights that it began with; inf if unknown


def divide_search(steps: int, planned: int) -> tuple[int, ...]:
    """The lengths of the trials that `steps` are enough for, from the shortest to the longest.

    >>> divide_search(30, 300), divide_search(300, 4000), divide_search(6000, 3000)
    ((6,), (17, 68), (176, 704, 3000))
    """
    in_full = count_in_full(steps, planned)
    steps -= in_full * planned
    short = min(steps // (WIDE_TRIALS + NARROW_TRIALS * GROWTH), planned // GROWTH)
    found = (short, GROWTH * short) if short >= LEAST_STEPS else (min(planned, max(1, steps // WIDE_TRIALS)),)
    return (*found, planned) if in_full else found


def count_in_full(steps: int, planned: int) -> int:
    """How many trainings in full `steps` are enough for, beside the shorter trials."""
    return max(0, math.floor(steps / planned - IN_FULL))


def next_trial(
    trials: Sequence[Outcome],
    first: float,
    lengths: Sequence[int],
    momentum: float = 0.0,
    epoch: float | None = None,
    shortest: int = 0,
) -> tuple[float, int, int] | None:
    """Learning rate, steps and seed of the next trial; None where the best ones are known.

    `epoch` are the steps in which a trial sees all data; None if it is unknown. There is no time any more for trials of
    fewer than `shortest` steps.

    >>> next_trial([], 0.1, [10]), next_trial([Outcome(0.1, 10, 0.8), Outcome(0.4, 10, 0.9)], 0.1, [10])
    ((0.1, 10, 0), (0.025, 10, 0))
    """
    upwards = True
    for steps in lengths:
        made = _means(trials, steps)
        if not made and steps < shortest:
            continue
        if not made:
            return _round(first), steps, 0
        # Where a longer training ends above a shorter one, even the lowest rate is far too high for it. At a budget of
        # 300% this takes the noisy digits from 13% above the best of the grid to 1% below.
        too_high = min(one.loss for one in made) > _lowest_below(trials, steps)
        factor = WIDE if too_high or steps == lengths[0] else NARROW
        lr = _outward(made, factor, upwards=upwards and not too_high)
        if lr is not None and len(made) < MOST_TRIALS and steps >= shortest:
            return lr, steps, 0
        best = min(made, key=lambda one: one.loss).lr
        # A longer training likes lower rates more often than higher ones, but where nothing higher was tried.
        upwards = len(made) > 1 and best == made[-1].lr
        longer = next((each for each in lengths if each > steps), steps)
        first = best * _shift(steps, longer, momentum) * _overfitting(trials, longer, epoch)
    # The same again with the data in another order, the best one first.
    again = {one.lr for one in trials if one.steps == lengths[-1] and one.seed}
    for one in sorted(made, key=lambda one: one.loss)[:2]:
        if one.lr not in again:
            return one.lr, lengths[-1], 1
    return None


def _lowest_below(trials: Sequence[Outcome], steps: int) -> float:
    """The lowest loss of shorter trials, with its noise; inf without any."""
    return min((one.loss + NOISES * one.noise for one in trials if one.steps < steps), default=math.inf)


def _outward(made: Sequence[Outcome], factor: float, *, upwards: bool) -> float | None:
    """A rate beyond the best one where that is at an edge, else None; of one alone, upwards or downwards first.

    Below the lowest rate lies none at all, which leaves the initial loss: where that is the best, the search goes down.
    """
    ordered = sorted(made)
    best = min(ordered, key=lambda one: (one.loss, one.lr))
    lower, higher = _round(ordered[0].lr / factor), _round(best.lr * factor)
    if len(ordered) == 1:
        return higher if upwards and math.isfinite(best.loss) else lower
    if best.loss >= best.initial:
        return lower
    if best is ordered[-1] and math.isfinite(best.loss):
        return higher
    return lower if best is ordered[0] else None


def _means(trials: Sequence[Outcome], steps: int) -> list[Outcome]:
    """The trials of a length, from the lowest rate up; those at one rate as their mean."""
    found: dict[float, list[Outcome]] = {}
    for one in trials:
        if one.steps == steps:
            found.setdefault(one.lr, []).append(one)
    return [
        Outcome(
            lr, steps, _mean([one.loss for one in same]), max(one.noise for one in same),
            training=_mean([one.training for one in same]), initial=same[0].initial,
        )
        for lr, same in sorted(found.items())
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread_of(trials: Sequence[Outcome]) -> float | None:
    """The standard deviation of a loss over two orders of the data, of the best trial that was repeated; else None."""
    pairs = [
        (one.loss + other.loss, abs(one.loss - other.loss) / math.sqrt(2))
        for one in trials
        for other in trials
        if one.seed < other.seed and (one.lr, one.steps) == (other.lr, other.steps)
    ]
    return min((pair for pair in pairs if math.isfinite(pair[0])), default=(0.0, None))[1]


def _shift(steps: int, longer: int, momentum: float) -> float:
    """By which factor the best peak of a longer training differs."""

    def built_up(length: int) -> float:
        """The mean step of heavy-ball momentum over a training, as a fraction of its final one."""
        total = momentum * (1 - math.pow(momentum, length)) / (1 - momentum)
        return 1 - total / length

    return built_up(steps) / built_up(longer) / math.pow(max(1.0, longer / steps / REACH), LONGER)


def _overfitting(trials: Sequence[Outcome], planned: int, epoch: float | None) -> float:
    """By which factor the best peak of the longest trials is too high for a training of `planned` steps that overfits.

    It will where a trial above the best one ended with a lower training loss and a higher validation loss, after two
    epochs or more. What a model learns by heart grows with the sum of the learning rates, so that the peak falls as the
    length grows. 1 where nothing shows that.
    """
    longest = max((one.steps for one in trials if one.steps < planned), default=planned)
    sound = [one for one in _means(trials, longest) if math.isfinite(one.loss)]
    if epoch is None or longest < OVERFITS_FROM * epoch or longest == planned or not sound:
        return 1.0
    best = min(sound, key=lambda one: one.loss)
    for one in sound:
        margin = NOISES * (best.noise + one.noise)
        if one.lr > best.lr and one.loss > best.loss + margin and one.training < best.training - margin:
            return longest / planned
    return 1.0


def _round(lr: float) -> float:
    return float(f"{lr:.3g}")


class Peak(NamedTuple):
    """What the trials answer."""

    lr: float  # for the whole training
    best: float  # the rate at which the longest trials ended lowest
    low: float  # the lower end of what is as good as that, within noise
    steps: int  # of the longest trials
    is_own: bool = False  # it is the config's own
    overfits: bool = False  # it is lower than the trials', since these show that the training would overfit


def find_peak(
    trials: Sequence[Outcome],
    planned: int,
    *,
    own: float | None = None,
    momentum: float = 0.0,
    epoch: float | None = None,
) -> Peak | None:
    """The peak for a training of `planned` steps; None if all trials diverged. `epoch` as of :func:`next_trial`."""
    lengths = sorted({one.steps for one in trials}, reverse=True)
    for steps in lengths:
        made = _means(trials, steps)
        sound = [one for one in made if math.isfinite(one.loss)]
        if sound and (len(made) > 1 or steps == lengths[-1] or steps == planned):
            break
    else:
        return None
    noise = spread_of(trials)
    best = min(sound, key=lambda one: one.loss)
    if steps >= planned:  # these are what is asked for; the best one's weights are kept
        return Peak(best.lr, best.lr, best.lr, steps, own == best.lr)
    low = _lower_end(sound, best, best.noise if noise is None else noise)
    lr = (
        math.sqrt(low * _vertex(sound, best))
        * _shift(steps, planned, momentum)
        * (HEAVY if momentum and steps < planned else 1.0)
    )
    overfitting = _overfitting(trials, planned, epoch)
    if steps < planned and overfitting < 1:
        return Peak(_round2(best.lr * overfitting), best.lr, low, steps, overfits=True)
    if best is made[-1] and len(sound) > 1 and len(lengths) == 1:
        lr *= math.pow(sound[-2].lr / best.lr, UNSEEN)
    if own is not None and lr <= own <= best.lr:
        return Peak(own, best.lr, low, steps, True)
    return Peak(_round2(lr), best.lr, low, steps)


def _vertex(sound: Sequence[Outcome], best: Outcome) -> float:
    """Where the parabola through the best trial and its neighbors is lowest, but not above the best."""
    place = sound.index(best)
    if not 0 < place < len(sound) - 1:
        return best.lr
    lower, upper = sound[place - 1], sound[place + 1]
    down, up = math.log(best.lr / lower.lr), math.log(upper.lr / best.lr)
    # A neighbor that went far up says no more than that it is worse.
    left, right = lower.loss - best.loss, upper.loss - best.loss
    left, right = min(left, STEEP * right), min(right, STEEP * left)
    if left + right <= 0:
        return best.lr
    away = (left * up**2 - right * down**2) / (2 * (left * up + right * down))
    return best.lr * math.exp(min(0.0, away))


def _lower_end(sound: Sequence[Outcome], best: Outcome, noise: float) -> float:
    """The lowest rate whose loss is like the best one, between two trials interpolated over the logarithm."""
    below = [one for one in sound if one.lr <= best.lr]
    for lower, upper in zip(below[-2::-1], below[:0:-1]):
        margin = max(noise, LIKE_BEST * (lower.loss - best.loss))
        if lower.loss - best.loss > margin:
            rise = lower.loss - upper.loss
            share = min(1.0, max(0.0, (best.loss + margin - upper.loss) / rise)) if rise > 0 else 0.0
            return upper.lr * math.pow(lower.lr / upper.lr, share)
    return below[0].lr


def _round2(lr: float) -> float:
    return float(f"{lr:.2g}")
