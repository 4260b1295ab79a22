"""Find a learning rate by a range test, train with it, and compare: on real data, in a minute or two.

Handwritten digits (they come with scikit-learn), a network of three layers, Adam:

    1  a slow and a fast range test, and a run at a fixed learning rate
    2  their plot, and the 1Cycle config that they suggest
    3  training with that config, and with a grid of fixed learning rates, on one rank
    4  the same at four times the batch, on two ranks under torchrun
    5  a table that compares them

Run by scripts/demo, which installs what is needed.
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

from redline import EngineError, RangeTestResult, initialize, run_range_test

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "digits.json"  # batch size 32, Adam at 0.001
LARGE_BATCH = ROOT / "configs" / "digits_large_batch.json"  # batch size 128
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)  # fixed learning rates to compare with
EPOCHS = 10  # of each training
MIN_LR, STEP_SIZE, STEPS = 1e-4, 20, 300  # of the range tests
SLOW, FAST = 5, 150  # rates: the slow test ends at 0.0076, the fast one would end at 0.225
LEARNED = 1.0  # a validation loss to reach; all runs start at 2.3


@dataclass(frozen=True)
class Method:
    """A way to set the learning rate; for each seed, loss and accuracy after each epoch."""

    name: str
    batch_size: int
    runs: list[list[dict[str, float]]]

    @property
    def losses(self) -> list[float]:
        """Final validation loss of each seed."""
        return [run[-1]["loss"] for run in self.runs]

    def loss_text(self) -> str:
        return spread(self.losses, 4)

    def accuracy_text(self) -> str:
        return f"{spread([100 * run[-1]['accuracy'] for run in self.runs], 1)} %"


def spread(values: list[float], digits: int) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} +- {deviation:.{digits}f}"


def steps_of(batch_size: int) -> int:
    """Optimizer steps of a training."""
    return EPOCHS * len(digits()[1]) // batch_size


def find_learning_rate() -> RangeTestResult:
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
        steps=STEPS,
        validations=30,
        train_steps=steps_of(batch_size=32),
    )


def print_curves(result: RangeTestResult) -> None:
    print(f"\n{'run':<12}  {f'below {LEARNED} after':>16}  {'lowest validation loss':>22}  end")
    for curve in result.curves:
        learned = next((f"{step} steps" for step, loss in curve.validation if loss < LEARNED), "never")
        step, lowest = min(curve.validation, key=lambda point: point[1])
        end = f"learning rate {curve.lrs[-1]:.2g}"
        if len(curve.steps) < STEPS:
            end = f"diverged at step {curve.steps[-1]}, {end}"
        print(f"{curve.name:<12}  {learned:>16}  {f'{lowest:.3f} at step {step}':>22}  {end}")


def train_seeds(name: str, config: dict[str, Any] | Path, seeds: int) -> Method:
    method = Method(name, 32, [train(config, epochs=EPOCHS, seed=seed) for seed in range(seeds)])
    print(f"{name:<12}  validation loss {method.loss_text()}   accuracy {method.accuracy_text()}", flush=True)
    return method


def train_fixed(lr: float, seeds: int) -> Method:
    config = json.loads(CONFIG.read_text())
    config["optimizer"]["params"]["lr"] = lr
    return train_seeds(f"fixed {lr:g}", config, seeds)


def train_on_two_ranks(out: Path, seeds: int) -> Method:
    """Range test and training at four times the batch, by two commands that anybody can type."""
    results = out / "training.json"
    # Larger batches allow larger learning rates: both tests climb twice as fast.
    test = f"--step-rates {2 * SLOW},{2 * FAST} --min-lr {MIN_LR} --step-size {STEP_SIZE} --steps {STEPS}"
    torchrun(
        *("-m", "redline", "range-test", "scripts/digits.py:digits", "--config", shown(LARGE_BATCH), *test.split()),
        *("--train-steps", str(steps_of(batch_size=128)), "--out", shown(out), "--force"),
    )
    torchrun(
        *("scripts/digits.py", "--config", shown(out / "one_cycle.json"), "--epochs", str(EPOCHS)),
        *("--seeds", str(seeds), "--out", shown(results)),
    )
    return Method("1Cycle, 4x batch, 2 ranks", 128, json.loads(results.read_text()))


def torchrun(*arguments: str) -> None:
    launch = ["--standalone", "--nproc-per-node", "2", *arguments]
    command = shlex.join(["torchrun", *launch])
    print("\n$ " + textwrap.fill(command, width=96, subsequent_indent="      ", break_on_hyphens=False), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two ranks share the cores
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *launch], cwd=ROOT, env=environment, check=True)


def print_comparison(rows: dict[str, Method], best: Method, seeds: int) -> None:
    print(f"{'':<32}  {'steps x batch':>15}  {'validation loss':>17}  {'accuracy':>14}")
    for name, method in rows.items():
        size = f"{steps_of(method.batch_size)} x {method.batch_size}"
        print(f"{name:<32}  {size:>15}  {method.loss_text():>17}  {method.accuracy_text():>14}")
    print(f"Mean +- standard deviation over {seeds} seeds, after {EPOCHS} epochs.")
    ratio = mean(rows["1Cycle as suggested"].losses) / mean(best.losses)
    print(f"\n1Cycle as suggested ends at {ratio:.2f} times the validation loss of the best fixed learning rate,")
    print("which was selected by the same validation loss, in its favor.")


def plot_comparison(methods: list[Method], path: Path) -> None:
    """Validation loss along the training, and at its end for each seed."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    along, end = figure.subplots(1, 2)
    grays = [str(0.8 - 0.15 * index) for index in range(len(GRID))]
    for position, (method, color) in enumerate(zip(methods, [*grays, "#0072B2", "#D55E00"])):
        curve = [mean(run[epoch]["loss"] for run in method.runs) for epoch in range(EPOCHS)]
        along.plot(range(1, EPOCHS + 1), curve, color=color, marker="o", markersize=3, label=method.name)
        end.plot([position] * len(method.losses), method.losses, "o", color=color, alpha=0.6)
        end.plot([position - 0.3, position + 0.3], [mean(method.losses)] * 2, color=color, linewidth=3)
    names = [method.name.replace(", ", ",\n") for method in methods]
    end.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    for axes, title in ((along, "during training (mean)"), (end, "at the end (a dot per seed, and their mean)")):
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


def run(out: Path, seeds: int) -> None:
    heading("1", f"A slow and a fast range test of {STEPS} steps each, and a run at a fixed learning rate")
    result = find_learning_rate()
    print_curves(result)

    heading("2", "The plot, and the 1Cycle schedule that it suggests")
    one = out / "one_rank"
    result.save(one)
    print(f"{shown(result.plot(one / 'range_test.png'))}  <- open it: where do the curves turn?\n")
    for line in result.summary().splitlines():
        print(textwrap.fill(line, width=96, subsequent_indent="      "))

    heading("3", f"Training with it, and at fixed learning rates: {EPOCHS} epochs, {seeds} seeds, one rank")
    logging.getLogger("redline").setLevel(logging.WARNING)  # each engine would log its summary
    cycle = train_seeds("1Cycle", one / "one_cycle.json", seeds)
    grid = [train_fixed(lr, seeds) for lr in GRID]

    heading("4", "Four times the batch on two ranks: a range test at that batch size, then training")
    large = train_on_two_ranks(out / "two_ranks", seeds)

    heading("5", "Comparison")
    own, best = grid[GRID.index(0.001)], min(grid, key=lambda method: mean(method.losses))
    rows = {
        f"{own.name}, the config's own": own,
        f"{best.name}, best of {len(GRID)} tried": best,
        "1Cycle as suggested": cycle,
        large.name: large,
    }
    print_comparison(rows, best, seeds)
    plot_comparison([*grid, cycle, large], out / "comparison.png")
    save_results([*grid, cycle, large], out)


def heading(number: str, text: str) -> None:
    print(f"\n{number}. {text}\n" + "-" * (len(text) + 3), flush=True)


def shown(path: Path) -> str:
    """A path relative to the repository, if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output", metavar="DIR", help="default: demo-output")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings of each kind (default: 5)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}; expected at least 1")
    out = options.out.resolve()
    start = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so small a network gains nothing from a GPU, and two ranks need two ...
    torch.set_num_threads(1)  # ... nor from more than one thread
    out.mkdir(parents=True, exist_ok=True)
    try:
        run(out, options.seeds)
    except (EngineError, subprocess.CalledProcessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Results are in {shown(out)}:")
    print("  one_rank/range_test.png    the range test (its numbers are in .csv and .json)")
    print("  one_rank/one_cycle.json    the suggested config, with a reason for each number")
    print("  two_ranks/                 the same for four times the batch")
    print("  comparison.png             the comparison (all numbers are in .csv and .json)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
