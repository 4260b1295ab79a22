"""`redline tune`: the task and the config in, the report and an exit code out."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from engine.config import load_config
from engine.engine import Engine
from engine.errors import RangeTestError
from engine.range_test.smoothing import SMOOTHING
from engine.range_test.task import Task, load_task
from engine.start import initialize
from engine.tuning.api import Interrupted, Wishes, run_tuning
from engine.tuning.report import show_tuning, write_tuning
from engine.tuning.result import Tuning
from engine.tuning.stand import FreshEngines
from engine.tuning.stop import Stop
from engine.tuning.store import load_tuning

__all__ = ["report_tuning", "run_command"]


def run_command(options: argparse.Namespace) -> int:
    """Tune as the command line says.

    Returns:
        0; 1 where no config can be suggested; 130 after Ctrl-C and 143 after SIGTERM.
    """
    wishes = Wishes(
        steps=options.steps,
        budget=options.budget,
        max_updates=options.max_updates,
        seeds=options.seeds,
        batch_sizes=options.batch_sizes,
        sweep=dict(options.sweep or ()),
        target_batch_size=options.target_batch,
        target_processes=options.target_processes,
    )
    config = Path(options.config)
    load_config(config)  # a mistake in it is found out before the task is built

    def build(task: Task) -> Engine:
        engine = initialize(task.model, config)
        engine.recorder = None  # of a passive test: this keeps its own record
        return engine

    is_first = os.environ.get("RANK", "0") == "0"
    stand = FreshEngines(lambda: load_task(options.task), build, options.seed)
    # Signals are taken until the report is written: torchrun sends each twice.
    with Stop(ends=True) as stop:
        try:
            shown = False if options.quiet else None
            tuning, code = run_tuning(stand, wishes, stop, out=options.out, progress=shown), 0
        except Interrupted as interrupted:
            tuning, code = interrupted.tuning, 128 + interrupted.signal
        if is_first:
            _tell(tuning, options.out)
    return code or int(tuning.refusal is not None)


def report_tuning(directory: Path, out: str | Path, steps: int | None, beta: float) -> int:
    """Read a finished tuning again and write its files."""
    tuning = load_tuning(directory)
    if steps is not None:
        tuning = tuning.planned_for(steps)
    tuning = replace(tuning, test=tuning.test.smoothed_by(beta))
    _tell(tuning, out, beta=beta)
    return int(tuning.refusal is not None)


def _tell(tuning: Tuning, out: str | Path, *, beta: float = SMOOTHING) -> None:
    """Write the files and print what they say; where they cannot be written, what was found is printed all the same."""
    try:
        said = write_tuning(tuning, out, beta=beta)
    except OSError as error:
        print(show_tuning(tuning, beta=beta), flush=True)
        raise RangeTestError(
            f"out: {out}: {error.strerror or error}; what was found is printed: keep it from there"
        ) from None
    print(show_tuning(tuning, said, beta=beta), flush=True)
