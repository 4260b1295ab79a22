"""What a tuning may spend and on what: the request, the plan made from it, and the count while it runs.

The unit is an optimizer step at the config's own batch size. A step at a batch eight times as large costs eight, a step
at a smaller batch costs one. Steps that a stage leaves unused, because a run diverged early, go to the stages after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from redline.errors import RangeTestError
from redline.range_test.curve import Curve
from redline.range_test.session import Progress, Run
from redline.range_test.suggest import MIN_STEPS, MIN_SWEEP_STEPS
from redline.tuning.trials import SCHEDULES

__all__ = ["Budget", "Plan", "Request", "cost_of", "divide_trials", "make_plan"]

# Every constant by which the budget is divided.
DEFAULT = 0.1  # of the training ...
LEAST_DEFAULT = 100  # ... and at least as many steps as the range tests of other tools take, which a search needs ...
MOST_DEFAULT = 0.5  # ... but of a short training no more than half
MAX_STEPS = 1000  # of a tuning, unless more is asked for: 2% of a training of 50,000 ...
ASKED_FOR = 0.5  # ... as a budget of half a training does
MOST_BUDGET = 10.0
COMPARISON_SHARE = 0.5  # of the whole: tests at other batch sizes and settings, if asked for
VALIDATION_SHARE = 0.25  # of the rest, at most: all passes over the validation data ...
PASSES = 9  # ... of which a search makes about so many; a large validation set is read in part
FORWARD = 3.0  # a training step costs as much as so many forward passes
ROOM_FOR_ALL = 300  # from here on there is room for every stage; below, all steps go to the search
SWEEP_SHARE = 0.1  # the exponential sweep, or the slow and the fast linear test together
TRIALS_SHARE = 0.2  # the schedule trials, which also get what is left by the stages before
MOST_TEST = 300  # a longer test tells no more
LEAST_TOTAL = 12  # of a tuning
TRIAL_MULTIPLE = 10  # the length of a schedule trial is a multiple of this, so that it ends with a validation
LEAST_TRIAL = 20  # a shorter schedule trial tells nothing


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of :func:`redline.tuning.tune`, which documents them, after a check.

    Raises:
        RangeTestError: One is out of range, or the budget is too small for any test.
    """

    steps: int
    budget: float | None = None
    max_updates: int | None = None
    seeds: int = 1
    batch_sizes: Sequence[int] | None = None
    sweep: Mapping[str, Sequence[float]] | None = None
    target_batch_size: int | None = None
    target_processes: int | None = None
    schedules: Sequence[str] = ("linear", "onecycle")

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "max_updates", "target_batch_size", "target_processes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RangeTestError(f"{name}: got {value!r}; expected an integer >= 1")
        if not 0 < self.share <= MOST_BUDGET:
            raise RangeTestError(
                f"budget: got {self.budget!r}; expected a multiple of the planned steps, such as 0.1 or 2, above 0 and "
                f"at most {MOST_BUDGET:g}"
            )
        if not self.schedules or (unknown := [name for name in self.schedules if name not in SCHEDULES]):
            given = repr(unknown[0]) if self.schedules else "none"
            raise RangeTestError(f"schedules: got {given}; expected some of {', '.join(SCHEDULES)}")
        self.total()  # too small a budget is refused before anything is built

    @property
    def allowed(self) -> float:
        """Steps that the budget allows."""
        if self.budget is not None:
            return self.budget * self.steps
        return max(DEFAULT * self.steps, min(MOST_DEFAULT * self.steps, LEAST_DEFAULT))

    @property
    def share(self) -> float:
        """The same as a multiple of the planned steps."""
        return self.allowed / self.steps if self.budget is None else self.budget

    @property
    def settings(self) -> list[tuple[str, float]]:
        """The optimizer settings to compare, one by one."""
        return [(name, float(value)) for name, values in (self.sweep or {}).items() for value in values]

    def total(self) -> int:
        """Steps that the tuning may take; refused if they are too few."""
        most = self.max_updates or (MAX_STEPS if self.share < ASKED_FOR else math.inf)
        total = min(math.floor(self.allowed), most)
        if total < LEAST_TOTAL:
            given = f"budget: {self.share:g} of {self.steps} steps is {total}"
            given = f"max_updates: got {most}" if most < LEAST_TOTAL else given
            raise RangeTestError(
                f"{given}, and a search takes {LEAST_TOTAL} at least; plan at least "
                f"{math.ceil(LEAST_TOTAL / self.share)} steps, allow more of them, or train at two or three learning "
                "rates in full, which costs little for so short a training"
            )
        return int(total)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the budget is spent, in optimizer steps; 0 leaves a stage out."""

    total: int
    sweep: int = 0
    slow: int = 0  # the slow linear test, for each seed
    fast: int = 0
    seeds: int = 1  # repetitions of the tests
    search: int = 0  # all trials of the search, its validations included
    schedule_trials: int = 0  # all of them, which also get what the stages before leave unused
    comparison: int = 0  # each of them
    comparisons: tuple[dict[str, Any], ...] = ()  # the batch size or settings in which a test differs, as in `Run`
    left_out: tuple[str, ...] = ()  # what is not done, and why: a sentence each

    def __str__(self) -> str:
        stages = {name: steps for name, steps in asdict(self).items() if isinstance(steps, int) and name != "total"}
        return ", ".join(f"{name.replace('_', ' ')} {steps}" for name, steps in stages.items() if steps)


def cost_of(steps: int, size: int | None, own: int) -> int:
    """Cost of steps at a batch size (None for the config's own), in steps at `own`; never less than their number.

    >>> cost_of(10, 256, 32), cost_of(10, 8, 32)
    (80, 10)
    """
    return max(steps, math.ceil(steps * (size or own) / own))


def make_plan(request: Request, *, batch_size: int, start_named: bool = False, validates: bool = True) -> Plan:
    """Divide the budget among the stages.

    Args:
        request: What was asked for.
        batch_size: The config's own, in samples.
        start_named: Whether the config names the learning rate at which range tests start; then there is no sweep.
        validates: Whether there is validation data.
    """
    total = request.total()
    comparison, comparisons, dropped = _plan_comparisons(request, batch_size, total)
    cost = sum(cost_of(comparison, change.get("train_batch_size"), batch_size) for change in comparisons)
    plan = _plan_stages(total - cost, request, start_named)
    left_out = (*_reasons_left_out(request, plan, start_named, validates), *dropped)
    return replace(plan, total=total, comparison=comparison, comparisons=comparisons, left_out=left_out)


def _plan_comparisons(request: Request, own: int, total: int) -> tuple[int, tuple[dict[str, Any], ...], list[str]]:
    """Steps of each comparison, the ones there is room for, and a sentence on each of the others."""

    def unit(change: dict[str, Any]) -> float:
        return max(1.0, float(change.get("train_batch_size", own)) / own)  # cost of a step

    settings: list[dict[str, Any]] = [{"settings": {name: value}} for name, value in request.settings]
    # Batch sizes are compared by tests of one length, so the config's own needs such a test, too.
    others = set(request.batch_sizes or ()) - {own}
    sizes: list[dict[str, Any]] = [{"train_batch_size": size} for size in sorted(others | {own})] if others else []
    room = min(math.floor(COMPARISON_SHARE * total), total - MIN_SWEEP_STEPS)
    dropped: list[str] = []
    while wanted := [*sizes, *settings]:
        # Costs are rounded up, each by less than one step.
        length = min(MOST_TEST, math.floor((room - len(wanted)) / sum(map(unit, wanted))))
        if length >= MIN_SWEEP_STEPS:
            return length, tuple(wanted), dropped
        costliest = max([*reversed(sizes), *reversed(settings)], key=unit)
        (sizes if costliest in sizes else settings).remove(costliest)
        if sizes == [{"train_batch_size": own}]:
            sizes = []  # nothing is left to compare it with
        what = [f"with {name} {value:g}" for name, value in costliest.get("settings", {}).items()]
        what += [f"at batch size {costliest['train_batch_size']}"] if "train_batch_size" in costliest else []
        dropped.append(
            f"The test {what[0]} is left out: it would cost at least {math.ceil(MIN_SWEEP_STEPS * unit(costliest))} "
            f"steps, and all comparisons may take {max(0, room)}."
        )
    return 0, (), dropped


def _plan_stages(rest: int, request: Request, start_named: bool) -> Plan:
    """All stages if there is room for all, else the search alone."""
    seeds = request.seeds if rest >= ROOM_FOR_ALL else 1
    tests = trials = 0
    if rest >= ROOM_FOR_ALL:
        whole = min(rest, request.steps)  # what a larger budget adds is for trainings in full
        tests = min(2 * MOST_TEST if start_named else MOST_TEST, max(2 * MIN_STEPS, math.floor(SWEEP_SHARE * whole)))
        trials = math.floor(TRIALS_SHARE * whole)
        while seeds > 1 and seeds * tests > 2 * SWEEP_SHARE * rest:
            seeds -= 1
    search = rest - seeds * tests - trials
    slow, fast = (tests - tests // 2, tests // 2) if start_named else (0, 0)
    return Plan(rest, 0 if start_named else tests, slow, fast, seeds, search, trials)


def _reasons_left_out(request: Request, plan: Plan, start_named: bool, validates: bool) -> Iterator[str]:
    if start_named and plan.slow:
        yield "The sweep is left out: the config names lr_range_test_min_lr, where the tests start."
    if not plan.schedule_trials:
        yield (
            f"Range tests and schedule trials are left out: {plan.total} steps are enough for the search only; linear "
            "decay is written, which ended lowest on most of the tasks that were measured."
        )
    if not validates:
        yield "There is no validation data: the training loss decides, which does not show overfitting."
    if plan.seeds < request.seeds:
        yield f"There is room for {plan.seeds} of {request.seeds} seeds."


def divide_trials(left: int, candidates: int, steps: int) -> tuple[int, int]:
    """The number of schedule trials and the steps of each; (0, 0) where there is no room for two.

    More candidates come before longer trials: that a schedule beats fixed learning rates is what a trial can show. No
    trial is longer than the planned training's `steps`.

    >>> divide_trials(300, 4, 10_000), divide_trials(50, 4, 10_000), divide_trials(30, 4, 10_000)
    ((4, 70), (2, 20), (0, 0))
    """
    longest = steps // TRIAL_MULTIPLE * TRIAL_MULTIPLE
    if candidates < 2 or longest < LEAST_TRIAL or left // 2 < LEAST_TRIAL:
        return 0, 0
    count = min(candidates, left // LEAST_TRIAL)
    return count, min(longest, left // count // TRIAL_MULTIPLE * TRIAL_MULTIPLE)


# -- while it runs ---------------------------------------------------------------------------------------


class Budget(Progress):
    """Counts the cost of a tuning step by step, keeps the record of the run in progress, and shows the progress."""

    def __init__(self, total: int, batch_size: int, show: bool | None) -> None:
        super().__init__(total, show=show)
        self.updates = 0  # steps made, at any batch size
        self.check_stop: Callable[[], None] = lambda: None  # called after each step; raises to end the tuning
        self._own, self._stage = batch_size, ""
        self._run: Run | None = None
        self._record: list[tuple[float, float]] = []  # (LR, loss) of each step of the run in progress
        self._spent_before = 0  # by the runs before it
        self._samples = 0.0  # of validation data
        self.pass_cost = 0.0  # of the last validation, in steps
        self._start = time.monotonic()

    @property
    def spent(self) -> int:
        """Cost so far, validations included."""
        size = None if self._run is None else self._run.train_batch_size
        return self._spent_before + cost_of(len(self._record), size, self._own) + self.validation

    @property
    def validation(self) -> int:
        """Cost of the validations so far."""
        return math.ceil(self._samples / FORWARD / self._own)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def begin(self, stage: str, run: Run) -> None:
        """Count the steps of a run."""
        self._stage, self._run = stage, run

    def end(self) -> None:
        """The run is complete."""
        self._spent_before, self._run, self._record = self.spent - self.validation, None, []

    def partial(self) -> Curve | None:
        """The run in progress as far as it came; None if it has no step yet."""
        run = self._run
        if run is None or not self._record:
            return None
        lrs, losses = zip(*self._record)
        return Curve(
            f"{run.name} (broken off)", run.rate, tuple(range(len(lrs))), lrs, losses, kind=run.kind, seed=run.seed,
            train_batch_size=run.train_batch_size, settings=tuple(run.settings.items()),
        )  # fmt: skip

    def update(self, run: str, step: int, lr: float, loss: float) -> None:
        """Count one step; ends the tuning if a signal has asked for it."""
        before = self.spent
        self.updates += 1
        self._record.append((lr, loss))
        self.advance(self.spent - before, f"{self._stage} {run}", lambda: f"step {step}, lr {lr:.3g}, loss {loss:.4g}")
        self.check_stop()

    def validated(self, samples: float) -> None:
        before = self.spent
        self._samples += samples
        self.pass_cost = samples / FORWARD / self._own
        self.advance(self.spent - before, f"{self._stage} validation", lambda: "")

    def format_line(self, description: str, values: str) -> str:
        assert self.total is not None
        left = timedelta(seconds=round(self.seconds / self.spent * max(0, self.total - self.spent)))
        what = ", ".join(filter(None, (description, values)))  # a validation has no values
        return f"{100 * self.spent / self.total:3.0f}%  {what}; about {left} left"

    def skip(self, steps: int) -> None:
        """A run ended early; its steps are left to the stages after it."""
