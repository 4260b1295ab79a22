"""The tuning itself: stage by stage, each saved as it ends, on one budget.

A sweep finds the order of magnitude, linear tests the boundaries, the search the peak, trials the schedule. What is
known when it is broken off (a signal, a loss that raises) is kept all the same; the engine is put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.optim import SGD, Optimizer

from engine.build import build_schedule
from engine.config import load_config
from engine.engine import Engine
from engine.range_test.analysis import rough_maximum
from engine.range_test.curve import Curve
from engine.range_test.rates import own_rates, ratios_of
from engine.range_test.result import RangeTestResult
from engine.range_test.rig import Run
from engine.range_test.search import next_peak
from engine.range_test.suggestion import Suggestion
from engine.tuning.candidates import Candidate, candidates_of
from engine.tuning.meter import Meter
from engine.tuning.plan import TRIAL_MULTIPLE, TRIES, Plan, share_out_trials
from engine.tuning.result import Tuning, tries_of
from engine.tuning.runs import Variant, fixed_run, linear_runs, named_runs, span_around, span_of, sweep_run, try_run
from engine.tuning.stand import Stand
from engine.tuning.stop import Stopped
from engine.tuning.trials import Trial, trial_of
from schedulers.schedule import Schedule

__all__ = ["Facts", "Tuner", "facts_of"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What of an engine a tuning needs to know.

    Attributes:
        test: an empty record, to be filled with curves.
        named_start: the rate at which the config's LRRangeTest starts; None where it names none.
        own_lr: the rate that the config or the script's optimizer names, the highest one of a schedule; None for a
            default.
        micro_batch: samples of a forward on one process.
        momentum: SGD's; 0 for other optimizers, which correct for its start.
    """

    test: RangeTestResult
    named_start: float | None
    own_lr: float | None
    micro_batch: int
    momentum: float


def facts_of(engine: Engine, steps: int) -> Facts:
    """The facts of an engine that is to train for so many updates.

    Raises:
        RangeTestError: the first parameter group's rate is 0, and another one's is not.
    """
    lrs = own_rates(engine)
    return Facts(
        RangeTestResult.of(engine, [], train_steps=steps, group_ratios=ratios_of(lrs)),
        _named_start(engine),
        _own_lr(engine, lrs[0]),
        engine.train_micro_batch_size_per_gpu(),
        _heavy_ball(engine.optimizer),
    )


def _own_lr(engine: Engine, lr: float) -> float | None:
    if peaks := getattr(engine.lr_scheduler, "max_lrs", None):  # of a warm-up or a cycle
        lr = float(peaks[0])
    elif not _names_lr(engine):
        return None
    return lr if lr > 0 else None


def _heavy_ball(optimizer: Optimizer | None) -> float:
    return float(optimizer.param_groups[0]["momentum"]) if isinstance(optimizer, SGD) else 0.0


def _named_start(engine: Engine) -> float | None:
    scheduler = engine.config.scheduler
    params = (engine.config.document().get("scheduler") or {}).get("params") or {}
    if scheduler is None or scheduler.type != "LRRangeTest" or "lr_range_test_min_lr" not in params:
        return None
    given = scheduler.arguments()["lr_range_test_min_lr"]
    return float(given[0] if isinstance(given, Sequence) else given)


def _names_lr(engine: Engine) -> bool:
    if engine.config.optimizer is None:
        return True  # the script's own optimizer
    params = (engine.config.document().get("optimizer") or {}).get("params") or {}
    return params.get("lr") not in (None, "auto")


class Tuner:
    """One tuning under way.

    Args:
        stand: where runs are made.
        facts: of its engine.
        plan: how the budget is spent.
        tuning: what is known at the start: nothing, with its frame.
        meter: counts and shows.
        save: keeps what is known so far; called after each stage.
    """

    def __init__(
        self, stand: Stand, facts: Facts, plan: Plan, tuning: Tuning, meter: Meter, save: Callable[[Tuning], None]
    ) -> None:
        self._stand, self._facts, self._plan, self._meter, self._save = stand, facts, plan, meter, save
        self._frame = tuning
        self._left_out = list(plan.left_out)
        self._curves: list[Curve] = []
        self._comparisons: list[Curve] = []
        self._tries: list[Trial] = []
        self._trials: list[Trial] = []
        self._stage, self._number = "start", ""
        self._stopped: str | None = None
        self._partial: Curve | None = None  # of the run under way, where it was broken off
        self._whole = False
        self._lock = threading.Lock()  # a thread breaks off, too, where an update takes too long

    def run(self) -> Tuning:
        """Make all stages.

        Returns:
            What was found.

        Raises:
            Stopped: after what is known has been saved; `result` has it.
        """
        stages = {
            "sweep": self._sweep,
            "linear tests": self._linear,
            "search": self._search,
            "comparisons": self._asked,
            "trials": self._try,
        }
        try:
            for number, (name, stage) in enumerate(stages.items(), start=1):
                self._stage, self._number = name, f"{number}/{len(stages)}"
                stage()
                with self._lock:
                    self._whole = number == len(stages)
                    self._save(self.result())
        except BaseException as error:
            self.break_off(error.args[0] if isinstance(error, Stopped) else type(error).__name__)
            raise
        return self.result()

    def break_off(self, how: str) -> None:
        """Save what is known at this moment, the run under way included.

        May be called in a thread, and again: the last call counts. A tuning that is whole is not broken off.
        """
        with self._lock:
            if self._whole:
                return
            self._stopped = f'by {how} in the stage "{self._stage}"'
            partial = self._meter.partial()
            # A trial that is broken off cannot be compared with others.
            self._partial = partial if partial is not None and partial.is_test else None
            self._save(self.result())

    def result(self) -> Tuning:
        """What is known so far."""
        curves, comparisons = list(self._curves), list(self._comparisons)
        if (partial := self._partial) is not None:
            compares = partial.train_batch_size is not None or partial.settings
            (comparisons if compares else curves).append(partial)
        return replace(
            self._frame,
            test=replace(self._facts.test, curves=tuple(curves)),
            comparisons=tuple(comparisons),
            search=tuple(self._tries),
            trials=tuple(self._trials),
            spent=self._meter.spent,
            updates=self._meter.updates,
            seconds=round(self._meter.seconds, 1),
            stopped=self._stopped,
            left_out=tuple(self._left_out),
        )

    # -- the stages ------------------------------------------------------------------------------

    def _sweep(self) -> None:
        plan = self._plan
        if not plan.sweep:
            return
        span = span_of(self._optimizer())
        for seed in range(1 if plan.slow else plan.seeds):
            self._curves.append(self._make(sweep_run(span, plan.sweep, self._ratios, Variant(seed))))

    def _linear(self) -> None:
        plan = self._plan
        if not plan.slow:
            return
        answer, diverged_at = self.result().answer, self._diverged_at()
        for seed in range(plan.seeds):
            variant = Variant(seed)
            if self._facts.named_start is not None:
                runs = named_runs(self._facts.named_start, plan.slow, plan.fast, self._ratios, variant)
            else:
                runs = linear_runs(answer, diverged_at, plan.slow, plan.fast, self._ratios, variant)
            for run in runs:
                self._curves.append(self._make(run))
        if not runs:
            self._left_out.append("The linear tests are left out: the sweep gives nothing to go by.")

    def _search(self) -> None:
        answer, updates = self.result().answer, self._plan.search
        # A sweep that is too short to be sure of a descent is good enough to begin at.
        first = answer.cycle_max_lr if isinstance(answer, Suggestion) else rough_maximum(self._curves)
        if not updates:
            return
        if first is None:
            self._left_out.append("The search for the peak is left out: the tests give it nothing to begin at.")
            return
        for _ in range(TRIES):
            lr = next_peak(tries_of(self._tries), float(f"{first:.3g}"))
            curve = self._make(try_run(lr, updates, self._ratios, holds=self._facts.momentum > 0))
            self._tries.append(trial_of(curve, "WarmupDecayLR", lr, "Tried by the search.", updates=updates))

    def _asked(self) -> None:
        plan = self._plan
        if not plan.asked:
            return
        span = span_around(self.result().answer, self._diverged_at(), span_of(self._optimizer()))
        variants = [Variant(train_batch_size=size) for size in plan.batch_sizes]
        variants += [Variant(settings={name: value}) for name, value in plan.settings]
        for variant in variants:
            self._comparisons.append(self._make(sweep_run(span, plan.asked, self._ratios, variant)))

    def _try(self) -> None:
        answer = self.result().answer
        if not isinstance(answer, Suggestion) or not self._plan.trials:
            return
        candidates = candidates_of(answer, self._facts.own_lr)
        if 0 in self._ratios:
            candidates = [candidate for candidate in candidates if candidate.schedule != "OneCycle"]
            self._left_out.append(
                "1Cycle is left out: a parameter group has the rate 0, and a cycle's rates are above it."
            )
        left = self._plan.total - self._meter.spent
        count, updates = share_out_trials(left, len(candidates), self._frame.steps)
        if not count:
            self._left_out.append(f"Trials are left out: {left} updates are left, too few for two.")
        elif count < len(candidates):
            names = ", ".join(candidate.name for candidate in candidates[count:])
            self._left_out.append(f"There was no room for trials of {names}.")
        for candidate in candidates[:count]:
            curve = self._make(self._trial(candidate, updates))
            self._trials.append(trial_of(curve, candidate.schedule, candidate.lr, candidate.why, updates=updates))

    def _trial(self, candidate: Candidate, updates: int) -> Run:
        section = candidate.section(updates, self._ratios)
        if section is None:
            lrs = [candidate.lr * ratio for ratio in self._ratios]
            return fixed_run(candidate.name, lrs, updates, TRIAL_MULTIPLE)
        engine = self._stand.rig(0).engine
        # As training will have it: read from the config, with its corrections.
        config = load_config({**engine.config.document(), "scheduler": section}, world_size=engine.world_size)

        def schedule(optimizer: Optimizer) -> Schedule:
            built = build_schedule(config, optimizer)
            assert isinstance(built, Schedule)
            return built

        return Run(candidate.name, candidate.kind, schedule, updates, validations=TRIAL_MULTIPLE)

    # -- one run ---------------------------------------------------------------------------------

    def _make(self, run: Run) -> Curve:
        rig = self._stand.rig(run.seed)
        self._meter.begin(self._number, run, rig.engine.world)
        curve = rig.make(run, self._meter)
        with self._lock:
            self._meter.end()
            self._partial = self._stopped = None  # a thread may have broken off a run that came to its end after all
        return curve

    @property
    def _ratios(self) -> tuple[float, ...]:
        return self._facts.test.group_ratios

    def _optimizer(self) -> Optimizer:
        optimizer = self._stand.rig(0).engine.optimizer
        assert optimizer is not None
        return optimizer

    def _diverged_at(self) -> float | None:
        """The lowest rate at which a sweep diverged."""
        ends = [(curve, curve.diverged_at) for curve in self._curves if curve.kind == "exponential"]
        return min((curve.lrs[end] for curve, end in ends if end is not None), default=None)
