"""The search for the peak learning rate: which short training to make next, and what they all say. Pure numbers.

Each trial is the training in miniature: the schedule of the long one, a linear decay after 2% of warm-up, in a few
steps, from the same weights, on so small a part of the data that it sees that about as often as the training sees all
of it. So it shows what a model learns by heart. The first trial has the config's own learning rate. The next ones move
by a factor until the best one lies between two that are worse, upwards and downwards alike. With a budget of several
trainings the longest trials are trainings in full.

The peak is chosen by comparing losses of trials of one length. So a constant added to the loss changes nothing, and
with an optimizer that scales its own steps a factor does not either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Outcome", "Peak", "Room", "divide_search", "find_peak", "next_trial", "part_of", "spread_of"]

MOST_TRIALS = 8  # of one length
IN_FULL = 0.25  # trainings that the shorter trials get before any is made in full
WIDE, NARROW = 4.0, 2.0  # the factor between the trials, and between those next to the best one and trainings in full
TRIALS = 7  # that a budget is divided for: five that are wide apart and the two next to the best ...
FEW_TRIALS, LEAST_OF_MANY = 5, 24  # ... or the five alone, where seven would have fewer steps than this
# For the following, what trainings at the answer lose against the best peak was compared on small tasks, on 15 at first
# and on 49 in the end, at the default budget and at 100%. To smooth losses over neighbors, and trials of two lengths,
# of which the longer ones follow around the best of the shorter, won on tables of trials and lost in real searches.
#
# A trial sees no fewer steps of data than this before it sees them again: fewer batches say too little of all data.
# With the parts of a true miniature, of one or two batches, or with all data, the answers are further off.
LEAST_PART = 4
LONGER = 0.2  # in a longer training the best peak falls by this power; 0.32 in https://arxiv.org/abs/2409.19913 ...
MOST_LONGER = 20.0  # ... of its length, up to so many times that of the trial, ...
LEAST_STEPS = 10  # ... of so many steps or more: what shorter ones say is as often too low as too high
# What a model learns by heart grows with the learning rates of all passes over its data. Where the training makes more
# of them than the trial, the peak falls in proportion if this part or more of what the trial learned of its own batches
# is missing in the validation loss, and for a smaller part by a power in proportion. That part is 0 to 0.25 on clean
# data, 0.4 to 0.8 on noisy data, and 1 where next to nothing can be learned.
BY_HEART = 0.7
AS_OFTEN = 1.25  # times as many passes count as the same number, since a part has whole steps
LIKE_BEST = 0.05  # of the rise to the next lower trial: what is above the best by less is as good (up to 0.1 is alike)
# Where the best of the trials is the highest one tried as the budget ends, the next may be better or diverge, and
# nobody knows which: the answer is half a step lower. At a budget of 30% it takes the digits from 72% above the best of
# the grid to 5%, at 10 and 100% it changes nothing.
UNSEEN = 0.5
# A rise above the best trial that is less than this part of the one below it, or than noise, is none to stop at. At a
# budget of 30% it takes the painting from 45% above the best of the grid to 7%.
SLIGHT = 0.1
# Where no trial moves the loss by more than so many times the noise of the quietest one, all rates are too low to say
# more. At a budget of a tenth it takes the noisy digits from 18% above the best of the grid to 6%.
FLAT = 4.0
NOISES = 2.0  # losses that differ by less than so many times their noise are alike
THROWN_OFF = -1.0  # a loss that rose by as much as that on the trial's own batches fell
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
    passes: float = 1.0  # how often it saw its data, at least once


class Room(NamedTuple):
    """The optimizer steps that are left for trials, and what they are for."""

    left: float
    kept: float = 0.0  # of these, for trainings in full
    overhead: float = 0.0  # what a trial costs besides its own: its validation

    def holds(self, steps: int, planned: int) -> bool:
        """Whether a trial of `steps` is affordable, of `planned` in full."""
        return steps + self.overhead <= self.left - (self.kept if steps < planned else 0)


def divide_search(steps: float, planned: int, overhead: float = 0.0) -> tuple[int, Room]:
    """The length of the trials that `steps` are enough for, and the room for all; `overhead` as of a room's.

    >>> divide_search(60, 300)[0], divide_search(300, 4000)[0], divide_search(6000, 3000)
    (12, 42, (428, Room(left=6000, kept=3000.0, overhead=0.0)))
    """
    in_full = planned + overhead
    kept = max(0, math.floor(steps / in_full - IN_FULL)) * in_full

    def length(trials: int) -> int:
        return min(planned, max(1, math.floor((steps - kept) / trials - overhead)))

    short = length(TRIALS)
    return short if short >= LEAST_OF_MANY else length(FEW_TRIALS), Room(steps, kept, overhead)


def part_of(steps: int, planned: int, epoch: float | None) -> int | None:
    """The steps after which a trial sees its data again, as often as a training of `planned` steps; None for all data.

    `epoch` are the steps in which all data is seen once; None if unknown.

    >>> part_of(40, 400, 100.0), part_of(40, 400, 20.0), part_of(40, 400, None), part_of(40, 90, 100.0)
    (10, 4, None, None)
    """
    if epoch is None or planned <= epoch:
        return None
    part = max(LEAST_PART, math.ceil(epoch * steps / planned))
    return part if part < min(steps, epoch) else None


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

    Trials have `short` steps; those of `planned` are trainings in full. `epoch` as of :func:`part_of`.

    >>> next_trial([], 0.1, 10, 300, Room(30)), next_trial([Outcome(0.1, 10, 0.8)], 0.1, 10, 300, Room(20))
    ((0.1, 10, 0), (0.4, 10, 0))
    """
    steps, made = short, _means(trials, short)
    lr = _outward(made, WIDE, first) or _between(made) if made else _round(first)
    if lr is None or len(made) >= MOST_TRIALS or not room.holds(short, planned):
        lr, in_full = None, _means(trials, planned)
        if in_full or room.holds(planned, planned):
            steps, made, lr = planned, in_full, _next_in_full(trials, short, planned, momentum, epoch)
    if lr is not None and room.holds(steps, planned):
        return lr, steps, 0
    # The same again with the data in another order, the best one first.
    again = {one.lr for one in trials if one.steps == steps and one.seed}
    for one in sorted(made, key=lambda one: one.loss)[:2]:
        if one.lr not in again and room.holds(steps, planned):
            return one.lr, steps, 1
    return None


def _next_in_full(
    trials: Sequence[Outcome], short: int, planned: int, momentum: float, epoch: float | None
) -> float | None:
    """The learning rate of the next training in full: first the answer of the trials, then next to the best one."""
    peak = find_peak([one for one in trials if one.steps == short], planned, momentum=momentum, epoch=epoch)
    made = _means(trials, planned)
    if peak is None or len(made) >= MOST_TRIALS:
        return None
    if not made:
        return _round(peak.lr)
    # Where a training ends above a trial, even the lowest rate is far too high for it. At a budget of 300% this takes
    # the noisy digits from 13% above the best of the grid to 1% below.
    best = min(made, key=lambda one: one.loss)
    if best.loss > _lowest_below(trials, planned):
        return _round(best.lr / WIDE) if best is made[0] else None
    return _outward(made, NARROW, peak.lr, upwards=peak.unseen)


def _lowest_below(trials: Sequence[Outcome], steps: int) -> float:
    """The lowest loss of shorter trials, with its noise; inf without any."""
    return min((one.loss + NOISES * one.noise for one in trials if one.steps < steps), default=math.inf)


def _outward(made: Sequence[Outcome], factor: float, first: float, *, upwards: bool = True) -> float | None:
    """A rate beyond the best one where that is at an edge, else None; of one alone, upwards or downwards first.

    Above the highest rate that is hardly worse nobody knows what comes: only a clear rise ends the search there. Where
    no trial ends below the initial loss, it goes below `first`, which it began with, before it goes up.
    """
    best = min(made, key=lambda one: (one.loss, one.lr))
    lowest, highest = made[0], made[-1]
    lower, higher = _round(lowest.lr / factor), _round(highest.lr * factor)
    if max(abs(one.initial - one.loss) for one in made) <= FLAT * min(one.noise for one in made):
        return higher  # nothing is learned at all
    if len(made) == 1:
        return higher if upwards and math.isfinite(best.loss) else lower
    if best.loss >= best.initial and math.isfinite(best.loss):
        # The rates are too high, or so low that a few batches are all that was learned so far: that loss has hardly
        # risen, and higher ones follow, until they throw the weights off.
        if lowest.lr >= _round(first) or best.carried is None or best.carried <= THROWN_OFF:
            return lower
        if highest.carried is not None and highest.carried > THROWN_OFF:
            return higher
        return lower if best is lowest else None
    below = [one for one in made[: made.index(best)] if math.isfinite(one.loss)]
    slight = max(SLIGHT * (below[-1].loss - best.loss) if below else 0.0, NOISES * highest.paired)
    if math.isfinite(best.loss) and highest.loss <= best.loss + (slight if factor == WIDE else 0.0):
        return higher
    return lower if best is lowest else None


def _between(made: Sequence[Outcome]) -> float | None:
    """A rate between the best one and its neighbors, the lower one first, that was not tried; else None."""
    best = min(made, key=lambda one: one.loss)
    if not math.isfinite(best.loss):
        return None
    near = (_round(best.lr / NARROW), _round(best.lr * NARROW))
    return next((lr for lr in near if all(abs(math.log(lr / one.lr)) > math.log(NARROW) / 2 for one in made)), None)


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


def _memorizing(best: Outcome, planned: int, epoch: float | None) -> float:
    """By which factor the best peak falls in a training that sees its data more often than the trial."""
    passes = max(1.0, planned / epoch if epoch else 1.0) / best.passes
    if best.carried is None or passes < AS_OFTEN:
        return 1.0
    return math.pow(passes, -min(1.0, max(0.0, 1 - best.carried) / BY_HEART))


def _round(lr: float) -> float:
    return float(f"{lr:.3g}")


class Peak(NamedTuple):
    """What the trials answer."""

    lr: float  # for the whole training
    best: float  # the rate at which the longest trials ended lowest
    low: float  # the lower end of what is as good as that, within noise
    steps: int  # of the longest trials
    is_own: bool = False  # it is the config's own
    by_heart: bool = False  # it is lower than the trials', since the training sees its data more often
    unseen: bool = False  # it is lower than the best one, above which nothing was tried


def find_peak(
    trials: Sequence[Outcome],
    planned: int,
    *,
    own: float | None = None,
    momentum: float = 0.0,
    epoch: float | None = None,
) -> Peak | None:
    """The peak for a training of `planned` steps; None if all trials diverged. `epoch` as of :func:`part_of`."""
    for steps in sorted({one.steps for one in trials}, reverse=True):
        made = _means(trials, steps)
        sound = [one for one in made if math.isfinite(one.loss)]
        if sound:
            break
    else:
        return None
    best = min(sound, key=lambda one: one.loss)
    if steps >= planned:  # these are what is asked for; the best one's weights are kept
        return Peak(best.lr, best.lr, best.lr, steps, own is not None and best.lr == _round(own))
    spread = spread_of(trials)
    low = _lower_end(sound, best, best.paired if spread is None else spread)
    lr = math.sqrt(low * _vertex(sound, best)) * _shift(steps, planned, momentum)
    unseen = len(sound) > 1 and best.lr == max(one.lr for one in trials)
    if unseen:
        lr *= math.pow(sound[-2].lr / best.lr, UNSEEN)
    memorizing = _memorizing(best, planned, epoch)
    longer = min(MOST_LONGER, planned / steps) if steps >= LEAST_STEPS else 1.0
    lr *= memorizing * math.pow(longer, -LONGER)
    if own is not None:
        # Above the best one no rate is as good as that, but for the own: it needs a reason to be left, and not only
        # that the training is longer.
        highest = best.lr * memorizing
        if lr <= own <= highest or (own > highest == best.lr and _is_tied(own, best, sound)):
            return Peak(own, best.lr, low, steps, True)
    return Peak(_round2(lr), best.lr, low, steps, by_heart=memorizing < 0.95, unseen=unseen)


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
