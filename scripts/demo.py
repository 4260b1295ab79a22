"""The whole idea on real data: find a learning rate by a range test, train with it, and see whether it was worth it.

Handwritten digits (scikit-learn's, inside the package), a network of three layers, Adam:

    1  a slow and a fast range test beside a fixed learning rate
    2  their picture, and the 1Cycle config that they suggest
    3  training with that config, and with a grid of fixed learning rates to compare, on one process
    4  the same with four times the batch, on two processes under torchrun
    5  a table, honest whatever comes out

Run by scripts/demo, which installs what it needs first.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from digits import digits, train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engine import EngineError, RangeTestResult, initialize, run_range_test

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "digits.json"  # batches of 32, Adam at 0.001
LARGE_BATCH = ROOT / "configs" / "digits_large_batch.json"  # batches of 128
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)  # fixed learning rates to compare with
MIN_LR = 1e-4  # where the range tests start ...
STEP_SIZE = 20  # ... and in how many updates they grow by rate x MIN_LR
SLOW, FAST = 5, 150  # rates: the slow test ends at 0.0076, the fast one would at 0.225
LEARNED = 1.0  # a validation loss that a run is timed to; all begin at 2.3


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    out: Path
    seeds: int = 5
    epochs: int = 10  # of each training
    steps: int = 300  # updates of each range test

    def updates(self, batch_size: int) -> int:
        """Updates of a training."""
        return self.epochs * len(digits()[1]) // batch_size


@dataclass(frozen=True)
class Method:
    """A way to set the learning rate, and what it led to: per seed, loss and accuracy after each epoch."""

    name: str
    batch_size: int
    runs: list[list[dict[str, float]]]

    @property
    def losses(self) -> list[float]:
        """Validation loss at the end, one for each seed."""
        return [run[-1]["loss"] for run in self.runs]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy at the end, in percent, one for each seed."""
        return [100 * run[-1]["accuracy"] for run in self.runs]


# -- 1 and 2: the range test -------------------------------------------------------------------------


def find_learning_rate(plan: Plan) -> RangeTestResult:
    """A slow and a fast range test, and a run at the config's own learning rate."""
    torch.manual_seed(0)
    model, data, loss, validation = digits()
    engine = initialize(model, CONFIG)
    return run_range_test(
        engine,
        data,
        loss,
        validation=validation,
        rates=(SLOW, FAST),
        min_lr=MIN_LR,
        step_size=STEP_SIZE,
        steps=plan.steps,
        validations=30,
        train_steps=plan.updates(batch_size=32),
    )


def tell_curves(result: RangeTestResult, steps: int) -> None:
    """What the three runs did, in numbers."""
    print(f"\n{'run':<12}  {f'below {LEARNED} after':>16}  {'lowest validation loss':>24}  end")
    for curve in result.curves:
        learned = next((f"{updates} updates" for updates, loss in curve.validation if loss < LEARNED), "never")
        updates, lowest = min(curve.validation, key=lambda point: point[1])
        end = f"learning rate {curve.lrs[-1]:.2g}"
        if len(curve.steps) < steps:
            end = f"diverged at update {curve.steps[-1]}, " + end
        print(f"{curve.name:<12}  {learned:>16}  {f'{lowest:.3f} at update {updates}':>24}  {end}")


def tell_suggestion(result: RangeTestResult) -> None:
    """The suggested schedule, each number with its reason."""
    for line in result.summary().splitlines():
        print(textwrap.fill(line, width=96, subsequent_indent="      "))


# -- 3: training -------------------------------------------------------------------------------------


def train_fixed(lr: float, plan: Plan) -> Method:
    """The config as it is, but for its learning rate."""
    config = json.loads(CONFIG.read_text())
    config["optimizer"]["params"]["lr"] = lr
    return train_seeds(f"fixed {lr:g}", config, plan)


def train_seeds(name: str, config: dict[str, Any] | Path, plan: Plan) -> Method:
    """One training per seed."""
    method = Method(name, 32, [train(config, epochs=plan.epochs, seed=seed) for seed in range(plan.seeds)])
    print(
        f"{name:<12}  validation loss {spread(method.losses, 4)}   accuracy {spread(method.accuracies, 1)} %",
        flush=True,
    )
    return method


def best_of(methods: list[Method]) -> Method:
    """The one with the lowest mean validation loss; a grid is judged by what it is chosen by, in its favour."""
    return min(methods, key=lambda method: mean(method.losses))


# -- 4: two processes --------------------------------------------------------------------------------


def train_on_two_processes(plan: Plan) -> Method:
    """Range test and training at four times the batch, each a command that anybody could type."""
    found, results = plan.out / "two_processes", plan.out / "two_processes" / "training.json"
    # Larger batches bear larger learning rates: both tests climb twice as fast.
    test = f"--rates {2 * SLOW},{2 * FAST} --min-lr {MIN_LR} --step-size {STEP_SIZE} --steps {plan.steps}"
    torchrun(
        *("-m", "engine", "range-test", "scripts/digits.py:digits", "--config", shown(LARGE_BATCH), *test.split()),
        *("--train-steps", str(plan.updates(batch_size=128)), "--out", shown(found)),
    )
    torchrun(
        *("scripts/digits.py", "--config", shown(found / "one_cycle.json"), "--epochs", str(plan.epochs)),
        *("--seeds", str(plan.seeds), "--out", shown(results)),
    )
    return Method("1Cycle, 4x batch, 2 processes", 128, json.loads(results.read_text()))


def torchrun(*arguments: str) -> None:
    """Run a command on two processes of this machine, and show how it is typed."""
    launch = ["--standalone", "--nproc-per-node", "2", *arguments]
    print(
        "\n$ "
        + textwrap.fill(
            shlex.join(["torchrun", *launch]), width=96, subsequent_indent="      ", break_on_hyphens=False
        ),
        flush=True,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes share the cores
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *launch], cwd=ROOT, env=environment, check=True)


# -- 5: the comparison -------------------------------------------------------------------------------


def tell_comparison(methods: list[Method], plan: Plan) -> None:
    """The table, and what it says."""
    print(f"{'':<32}  {'updates x batch':>15}  {'validation loss':>17}  {'accuracy':>14}")
    for method in methods:
        size = f"{plan.updates(method.batch_size)} x {method.batch_size}"
        accuracy = f"{spread(method.accuracies, 1)} %"
        print(f"{method.name:<32}  {size:>15}  {spread(method.losses, 4):>17}  {accuracy:>14}")
    print(f"Mean +- standard deviation over {plan.seeds} initial networks, after {plan.epochs} epochs.")
    best, cycle = methods[1], methods[2]
    ratio = mean(cycle.losses) / mean(best.losses)
    print(f"\n1Cycle as suggested ends at {ratio:.2f} times the validation loss of the best fixed learning rate,")
    print("which was chosen by the very loss that it is judged by here.")


def draw_comparison(grid: list[Method], cycles: list[Method], path: Path) -> None:
    """Validation loss along the training, and at its end for each seed."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    along, end = figure.subplots(1, 2)
    shades = [str(0.8 - 0.15 * index) for index in range(len(grid))]  # of grey
    for position, (method, color) in enumerate(zip([*grid, *cycles], [*shades, "#0072B2", "#D55E00"])):
        curve = [mean(run[epoch]["loss"] for run in method.runs) for epoch in range(len(method.runs[0]))]
        along.plot(range(1, len(curve) + 1), curve, color=color, marker="o", markersize=3, label=method.name)
        end.plot([position] * len(method.losses), method.losses, "o", color=color, alpha=0.6)
        end.plot([position - 0.3, position + 0.3], [mean(method.losses)] * 2, color=color, linewidth=3)
    names = [method.name.replace(", ", ",\n") for method in [*grid, *cycles]]
    end.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    for axes, title in (
        (along, "along the training (mean)"),
        (end, "at the end (a dot for each seed, and their mean)"),
    ):
        axes.set_title(f"Validation loss {title}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.grid(alpha=0.3, which="both", axis="y")
    along.set_xlabel("epoch")
    along.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def save_results(methods: list[Method], out: Path) -> None:
    """Every number behind the table, as JSON and CSV."""
    runs = {method.name: {"batch_size": method.batch_size, "runs": method.runs} for method in methods}
    (out / "comparison.json").write_text(json.dumps(runs, indent=1) + "\n")
    with (out / "comparison.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "batch_size", "seed", "epoch", "validation_loss", "accuracy"))
        for method in methods:
            for seed, run in enumerate(method.runs):
                for epoch, values in enumerate(run, start=1):
                    writer.writerow((method.name, method.batch_size, seed, epoch, values["loss"], values["accuracy"]))


# -- the story ---------------------------------------------------------------------------------------


def run(plan: Plan) -> None:
    heading("1", f"A slow and a fast range test, {plan.steps} updates each, beside a fixed learning rate")
    result = find_learning_rate(plan)
    tell_curves(result, plan.steps)

    heading("2", "The picture, and the 1Cycle schedule that it suggests")
    one = plan.out / "one_process"
    result.save(one)
    print(f"{shown(result.plot(one / 'range_test.png'))}  look at it: where do the curves turn?\n")
    tell_suggestion(result)

    heading(
        "3", f"Training with it, and at fixed learning rates: {plan.epochs} epochs, {plan.seeds} seeds, one process"
    )
    logging.getLogger("engine").setLevel(logging.WARNING)  # each engine would introduce itself
    cycle = train_seeds("1Cycle", one / "one_cycle.json", plan)
    grid = [train_fixed(lr, plan) for lr in GRID]

    heading("4", "Four times the batch on two processes: a test at that batch size, then training")
    large = train_on_two_processes(plan)

    heading("5", "Was it worth it?")
    fixed, best = grid[GRID.index(0.001)], best_of(grid)
    tell_comparison(
        [
            Method(f"{fixed.name}, the config's own", 32, fixed.runs),
            Method(f"{best.name}, best of {len(GRID)} tried", 32, best.runs),
            Method("1Cycle as suggested", 32, cycle.runs),
            large,
        ],
        plan,
    )
    draw_comparison(grid, [cycle, large], plan.out / "comparison.png")
    save_results([*grid, cycle, large], plan.out)


def heading(number: str, text: str) -> None:
    print(f"\n{number}. {text}\n" + "-" * (len(text) + 3), flush=True)


def spread(values: list[float], digits: int) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} +- {deviation:.{digits}f}"


def shown(path: Path) -> str:
    """A path as short as it can be typed from the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output", metavar="DIR", help="default: demo-output")
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="trainings of each kind (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}; expected at least 1")
    plan = Plan(options.out.resolve(), options.seeds)
    start = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes want two GPUs, and so small a network none ...
    torch.set_num_threads(1)  # ... and no more than one thread
    plan.out.mkdir(parents=True, exist_ok=True)
    try:
        run(plan)
    except (EngineError, subprocess.CalledProcessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.perf_counter() - start:.0f} s. All of it is in {shown(plan.out)}:")
    print("  one_process/range_test.png    the range test (.csv and .json beside it: its numbers)")
    print("  one_process/one_cycle.json    the config that it suggests, each number with its reason")
    print("  two_processes/                the same for four times the batch")
    print("  comparison.png                what came out (.csv and .json: all numbers)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
