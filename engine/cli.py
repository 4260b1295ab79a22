"""The command `redline`: what can be done without writing a script.

Exit codes: 0 done, 1 the input is at fault or a range test shows no usable descent (the message says why),
2 the command line is at fault, 3 (validate only) the config is valid DeepSpeed but asks for what is not supported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.arguments import build_parser
from engine.errors import ConfigError, EngineError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except EngineError as error:
        # Every process reads the same config and finds the same mistakes.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"redline{_rank()}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"redline: {error.filename or 'file'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("redline: interrupted", file=sys.stderr)
        return 130


def _rank() -> str:
    """Which of several processes speaks: a file may be missing on one host only."""
    return f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""


def _validate(options: argparse.Namespace) -> int:
    from engine.config import origins, validate

    reports = [validate(Path(name), world_size=options.world_size, policy=options.schema) for name in options.configs]
    if options.json:
        values = [report.to_json() for report in reports]
        for value, report in zip(values, reports):
            if options.effective and report.config is not None:
                value["origins"] = origins(report.config)
        print(json.dumps(values[0] if len(values) == 1 else values, indent=2))
    else:
        width, color = _terminal()
        print("\n\n".join(report.to_text(color, width=width, whole=options.effective) for report in reports))
    codes = {report.exit_code for report in reports}
    return 1 if 1 in codes else max(codes)


def _explain(options: argparse.Namespace) -> int:
    from engine.config.explain import explain
    from engine.config.table import paint_nothing, paint_on_terminal

    width, color = _terminal()
    print(explain(options.key, width, paint_on_terminal if color else paint_nothing))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from engine.config import differences, validate
    from engine.config.table import rows_as_text

    configs = []
    for name in (options.first, options.second):
        report = validate(name, world_size=options.world_size)
        if report.config is None:
            raise ConfigError(report.errors, report.source)
        configs.append(report.config)
    rows = [
        (path, "-" if one is None else str(one), "-" if other is None else str(other))
        for path, one, other in differences(*configs)
    ]
    if not rows:
        print("no difference")
        return 0
    width, _ = _terminal()
    print("\n".join(rows_as_text(rows, ("key", options.first, options.second), width)))
    return 0


def _terminal() -> tuple[int | None, bool]:
    """The width of the terminal, None for a pipe or a file; and whether it wants color."""
    if not sys.stdout.isatty():
        return None, False
    return shutil.get_terminal_size().columns, "NO_COLOR" not in os.environ


def _schema(options: argparse.Namespace) -> int:
    from engine.config import build_schema

    print(json.dumps(build_schema(), indent=2))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from engine.config import load_config
    from engine.preview import trace_schedule

    trace = trace_schedule(load_config(Path(options.config)), options.steps)
    print(trace.to_text())
    if options.csv:
        print(f"Written to {trace.save_csv(Path(options.csv))}")
    print(f"Written to {trace.save_picture(Path(options.out or Path(options.config).stem + '_schedule.png'))}")
    return 0


def _range_test(options: argparse.Namespace) -> int:
    import torch

    from engine.range_test import run_range_test
    from engine.range_test.report import show_report
    from engine.range_test.task import load_task
    from engine.start import initialize

    torch.manual_seed(options.seed)
    task = load_task(options.task)
    engine = initialize(task.model, Path(options.config))
    engine.recorder = None  # of a passive test: this one keeps its own record
    Path(options.out).mkdir(parents=True, exist_ok=True)  # a folder that cannot be is found out before the test
    result = run_range_test(
        engine,
        task.data,
        task.loss,
        validation=task.validation,
        rates=options.rates,
        min_lr=options.min_lr,
        step_size=options.step_size,
        growth=options.growth,
        steps=options.steps,
        baseline=options.baseline,
        seeds=options.seeds,
        batch_sizes=options.batch_sizes,
        sweep=dict(options.sweep),
        train_steps=options.train_steps,
        progress=False if options.quiet else None,
    )
    if engine.global_rank == 0:
        print(show_report(result, options.out))
    return 0 if result.has_suggestion else 1


def _tune(options: argparse.Namespace) -> int:
    from engine.tuning.command import run_command

    return run_command(options)


def _report(options: argparse.Namespace) -> int:
    from engine.range_test.report import load_result, show_report
    from engine.tuning.command import report_tuning
    from engine.tuning.store import is_tuning

    source = Path(options.source)
    if is_tuning(source):
        return report_tuning(source, options.out or source, options.train_steps, options.smoothing)
    result = load_result(
        source,
        lr_column=options.lr_column,
        loss_column=options.loss_column,
        train_batch_size=options.batch_size,
    )
    if options.train_steps:
        result = result.planned_for(options.train_steps)
    result = result.smoothed_by(options.smoothing)
    # Beside a table of somebody else's, in a folder of its own; a test's own folder is renewed.
    out = options.out or (source if source.is_dir() else f"{source.stem}_report")
    print(show_report(result, out, beta=options.smoothing))
    return 0 if result.has_suggestion else 1


def _consolidate(options: argparse.Namespace) -> int:
    from engine.checkpoint.consolidate import consolidate

    done = consolidate(
        options.directory,
        options.output,
        tag=options.tag,
        dtype=options.dtype,
        force=options.force,
        progress=not options.quiet,
    )
    print(f"{done.path}: {done.tensors} tensors, {done.bytes / 2**20:,.1f} MiB; from {done.source}")
    for alias, name in done.aliases.items():
        print(f"  {alias} is tied to {name}")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "validate": _validate,
    "explain": _explain,
    "diff": _diff,
    "schema": _schema,
    "plot": _plot,
    "range-test": _range_test,
    "tune": _tune,
    "report": _report,
    "consolidate": _consolidate,
}
