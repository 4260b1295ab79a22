"""The commands that find and show learning rates: plot, range-test, tune, report."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from redline.cli.arguments import Argument, aliased, arg, command, kind, numbers, positive
from redline.errors import RangeTestError

if TYPE_CHECKING:
    from redline.engine import Engine
    from redline.range_test.task import Task
    from redline.tuning.result import Tuning

__all__ = ["plot", "range_test", "report", "tune"]


@command(
    arg("config", metavar="CONFIG", help="a config file"),
    arg("--steps", type=positive, metavar="N", help="optimizer steps to plot (default: the schedule's length)"),
    arg("--out", metavar="FILE", help="PNG, SVG or PDF (default: CONFIG's name with _schedule.png)"),
    arg("--csv", metavar="FILE", help="write the numbers as well"),
)
def plot(options: argparse.Namespace) -> int:
    """Plot the learning rate of a config before any training, and its momentum where that changes.

    The charts are printed to the terminal and saved as a picture.

    example:
      redline plot configs/one_cycle.json --steps 5000
    """
    from redline.config import load_config
    from redline.reports.schedule import trace_schedule

    trace = trace_schedule(load_config(Path(options.config)), options.steps)
    # First, since a picture needs matplotlib, and the charts do not.
    print(trace.to_text())
    if options.csv:
        print(f"Written to {trace.save_csv(Path(options.csv))}")
    print(f"Written to {trace.save_picture(Path(options.out or Path(options.config).stem + '_schedule.png'))}")
    return 0


def _sweep_of(text: str) -> tuple[str, list[float]]:
    name, _, values = text.partition("=")
    if name not in ("weight_decay", "momentum"):
        raise ValueError
    return name, [float(value) for value in values.split(",")]


_batch_sizes = kind(
    lambda text: [int(part) for part in text.split(",")], "integers >= 1 with commas, such as 32,128",
    lambda sizes: min(sizes) >= 1,
)  # fmt: skip
_baseline = kind(lambda text: text != "none" and float(text), "a learning rate or none")
_seed = kind(int, "an integer of at most 63 bits", lambda seed: -(2**63) <= seed < 2**63)  # as torch's generators
_smoothing = kind(float, "a number from 0 to below 1", lambda beta: 0 <= beta < 1)
_sweep = kind(_sweep_of, "weight_decay=... or momentum=..., such as weight_decay=0,1e-4,1e-2")
_names = kind(lambda text: text.split(","), "names with commas, such as linear,cosine")


def _task_arguments(out: str) -> tuple[Argument, ...]:
    """What `range-test` and `tune` take alike; `out` is the folder to write to by default."""
    sweep = "also test with these values of weight_decay or momentum; may be given for both"
    return (
        arg("task", metavar="TASK", help="file.py:function"),
        arg("--config", required=True, metavar="CONFIG", help="the config to start from, DeepSpeed's JSON"),
        arg("--out", default=out, metavar="DIR", help="folder to write to (default: %(default)s)"),
        arg("--seeds", type=positive, default=1, metavar="N", help="seeds of each test (default: %(default)s)"),
        arg("--batch-sizes", type=_batch_sizes, metavar="B,B,...", help="also test at these, by accumulation"),
        arg("--sweep", type=_sweep, action="append", default=[], metavar="NAME=V,V,...", help=sweep),
        arg("--seed", type=_seed, default=0, metavar="N", help="of torch's random numbers (default: %(default)s)"),
        arg("--force", action="store_true", help="replace earlier results in DIR"),
        arg("--quiet", action="store_true", help="print no progress"),
    )


@command(
    *_task_arguments("range_test"),
    *aliased("--step-rates", "--rates", dest="rates", type=numbers, metavar="R,R,...",  # the latter is the former name
             help="growth rates, one run each (default: 5,50,500)"),
    arg("--min-lr", type=float, metavar="LR", help="first learning rate (default: the config's, or 1e-4)"),
    arg("--max-lr", type=float, metavar="LR",
        help="one run from MIN_LR (1e-7) to this, exponentially, in place of rates"),
    arg("--step-size", type=positive, metavar="N", help="steps to grow by a rate (default: config's, or STEPS / 20)"),
    arg("--growth", choices=["linear", "exponential"], metavar="GROWTH",
        help="linear or exponential (default: config's, or linear)"),
    arg("--steps", type=positive, default=200, metavar="N", help="optimizer steps of a run (default: %(default)s)"),
    arg("--baseline", type=_baseline, default=True, metavar="LR|none",
        help="fixed rate to compare (default: the optimizer's)"),
    arg("--train-steps", type=positive, metavar="N", help="steps of the training you plan (default: 10 x STEPS)"),
)  # fmt: skip
def range_test(options: argparse.Namespace) -> int:
    """Find the learning rate of a model with a range test.

    TASK is file.py:function, a function that returns model and data, and optionally loss and validation:

      def digits():
          return model, train_dataset, torch.nn.CrossEntropyLoss(), validation_dataset

    data: a dataset, tensors or arrays in a tuple or dict, or a loader. loss: a criterion, or
    loss(model, batch); without one the model's output has a .loss. validation: data, or metric(model).
    Each step rate is one run from the same weights: in STEP_SIZE optimizer steps the learning rate
    grows by rate x MIN_LR, or 1 + rate times with --growth exponential. With --max-lr there is one run,
    from MIN_LR to MAX_LR. The results are a picture, the numbers, and a config with a OneCycle to train with.

    examples:
      redline range-test task.py:digits --config config.json --step-rates 5,50 --out range_test
      redline range-test task.py:digits --config config.json --min-lr 1e-6 --max-lr 1
      torchrun --nproc-per-node 2 -m redline range-test task.py:digits --config config.json
    """
    import torch

    from redline.range_test import run_range_test
    from redline.range_test.result import check_out
    from redline.range_test.task import load_task
    from redline.reports import show_report
    from redline.start import initialize

    check_out(options.out, force=options.force)
    # Before the task is loaded, which makes the model.
    torch.manual_seed(options.seed)
    task = load_task(options.task)
    engine = initialize(task.model, Path(options.config))
    Path(options.out).mkdir(parents=True, exist_ok=True)  # fails before the test where it cannot be made
    names = ("rates", "min_lr", "max_lr", "step_size", "growth", "steps", "baseline", "seeds", "batch_sizes")
    settings = {name: getattr(options, name) for name in (*names, "train_steps")}
    settings |= {"sweep": dict(options.sweep), "progress": False if options.quiet else None}
    result = run_range_test(engine, task.data, task.loss, validation=task.validation, mode=task.mode, **settings)
    if engine.global_rank == 0:
        print(show_report(result, options.out))
    return 0 if result.has_suggestion else 1


@command(
    *_task_arguments("tune"),
    arg("--steps", type=positive, required=True, metavar="N", help="optimizer steps of the training you plan"),
    arg("--budget", type=float, metavar="B",
        help="steps that it may take, in multiples of N (default: 0.1; of a short training 100 steps, or half)"),
    arg("--max-updates", type=positive, metavar="N", help="the same in steps (default: 1000 for a budget below 0.5)"),
    arg("--schedules", type=_names, default=["linear", "onecycle"], metavar="S,S,...",
        help="schedules to try: linear, onecycle, cosine, wsd (default: linear,onecycle)"),
    arg("--target-batch", dest="target_batch_size", type=positive, metavar="B", help="the batch size to tune for"),
    arg("--target-processes", type=positive, metavar="P", help="the number of ranks to tune for"),
)  # fmt: skip
def tune(options: argparse.Namespace) -> int:
    """Find the learning rate and the schedule, and test them by training.

    A range test shows the order of magnitude, and short trainings in miniature find the peak, from the
    config's own learning rate on. Trials with SCHEDULES and with the config's own show which is best, and
    DIR gets its config, tuned.json, with a report. Together they take at most B times the N optimizer
    steps that you plan. TASK is as for range-test; with validation trials are compared by it.

    The config's optimizer and batch size are kept, its schedule is replaced. Where its schedule is an
    LRRangeTest with lr_range_test_min_lr, the tests start there and there is no sweep.
    Ctrl-C ends it at the next step with a report of what is known by then; a second one ends at once.
    Exit code: 0 done, 1 nothing can be suggested (the message says why), 2 wrong command line, 130 Ctrl-C.

    examples:
      redline tune task.py:digits --config config.json --steps 4000
      redline tune task.py:digits --config config.json --steps 4000 --sweep weight_decay=0,1e-4,1e-2
      redline tune task.py:digits --config config.json --steps 4000 --batch-sizes 32,128,512 --target-batch 512
      torchrun --nproc-per-node 2 -m redline tune task.py:digits --config config.json --steps 4000
    """
    import torch

    from redline.config import load_config
    from redline.range_test.result import check_out
    from redline.range_test.task import load_task
    from redline.start import initialize
    from redline.tuning.api import Engines, Interrupted, Stop, run_tuning
    from redline.tuning.budget import Request

    names = ("steps", "budget", "max_updates", "seeds", "batch_sizes", "schedules", "target_batch_size")
    settings = {name: getattr(options, name) for name in (*names, "target_processes")}
    request = Request(**settings, sweep=dict(options.sweep))
    config = Path(options.config)
    check_out(options.out, force=options.force)
    load_config(config)  # report its mistakes before the task is built

    def build(seed: int) -> tuple[Engine, Task]:  # each seed has a model of its own
        torch.manual_seed(options.seed + seed)
        task = load_task(options.task)
        return initialize(task.model, config), task

    engines, progress = Engines(build, per_seed=True), False if options.quiet else None
    with Stop() as stop:  # until the report is written: torchrun sends each signal twice
        try:
            tuning, code = run_tuning(engines, request, stop, out=options.out, force=True, progress=progress), 0
        except Interrupted as interrupted:
            tuning, code = interrupted.tuning, 128 + interrupted.signal
        if os.environ.get("RANK", "0") == "0":
            _print_tuning(tuning, options.out)
    return code or int(tuning.refusal is not None)


def _print_tuning(tuning: Tuning, out: str | Path, beta: float = 0.8) -> None:
    """Print the summary of a tuning and write its files; if that fails, print the config, too."""
    from redline.tuning.report import summarize, write_tuning

    print(summarize(tuning, beta=beta), flush=True)
    try:
        print(write_tuning(tuning, out, beta=beta), flush=True)
    except OSError as error:
        if tuning.refusal is None:
            print(json.dumps(tuning.to_config(), indent=2), flush=True)
        remedy = "the result is printed above, copy it from there"
        raise RangeTestError(f"out: {out}: {error.strerror or error}; {remedy}") from None


@command(
    arg("source", metavar="DIR|FILE", help="the folder that range-test, tune or a training run wrote, or a table"),
    arg("--train-steps", type=positive, metavar="N", help="suggest for a training of N optimizer steps"),
    arg("--smoothing", type=_smoothing, default=0.8, metavar="B", help="weight of the past in curves (default: 0.8)"),
    arg("--out", metavar="DIR", help="folder to write to (default: DIR itself, or FILE's name_report)"),
    arg("--lr-column", metavar="NAME", help="column of FILE with the learning rate"),
    arg("--loss-column", metavar="NAME", help="column of FILE with the training loss"),
    arg("--batch-size", type=positive, metavar="B", help="samples of an optimizer step in FILE"),
    arg("--force", action="store_true", help="replace earlier results in another DIR than the one that is read"),
)
def report(options: argparse.Namespace) -> int:
    """Read a finished range test, tuning or training run, and write its report.

    DIR is the folder that range-test or tune wrote; its files are rewritten. Or it is that of a training run with
    "redline": {"log_dir": DIR} or csv_monitor in its config, whose curves are drawn. FILE is a table that you have: CSV
    with a header, pytorch-lr-finder's history or Lightning's results as JSON. It needs a learning rate and a loss
    for each step; common names of columns are recognized. Its report goes to FILE's name with _report.

    examples:
      redline report range_test --train-steps 5000
      redline report runs/first
      redline report losses.csv --lr-column lr --loss-column loss
    """
    from redline.range_test.result import check_out
    from redline.reports import load_result, show_report
    from redline.reports.run import is_run, show_run
    from redline.tuning.result import is_tuning, load_tuning

    source, train_steps = Path(options.source), options.train_steps
    if is_run(source):
        print(show_run(source, Path(options.out or source), beta=options.smoothing))
        return 0
    if options.out is not None and Path(options.out).resolve() != source.resolve():
        check_out(options.out, force=options.force)
    if is_tuning(source):
        tuning = load_tuning(source)
        tuning = tuning.planned_for(train_steps) if train_steps else tuning
        tuning = replace(tuning, test=tuning.test.smoothed_by(options.smoothing))
        _print_tuning(tuning, options.out or source, options.smoothing)
        return int(tuning.refusal is not None)
    columns = {"lr_column": options.lr_column, "loss_column": options.loss_column}
    result = load_result(source, **columns, train_batch_size=options.batch_size)
    result = (result.planned_for(train_steps) if train_steps else result).smoothed_by(options.smoothing)
    # The report on a table gets a folder of its own; a test's own folder is rewritten.
    out = options.out or (source if source.is_dir() else f"{source.stem}_report")
    print(show_report(result, out))
    return 0 if result.has_suggestion else 1
