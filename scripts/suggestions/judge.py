"""All that is measured of one task: its grid, what each method suggests, and what that is worth when it is trained."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from suggestions import ours, peers
from suggestions.grid import HOPELESS, points, train, untrained, worth_repeating
from suggestions.ours import KINDS, schedule_config
from suggestions.tasks import Task
from suggestions.work import Cache, Crew, Job

__all__ = ["OURS", "measure"]

OURS = "Redline"


def measure(task: Task, crew: Crew, cache: Cache, *, seeds: int, grid: int, with_peers: bool) -> dict[str, Any]:
    """Train the grid, ask the methods, train with their answers; all figures of the task."""
    truth = {kind: _grid(task, kind, crew, cache, seeds, points(task, grid)) for kind in KINDS}
    answers = _ask(task, crew, cache, seeds, with_peers)
    wanted = [
        (seed, kind, answer[kind])
        for method in answers.values()
        for seed, answer in enumerate(method)
        for kind in KINDS
        if answer.get(kind) is not None
    ]
    crew.do(task.name, [_training(task, *each) for each in wanted], cache)
    blank = [untrained(task.name, seed) for seed in range(seeds)]
    return {
        "name": task.name,
        "aside": task.aside,
        "optimizer": task.optimizer["type"],
        "steps": task.steps,
        "batch_size": task.batch_size,
        "untrained": blank,
        "grid": truth,
        "methods": {
            method: {
                "answers": given,
                "trained": {
                    kind: [_worth(task, cache, seed, kind, answer.get(kind)) for seed, answer in enumerate(given)]
                    for kind in KINDS
                },
            }
            for method, given in answers.items()
        },
    }


def _training(task: Task, seed: int, kind: str, lr: float) -> Job:
    shape = json.dumps(schedule_config(kind, lr, task.steps), sort_keys=True)
    return f"train {seed} {shape}", train, (task.name, seed, kind, lr)


def _worth(task: Task, cache: Cache, seed: int, kind: str, lr: float | None) -> dict[str, Any] | None:
    """What a training came to; diverged: its loss is not finite, or above that of the initial weights."""
    if lr is None:
        return None
    result = cache.found[_training(task, seed, kind, lr)[0]]
    loss = result["loss"]
    return {**result, "diverged": loss is None or loss > untrained(task.name, seed)}


def _grid(task: Task, kind: str, crew: Crew, cache: Cache, seeds: int, lrs: list[float]) -> dict[str, Any]:
    """Trainings at each rate with the first seed, and with the others as long as a rate is not hopeless."""
    runs: dict[float, list[Any]] = {lr: [] for lr in lrs}
    for limit, more in zip((math.inf, *HOPELESS), ([0], [1], range(2, seeds))):
        losses = {lr: [None if run["diverged"] else run["loss"] for run in made] for lr, made in runs.items()}
        chosen = worth_repeating(losses, limit) if math.isfinite(limit) else lrs
        wanted = [(seed, lr) for lr in chosen for seed in more if seed < seeds]
        crew.do(task.name, [_training(task, seed, kind, lr) for seed, lr in wanted], cache)
        for seed, lr in wanted:
            runs[lr].append(_worth(task, cache, seed, kind, lr))
    rows = [{"lr": lr, "runs": made} for lr, made in runs.items()]
    return {"points": rows, "best": _best(rows, seeds)}


def _best(rows: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """The rate with the lowest mean loss among those that every seed was trained with and none diverged at."""
    whole = [row for row in rows if len(row["runs"]) == seeds and not any(run["diverged"] for run in row["runs"])]
    if not whole:
        return {"lr": None, "loss": None, "spread": None, "accuracy": None}
    best = min(whole, key=lambda row: statistics.fmean(run["loss"] for run in row["runs"]))
    losses = [run["loss"] for run in best["runs"]]
    accuracies = [run["accuracy"] for run in best["runs"] if "accuracy" in run]
    return {
        "lr": best["lr"],
        "loss": statistics.fmean(losses),
        "spread": statistics.stdev(losses) if seeds > 1 else 0.0,
        "accuracy": statistics.fmean(accuracies) if accuracies else None,
    }


def _ask(task: Task, crew: Crew, cache: Cache, seeds: int, with_peers: bool) -> dict[str, list[dict[str, Any]]]:
    """Each method's answers, one a seed: a learning rate for each schedule (None for none), updates, or an error."""
    fresh = Cache(None, task.name, {})  # our own answers are never kept: they are what changes
    crew.do(task.name, [(str(seed), ours.suggest, (task.name, seed)) for seed in range(seeds)], fresh)
    answers = {OURS: [fresh.found[str(seed)] for seed in range(seeds)]}
    for peer in peers.PEERS if with_peers else ():
        if peers.missing(peer):
            continue
        name = f"{peer} {peers.version(peer)}"
        crew.do(task.name, [(f"ask {name} {seed}", peers.ask, (peer, task.name, seed)) for seed in range(seeds)], cache)
        found = [cache.found[f"ask {name} {seed}"] for seed in range(seeds)]
        for method in peers.METHODS[peer]:
            answers[method] = [_for_both(given, method) for given in found]
    return answers


def _for_both(given: dict[str, Any], method: str) -> dict[str, Any]:
    """A peer's one learning rate as the maximum of either schedule."""
    if "error" in given:
        return {**dict.fromkeys(KINDS), "updates": 0, "error": given["error"]}
    return {**dict.fromkeys(KINDS, given["lrs"][method]), "updates": given["updates"]}
