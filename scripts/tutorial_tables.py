"""What scripts/tutorials.py is made of, the part that says what came out: the two pages' tables, files of numbers.

A table stands in a page between two comments, <!-- by scripts/tutorials.py: NAME --> and another whose name is end.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from tutorial_runs import Method, Task

from engine import RangeTestResult
from engine.range_test import Curve, Suggestion
from engine.range_test.divergence import divergence

MARK = "<!-- by scripts/tutorials.py: {} -->"
BLOCK = re.compile(f"{MARK.format('(?P<name>[a-z ]+)')}\n.*?{MARK.format('end')}", re.DOTALL)
TESTS_HEAD = ("run", "learning rate", "lowest validation loss", "after updates", "diverged")
METHODS_HEAD = (
    "schedule",
    "highest learning rate",
    "updates x batch",
    "validation loss",
    "accuracy (%)",
    "as good as Fixed after",
)


@dataclass(frozen=True)
class Outcome:
    """What one task's part of the script found."""

    task: Task
    result: RangeTestResult
    methods: list[Method]

    def method(self, name: str) -> Method | None:
        """The one whose name begins so; None after a refusal, when there was no schedule to train with."""
        return next((method for method in self.methods if method.name.startswith(name)), None)

    @property
    def fixed(self) -> Method:
        """The small batch's learning rate at the large batch."""
        return next(method for method in self.methods if method.name == "Fixed")

    def tests(self) -> list[list[Curve]]:
        """Fixed, slow and fast: each its curves, one for each seed."""
        names = dict.fromkeys(curve.name for curve in self.result.curves)
        return [[curve for curve in self.result.curves if curve.name == name] for name in names]


def spread(values: Sequence[float], digits: int) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} +- {deviation:.{digits}f}"


def between(values: Iterable[float], form: str) -> str:
    """The smallest and the largest, or the one that they all are."""
    ordered = [format(value, form) for value in sorted(values)]
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- range tests -------------------------------------------------------------------------------------


def tests_table(outcome: Outcome) -> str:
    rows = []
    for kind, curves in zip(("best fixed", "slow", "fast"), outcome.tests()):
        lows = [lowest(curve) for curve in curves]
        first, last = curves[0].lrs[0], max(curve.lrs[-1] for curve in curves)
        rows.append(
            (
                kind if kind == "best fixed" else f"{kind}, {curves[0].name}",
                f"{first:.3g}" if first == last else f"{first:.3g} to {last:.2g}",
                spread([loss for _, loss in lows], 3),
                between([updates for updates, _ in lows], "d"),
                diverged(curves),
            )
        )
    return table(TESTS_HEAD, rows)


def lowest(curve: Curve) -> tuple[int, float]:
    """Updates after which the validation loss was lowest, and that loss."""
    return min(curve.validation, key=lambda point: point[1])


def diverged(curves: list[Curve]) -> str:
    """How many did, and where."""
    ends = [(curve, end) for curve in curves if curve.is_test and (end := divergence(curve.losses)) is not None]
    if not ends:
        return "no"
    updates = between([curve.steps[end] for curve, end in ends], "d")
    lrs = between([curve.lrs[end] for curve, end in ends], ".2g")
    return f"{len(ends)} of {len(curves)}: at update {updates}, at {lrs}"


def suggestion_block(outcome: Outcome) -> str:
    """The schedule as it stands in one_cycle.json, its reasons, and what the tests of each seed would have said."""
    result = outcome.result
    answer = result.suggestion
    if not isinstance(answer, Suggestion):
        return f"```\n{result.summary()}\n```"
    scheduler = json.dumps({"scheduler": result.to_config()["scheduler"]}, indent=2)
    why = "\n".join(f"- `{key}`: {answer.reasons[key]}" for key in answer.params() if key in answer.reasons)
    notes = "".join(f"\n- Note: {note}" for note in dict.fromkeys(answer.notes))  # one for each seed
    return f"```json\n{scheduler}\n```\n\n{why}{notes}\n\n{suggestions_alone(result)}"


def suggestions_alone(result: RangeTestResult) -> str:
    """The suggested maximum from the tests of one seed each: how far chance goes."""
    peaks = []
    for seed in sorted({curve.seed for curve in result.curves}):
        answer = replace(result, curves=tuple(curve for curve in result.curves if curve.seed == seed)).suggestion
        peaks.append(f"{answer.cycle_max_lr:g}" if isinstance(answer, Suggestion) else "none")
    return f"The tests of one network alone suggest a `cycle_max_lr` of {', '.join(peaks)}."


# -- trainings ---------------------------------------------------------------------------------------


def methods_table(outcome: Outcome) -> str:
    rows = [
        (
            method.name,
            f"{method.lr:g}",
            f"{outcome.task.updates(method.batch)} x {method.batch}",
            spread(method.losses, 4),
            spread(method.accuracies, 1),
            share_of_data(method, outcome.fixed.loss),
        )
        for method in outcome.methods
    ]
    return table(METHODS_HEAD, rows)


def share_of_data(method: Method, loss: float) -> str:
    """After which share of the training the mean validation loss first was as low as this."""
    points = mean_losses(method)
    found = next((updates for updates, value in points if value <= loss), None)
    return "never" if found is None else f"{found / points[-1][0]:.0%} of the data"


def mean_losses(method: Method) -> list[tuple[int, float]]:
    """Updates, and the mean over the seeds of the validation loss after so many."""
    at = [point[0] for point in method.runs[0].held_out]
    return [(updates, mean(run.held_out[index][1] for run in method.runs)) for index, updates in enumerate(at)]


# -- files -------------------------------------------------------------------------------------------


def save_numbers(outcome: Outcome, out: Path) -> None:
    """Every number behind the tables of the trainings, as JSON and CSV; the tests' are in range_test."""
    (out / "runs.json").write_text(json.dumps([asdict(method) for method in outcome.methods], indent=1) + "\n")
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("schedule", "batch_size", "seed", "updates", "lr", "validation_loss", "accuracy"))
        for method in outcome.methods:
            for run in method.runs:
                for updates, loss, accuracy in run.held_out:
                    lr = run.lrs[max(0, updates - 1)] if run.lrs else ""  # of the update before
                    writer.writerow((method.name, method.batch, run.seed, updates, lr, loss, accuracy))


def write_tables(blocks: dict[str, str], path: Path) -> None:
    """All tables in one file of Markdown."""
    path.write_text("\n\n".join(f"## {name}\n\n{text}" for name, text in blocks.items()) + "\n")


def render(page: str, blocks: dict[str, str]) -> str:
    """A page with its tables as they are in this run."""

    def renewed(found: re.Match[str]) -> str:
        return f"{MARK.format(found['name'])}\n\n{blocks[found['name']]}\n\n{MARK.format('end')}"

    return BLOCK.sub(renewed, page)
