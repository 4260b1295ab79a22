"""All that is measured of one task: its grid, what each method suggests, and what that is worth when it is trained.

Every job has a name in the task's cache, so that a table can be made in parts; `collect` shows what is there.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from suggestions import ours, peers, rivals
from suggestions.grid import HOPELESS, train, untrained, worth_repeating
from suggestions.tasks import Task
from suggestions.work import Cache, Job, Workers

__all__ = ["BUDGETS", "DEFAULT", "METHODS", "OWN", "collect", "measure", "redline"]

BUDGETS = (0.02, 0.05, 0.1, 0.3, 1.0, 3.0)
OWN, DEFAULT = "config's own", "Redline (its default)"


def redline(budget: float) -> str:
    return f"Redline, {budget:.0%}"


_OURS = {DEFAULT: None, **{redline(budget): budget for budget in BUDGETS}}
_PEER_OF = {method: peer for peer, methods in peers.METHODS.items() for method in methods}
METHODS = (OWN, *_OURS, *_PEER_OF, *rivals.RIVALS)


def measure(task: Task, workers: Workers, cache: Cache, *, seeds: int, methods: Sequence[str]) -> None:
    """Train the grid, ask the methods, train with their answers: what of it the cache lacks."""
    _train_grid(task, workers, cache, seeds)
    everyone = [(method, seed) for seed in range(seeds) for method in methods if not _missing(method)]
    workers.do(task.name, [job for each in everyone if (job := _asking(task, *each)) is not None], cache)
    answers = [(seed, _answer(task, cache.found, method, seed)) for method, seed in everyone]
    wanted = [_training(task, seed, _lr(task, answer)) for seed, answer in answers if answer and "loss" not in answer]
    workers.do(task.name, wanted, cache)


def _missing(method: str) -> bool:
    package = _PEER_OF.get(method) or (rivals.PACKAGE if method in rivals.RIVALS else None)
    return package is not None and peers.missing(package)


def _training(task: Task, seed: int, lr: float) -> Job:
    return f"train {seed} {lr:.6g}", train, (task.name, seed, lr)


def _asking(task: Task, method: str, seed: int) -> Job | None:
    if method == OWN:
        return None
    if method in _OURS:
        return f"ask {method} {seed}", ours.suggest, (task.name, seed, _OURS[method])
    if method in rivals.RIVALS:
        return f"run {method} {seed}", rivals.train, (method, task.name, seed)
    peer = _PEER_OF[method]
    return f"ask {peer} {seed}", peers.ask, (peer, task.name, seed)


def _answer(task: Task, found: dict[str, Any], method: str, seed: int) -> dict[str, Any] | None:
    """What a method said: {"lr", "steps"}, or {"loss"} of a training of its own; None where it was not asked."""
    asked = _asking(task, method, seed)
    if asked is None:
        return {"lr": task.own_lr, "steps": 0}
    answer = found.get(asked[0])
    if answer is not None and "lrs" in answer:
        return {"lr": answer["lrs"][method], "steps": answer["steps"]}
    return answer


def _lr(task: Task, answer: dict[str, Any]) -> float:
    """Who gets no answer trains with the learning rate of the config."""
    return task.own_lr if answer.get("lr") is None else answer["lr"]


# -- the grid ------------------------------------------------------------------------------------------


def _train_grid(task: Task, workers: Workers, cache: Cache, seeds: int) -> None:
    """Every other rate and those next to a good one with the first seed, and good ones with the other seeds."""

    def do(lrs: Sequence[float], numbers: Sequence[int]) -> None:
        workers.do(task.name, [_training(task, seed, lr) for lr in lrs for seed in numbers if seed < seeds], cache)

    def good(limit: float) -> list[float]:
        runs = {lr: [_worth(task, run, seed) for seed, run in _runs(task, cache.found, lr, seeds)] for lr in task.grid}
        losses = {lr: [None if run["diverged"] else run["loss"] for run in made] for lr, made in runs.items()}
        return worth_repeating(losses, limit, log_scale=task.log_scale)

    do(task.grid[::2], [0])
    near = {index + side for index, lr in enumerate(task.grid) if lr in good(HOPELESS[0]) for side in (-1, 1)}
    do([lr for index, lr in enumerate(task.grid) if index in near], [0])
    do(good(HOPELESS[1]), [1])
    do(good(HOPELESS[2]), range(2, seeds))


def _runs(task: Task, found: dict[str, Any], lr: float, seeds: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for seed in range(seeds):
        if (run := found.get(_training(task, seed, lr)[0])) is not None:
            yield seed, run


def _worth(task: Task, run: dict[str, Any], seed: int) -> dict[str, Any]:
    """Of a training; diverged: a loss is not finite, or both end above that of the initial weights, as which it counts.

    The validation loss alone may end there where a model overfits, the training loss where it has learned little.
    """
    start = untrained(task.name, seed)
    diverged = run["loss"] is None or min(run["training"], run["loss"]) > start
    return {**run, "diverged": diverged, "loss": start if diverged else run["loss"]}


# -- what is there -------------------------------------------------------------------------------------


def collect(task: Task, found: dict[str, Any], seeds: int, methods: Sequence[str]) -> dict[str, Any] | None:
    """All figures of a task by its cache; None while the grid is not complete."""
    points = []
    for lr in task.grid:
        runs = [_worth(task, run, seed) for seed, run in _runs(task, found, lr, seeds)]
        points.append({"lr": lr, "runs": runs})
    most = max(len(point["runs"]) for point in points)
    complete = [point for point in points if len(point["runs"]) == most and _all_trained(point)]
    if not most or not complete:
        return None
    best = min(complete, key=lambda point: statistics.fmean(run["loss"] for run in point["runs"]))
    return {
        "name": task.name,
        "kind": task.kind,
        "held_out": task.held_out,
        "log_scale": task.log_scale,
        "steps": task.steps,
        "own_lr": task.own_lr,
        "grid": {"points": points, "best": best},
        "methods": {
            method: outcomes
            for method in methods
            if (outcomes := [each for seed in range(most) if (each := _outcome(task, found, method, seed)) is not None])
        },
    }


def _all_trained(point: dict[str, Any]) -> bool:
    return not any(run["diverged"] for run in point["runs"])


def _outcome(task: Task, found: dict[str, Any], method: str, seed: int) -> dict[str, Any] | None:
    answer = _answer(task, found, method, seed)
    if answer is None:
        return None
    trained = answer if "loss" in answer else found.get(_training(task, seed, _lr(task, answer))[0])
    if trained is None:
        return None
    why = answer.get("error") or answer.get("why") or "it returned nothing"
    return {
        **_worth(task, trained, seed),
        "seed": seed,
        "lr": answer.get("lr"),
        "steps": answer.get("steps", 0),
        "asking": answer.get("seconds", 0.0) if "loss" not in answer else 0.0,
        **({} if answer.get("lr") is not None or "loss" in answer else {"why": why}),
    }
