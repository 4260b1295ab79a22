"""How a comparison is made: every engine reproduces the reference losses, then they take turns.

A machine whose speed drifts slows all engines of a round alike. So each turn is compared with the handwritten loop's
turn in the same round, and the result is the median over the rounds. The order changes from round to round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmark.task import BY_HAND, Task, is_installed
from benchmark.worker_group import WorkerError, WorkerGroup

__all__ = ["Comparison", "Effort", "compare", "measure_start"]

Say = Callable[[str], None]
PROOF = 12  # steps whose losses are compared


@dataclass(frozen=True)
class Effort:
    """How much is done: rounds of turns that take at least so long each, and starts of each subject."""

    rounds: int
    turn_s: float
    starts: int


@dataclass(frozen=True)
class Comparison:
    """Subjects that do one task side by side.

    Attributes:
        title: for people.
        task: what they do; its subject is the base, the loop by hand.
        subjects: the other engines.
        measures: of "overhead", "throughput", "memory", "bytes", "waits".
    """

    title: str
    task: Task
    subjects: tuple[str, ...]
    measures: frozenset[str]

    @property
    def tolerance(self) -> float:
        """How far a subject's losses may be from the base's, relatively.

        In bf16 the base rounds activations only (autocast), others their weights, too.
        """
        if self.task.precision == "bf16":
            return 1e-2
        return 1e-6 if self.task.device == "cpu" else 1e-5  # where some sums have no fixed order


def compare(comparison: Comparison, effort: Effort, say: Say) -> dict[str, dict[str, Any]]:
    """The figures of each subject; {"left_out": why} for one that is not measured."""
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        groups: dict[str, WorkerGroup] = {}
        for subject in (BY_HAND, *comparison.subjects):
            if is_installed(subject):
                groups[subject] = stack.enter_context(WorkerGroup(replace(comparison.task, subject=subject)))
        say(f"{comparison.title}: {len(groups)} engines start and reproduce the reference losses")
        results |= _prove(groups, comparison.tolerance)
        if comparison.measures & {"overhead", "throughput"}:
            _add(results, _take_turns(groups, effort, comparison.title, say))
        if "memory" in comparison.measures:
            _add(results, {name: {"memory_bytes": group.memory_bytes()} for name, group in groups.items()})
        if "bytes" in comparison.measures:
            _add(results, {name: {"sent_bytes": group.sent_bytes()} for name, group in groups.items()})
        if "waits" in comparison.measures:
            _add(results, {name: {"waits": group.waits(10)} for name, group in groups.items()})
    return results


def _add(results: dict[str, dict[str, Any]], more: dict[str, dict[str, Any]]) -> None:
    for name, figures in more.items():
        results[name] |= figures


def _prove(groups: dict[str, WorkerGroup], tolerance: float) -> dict[str, dict[str, Any]]:
    """Each subject's distance to the base's losses; those that fail, or are too far from it, leave `groups`."""
    results: dict[str, dict[str, Any]] = {}
    expected: list[float] = []
    for name, group in list(groups.items()):
        try:
            parameters = group.started()["parameters"]
            losses = group.losses(PROOF)
        except WorkerError as error:
            if name == BY_HAND:
                raise
            results[name] = {"left_out": str(error)}
        else:
            expected = expected or losses
            distance = max(_distance(a, b) for a, b in zip(losses, expected))
            results[name] = {"loss_difference": distance, "parameters": parameters}
            if distance > tolerance:
                results[name]["left_out"] = f"its losses differ by {distance:.1e} of theirs, more than {tolerance:g}"
        if "left_out" in results[name]:
            del groups[name]
    return results


def _distance(value: float, expected: float) -> float:
    """Relative; infinite for what is no number."""
    distance = abs(value - expected) / max(abs(expected), 1e-12)
    return distance if math.isfinite(distance) else math.inf


def _take_turns(groups: dict[str, WorkerGroup], effort: Effort, title: str, say: Say) -> dict[str, dict[str, Any]]:
    steps = _steps_of_a_turn(groups[BY_HAND], effort.turn_s)
    for group in groups.values():
        group.seconds(max(2, steps // 2))
    times: dict[str, list[float]] = {name: [] for name in groups}
    order, reported = list(groups), time.monotonic()
    for done in range(effort.rounds):
        for name in order:
            times[name].append(groups[name].seconds(steps) / steps)
        order = order[1:] + order[:1]
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            say(f"{title}: round {done + 1} of {effort.rounds}")
    base = times[BY_HAND]
    return {
        name: {
            "us": statistics.median(found) * 1e6,
            "overhead_us": statistics.median(a - b for a, b in zip(found, base)) * 1e6,
            "ratio": statistics.median(b / a for a, b in zip(found, base)),
            "ratio_quartiles": _quartiles([b / a for a, b in zip(found, base)]),
            "rounds": effort.rounds,
            "steps": steps,
        }
        for name, found in times.items()
    }


def _steps_of_a_turn(group: WorkerGroup, turn_s: float) -> int:
    """So many that a turn takes at least `turn_s`."""
    steps = 1
    group.seconds(2)
    while (seconds := group.seconds(steps)) < turn_s:
        steps = max(steps + 1, min(10 * steps, math.ceil(steps * turn_s / seconds)))
    return steps


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def measure_start(task: Task, subjects: Iterable[str], effort: Effort, say: Say) -> dict[str, dict[str, Any]]:
    """Seconds of import, build and first step, each beyond `import torch`: medians over fresh processes."""
    results: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (BY_HAND, *subjects) if is_installed(name)}
    for turn in range(effort.starts + 1):
        say(f"start: turn {turn} of {effort.starts}" if turn else "start: once, unmeasured, to read all files")
        for name in list(found):
            try:
                with WorkerGroup(replace(task, subject=name)) as group:
                    started = group.started()
            except WorkerError as error:
                results[name] = {"left_out": str(error)}
                del found[name]
            else:
                found[name] += [started] if turn else []
    for name, starts in found.items():
        parts = ("import_s", "build_s", "first_s")
        results[name] = {part: statistics.median(start[part] for start in starts) for part in parts}
        results[name]["start_s"] = statistics.median(sum(start[part] for part in parts) for start in starts)
    return results
