"""The stages of a tuning, in order and on one budget; what is known is saved after each.

A sweep over all learning rates that make sense for the optimizer shows the order of magnitude; where the config names
the start of a range test, a slow and a fast linear test from there take its place. Then come the search for the peak,
comparisons, and trials of schedules. A small budget is spent on the search alone, which begins at the config's own
learning rate.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch.optim import SGD, Optimizer

from redline.build import build_schedule
from redline.config import load_config
from redline.engine import Engine
from redline.range_test.curve import Curve, Kind
from redline.range_test.result import RangeTestResult
from redline.range_test.runner import base_lrs, lr_ratios
from redline.range_test.session import Run, Session, check_run
from redline.range_test.suggest import Suggestion, rough_maximum
from redline.schedulers import LRRangeTest, WarmupDecayLR
from redline.schedulers.schedule import Rate, Schedule, fill
from redline.tuning.batch_sizes import batch_keys
from redline.tuning.budget import (
    FORWARD,
    PASSES,
    VALIDATION_SHARE,
    Budget,
    Request,
    divide_trials,
    make_plan,
)
from redline.tuning.result import Tuning
from redline.tuning.search import FEW_TRIALS, Outcome, divide_search, next_trial, part_of
from redline.tuning.trials import (
    LEAST_FITTED,
    SCHEDULES,
    WARMUP_SHARE,
    Candidate,
    candidates_of,
    outcomes_of,
    trial_of,
)

__all__ = ["Tuner", "empty_tuning"]

Growth = Literal["linear", "exponential"]

ADAPTIVE = (1e-5, 1.0)  # learning rates for optimizers that scale their own steps (those with betas) ...
PLAIN = (1e-4, 10.0)  # ... and for the others, wide enough for everything that is in use
BELOW = 100.0  # comparisons start this factor below the suggested peak ...
ABOVE = 30.0  # ... and end this factor above it ...
DIVERGES_PAST = 2.0  # ... or at this many times the learning rate at which the sweep diverged, if that is higher
DIVERGED_MARGIN = 10.0  # a sweep that diverged without a suggestion: the peak is assumed this factor below
NAMED_RATES = (5.0, 500.0)  # step rates of the slow and the fast test where the config names their start ...
STAIRS = 20  # ... for a step size of this part of the test


def empty_tuning(engine: Engine, request: Request) -> Tuning:
    """The record of a tuning that has not begun.

    Raises:
        RangeTestError: The first parameter group's learning rate is 0, and another one's is not.
    """
    lrs, optimizer = base_lrs(engine), engine.optimizer
    return Tuning(
        test=RangeTestResult.of(engine, [], train_steps=request.steps, group_ratios=lr_ratios(lrs)),
        steps=request.steps,
        budget=request.share,
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        own_lr=_own_lr(engine, lrs[0]),
        # Only the heavy ball's: Adam corrects for its start.
        momentum=float(optimizer.param_groups[0]["momentum"]) if isinstance(optimizer, SGD) else 0.0,
        schedules=tuple(SCHEDULES[name] for name in request.schedules),
        target_batch_size=request.target_batch_size,
        target_processes=request.target_processes,
    )


def _own_lr(engine: Engine, lr: float) -> float | None:
    """The learning rate that the config or the script's optimizer names; None for a default."""
    if peaks := getattr(engine.lr_scheduler, "max_lrs", None):  # of a warm-up or a cycle
        lr = float(peaks[0])
    elif engine.config.optimizer is not None and _params(engine, "optimizer").get("lr") in (None, "auto"):
        return None
    return lr if lr > 0 else None


def _named_start(engine: Engine) -> float | None:
    """The learning rate at which the config's LRRangeTest starts; None where the config names none."""
    scheduler = engine.config.scheduler
    if scheduler is None or scheduler.type != "LRRangeTest":
        return None
    if "lr_range_test_min_lr" not in _params(engine, "scheduler"):
        return None
    given = scheduler.arguments()["lr_range_test_min_lr"]
    return float(given[0] if isinstance(given, Sequence) else given)


def _params(engine: Engine, section: str) -> dict[str, Any]:
    """What the user wrote, without defaults."""
    return (engine.config.document().get(section) or {}).get("params") or {}


class Stretched(Schedule):
    """A schedule in fewer steps: step k has the learning rate of the original's step k times `ratio`."""

    def __init__(self, optimizer: Optimizer, original: Schedule, ratio: float) -> None:
        super().__init__(optimizer)
        self._original, self._ratio = original, ratio
        self._write(self._lrs(0))

    def _lrs(self, k: int) -> list[Rate]:
        return self._original._lrs(round(k * self._ratio))


class Tuner:
    """A tuning in progress; `save` is called with what is known after each stage, and after an exception.

    `keep` is called with the engine at the end of a training in full that ended lowest so far.

    Attributes:
        plan: What it will do.
        known: What is known so far.

    Raises:
        RangeTestError: The engine cannot do what was asked for.
    """

    def __init__(
        self,
        session: Callable[[int], Session],
        request: Request,
        save: Callable[[Tuning], None],
        keep: Callable[[Engine], object] = lambda engine: None,
        *,
        validates: bool,
        show: bool | None,
    ) -> None:
        engine = session(0).engine
        assert engine.optimizer is not None
        tuning = empty_tuning(engine, request)
        own, self._start = tuning.test.train_batch_size, _named_start(engine)
        for size in request.batch_sizes or ():
            check_run(engine, size, {})
        for name, value in request.settings:
            check_run(engine, None, {name: value})
        if request.target_batch_size is not None or request.target_processes is not None:
            batch_keys(request.target_batch_size or own, request.target_processes or tuning.test.world_size, own)
        self.plan = make_plan(request, batch_size=own, start_named=self._start is not None, validates=validates)
        self.known = replace(tuning, left_out=self.plan.left_out, steps_per_epoch=session(0).steps_per_epoch)
        self._session, self._save, self._keep = session, save, keep
        self._complete, self._lock = False, threading.Lock()  # `break_off` may be called in a thread
        self._budget = Budget(self.plan.total, own, show)
        self._lrs = ADAPTIVE if "betas" in engine.optimizer.defaults else PLAIN
        self._own_schedule = engine.lr_scheduler  # before runs put theirs there
        self._stage, self._number = "", ""
        self._limited: Session | None = None

    def run(self, check_stop: Callable[[], None]) -> None:
        """Run all stages; `check_stop` is called after each optimizer step, and raises to end the tuning."""
        self._budget.check_stop = check_stop
        stages = {
            "range tests": self._range_tests,
            "search": self._search_peak,
            "comparisons": self._compare,
            "trials": self._try_schedules,
        }
        try:
            with self._budget:
                for number, (name, stage) in enumerate(stages.items(), start=1):
                    self._stage, self._number = name, f"{number}/{len(stages)}"
                    stage()
                    with self._lock:
                        self._learn()
                        self._complete = number == len(stages)
                        self._save(self.known)
        except BaseException as error:
            signal = error.args[0] if isinstance(error, KeyboardInterrupt) and error.args else None
            self.known = self.break_off(signal or type(error).__name__)
            raise

    def break_off(self, how: str) -> Tuning:
        """Save and return what is known at this moment, a range test in progress included, unless all is complete."""
        with self._lock:
            known, partial = self.known, self._budget.partial()
            if self._complete:
                return known
            # Part of a trial cannot be compared with whole ones.
            if partial is not None and partial.is_test and (partial.train_batch_size or partial.settings):
                known = replace(known, comparisons=(*known.comparisons, partial))
            elif partial is not None and partial.is_test:
                known = known.with_test(partial)
            known = replace(known, **self._counts(), stopped=f'by {how} in the stage "{self._stage}"')
            self._save(known)
            return known

    def _counts(self) -> dict[str, Any]:
        budget = self._budget
        return {
            "spent": budget.spent,
            "updates": budget.updates,
            "validation_cost": budget.validation,
            "seconds": round(budget.seconds, 1),
        }

    def _learn(self, test: Curve | None = None, **found: Any) -> None:
        """Add to the record: a test, or one more of `search`, `trials`, `comparisons` or `left_out`."""
        more: dict[str, Any] = {name: (*getattr(self.known, name), value) for name, value in found.items()}
        known = self.known if test is None else self.known.with_test(test)
        self.known = replace(known, **self._counts(), **more)

    # -- the stages --------------------------------------------------------------------------------

    def _range_tests(self) -> None:
        plan = self.plan
        for seed in range(plan.seeds):
            if plan.sweep:
                self._learn(test=self._run(self._sweep_of(*self._lrs, plan.sweep, seed=seed), seed))
            for name, steps, rate in zip(("slow", "fast"), (plan.slow, plan.fast), NAMED_RATES):
                if steps and self._start is not None:
                    size = max(1, steps // STAIRS)
                    run = self._test(name, "linear", self._start, size, rate, steps, seed=seed)
                    self._learn(test=self._run(run, seed))

    def _search_peak(self) -> None:
        plan, tests = self.plan, self.known.test
        # The optimizer's default is a guess, for which a sweep is better.
        suggested = tests.suggestion.cycle_max_lr if isinstance(tests.suggestion, Suggestion) else None
        first = self.known.own_lr or suggested or base_lrs(self._session(0).engine)[0] or rough_maximum(tests.curves)
        if first is None:
            self._learn(left_out="The search is left out: the optimizer's learning rate is 0, where none can begin.")
            return
        most = self._budget.spent + plan.search
        session = self._opened(0)
        if session.validation:
            session.validate_initial(self._budget, fits=self._fits)
        planned, overhead = self.known.steps, self._budget.pass_cost
        if plan.schedule_trials:  # their own validations
            most -= math.ceil(overhead * (len(self.known.schedules) + 1))
        short, room = divide_search(most - self._budget.spent, planned, overhead)
        trials: list[Outcome] = []
        known = self.known
        while found := next_trial(trials, first, short, planned, room, known.momentum, known.steps_per_epoch):
            lr, steps, seed = found
            curve = self._run(self._peak_trial(lr, steps, seed))
            trial = trial_of(curve, "WarmupDecayLR", lr, "Tried by the search.", steps=steps)
            in_full = [one for one in trials if one.steps >= planned]
            self._learn(search=trial)
            if steps >= planned and trial.loss < min((one.loss for one in in_full), default=math.inf):
                self._keep(self._session(0).engine)
            trials = outcomes_of(self.known.search, known.steps_per_epoch)
            room = room._replace(left=most - self._budget.spent)

    @property
    def _fits(self) -> bool:
        """Whether trials measure how much of what they learn they learn by heart: of data that is seen again."""
        epoch = self.known.steps_per_epoch
        room = self.plan.search >= FEW_TRIALS * (LEAST_FITTED + 2)  # with the validations, roughly
        return room and epoch is not None and self.known.steps > epoch

    def _part(self, steps: int) -> int | None:
        """The steps after which a trial sees its data again; None for all data.

        Without validation data it sees all, as then the loss on batches that are new to it is the best sign there is.
        """
        validates = bool(self._session(0).validation)
        return part_of(steps, self.known.steps, self.known.steps_per_epoch) if validates else None

    def _compare(self) -> None:
        low, high = self._lrs
        # Where the order of magnitude is known: from below the peak to above.
        if (peak := self._likely_peak()) is not None:
            low, high = _round(peak / BELOW), _round(max(ABOVE * peak, DIVERGES_PAST * (self._diverged_at() or 0)))
        for comparison in self.plan.comparisons:
            curve = self._run(self._sweep_of(low, high, self.plan.comparison, **comparison))
            self._learn(comparisons=curve)

    def _try_schedules(self) -> None:
        answer = self.known.answer
        if not isinstance(answer, Suggestion) or not self.plan.schedule_trials:
            return
        own_lr = self.known.own_lr
        if not isinstance(self._own_schedule, Schedule | None):
            self._learn(left_out="The config's own schedule is not tried: only Redline's can be shortened.")
            own_lr = None
        candidates = candidates_of(answer, own_lr, self.known.schedules)
        if 0 in self.known.test.group_ratios:
            candidates = [candidate for candidate in candidates if candidate.schedule != "OneCycle"]
            self._learn(left_out="OneCycle is left out: a parameter group has learning rate 0, as no cycle has.")
        left = math.floor(self.plan.total - self._budget.spent - len(candidates) * self._budget.pass_cost)
        count, steps = divide_trials(left, len(candidates), self.known.steps)
        if not count:
            self._learn(left_out=f"Schedule trials are left out: {left} steps are left, too few for two.")
        elif count < len(candidates):
            names = ", ".join(candidate.name for candidate in candidates[count:])
            self._learn(left_out=f"There was no room for trials of {names}.")
        for candidate in candidates[:count]:
            curve = self._run(self._schedule_trial(candidate, steps))
            trial = trial_of(curve, candidate.schedule, candidate.lr, candidate.why, steps=steps)
            self._learn(trials=trial)

    def _run(self, run: Run, weights: int = 0) -> Curve:
        """Make a run on the model of a seed; its own seed is that of the order of the data."""
        self._budget.begin(self._number, run)
        curve = self._opened(weights).run(run, self._budget)
        self._budget.end()
        return curve

    def _opened(self, seed: int) -> Session:
        """The session of a seed, which reads a large validation set in part: validations take their share at most."""
        session = self._session(seed)
        if session is not self._limited:
            own = self.known.test.train_batch_size
            most = VALIDATION_SHARE * min(self.plan.total, self.known.steps) / PASSES * FORWARD
            session.validation.limit(max(1.0, most) * own)
            self._limited = session
        return session

    def _diverged_at(self) -> float | None:
        """The lowest learning rate at which a sweep diverged."""
        ends = [(curve, curve.diverged_at) for curve in self.known.test.curves if curve.kind == "exponential"]
        return min((curve.lrs[end] for curve, end in ends if end is not None), default=None)

    def _likely_peak(self) -> float | None:
        """The suggested peak, or a guess from where a sweep diverged."""
        if isinstance(answer := self.known.answer, Suggestion):
            return answer.cycle_max_lr
        diverged_at = self._diverged_at()
        return None if diverged_at is None else diverged_at / DIVERGED_MARGIN

    # -- the runs that they are made of ------------------------------------------------------------

    def _sweep_of(self, low: float, high: float, steps: int, **change: Any) -> Run:
        return self._test("sweep", "exponential", low, max(1, steps - 1), high / low - 1, steps, **change)

    def _test(
        self, name: str, growth: Growth, low: float, step_size: int, rate: float, steps: int, **change: Any
    ) -> Run:
        """A range test; `change` is its seed, batch size or settings, which are in its name, too."""
        run = Run(name, growth, self._range_test(low, step_size, rate, growth=growth), steps, rate=rate, **change)
        parts = [name, *(f"{setting} {value:g}" for setting, value in run.settings.items())]
        parts += [f"batch {run.train_batch_size}"] if run.train_batch_size else []
        parts += [f"seed {run.seed}"] if run.seed else []
        return replace(run, name=", ".join(parts), validations=0)

    def _peak_trial(self, lr: float, steps: int, seed: int) -> Run:
        """A short training with the schedule that will be trained with, in small."""
        name = f"peak {lr:g}, {steps} steps" + (f", seed {seed}" if seed else "")
        warmup = max(1, round(WARMUP_SHARE * steps))

        def schedule(optimizer: Optimizer) -> WarmupDecayLR:
            # Corrected: DeepSpeed's first two steps have learning rate 0, which are many of so few.
            return WarmupDecayLR(optimizer, steps, 0.0, self._scaled(lr), warmup, warmup_type="linear", corrected=True)

        return Run(name, "decay", schedule, steps, validations=1, seed=seed, part=self._part(steps), fits=self._fits)

    def _schedule_trial(self, candidate: Candidate, steps: int) -> Run:
        engine, make = self._session(0).engine, partial(Run, steps=steps, validations=1, part=self._part(steps))
        if candidate.schedule == "own":
            own, ratio = self._own_schedule, self.known.steps / steps
            if own is None or isinstance(own, LRRangeTest):
                return make(candidate.name, "fixed", self._range_test(candidate.lr, 1, 0.0))
            return make(candidate.name, "decay", lambda optimizer: Stretched(optimizer, own, ratio))
        section, _ = candidate.section(steps, self.known.test.group_ratios)
        # Read from a config, as training will read it, "redline.schedules" included.
        config = load_config({**engine.config.document(), "scheduler": section}, world_size=engine.world_size)

        def schedule(optimizer: Optimizer) -> Schedule:
            for group, each in zip(optimizer.param_groups, self._scaled(candidate.lr)):
                fill(group, each)  # which a cosine multiplies
            built = build_schedule(config, optimizer)
            assert isinstance(built, Schedule)
            return built

        kind: Kind = "cycle" if candidate.schedule == "OneCycle" else "decay"
        return make(candidate.name, kind, schedule)

    def _range_test(
        self, low: float, step_size: int, rate: float, growth: Growth = "linear"
    ) -> Callable[[Optimizer], Schedule]:
        """The schedule of a test, or with rate 0 of a trial at a fixed learning rate."""
        return lambda optimizer: LRRangeTest(optimizer, self._scaled(low), step_size, rate, growth=growth)

    def _scaled(self, lr: float) -> list[float]:
        return [lr * ratio for ratio in self.known.test.group_ratios]


def _round(lr: float) -> float:
    return float(f"{lr:.2g}")
