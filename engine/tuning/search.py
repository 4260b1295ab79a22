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

__all__ = ["Outcome", "Peak", "Room", "divide_search", "find_peak", "lengthened", "next_trial", "spread_of"]

LEAST_STEPS = 10  # of the first trials, if longer ones are to follow: the order of shorter ones says too little
MOST_TRIALS = 8  # of one length
IN_FULL = 0.25  # trainings that the shorter trials get before any is made in full
WIDE, NARROW = 4.0, 2.0  # the factor between the first, short trials, and between longer ones
WIDE_TRIALS, NARROW_TRIALS = 5, 3  # how many of each a budget is divided for
FEW_TRIALS = 4  # ... where no longer ones follow the first, and these are to show what is learned by heart
GROWTH = 4  # how many times longer the next trials are, as far as is known beforehand ...
LEAST_GROWTH = 2  # ... and at least, when the first ones are made
# For the following, what trainings at the answer lose against the best peak was compared on small tasks, on 15 at first
# and on 33 later, at budgets of 5% to 100%. To smooth losses over neighbors and to follow how the optimum moves from
# one length to the next won on tables of trials, and lost in real searches.
LONGER = 0.2  # in a longer training the best peak falls by this power; 0.32 in https://arxiv.org/abs/2409.19913 ...
MOST_LONGER = 20.0  # ... of its length, up to so many times that of the trial, of LEAST_STEPS or more
# At budgets of 100 steps, 30, 50 and 100% this takes the answers from 10, 11, 10 and 8% above the best of the grid, in
# the mean over the tasks, to 7, 6, 7 and 5%. What shorter trials say is as often too low as too high.
HEAVY = 0.75  # heavy-ball momentum becomes unstable late: what short trials say is too high by this factor (0.6 to 1)
LIKE_BEST = 0.05  # of the rise to the next lower trial: what is above the best by less is as good (up to 0.1 is alike)
# Where the best of the first trials is the highest one tried as the budget ends, the next may be better or diverge, and
# nobody knows which: the answer is half a step lower. At a budget of 30% it takes the digits from 72% above the best of
# the grid to 5%, at 10 and 100% it changes nothing; for longer trials it loses 1%, since shorter ones went further.
UNSEEN = 0.5
# What a model learns by heart grows with the learning rates of all passes over its data, so that the best peak of a
# training that overfits falls as their number grows: for 46 epochs it is 46 times below that of a trial of one. A trial
# shows it: of how far the loss on its own batches fell, this part or more is missing in the validation loss. On
# tasks of 16 to 100 epochs it is 0.3 to 1 where the training overfits, and -0.1 to 0.2 where it does not. For a smaller
# part the peak falls by a power in proportion, to which that of the length adds. At a budget of a tenth, two tasks that
# overfit go from 71 and 54% above the best of the grid to 3 and 0%.
BY_HEART = 0.3
# A rise above the best of the first trials that is less than this part of the one below it is none to stop at. At a
# budget of 30% it takes the painting from 45% above the best of the grid to 7%.
SLIGHT = 0.1
# Where no trial moves the loss by more than so many times the noise of the quietest one, all rates are too low to say
# more. At a budget of a tenth it takes the noisy digits from 18% above the best of the grid to 6%.
FLAT = 4.0
NOISES = 2.0  # losses that differ by less than so many times their noise are alike
STEEP = 4.0  # a neighbor of the best counts as no more than so many times as far above it as the other one


class Outcome(NamedTuple):
    """What a short training came to."""

    lr: float  # its highest
    steps: int  # planned, so that trials that diverged are among those of their length
    loss: float  # at the end; inf if it diverged
    noise: float = 0.0  # standard error of that loss, from the training losses of the later half
    paired: float = 0.0  # the same of its difference from the next lower rate, which has seen the same batches
    seed: int = 0  # of the order of the data
    carried: float | None = None  # of how far its loss on its own batches fell, how far the validation loss did
    initial: float = math.inf  # the validation loss of the weights that it began with; inf if unknown


class Room(NamedTuple):
    """The optimizer steps that are left for trials, and what they are for."""

    left: float
    kept: float = 0.0  # of these, for trainings in full
    overhead: float = 0.0  # what a trial costs besides its own: its validation

    def holds(self, steps: int, planned: int) -> bool:
        """Whether a trial of `steps` is affordable, of `planned` in full."""
        return steps + self.overhead <= self.left - (self.kept if steps < planned else 0)


def divide_search(steps: float, planned: int, overhead: float = 0.0, *, few: bool = False) -> tuple[int, Room]:
    """The length of the first trials that `steps` are enough for, and the room for all; `overhead` as of a room's.

    `few` and longer ones are made of little room, rather than more.

    >>> divide_search(30, 300)[0], divide_search(300, 4000)[0], divide_search(6000, 3000)
    (6, 17, (176, Room(left=6000, kept=3000.0, overhead=0.0)))
    """
    in_full = planned + overhead
    kept = max(0, math.floor(steps / in_full - IN_FULL)) * in_full
    left = steps - kept
    wide, narrow = WIDE_TRIALS, NARROW_TRIALS * GROWTH
    short = min((left - (WIDE_TRIALS + NARROW_TRIALS) * overhead) // (wide + narrow), planned // GROWTH)
    if short < LEAST_STEPS:  # no longer ones will follow
        short = min(planned, max(1, left // (FEW_TRIALS if few else wide) - math.ceil(overhead)))
    return int(short), Room(steps, kept, overhead)


def next_trial(
    trials: Sequence[Outcome],
    first: float,
    short: int,
    planned: int,
    room: Room,
    momentum: float = 0.0,
    epoch: float | None = None,
) -> tuple[float, int, int] | None:
    """Learning rate, steps and seed of the next trial; None where the best ones are known or there is no more room.

    The first trials have `short` steps. `epoch` are the steps in which a training that sees its data many times sees
    all of it once; None for another.

    >>> next_trial([], 0.1, 10, 300, Room(30)), next_trial([Outcome(0.1, 10, 0.8)], 0.1, 10, 300, Room(20))
    ((0.1, 10, 0), (0.4, 10, 0))
    """
    steps, factor, upwards = short, WIDE, True
    while True:
        made = _means(trials, steps)
        lr: float | None = _round(first)
        if made:
            # Where a longer training ends above a shorter one, even the lowest rate is far too high for it. At a budget
            # of 300% this takes the noisy digits from 13% above the best of the grid to 1% below.
            too_high = min(one.loss for one in made) > _lowest_below(trials, steps)
            lr = _outward(made, WIDE if too_high else factor, upwards=upwards and not too_high)
        if lr is not None and len(made) < MOST_TRIALS and room.holds(steps, planned):
            return lr, steps, 0
        if not made:
            return None
        longer = _longer(trials, steps, planned, room)
        if longer is None:
            break
        best = min(made, key=lambda one: one.loss)
        # A longer training likes lower rates more often than higher ones, but where nothing higher was tried.
        upwards, factor = len(made) > 1 and best is made[-1], NARROW
        first = best.lr * _shift(steps, longer, momentum) * lengthened(best, longer, epoch, power=0.0)
        steps = longer
    # The same again with the data in another order, the best one first.
    again = {one.lr for one in trials if one.steps == steps and one.seed}
    for one in sorted(made, key=lambda one: one.loss)[:2]:
        if one.lr not in again and room.holds(steps, planned):
            return one.lr, steps, 1
    return None


def _longer(trials: Sequence[Outcome], steps: int, planned: int, room: Room) -> int | None:
    """The length of the trials after those of `steps`, for which what is left is enough; None if there are none."""
    longer = [one.steps for one in trials if one.steps > steps]
    if longer or steps == planned:
        return min(longer, default=None)
    narrow = math.floor((room.left - room.kept) / NARROW_TRIALS - room.overhead)
    is_first = steps == min(one.steps for one in trials)
    if is_first and narrow >= LEAST_GROWTH * steps:
        return narrow
    return planned if room.kept else None


def _lowest_below(trials: Sequence[Outcome], steps: int) -> float:
    """The lowest loss of shorter trials, with its noise; inf without any."""
    return min((one.loss + NOISES * one.noise for one in trials if one.steps < steps), default=math.inf)


def _outward(made: Sequence[Outcome], factor: float, *, upwards: bool) -> float | None:
    """A rate beyond the best one where that is at an edge, else None; of one alone, upwards or downwards first.

    Above the highest rate that is hardly worse nobody knows what comes: only a clear rise ends the search there. Below
    the lowest one lies none at all, which leaves the initial loss: where that is the best, the search goes down.
    """
    ordered = sorted(made)
    best = min(ordered, key=lambda one: (one.loss, one.lr))
    lower, higher = _round(ordered[0].lr / factor), _round(ordered[-1].lr * factor)
    if max(abs(one.initial - one.loss) for one in ordered) <= FLAT * min(one.noise for one in ordered):
        return higher  # nothing is learned at all
    if len(ordered) == 1:
        return higher if upwards and math.isfinite(best.loss) else lower
    if best.loss >= best.initial:
        return lower
    below = [one for one in ordered[: ordered.index(best)] if math.isfinite(one.loss)]
    slight = SLIGHT * (below[-1].loss - best.loss) if below and factor == WIDE else 0.0
    if math.isfinite(best.loss) and ordered[-1].loss <= best.loss + slight:
        return higher
    return lower if best is ordered[0] else None


def _means(trials: Sequence[Outcome], steps: int) -> list[Outcome]:
    """The trials of a length, from the lowest rate up; those at one rate as their mean."""
    found: dict[float, list[Outcome]] = {}
    for one in trials:
        if one.steps == steps:
            found.setdefault(one.lr, []).append(one)
    return [
        same[0]._replace(
            loss=_mean([one.loss for one in same]),
            noise=max(one.noise for one in same),
            paired=max(one.paired for one in same),
            seed=0,
        )
        for _, same in sorted(found.items())
    ]


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
    """By which factor the best peak of a longer training differs, since heavy-ball momentum is built up in it."""

    def built_up(length: int) -> float:
        """The mean step of heavy-ball momentum over a training, as a fraction of its final one."""
        total = momentum * (1 - math.pow(momentum, length)) / (1 - momentum)
        return 1 - total / length

    return built_up(steps) / built_up(longer)


def lengthened(best: Outcome, longer: int, epoch: float | None, power: float = LONGER) -> float:
    """By which factor the best peak falls in a longer training, at least by a power of its length.

    With `epoch`, of a training that sees its data many times, it is the number of passes that counts, and by how much
    it learns its data by heart.
    """
    if epoch is None:
        return math.pow(min(MOST_LONGER, longer / best.steps), -power) if best.steps >= LEAST_STEPS else 1.0
    passes = max(longer, epoch) / max(best.steps, epoch)  # what a trial of less than an epoch sees, it sees once
    by_heart = 0.0 if best.carried is None else max(0.0, 1 - best.carried)
    return math.pow(passes, -min(1.0, power + by_heart / BY_HEART))


def _round(lr: float) -> float:
    return float(f"{lr:.3g}")


class Peak(NamedTuple):
    """What the trials answer."""

    lr: float  # for the whole training
    best: float  # the rate at which the longest trials ended lowest
    low: float  # the lower end of what is as good as that, within noise
    steps: int  # of the longest trials
    is_own: bool = False  # it is the config's own
    repeated: bool = False  # it is lower than the trials', since the training sees its data more often
    unseen: bool = False  # it is lower than the best one, above which nothing was tried


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
    best = min(sound, key=lambda one: one.loss)
    if steps >= planned:  # these are what is asked for; the best one's weights are kept
        return Peak(best.lr, best.lr, best.lr, steps, own is not None and best.lr == _round(own))
    spread = spread_of(trials)
    low = _lower_end(sound, best, best.paired if spread is None else spread)
    lr = (
        math.sqrt(low * _vertex(sound, best))
        * _shift(steps, planned, momentum)
        * (HEAVY if momentum and steps < planned else 1.0)
    )
    unseen = best is made[-1] and len(sound) > 1 and len(lengths) == 1
    if unseen:
        lr *= math.pow(sound[-2].lr / best.lr, UNSEEN)
    factor = lengthened(best, planned, epoch)
    if own is not None:
        # Above the best one no rate is as good as that, but for the own: it needs a reason to be left, and not only
        # that the training is longer.
        highest = best.lr * lengthened(best, planned, epoch, power=0.0)
        if lr * factor <= own <= highest or (own > highest == best.lr and _is_tied(own, best, sound)):
            return Peak(own, best.lr, low, steps, True)
    return Peak(_round2(lr * factor), best.lr, low, steps, repeated=epoch is not None and factor < 1, unseen=unseen)


def _is_tied(own: float, best: Outcome, sound: Sequence[Outcome]) -> bool:
    """Whether the config's own rate was tried and ended as low as the best one within noise."""
    return any(one.lr == _round(own) and one.loss - best.loss <= best.noise for one in sound)


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
