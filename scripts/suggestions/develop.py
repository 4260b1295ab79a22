"""How good the rules of `tune` are at this moment, in a minute: what it says is read off the grid, not trained.

    PYTHONPATH=scripts:. python -m suggestions.develop OUT [BUDGET] [NAME ...]

OUT is the folder of scripts/quality, in which grids were trained. Tasks that are held out are left alone: rules are
made on the others. Between two learning rates of the grid the loss is interpolated over the logarithm.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy
import torch

from suggestions.ours import suggest
from suggestions.tasks import TASKS, Task

SEEDS = 2


def grid_of(task: Task, out: Path) -> dict[float, float]:
    """The mean loss at each learning rate that was trained with; inf where a training diverged.

    Poor rates were trained with fewer seeds than good ones, so that a mean is that of the best rate, and the mean
    difference from it over the seeds that both have.
    """
    path = out / "cache" / (re.sub(r"\W+", "-", task.name) + ".json")
    losses: dict[float, dict[str, float]] = {}
    for name, result in json.loads(path.read_text())["found"].items() if path.exists() else ():
        if name.startswith("train "):
            _, seed, lr = name.split()
            losses.setdefault(float(lr), {})[seed] = math.inf if result["loss"] is None else result["loss"]
    if not losses:
        return {}
    best = min(losses.values(), key=lambda of: (-len(of), statistics.fmean(of.values())))
    mean = statistics.fmean(best.values())
    return {
        lr: mean + statistics.fmean(loss - best[seed] for seed, loss in of.items() if seed in best)
        for lr, of in sorted(losses.items())
    }


def excess(task: Task, grid: dict[float, float], lr: float) -> float:
    """How far a loss is above the best of the grid, as a fraction of that."""
    finite = {lr: loss for lr, loss in grid.items() if math.isfinite(loss)}
    if lr > max(finite) * 1.01:
        return math.inf
    loss, best = float(numpy.interp(math.log(lr), [*map(math.log, finite)], [*finite.values()])), min(finite.values())
    return math.expm1(loss - best) if task.log_scale else (loss - best) / abs(best)


def main() -> None:
    out, budget, names = Path(sys.argv[1]), float((sys.argv[2:] or ["0.1"])[0]), sys.argv[3:]
    torch.set_num_threads(1)
    found = []
    for task in TASKS:
        grid = grid_of(task, out)
        if task.held_out or not grid or (names and not any(name in task.name for name in names)):
            continue
        answers = [suggest(task.name, seed, budget) for seed in range(SEEDS)]
        lrs = [task.own_lr if answer["lr"] is None else answer["lr"] for answer in answers]
        worth = [excess(task, grid, lr) for lr in lrs]
        found += worth
        said = ", ".join(f"{lr:.2g} {each:+.1%}" for lr, each in zip(lrs, worth))
        best, own = min(grid, key=grid.__getitem__), excess(task, grid, task.own_lr)
        print(f"{task.name:45} best {best:.2g}, own {task.own_lr:.2g} {own:+.0%}: {said}", flush=True)
    if found:
        bad = sum(each > 0.1 for each in found)
        print(f"median {statistics.median(found):+.1%}, {bad} of {len(found)} above 10%, worst {max(found):+.0%}")


if __name__ == "__main__":
    main()
