"""Measure how good suggested learning rates are, on small real tasks, against a grid of 18 learning rates.

For each task and seed, the engine trains with a method's suggestion as the peak of a linear decay, and the final
validation loss is compared with that of the best of the grid. Methods: the config's own learning rate, Redline by
default and with budgets from 2% to 300% of the training, torch-lr-finder, Lightning, fastai, and two optimizers that
need none.

    scripts/quality --out out                        all tasks, methods and seeds: some hours on two cores
    scripts/quality --out out --tasks digits         some tasks
    scripts/quality --out out --methods Redline      some methods
    scripts/quality --out out --report               only tables of what is there
    scripts/quality --out out --docs                 also rewrite docs/quality.md

All results are kept, one file a task, so that the table can be made in parts. Redline is not asked again after a change
of its rules unless --ask-again says so; a training at an answer that it gave before is not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from bench import cpu_name, system
from suggestions import peers
from suggestions.grid import digest
from suggestions.judge import METHODS, collect, measure
from suggestions.report import block, draw, draw_budgets, renew, tables
from suggestions.tasks import TASKS, Task
from suggestions.work import Cache, Workers

import redline

ROOT = Path(__file__).resolve().parent.parent
PAGE, IMAGES = ROOT / "docs" / "quality.md", ROOT / "docs" / "images"


def main() -> None:
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a script, too, where SIGINT is ignored
        signal.signal(number, signal.default_int_handler)
    left_out = [peer for peer in peers.PEERS if peers.missing(peer)]
    for peer in left_out:
        print(f"quality: {peer} is not installed and left out; scripts/quality installs it", file=sys.stderr)
    try:
        with Workers(options.processes) as workers:
            for task in () if options.report else options.tasks:
                cache = Cache(options.cache, task.name, key_of(task))
                if options.ask_again:
                    cache.forget("ask Redline")
                measure(task, workers, cache, seeds=options.seeds, methods=options.methods)
    except KeyboardInterrupt:
        print("\nquality: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    caches = [Cache(options.cache, task.name, key_of(task)) for task in options.tasks]
    found = [collect(task, cache.found, options.seeds, options.methods) for task, cache in zip(options.tasks, caches)]
    done = [each for each in found if each is not None]
    results = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command_of(sys.argv[1:]),
        "machine": f"{cpu_name()}, {system()}, one thread per process",
        "versions": versions(),
        "left_out": left_out,
        "tasks_left_out": [task.name for task in TASKS if task.name not in {each["name"] for each in done}],
        "tasks": done,
    }
    write(options.out, results)
    print(tables(results))
    if options.docs:
        PAGE.write_text(renew(PAGE.read_text(), block(results)))
        draw(results, IMAGES / "quality.png")
        draw_budgets(results, IMAGES / "quality_budget.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for quality.json, .md and .png")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="results of trainings (default: OUT/cache)")
    parser.add_argument(
        "--tasks",
        type=tasks_named,
        nargs="+",
        metavar="NAME",
        help="this task, all with this in their name, development or held-out",
    )
    parser.add_argument(
        "--methods", type=methods_named, nargs="+", metavar="NAME", help="methods with this in their name, or grid"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of every task (default: %(default)s)")
    parser.add_argument("--ask-again", action="store_true", help="forget what Redline suggested")
    parser.add_argument("--report", action="store_true", help="train nothing, show what is there")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="workers, of one thread each (default: %(default)s)",
    )
    parser.add_argument("--docs", action="store_true", help="also put the results into docs/quality.md")
    options = parser.parse_args()
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes are at least 1")
    options.tasks = [task for task in TASKS if options.tasks is None or any(task in few for few in options.tasks)]
    options.methods = (
        METHODS
        if options.methods is None
        else [method for method in METHODS if any(method in few for few in options.methods)]
    )
    options.cache = options.cache or options.out / "cache"
    return options


def methods_named(part: str) -> list[str]:
    found = [method for method in METHODS if part in method]
    if not found and part != "grid":
        names = "\n  ".join(METHODS)
        raise argparse.ArgumentTypeError(f"no method has {part!r} in its name; there are\n  grid\n  {names}")
    return found


def tasks_named(part: str) -> list[Task]:
    groups = {"development": False, "held-out": True}
    exact = [task for task in TASKS if part == task.name or task.held_out is groups.get(part)]
    found = exact or [task for task in TASKS if part in task.name]
    if not found:
        names = "\n  ".join(task.name for task in TASKS)
        raise argparse.ArgumentTypeError(f"no task has {part!r} in its name; there are\n  {names}")
    return found


def command_of(arguments: list[str]) -> str:
    """The command line without folders."""
    kept = ["--out", "out"]
    given = iter(arguments)
    for argument in given:
        if argument in ("--out", "--cache"):
            next(given)
        elif argument not in ("--docs", "--report", "--ask-again"):
            kept.append(argument)
    return shlex.join(["scripts/quality", *kept])


def key_of(task: Task) -> dict[str, Any]:
    """What a training's result depends on, besides its schedule and seed."""
    return {"torch": torch.__version__, "redline": redline.__version__, "task": digest(task.name)}


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    return found | {peer: peers.version(peer) for peer in peers.PEERS if not peers.missing(peer)}


def write(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "quality.md").write_text(block(results) + "\n")
    draw(results, out / "quality.png")
    draw_budgets(results, out / "quality_budget.png")


if __name__ == "__main__":
    main()
