"""Tuning from Python, and what it shares with the command: arguments checked, stages run, signals taken."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.distributed import World
from engine.engine import Engine
from engine.errors import RangeTestError
from engine.log import log
from engine.range_test.conditions import SETTINGS, check
from engine.range_test.publish import publish
from engine.range_test.task import LossFn
from engine.tuning.batch import share_out_batch
from engine.tuning.meter import Meter
from engine.tuning.plan import MAX_UPDATES, TRIES, Plan, Request, make_plan, total_of
from engine.tuning.report import contents_of, prepare_folder, write_tuning
from engine.tuning.result import Tuning
from engine.tuning.stand import OneEngine, Stand
from engine.tuning.stop import Stop, Stopped
from engine.tuning.store import save_tuning
from engine.tuning.tuner import Facts, Tuner, facts_of

__all__ = ["Interrupted", "Wishes", "run_tuning", "tune"]

COUNTS = ("steps", "seeds", "max_updates", "target_batch_size", "target_processes")


class Interrupted(KeyboardInterrupt):
    """A tuning was ended by Ctrl-C or SIGTERM.

    Attributes:
        tuning: what was known by then; whole, and not `stopped`, where the signal came after the last update.
        signal: the number of the signal.
    """

    def __init__(self, tuning: Tuning, number: int) -> None:
        super().__init__(tuning.stopped or f"by {signal.Signals(number).name} after the last update")
        self.tuning, self.signal = tuning, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is asked of a tuning, checked: arguments of :func:`tune`, which has their meaning and their defaults.

    Raises:
        RangeTestError: an argument that cannot be; the message says what can.
    """

    steps: int
    budget: float
    max_updates: int | None
    seeds: int
    batch_sizes: Sequence[int] | None
    sweep: Mapping[str, Sequence[float]] | None
    target_batch_size: int | None
    target_processes: int | None

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in COUNTS}
        counts |= {f"batch_sizes[{index}]": size for index, size in enumerate(self.batch_sizes or ())}
        for name, value in counts.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RangeTestError(f"{name}: got {value!r}; expected an integer >= 1")
        if not 0 < self.budget <= 1:
            raise RangeTestError(
                f"budget: got {self.budget!r}; expected a share of the planned updates, above 0 and at most 1"
            )
        for name, values in (self.sweep or {}).items():
            if name not in SETTINGS:
                raise RangeTestError(f'sweep: got "{name}"; expected {" or ".join(SETTINGS)}')
            if bad := [value for value in values if not 0 <= value < math.inf]:
                raise RangeTestError(f"sweep: got {name} {bad[0]!r}; expected numbers >= 0")
        # Too few updates are found out before anything is built.
        total_of(self.steps, self.budget, self.max_updates or MAX_UPDATES)

    @property
    def settings(self) -> tuple[tuple[str, float], ...]:
        """What `sweep` asks for, one by one."""
        return tuple((name, float(each)) for name, values in (self.sweep or {}).items() for each in values)

    def plan(self, facts: Facts, *, validates: bool) -> Plan:
        """The plan for an engine.

        Raises:
            RangeTestError: the budget is too small, or a batch cannot be made of the engine's micro-batches.
        """
        own = facts.test.train_batch_size
        unit = facts.micro_batch * facts.test.world_size
        batch_sizes = tuple(self.batch_sizes or ())
        for size in batch_sizes:
            if size % unit:
                near = sorted({max(unit, size // unit * unit), -(-size // unit) * unit})
                raise RangeTestError(
                    f"batch_sizes: {size} is no multiple of {unit} (micro-batch {facts.micro_batch} x "
                    f"{facts.test.world_size} processes), of which larger batches are accumulated; give "
                    f"{' or '.join(map(str, near))}, or a smaller train_micro_batch_size_per_gpu in the config"
                )
        if self.target_batch_size is not None or self.target_processes is not None:
            share_out_batch(self.target_batch_size or own, self.target_processes or facts.test.world_size, own)
        return make_plan(
            Request(
                steps=self.steps,
                batch_size=own,
                budget=self.budget,
                max_updates=self.max_updates or MAX_UPDATES,
                named_start=facts.named_start is not None,
                seeds=self.seeds,
                batch_sizes=batch_sizes,
                settings=self.settings,
                validates=validates,
            )
        )


def tune(
    engine: Engine,
    data: Any,
    loss: LossFn,
    *,
    steps: int,
    validation: Any = None,
    budget: float = 0.1,
    max_updates: int | None = None,
    seeds: int = 1,
    batch_sizes: Sequence[int] | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
    target_batch_size: int | None = None,
    target_processes: int | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
) -> Tuning:
    """Find the learning rate and the schedule for a training: range tests, trials of what they suggest, the winner.

    The engine is then as it was before. On several processes every one calls this with the same arguments. Ctrl-C and
    SIGTERM end it at the next update, with all that is known by then saved to `out`.

    Args:
        engine: at the beginning of an update.
        data: a dataset, a tuple of tensors, or anything that yields micro-batches again and again.
        loss: ``loss(model, batch)`` to a scalar, or a criterion ``loss(output, target)``.
        steps: updates of the planned training.
        validation: data by whose loss trials are judged; None for the training loss.
        budget: share of the planned updates that the tuning may take, above 0 and at most 1.
        max_updates: the tuning's updates, at most; None for 1,000.
        seeds: repetitions of the tests. On a live engine they change the order of the data and dropout, not the initial
            weights; `redline tune` builds the model anew for each.
        batch_sizes: also test at these, by gradient accumulation.
        sweep: also test with these values of "weight_decay" and "momentum".
        target_batch_size: write the config for this batch.
        target_processes: write the config for so many processes.
        out: folder to save to, as each stage ends; None for none.
        progress: show a bar; None shows one on a terminal and some lines elsewhere.

    Returns:
        Tests, trials and the config of the winner, the same on every process.

    Raises:
        RangeTestError: an argument that cannot be, such as a folder that cannot be written to; a budget too small for
            any test.
        Interrupted: a signal ended it; it is a KeyboardInterrupt, and has the tuning so far.
    """
    wishes = Wishes(
        steps=steps,
        budget=budget,
        max_updates=max_updates,
        seeds=seeds,
        batch_sizes=batch_sizes,
        sweep=sweep,
        target_batch_size=target_batch_size,
        target_processes=target_processes,
    )
    with Stop() as stop:  # before the rig, which leaves signals to whoever has them
        stand = OneEngine(engine, data, loss, validation)
        return run_tuning(stand, wishes, stop, out=out, progress=progress)


def run_tuning(stand: Stand, wishes: Wishes, stop: Stop, *, out: str | Path | None, progress: bool | None) -> Tuning:
    """Run all stages on a stand, which is closed at the end, and tell its engine's monitors; see :func:`tune`."""
    try:
        engine = stand.rig(0).engine
        facts = facts_of(engine, wishes.steps)
        plan = wishes.plan(facts, validates=stand.validates)
        for name, value in wishes.settings:
            check(engine, None, {name: value})
        is_first = engine.global_rank == 0
        _look_at(out, engine.world)
        del engine  # a stand that builds engines has one at a time
        if is_first and out is not None:
            log.info("%s", _intent(plan, wishes))
        save = _saver(out if is_first else None)
        show = progress if is_first else False
        meter = Meter(plan.total, facts.test.train_batch_size, show, stop)
        tuner = Tuner(stand, facts, plan, _frame(facts, wishes), meter, save)
        stop.report = lambda number: tuner.break_off(signal.Signals(number).name)
        with meter:
            try:
                tuning = tuner.run()
            except Stopped as stopped:
                raise Interrupted(tuner.result(), stopped.signal) from None
        stop.report = None  # all is saved
    finally:
        last = stand.close()
    if last is not None:
        publish(last, contents_of(tuning))
    try:
        meter.look()  # a signal may have come since the last update
    except Stopped as stopped:
        raise Interrupted(tuning, stopped.signal) from None
    return tuning


def _frame(facts: Facts, wishes: Wishes) -> Tuning:
    return Tuning(
        test=facts.test,
        trials=(),
        steps=wishes.steps,
        budget=wishes.budget,
        spent=0,
        updates=0,
        seconds=0.0,
        micro_batch=facts.micro_batch,
        own_lr=facts.own_lr,
        momentum=facts.momentum,
        target_batch_size=wishes.target_batch_size,
        target_processes=wishes.target_processes,
    )


def _look_at(out: str | Path | None, world: World) -> None:
    """Find out before the tests whether rank zero can write to the folder; all processes leave if it cannot."""
    problem = None
    if world.rank == 0 and out is not None:
        try:
            prepare_folder(out)
        except RangeTestError as error:
            problem = str(error)
    if problem := world.gather(problem)[0]:
        raise RangeTestError(problem)


def _intent(plan: Plan, wishes: Wishes) -> str:
    """What will be done, in one line."""
    parts = [("sweep", plan.sweep), ("slow", plan.slow), ("fast", plan.fast)]
    told = [f"{name} {updates}" for name, updates in parts if updates]
    if plan.seeds > 1:
        told.append(f"{plan.seeds} seeds")
    if plan.asked:
        told.append(f"{len(plan.batch_sizes) + len(plan.settings)} tests of {plan.asked} for what was asked beside")
    if plan.search:
        told.append(f"search {TRIES} x {plan.search}")
    told.append(f"trials {plan.trials}" if plan.trials else "no trials")
    share = plan.total / wishes.steps
    return f"tune: at most {plan.total} updates, {share:.1%} of {wishes.steps} planned: {', '.join(told)}"


def _saver(out: str | Path | None) -> Callable[[Tuning], None]:
    """Keeps what is known so far; a full disk is no reason to stop measuring."""

    reported = False

    def save(tuning: Tuning) -> None:
        nonlocal reported
        if out is None:
            return
        try:
            if tuning.stopped is None and not reported:
                save_tuning(tuning, out)
            elif tuning.test.curves:
                write_tuning(tuning, out, picture=False)  # there may be little time
                if not reported:
                    log.warning("tune: broken off %s; what is known so far is in %s", tuning.stopped, out)
                reported = True
        except OSError as error:
            log.warning("tune: what is known so far could not be written to %s: %s", out, error.strerror or error)

    return save
