"""How a tuning spends its updates: pure numbers in, a plan with its reasons out.

The budget is counted in updates of the config's own batch size. An update of a batch eight times as large costs eight,
one of a smaller batch costs one. What a stage does not use, because it ends at its divergence, the next ones have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.errors import RangeTestError
from engine.range_test.analysis import LEAST_SWEEP, MIN_UPDATES
from engine.range_test.search import LEAST_UPDATES

__all__ = ["MAX_UPDATES", "Plan", "Request", "cost_of", "make_plan", "share_out_trials", "total_of"]

# How the budget is shared. All of it is here: change it here.
MAX_UPDATES = 1000  # of one tuning, unless more is asked for: 2% of a training of 50,000
ASKED_SHARE = 0.5  # of the whole, for other batch sizes and settings, where such are asked for
SWEEP_SHARE = 0.15  # of the rest: the coarse sweep ...
SWEEP_ALONE = 0.25  # ... or this, where there is no room for linear tests
SLOW_SHARE = 0.12  # ... the slow linear test ...
FAST_SHARE = 0.06  # ... and the fast one, which ends at its divergence
SEARCH_SHARE = 0.38  # ... the search for the peak, in `TRIES` short trainings; the trials have what is left ...
SEARCH_ALONE = 0.75  # ... or this, where there is no room for trials either
TRIES = 5
ROOM_FOR_ALL = 300  # updates from which all stages have room
LEAST_SLOW = 40  # likewise, and the analysis wants at least 20 of each linear test
LEAST_FAST = 20
LEAST_TRIAL = 20  # a shorter trial says nothing of a schedule
MOST_TEST = 300  # a longer test says no more
LEAST_TRY = LEAST_UPDATES
MOST_TRY = 100  # likewise
TRIAL_MULTIPLE = 10  # a trial's length is a multiple of it, so that its last validation is at its end


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a tuning.

    Attributes:
        steps: updates of the planned training.
        batch_size: samples of one of them.
        budget: share of them that the tuning may take.
        max_updates: the tuning's updates, at most.
        named_start: whether the config names the rate at which a range test starts; then there is no sweep.
        seeds: repetitions of the tests under other random numbers, the first one included.
        batch_sizes: others to test at.
        settings: (name, value) of settings to test with.
        validates: whether there is data for a validation loss.
    """

    steps: int
    batch_size: int
    budget: float = 0.1
    max_updates: int = MAX_UPDATES
    named_start: bool = False
    seeds: int = 1
    batch_sizes: tuple[int, ...] = ()
    settings: tuple[tuple[str, float], ...] = ()
    validates: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """How the budget is spent.

    Attributes:
        total: the budget, in updates.
        sweep: updates of the coarse exponential sweep; 0 for none.
        slow, fast: updates of the linear tests, of each seed; 0 for none.
        seeds: repetitions of the tests.
        batch_sizes: those that are tested.
        settings: those that are tested.
        asked: updates of each test at another batch size or setting.
        search: updates of each try of the search for the peak; 0 for none.
        trials: updates set aside for trials of schedules, which also have what the tests leave.
        left_out: what is not done, and why: a sentence each.
    """

    total: int
    sweep: int = 0
    slow: int = 0
    fast: int = 0
    seeds: int = 1
    batch_sizes: tuple[int, ...] = ()
    settings: tuple[tuple[str, float], ...] = ()
    asked: int = 0
    search: int = 0
    trials: int = 0
    left_out: tuple[str, ...] = ()

    def cost(self, batch_size: int) -> int:
        """What all of it comes to at most, for a config of this batch size."""
        # Where there are no linear tests, the sweep is what is repeated.
        tests = (self.sweep if self.slow else self.sweep * self.seeds) + self.seeds * (self.slow + self.fast)
        asked = [cost_of(self.asked, size, batch_size) for size in self.batch_sizes]
        return tests + sum(asked) + self.asked * len(self.settings) + TRIES * self.search + self.trials


def cost_of(updates: int, size: int, batch_size: int) -> int:
    """What updates at one batch size cost, in updates of another; never less than their number.

    >>> cost_of(10, 256, 32), cost_of(10, 8, 32)
    (80, 10)
    """
    return max(updates, math.ceil(updates * size / batch_size))


def make_plan(request: Request) -> Plan:
    """Share the budget out.

    Raises:
        RangeTestError: it does not hold even one test; the message says what would.
    """
    least = MIN_UPDATES if request.named_start else LEAST_SWEEP
    total = total_of(request.steps, request.budget, request.max_updates, least)
    length, asked, left_out = _share_out_asked(request, total)
    spent = sum(cost_of(length, part.size or request.batch_size, request.batch_size) for part in asked)
    plan = _share_out_tests(request, total - spent)
    return replace(
        plan,
        total=total,
        batch_sizes=tuple(part.size for part in asked if part.size is not None),
        settings=tuple(part.setting for part in asked if part.setting is not None),
        asked=length,
        left_out=(*_why_left_out(request, plan, total - spent), *left_out),
    )


def share_out_trials(left: int, candidates: int, steps: int) -> tuple[int, int]:
    """How many trials there are, and of how many updates each; (0, 0) where there is no room for two.

    Rather all candidates than long trials: that a schedule beats fixed rates is what a trial can show.

    Args:
        left: updates that may be spent.
        candidates: schedules to try, the most promising ones first.
        steps: updates of the planned training; a trial is never longer.

    >>> share_out_trials(300, 4, 10_000), share_out_trials(50, 4, 10_000), share_out_trials(30, 4, 10_000)
    ((4, 70), (2, 20), (0, 0))
    """
    longest = steps // TRIAL_MULTIPLE * TRIAL_MULTIPLE
    if candidates < 2 or longest < LEAST_TRIAL or left // 2 < LEAST_TRIAL:
        return 0, 0
    count = min(candidates, left // LEAST_TRIAL)
    return count, min(longest, left // count // TRIAL_MULTIPLE * TRIAL_MULTIPLE)


def total_of(steps: int, budget: float, max_updates: int, least: int = LEAST_SWEEP) -> int:
    """The updates that a tuning may take.

    Args:
        steps: updates of the planned training.
        budget: share of them.
        max_updates: the most.
        least: updates of the shortest test that can be read.

    Raises:
        RangeTestError: too few for any test.

    >>> total_of(180, 0.1, 1000), total_of(50_000, 0.1, 1000)
    (18, 1000)
    """
    total = min(math.floor(budget * steps), max_updates)
    if total >= least:
        return total
    if max_updates < least:
        raise RangeTestError(f"max_updates: got {max_updates}; the shortest test takes {least} updates")
    share = math.ceil(1000 * least / steps) / 1000
    larger = f", or a budget of {share:g}," if share <= 1 else ""
    raise RangeTestError(
        f"budget: {budget:g} of {steps} updates is {total}, and the shortest test takes {least}; plan at least "
        f"{math.ceil(least / budget)} updates{larger} or train at two or three learning rates in full, which "
        "costs little in so short a training"
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A test that was asked for beside the config's own."""

    words: str
    unit: float  # cost of one of its updates
    size: int | None = None
    setting: tuple[str, float] | None = None


def _share_out_asked(request: Request, total: int) -> tuple[int, list[_Asked], list[str]]:
    """Updates of each test at another batch size or setting; which of them there is room for; what is left out."""
    asked = [_Asked(f"with {name} {value:g}", 1.0, setting=(name, value)) for name, value in request.settings]
    # Batch sizes are compared by tests of one length, so that the config's own has such a test, too.
    sizes = set(request.batch_sizes) - {request.batch_size}
    for size in sorted(sizes | {request.batch_size}) if sizes else ():
        asked.append(_Asked(f"at batch size {size}", max(1.0, size / request.batch_size), size=size))
    room = min(math.floor(ASKED_SHARE * total), total - LEAST_SWEEP)
    left_out: list[str] = []
    while asked:
        if [part.size for part in asked if part.size is not None] == [request.batch_size]:
            asked = [part for part in asked if part.size is None]  # nothing is left to compare it with
            continue
        # Costs are rounded up, by less than one update each.
        length = min(MOST_TEST, math.floor((room - len(asked)) / sum(part.unit for part in asked)))
        if length >= LEAST_SWEEP:
            return length, asked, left_out
        dropped = max(reversed(asked), key=lambda part: part.unit)
        asked.remove(dropped)
        left_out.append(
            f"The test {dropped.words} is left out: it would cost {math.ceil(LEAST_SWEEP * dropped.unit)} updates at "
            f"the least, and what is asked for may take {max(0, room)}."
        )
    return 0, [], left_out


def _share_out_tests(request: Request, rest: int) -> Plan:
    """All stages if there is room for all, else the first test and the search, else the first test alone."""
    sweep = 0 if request.named_start else _part(SWEEP_SHARE, rest, LEAST_SWEEP)
    for seeds in range(request.seeds, 0, -1):
        slow = _part(SLOW_SHARE if sweep else SLOW_SHARE + SWEEP_SHARE / 2, rest // seeds, LEAST_SLOW)
        fast = _part(FAST_SHARE if sweep else FAST_SHARE + SWEEP_SHARE / 2, rest // seeds, LEAST_FAST)
        search = _length_of_tries(SEARCH_SHARE, rest)
        trials = rest - sweep - seeds * (slow + fast) - TRIES * search
        if rest >= ROOM_FOR_ALL and trials >= 2 * LEAST_TRIAL:
            return Plan(rest, sweep=sweep, slow=slow, fast=fast, seeds=seeds, search=search, trials=trials)

    def alone(length: int, seeds: int) -> Plan:
        first = Plan(rest, slow=length) if request.named_start else Plan(rest, sweep=length)
        return replace(first, seeds=seeds)

    least = LEAST_SLOW if request.named_start else LEAST_SWEEP
    for seeds in range(request.seeds, 0, -1):
        length = _part(SWEEP_ALONE, rest // seeds, least)
        search = _length_of_tries(SEARCH_ALONE, rest)
        if seeds * length + TRIES * search > rest:
            search = (rest - seeds * length) // TRIES
        if search >= LEAST_TRY:
            return replace(alone(length, seeds), search=search)
    seeds = max(1, min(request.seeds, rest // least))
    return alone(rest // seeds, seeds)


def _length_of_tries(share: float, whole: int) -> int:
    return min(MOST_TRY, max(LEAST_TRY, math.floor(share * whole) // TRIES))


def _part(share: float, whole: int, least: int) -> int:
    return min(MOST_TEST, max(least, math.floor(share * whole)))


def _why_left_out(request: Request, plan: Plan, rest: int) -> Iterator[str]:
    first = "slow test" if request.named_start else "sweep"
    if request.named_start:
        yield "The coarse sweep is left out: the config names lr_range_test_min_lr, where the tests start."
    if not plan.fast:
        what = "The fast linear test is" if request.named_start else "The slow and the fast linear test are"
        yield f"{what} left out: {rest} updates have no room for tests and trials."
    if plan.search and not plan.trials:
        yield (
            f"Trials are left out: {rest} updates are enough for the search only; linear decay is written, which "
            "ended lowest on most of the tasks that were measured."
        )
    elif not plan.trials:
        yield (
            f"Trials are left out, and the search for the peak, too: {rest} updates are enough for one {first} only; "
            "the schedule that it suggests is written without having been tried."
        )
    elif not request.validates:
        yield "There is no validation data: trials are judged by their training loss."
    if plan.seeds < request.seeds:
        yield f"Of {request.seeds} seeds there is room for {plan.seeds}."
