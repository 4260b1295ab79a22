"""Tuning from Python: arguments in, stages run, a result or an interruption out."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from redline.distributed.process_group import World
from redline.engine import Engine
from redline.log import log
from redline.range_test.result import publish
from redline.range_test.session import Session
from redline.range_test.task import LossFn, Mode, Task
from redline.signals import InterruptGuard
from redline.tuning.budget import Request
from redline.tuning.report import prepare_folder, report_of, save_progress
from redline.tuning.result import TRAINED, Tuning
from redline.tuning.tuner import Tuner

__all__ = ["Engines", "Interrupted", "Stop", "run_tuning", "tune"]

PATIENCE = 10.0  # seconds that the current step has after a signal


def tune(
    engine: Engine,
    data: Any,
    loss: LossFn | None = None,
    *,
    steps: int,
    validation: Any = None,
    mode: Mode = "min",
    budget: float | None = None,
    max_updates: int | None = None,
    seeds: int = 1,
    batch_sizes: Sequence[int] | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
    target_batch_size: int | None = None,
    target_processes: int | None = None,
    schedules: Sequence[str] = ("linear", "onecycle"),
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Tuning:
    """Find the learning rate and the schedule for a training, by range tests and short trainings.

    The engine is restored bit for bit. On several ranks, all of them must call this with the same arguments. Ctrl-C and
    SIGTERM end it after the current step; what is known by then is saved to `out`.

    Args:
        engine: An engine at an accumulation boundary.
        data: A dataset, tensors or arrays in a tuple or dict, or an iterable of micro-batches that can be iterated
            repeatedly.
        loss: ``loss(model, batch)`` returning a scalar, or a criterion ``loss(output, target)``; None for a model whose
            output has a ``loss``.
        steps: Optimizer steps of the planned training.
        validation: Data whose loss decides between trials, or a function ``metric(model)`` returning a number; None for
            the training loss.
        mode: Whether a lower ("min") or a higher metric is better ("max"): then its negative is recorded.
        budget: Steps that the tuning may take, as a multiple of the planned ones; validations count, too. None for a
            tenth, and at least for 100 steps, but of a training of fewer than 200 for half.
        max_updates: The same as a number; None for 1,000, or from half a training on for no limit.
        seeds: Repetitions of the tests. On a live engine a seed changes the order of the data and dropout, not the
            initial weights; `redline tune` builds a new model for each.
        batch_sizes: Batch sizes to compare, reached by gradient accumulation.
        sweep: Values of "weight_decay" and "momentum" to compare.
        target_batch_size: Write the config for this batch size; None for the engine's.
        target_processes: Write the config for this number of ranks; None for the current one.
        schedules: The schedules to try at the peak that was found, of "linear", "onecycle", "cosine" and "wsd".
        out: Folder to save to after each stage.
        force: Replace earlier results in `out`.
        progress: Show a progress bar; None shows one on a terminal and some lines elsewhere.

    Returns:
        Tests, trials and the config of the winner, the same on every rank.

    Raises:
        RangeTestError: An argument is invalid, `out` cannot be written to or holds earlier results, or the budget is
            too small for any test.
        Interrupted: A signal ended it; has the tuning so far.
    """
    request = Request(
        steps, budget, max_updates, seeds, batch_sizes, sweep, target_batch_size, target_processes, schedules
    )
    task = Task(engine.module, data, loss, validation, mode)
    # Signals first: a session handles only those that nobody else does.
    with Stop() as stop:
        engines = Engines(lambda seed: (engine, task), per_seed=False)
        return run_tuning(engines, request, stop, out=out, force=force, progress=progress)


def run_tuning(
    engines: Engines,
    request: Request,
    stop: Stop,
    *,
    out: str | Path | None,
    progress: bool | None,
    force: bool = False,
) -> Tuning:
    """Run all stages, close the engines, and send the curves to the monitors of the last one; see :func:`tune`."""
    try:
        try:
            world = engines.session(0).engine.world
            folder, show = (out, progress) if world.rank == 0 else (None, False)
            save = partial(save_progress, directory=folder)
            tuner = Tuner(engines.session, request, save, partial(_keep, out), validates=engines.validates, show=show)
            prepare_folder(folder, world, force=force)
            if folder is not None:
                log.info("tune: at most %d of %d planned steps: %s", tuner.plan.total, request.steps, tuner.plan)
            stop.report = lambda number: tuner.break_off(signal.Signals(number).name)
            tuner.run(lambda: stop.check(world))
        finally:
            last = engines.close()
        tuning = tuner.known
        if last is not None:
            search, trials = ([trial.curve for trial in each] for each in (tuning.search, tuning.trials))
            curves = {"RangeTest": report_of(tuning).curves, "Search": search, "Trials": trials}
            publish(last, curves, tuning.answer, tuning.left_out)
        stop.check(world)  # a signal may have come since the last step
    except Interrupted as error:
        error.tuning = tuner.known
        raise
    return tuning


def _keep(out: str | Path | None, engine: Engine) -> None:
    """Save the training that an engine has just completed, on all ranks."""
    if out is not None:
        engine.save_checkpoint(Path(out) / TRAINED, tag="best")


class Engines:
    """Opens range test sessions, one at a time, on engines that `build` makes for a seed.

    With `per_seed` each seed has an engine of its own, whose initial weights differ, too; else all have one.
    """

    def __init__(self, build: Callable[[int], tuple[Engine, Task]], *, per_seed: bool) -> None:
        self._build, self._per_seed = build, per_seed
        self._session: Session | None = None
        self._seed: int | None = None
        self._scale: dict[str, Any] | None = None  # loss scale at which the last engine's runs have settled
        self.validates = False

    def session(self, seed: int) -> Session:
        """The open session of a seed; a session of another one is closed first."""
        if self._session is not None and (seed == self._seed or not self._per_seed):
            return self._session
        if self.close() is None:
            engine, task = self._build(seed)
        else:
            gc.collect()  # engines and DDP are in reference cycles, and only one of them fits into memory
            level = log.level
            log.setLevel(logging.WARNING)  # the first engine has already logged its start-up lines
            try:
                engine, task = self._build(seed)
            finally:
                log.setLevel(level)
        self._seed, self.validates = seed, task.validation is not None
        session = Session(engine, task.data, task.loss, validation=task.validation, mode=task.mode)
        session.scale = self._scale
        self._session = session.__enter__()
        return self._session

    def close(self) -> Engine | None:
        """Close the open session, which restores its engine; returns the engine, for its monitors."""
        if self._session is None:
            return None
        session, self._session = self._session, None
        self._scale = session.scale
        session.__exit__(None, None, None)
        return session.engine


class Interrupted(KeyboardInterrupt):
    """A tuning was ended by Ctrl-C or SIGTERM.

    Attributes:
        tuning: What was known by then; complete, and not `stopped`, if the signal came after the last step.
        signal: The number of the signal.
    """

    tuning: Tuning

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number

    def __str__(self) -> str:
        return self.tuning.stopped or f"by {self.args[0]} after the last step"


class Stop(InterruptGuard):
    """A context in which SIGINT and SIGTERM end a tuning after the current step, on all ranks at the same one.

    Attributes:
        report: Called in a thread, with the signal's number, if the step does not end within `patience` seconds:
            torchrun kills its workers 30 seconds after a signal.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        super().__init__((signal.SIGINT, signal.SIGTERM), replaces=True)
        self.report: Callable[[int], object] | None = None
        self._patience = patience
        self._asked, self._ended = threading.Event(), threading.Event()

    def __enter__(self) -> Stop:
        self.install()
        # Begun here: a signal handler must not begin a thread, since it may have interrupted that very code.
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._asked.set()
        self.remove()

    def check(self, world: World) -> None:
        """Raise Interrupted if any rank was asked to stop; a collective where there are several."""
        if number := self.requested(world):
            self._ended.set()
            raise Interrupted(number)

    def _on_request(self, number: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            # Not print, which is not reentrant: the signal may have come inside another one.
            os.write(2, f"\nredline: {name}: stopping after this step; again to exit at once\n".encode())
        self._asked.set()

    def _watch(self) -> None:
        self._asked.wait()
        if not self._ended.wait(self._patience) and self.report is not None:
            self.report(self.received)
