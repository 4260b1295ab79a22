"""The numbers that the page's scripts draw, as a value for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from engine.range_test.contents import Contents, Group, groups_of, looks_of, trial_groups
from engine.range_test.curve import Curve
from engine.range_test.suggestion import Refusal, Suggestion

__all__ = ["MAX_POINTS", "data_of", "thinning"]

MAX_POINTS = 2000  # of a run; a longer one is thinned out

_DIGITS = 6


def data_of(contents: Contents) -> dict[str, Any]:
    """What the scripts need.

    A number that is not finite is a string, since JSON knows none.
    """
    groups = groups_of(contents.curves, contents.train_batch_size)
    return {
        "beta": contents.beta,
        "groups": _groups(groups),
        "trials": _groups(trial_groups(contents.trials)),
        "winner": contents.winner,
        "search": _search(contents),
        "marks": [{"rule": mark.rule, "lr": _lr(mark.lr), "why": mark.why} for mark in contents.marks],
        "answer": _answer(contents.answer),
        "batches": [
            {"size": size, "low": answer.cycle_min_lr, "high": answer.cycle_max_lr}
            for size, answer in contents.batches
            if isinstance(answer, Suggestion)
        ],
    }


def _search(contents: Contents) -> list[dict[str, Any]]:
    tries = sorted(((trial.lr, came, trial.diverged) for trial, came in contents.search), key=lambda each: each[0])
    return [{"lr": lr, "came": None if diverged else _number(came)} for lr, came, diverged in tries]


def thinning(curve: Curve) -> int:
    """Every how many updates one is shown."""
    return max(1, math.ceil(len(curve.steps) / MAX_POINTS))


def _answer(answer: Suggestion | Refusal) -> dict[str, float] | None:
    if isinstance(answer, Refusal):
        return None
    return {
        "low": answer.cycle_min_lr,
        "high": answer.cycle_max_lr,
        "probably_low": answer.low_lr,
        "probably_high": answer.high_lr,
    }


def _groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            "label": group.label,
            "panel": group.panel,
            "look": look,
            "test": group.curves[0].is_test,
            "runs": [_run(curve) for curve in group.curves],
        }
        for group, look in zip(groups, looks_of(groups))
    ]


def _run(curve: Curve) -> dict[str, Any]:
    every = thinning(curve)
    end = curve.diverged_at if curve.is_test else None
    run: dict[str, Any] = {
        "name": curve.name,
        "updates": len(curve.steps),
        "lrs": _numbers(curve.lrs[::every]),
        "losses": _numbers(curve.losses[::every]),
        "validation": [[updates, _number(loss)] for updates, loss in curve.validation],
        "skipped": list(curve.skipped),
        "diverged": None if end is None else [curve.steps[end], _number(curve.lrs[end])],
    }
    if curve.steps[::every] == tuple(range(0, every * len(run["lrs"]), every)):
        run["every"] = every  # step numbers that can be counted out need no room
    else:
        run["steps"] = list(curve.steps[::every])
    return run


def _numbers(values: Iterable[float]) -> list[float | str]:
    return [_number(value) for value in values]


def _number(value: float) -> float | str:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)


def _lr(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
