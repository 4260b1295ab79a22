"""The results of DeepSpeed's two tutorials on learning rates, in kind, on real data.

"Learning Rate Range Test" and "1-Cycle Schedule" tell of two models of their authors'. Here are two that anybody can
train: an MLP on scikit-learn's handwritten digits with SGD, and a small transformer on the characters of Python's own
standard library with Adam. For each:

    1  the best fixed learning rate for a small batch, which is what the hardware holds
    2  fixed learning rates at eight times the batch, by gradient accumulation: the same one, eight times it, others
    3  a slow and a fast range test at the large batch, and the 1Cycle that they suggest
    4  training with it, and with a linear decay
    5  tables, honest whatever comes out, and pictures

Run by scripts/tutorials, which installs what it needs first. docs/tutorial_range_test.md and docs/tutorial_1cycle.md
walk through it; `--docs` puts the tables and pictures of a run there.
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
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from tutorial_claims import ONE_CYCLE_CLAIMS, RANGE_TEST_CLAIMS, claims_table
from tutorial_pictures import draw_methods, draw_tests
from tutorial_runs import SCALE, TASKS, Method, Run, Task, find_boundaries, rehearsal, train, write_config
from tutorial_tables import (
    Outcome,
    methods_table,
    render,
    save_numbers,
    spread,
    suggestion_block,
    tests_table,
    write_tables,
)

from engine import EngineError, RangeTestResult
from engine.range_test import Suggestion

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "tutorial_range_test.md", ROOT / "docs" / "tutorial_1cycle.md")


@dataclass(frozen=True)
class Study:
    """One task's share of the work, and the folder that it is left in."""

    task: Task
    out: Path
    seeds: int

    def train(self, name: str, config: Path, lr: float, *, scale: int = SCALE) -> Method:
        """One training per seed, as the config says."""
        start = time.perf_counter()
        print(f"  {name:<26} learning rate {lr:<7g} ", end="", flush=True)
        runs = []
        for seed in range(self.seeds):
            runs.append(train(self.task, config, seed))
            print(".", end="", flush=True)
        method = Method(name, lr, scale * self.task.batch, runs)
        told = f"validation loss {spread(method.losses, 4)}   accuracy {spread(method.accuracies, 1)} %"
        print(f"  {told}   {time.perf_counter() - start:.0f} s", flush=True)
        return method

    def train_fixed(self, name: str, lr: float, *, scale: int = SCALE) -> Method:
        """One training per seed at a fixed learning rate."""
        config = write_config(self.task.config(lr, scale=scale), self.out / "configs" / f"{scale}x_fixed_{lr:g}.json")
        return self.train(name, config, lr, scale=scale)


def study(task: Task, out: Path, seeds: int) -> Outcome:
    """All of one task."""
    work = Study(task, out / task.name, seeds)
    print(f"\n{task.title}\n" + "-" * len(task.title), flush=True)

    print(f"Fixed learning rates at batch size {task.batch}, {task.updates(task.batch)} updates:")
    small = best_of([work.train_fixed("small batch", lr, scale=1) for lr in task.lrs])

    large = SCALE * task.batch
    print(f"Fixed learning rates at batch size {large}, {task.updates(large)} updates of {SCALE} micro-batches:")
    names = {1: "Fixed", SCALE: "LinearScale"}
    grid = {k: work.train_fixed(names.get(k, f"Fixed x {k}"), k * small.lr) for k in task.factors}
    best = best_of(list(grid.values()))

    print(f"Range tests at batch size {large}, beside the best fixed learning rate, {best.lr:g} ", end="", flush=True)
    result = find_boundaries(task, work.out / "configs" / f"{SCALE}x_fixed_{best.lr:g}.json", seeds)
    result.save(work.out / "range_test")
    print("\n" + "\n".join(f"  {line}" for line in result.summary().splitlines()), flush=True)

    methods = [small, grid[1], grid[SCALE], best.named(f"best of {len(grid)} fixed"), *train_schedules(work, result)]
    return Outcome(task, result, methods)


def train_schedules(work: Study, result: RangeTestResult) -> list[Method]:
    """1Cycle as suggested, and a linear decay; nothing after a refusal."""
    answer = result.suggestion
    if not isinstance(answer, Suggestion):
        return []
    cycle = write_config(result.to_config(), work.out / "configs" / "one_cycle.json")
    peak = answer.cycle_max_lr
    params = decay_params(peak, result.train_steps)
    config = {**result.to_config(), "scheduler": {"type": "WarmupDecayLR", "params": params}}
    decay = write_config(config, work.out / "configs" / "linear_decay.json")
    print("Training with schedules:")
    methods = [work.train("1Cycle", cycle, answer.cycle_max_lr), work.train("linear decay", decay, peak)]
    if work.task.processes > 1:
        methods.insert(1, train_on_several(work, cycle, answer.cycle_max_lr))
    return methods


def decay_params(lr: float, updates: int) -> dict[str, object]:
    """Up within a tenth of the updates, then straight down to nothing."""
    warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": lr, "warmup_num_steps": max(2, updates // 10)}
    return {**warmup, "warmup_type": "linear", "total_num_steps": updates}


def train_on_several(work: Study, config: Path, lr: float) -> Method:
    """The same config on several processes, which accumulate less each: a command that anybody could type."""
    number, results = work.task.processes, work.out / "processes.json"
    launch = ["--standalone", "--nproc-per-node", str(number), "scripts/digits.py", "--config", shown(config)]
    launch += ["--epochs", str(work.task.epochs), "--seeds", str(work.seeds), "--out", str(results)]
    print(f"  $ {shlex.join(['torchrun', *launch])}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # they share the cores
    command = [sys.executable, "-m", "torch.distributed.run", *launch]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    per_epoch = work.task.updates(SCALE * work.task.batch) // work.task.epochs
    runs = [
        Run(seed, [], [(per_epoch * epoch, end["loss"], end["accuracy"]) for epoch, end in enumerate(ends, start=1)])
        for seed, ends in enumerate(json.loads(results.read_text()))
    ]
    return Method(f"1Cycle, {number} processes", lr, SCALE * work.task.batch, runs)


def best_of(methods: list[Method]) -> Method:
    """The one with the lowest mean validation loss: judged by what it is chosen by, in its favour."""
    return min(methods, key=lambda method: method.loss)


def tables(outcomes: list[Outcome], seeds: int) -> dict[str, str]:
    """The pages' tables by their names."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Redline {version('redline')}"
    blocks = {
        "run": f"By `scripts/tutorials --seeds {seeds}` on {date.today()}: {versions}, CPU, one thread; mean and "
        f"standard deviation over {seeds} initial networks.",
        "range test claims": claims_table(RANGE_TEST_CLAIMS, outcomes),
        "one cycle claims": claims_table(ONE_CYCLE_CLAIMS, outcomes),
    }
    for outcome in outcomes:
        blocks[f"{outcome.task.name} range test"] = tests_table(outcome)
        blocks[f"{outcome.task.name} suggestion"] = suggestion_block(outcome)
        blocks[f"{outcome.task.name} one cycle"] = methods_table(outcome)
    return blocks


def renew_docs(blocks: dict[str, str], out: Path) -> None:
    """This run's tables and pictures into the pages."""
    for page in PAGES:
        page.write_text(render(page.read_text(), blocks))
    for task in TASKS:
        for name in ("range_test", "one_cycle"):
            shutil.copy(out / task.name / f"{name}.png", ROOT / "docs" / "images" / f"tutorial_{name}_{task.name}.png")


def shown(path: Path) -> str:
    """A path as short as it can be typed from the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tutorials-output", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a rehearsal in seconds, on one process, whose answers are worth nothing"
    )
    parser.add_argument("--docs", action="store_true", help="put this run's tables and pictures into docs/")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}; expected at least 1")
    if options.docs and options.quick:
        parser.error("--docs: the pages show no rehearsal; leave out --quick")
    start = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes want two GPUs, and so small networks none ...
    torch.set_num_threads(1)  # ... and no more than one thread
    logging.getLogger("engine").setLevel(logging.ERROR)  # each engine would introduce itself
    logging.getLogger("schedulers").setLevel(logging.ERROR)
    out = options.out.resolve()
    try:
        tasks = [rehearsal(task) if options.quick else task for task in TASKS]
        outcomes = [study(task, out, options.seeds) for task in tasks]
    except (EngineError, subprocess.CalledProcessError) as error:
        print(f"tutorials: {error}", file=sys.stderr)
        return 1
    for outcome in outcomes:
        save_numbers(outcome, out / outcome.task.name)
        draw_tests(outcome, out / outcome.task.name / "range_test.png")
        draw_methods(outcome, out / outcome.task.name / "one_cycle.png")
    blocks = tables(outcomes, options.seeds)
    write_tables(blocks, out / "tables.md")
    if options.docs:
        renew_docs(blocks, out)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. All of it is in {shown(out)}:")
    print("  tables.md                     the tables (docs/ has them from another run)")
    for task in tasks:
        print(f"  {task.name + '/range_test.png':<29} validation loss and learning rate of the range tests")
        print(f"  {task.name + '/one_cycle.png':<29} the same of the trainings at {SCALE} times the batch")
        print(f"  {task.name + '/configs':<29} every config that was trained with")
        print(f"  {task.name + '/runs.csv':<29} all numbers (runs.json, too; the tests' are in range_test)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
