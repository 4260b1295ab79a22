"""Repeat DeepSpeed's two learning rate tutorials on public data.

"Learning Rate Range Test" and "1-Cycle Schedule" describe two models that are not public. This script uses two that
anybody can train: an MLP on scikit-learn's handwritten digits with SGD, and a small transformer on the source text of
Python's standard library with Adam. For each it

    1  finds the best fixed learning rate for a small batch
    2  trains with fixed learning rates at eight times the batch, by gradient accumulation
    3  runs a slow and a fast range test at the large batch, which suggest a 1Cycle schedule
    4  trains with that schedule, and with linear decay
    5  writes tables and plots

Run by scripts/tutorials, which installs what is needed. docs/tutorial_range_test.md and docs/tutorial_1cycle.md explain
it; --docs puts the tables and plots of a run there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from tutorial.pictures import draw_methods, draw_tests
from tutorial.runs import SCALE, TASKS, Method, Run, Task, find_boundaries, train, write_config
from tutorial.tables import (
    ONE_CYCLE_CLAIMS,
    RANGE_TEST_CLAIMS,
    Outcome,
    claims_table,
    methods_table,
    render,
    save_numbers,
    spread,
    suggestion_block,
    tests_table,
)  # fmt: skip

from redline import EngineError, RangeTestResult
from redline.range_test import Suggestion

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "tutorial_range_test.md", ROOT / "docs" / "tutorial_1cycle.md")


class Study:
    """The trainings of one task, and the folder that they are written to."""

    def __init__(self, task: Task, out: Path, seeds: int) -> None:
        self.task, self.out, self.seeds = task, out, seeds

    def run(self) -> Outcome:
        task, large = self.task, SCALE * self.task.batch
        print(f"\n{task.title}\n" + "-" * len(task.title), flush=True)
        print(f"Fixed learning rates at batch size {task.batch}, {task.steps(task.batch)} steps:")
        small = best_of([self.train_fixed("small batch", lr, scale=1) for lr in task.lrs])

        print(f"Fixed learning rates at batch size {large}, {task.steps(large)} steps of {SCALE} micro-batches:")
        names = {1: "Fixed", SCALE: "LinearScale"}
        grid = {k: self.train_fixed(names.get(k, f"Fixed x {k}"), k * small.lr) for k in task.factors}
        best = best_of(list(grid.values()))

        print(f"Range tests at batch size {large}, and the best fixed learning rate, {best.lr:g} ", end="", flush=True)
        result = find_boundaries(task, self.out / "configs" / f"{SCALE}x_fixed_{best.lr:g}.json", self.seeds)
        result.save(self.out / "range_test")
        print("\n" + "\n".join(f"  {line}" for line in result.summary().splitlines()), flush=True)

        best = Method(f"best of {len(grid)} fixed", best.lr, best.batch, best.runs)
        return Outcome(task, result, [small, grid[1], grid[SCALE], best, *self.train_schedules(result)])

    def train(self, name: str, config: Path, lr: float, *, scale: int = SCALE) -> Method:
        """One training per seed."""
        start = time.perf_counter()
        print(f"  {name:<26} learning rate {lr:<7g} ", end="", flush=True)
        runs = []
        for seed in range(self.seeds):
            runs.append(train(self.task, config, seed))
            print(".", end="", flush=True)
        method = Method(name, lr, scale * self.task.batch, runs)
        text = f"validation loss {spread(method.losses, 4)}   accuracy {spread(method.accuracies, 1)} %"
        print(f"  {text}   {time.perf_counter() - start:.0f} s", flush=True)
        return method

    def train_fixed(self, name: str, lr: float, *, scale: int = SCALE) -> Method:
        config = write_config(self.task.config(lr, scale=scale), self.out / "configs" / f"{scale}x_fixed_{lr:g}.json")
        return self.train(name, config, lr, scale=scale)

    def train_schedules(self, result: RangeTestResult) -> list[Method]:
        """1Cycle as suggested, and linear decay from the same peak; nothing without a suggestion."""
        if not isinstance(result.suggestion, Suggestion):
            return []
        peak, steps = result.suggestion.cycle_max_lr, result.train_steps
        warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": peak, "warmup_num_steps": max(2, steps // 10)}
        params = {**warmup, "warmup_type": "linear", "total_num_steps": steps}
        decay = {**result.to_config(), "scheduler": {"type": "WarmupDecayLR", "params": params}}
        print("Training with schedules:")
        cycle = write_config(result.to_config(), self.out / "configs" / "one_cycle.json")
        methods = [self.train("1Cycle", cycle, peak)]
        if self.task.ranks > 1:
            methods.append(self.train_on_ranks(cycle, peak))
        decay_config = write_config(decay, self.out / "configs" / "linear_decay.json")
        return [*methods, self.train("linear decay", decay_config, peak)]

    def train_on_ranks(self, config: Path, lr: float) -> Method:
        """The same config on several ranks, which accumulate less each."""
        ranks, results = self.task.ranks, self.out / "ranks.json"
        launch = ["--standalone", "--nproc-per-node", str(ranks), "scripts/digits.py", "--config", shown(config)]
        launch += ["--epochs", str(self.task.epochs), "--seeds", str(self.seeds), "--out", str(results)]
        print(f"  $ {shlex.join(['torchrun', *launch])}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # ranks share the cores
        command = [sys.executable, "-m", "torch.distributed.run", *launch]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        per_epoch = self.task.steps(SCALE * self.task.batch) // self.task.epochs
        runs = [
            Run(seed, [], [(per_epoch * epoch, end["loss"], end["accuracy"]) for epoch, end in enumerate(ends, 1)])
            for seed, ends in enumerate(json.loads(results.read_text()))
        ]
        return Method(f"1Cycle, {ranks} ranks", lr, SCALE * self.task.batch, runs)


def best_of(methods: list[Method]) -> Method:
    """The lowest mean validation loss: the grid is selected by the loss that judges it, in its favor."""
    return min(methods, key=lambda method: method.loss)


def tables(outcomes: list[Outcome], seeds: int) -> dict[str, str]:
    """The pages' tables by name."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Redline {version('redline')}"
    blocks = {
        "run": f"By `scripts/tutorials --seeds {seeds}` on {date.today()}: {versions}, CPU, one thread; mean and "
        f"standard deviation over {seeds} seeds.",
        "range test claims": claims_table(RANGE_TEST_CLAIMS, outcomes),
        "one cycle claims": claims_table(ONE_CYCLE_CLAIMS, outcomes),
    }
    for outcome in outcomes:
        blocks[f"{outcome.task.name} range test"] = tests_table(outcome)
        blocks[f"{outcome.task.name} suggestion"] = suggestion_block(outcome)
        blocks[f"{outcome.task.name} one cycle"] = methods_table(outcome)
    return blocks


def write(outcomes: list[Outcome], seeds: int, out: Path, *, docs: bool) -> None:
    """Numbers, plots and tables, into `out` and, if asked for, into the docs."""
    blocks = tables(outcomes, seeds)
    (out / "tables.md").write_text("\n\n".join(f"## {name}\n\n{text}" for name, text in blocks.items()) + "\n")
    for page in PAGES if docs else ():
        page.write_text(render(page.read_text(), blocks))
    for outcome in outcomes:
        name = outcome.task.name
        save_numbers(outcome, out / name)
        draw_tests(outcome, out / name / "range_test.png")
        draw_methods(outcome, out / name / "one_cycle.png")
        for kind in ("range_test", "one_cycle") if docs else ():
            shutil.copy(out / name / f"{kind}.png", ROOT / "docs" / "images" / f"tutorial_{kind}_{name}.png")


def shown(path: Path) -> str:
    """A path relative to the repository, if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/tutorials", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "tutorials-output"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: tutorials-output")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run in seconds; its results mean nothing")
    parser.add_argument("--docs", action="store_true", help="put this run's tables and plots into docs/")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}; expected at least 1")
    if options.docs and options.quick:
        parser.error("--docs: the pages show full runs only; leave out --quick")
    start = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so small networks gain nothing from a GPU, and two ranks need two ...
    torch.set_num_threads(1)  # ... nor from more than one thread
    logging.getLogger("redline").setLevel(logging.ERROR)  # each engine would log its summary
    logging.getLogger("redline.schedulers").setLevel(logging.ERROR)
    out = options.out.resolve()
    tasks = [task.quick() if options.quick else task for task in TASKS]
    try:
        outcomes = [Study(task, out / task.name, options.seeds).run() for task in tasks]
    except (EngineError, subprocess.CalledProcessError) as error:
        print(f"tutorials: {error}", file=sys.stderr)
        return 1
    write(outcomes, options.seeds, out, docs=options.docs)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Results are in {shown(out)}:")
    print("  tables.md                     the tables (those in docs/ come from another run)")
    for task in tasks:
        print(f"  {task.name + '/range_test.png':<29} validation loss and learning rate of the range tests")
        print(f"  {task.name + '/one_cycle.png':<29} the same for the trainings at {SCALE} times the batch")
        print(f"  {task.name + '/configs':<29} every config that was trained with")
        print(f"  {task.name + '/runs.csv':<29} all numbers (runs.json, too; those of the tests are in range_test)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
