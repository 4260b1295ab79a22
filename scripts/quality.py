"""How good suggested learning rates are, on small real tasks that were each trained over a whole grid of rates.

For each task, schedule (a cycle, and a warm-up with a linear decay) and seed, a method's suggestion is the maximum of
a training by the engine, whose last validation loss is compared with that of the best of 18 rates. Methods: Redline's
own, and torch-lr-finder's, Lightning's and fastai's by their packages. Run by scripts/quality, which installs those.

    scripts/quality --out out                        all tasks, all seeds: an hour or two of two cores
    scripts/quality --out out --tasks digits         a few tasks
    scripts/quality --out out --docs                 and the results into docs/quality.md

Trainings are kept in --cache, so that another run after a change of rule only makes what it changes.
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
from suggestions.judge import measure
from suggestions.report import block, draw, renew, tables
from suggestions.tasks import TASKS, Task
from suggestions.work import Cache, Crew

import engine

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "images" / "quality.png"


def main() -> None:
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background of a script, too, where SIGINT is ignored
        signal.signal(number, signal.default_int_handler)
    left_out = [] if options.no_peers else [peer for peer in peers.PEERS if peers.missing(peer)]
    for peer in left_out:
        print(f"quality: {peer} is not installed, and left out; scripts/quality installs it", file=sys.stderr)
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command_of(sys.argv[1:]),
        "machine": f"{cpu_name()}, {system()}, one thread a process",
        "versions": versions(),
        "points": options.grid,
        "left_out": left_out,
        "tasks_left_out": [task.name for task in TASKS if task not in options.tasks],
        "tasks": [],
    }
    try:
        with Crew(options.processes) as crew:
            for task in options.tasks:
                cache = Cache(options.cache, task.name, key_of(task))
                results["tasks"].append(
                    measure(
                        task,
                        crew,
                        cache,
                        seeds=options.seeds or task.seeds,
                        grid=options.grid,
                        with_peers=not options.no_peers,
                    )
                )
                write(options.out, results)
    except KeyboardInterrupt:
        done = f"{len(results['tasks'])} of {len(options.tasks)} tasks"
        print(f"\nquality: interrupted with {done} done; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    print(tables(results))
    if options.docs:
        PAGE.write_text(renew(PAGE.read_text(), block(results)))
        draw(results, PICTURE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for quality.json, .md and .png")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="what trainings came to (default: OUT/cache)")
    parser.add_argument(
        "--tasks", type=tasks_named, nargs="+", metavar="NAME", help="those with this in their name (default: all)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="of every task (default: each task's own, 5 or 15)")
    parser.add_argument("--grid", type=int, default=18, metavar="N", help="points of the grid (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="only Redline's own suggestions")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="of one thread each (default: %(default)s)"
    )
    parser.add_argument("--docs", action="store_true", help="put the results into docs/quality.md, too")
    options = parser.parse_args()
    if (options.seeds is not None and options.seeds < 1) or not 2 <= options.grid <= 18 or options.processes < 1:
        parser.error("--seeds and --processes are at least 1, --grid is 2 to 18")
    options.tasks = [task for task in TASKS if options.tasks is None or any(task in few for few in options.tasks)]
    if options.docs and (options.seeds or options.grid < 18 or options.no_peers):
        parser.error("--docs: the page shows whole runs only; leave out --seeds, --grid and --no-peers")
    options.cache = options.cache or options.out / "cache"
    return options


def tasks_named(part: str) -> list[Task]:
    found = [task for task in TASKS if part in task.name]
    if not found:
        names = "\n  ".join(task.name for task in TASKS)
        raise argparse.ArgumentTypeError(f"no task has {part!r} in its name; there are\n  {names}")
    return found


def command_of(arguments: list[str]) -> str:
    """What was typed, but for the folders."""
    kept = ["--out", "out"]
    given = iter(arguments)
    for argument in given:
        if argument in ("--out", "--cache"):
            next(given)
        elif argument != "--docs":
            kept.append(argument)
    return shlex.join(["scripts/quality", *kept])


def key_of(task: Task) -> dict[str, Any]:
    """What a training's result depends on beside its schedule and seed."""
    return {"torch": torch.__version__, "redline": engine.__version__, "task": digest(task.name)}


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    return found | {peer: peers.version(peer) for peer in peers.PEERS if not peers.missing(peer)}


def write(out: Path, results: dict[str, Any]) -> None:
    """After every task: a long run that is cut short has its figures so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "quality.md").write_text(block(results) + "\n")
    draw(results, out / "quality.png")


if __name__ == "__main__":
    main()
