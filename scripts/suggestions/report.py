"""The bench's figures as tables and as a picture. Pure functions of the results, which are JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "block", "draw", "excess", "renew", "tables"]

BEGIN, END = "<!-- scripts/quality: begin -->", "<!-- scripts/quality: end -->"
SHORT = {"OneCycle": "OneCycle", "WarmupDecayLR": "decay"}
FLOOR = 1e-3  # the picture's left edge: better than that is drawn there

Results = dict[str, Any]


# -- figures -------------------------------------------------------------------------------------------


def excess(task: Results, method: str, kind: str) -> float | None:
    """How far the mean validation loss of a method's trainings is above that of the grid's best point, as a share.

    A run that diverged counts as an untrained model. Seeds without an answer are left out; None where none has one.
    """
    best = task["grid"][kind]["best"]["loss"]
    losses = [
        blank if run["diverged"] else run["loss"]
        for run, blank in zip(task["methods"][method]["trained"][kind], task["untrained"])
        if run is not None
    ]
    return statistics.fmean(losses) / best - 1 if losses and best else None


def _spread(task: Results, method: str) -> float | None:
    """Highest by lowest answer over the seeds, of the schedule where that is more."""
    found = []
    for kind in SHORT:
        lrs = [answer[kind] for answer in task["methods"][method]["answers"] if answer[kind] is not None]
        if len(lrs) > 1:
            found.append(max(lrs) / min(lrs))
    return max(found, default=None)


def _cost(task: Results, method: str) -> float:
    """Updates of a suggestion as a share of the training's, the most over the seeds."""
    return max(answer["updates"] for answer in task["methods"][method]["answers"]) / task["steps"]


def _runs(task: Results, method: str, kind: str) -> list[Results | None]:
    return task["methods"][method]["trained"][kind]


# -- tables --------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    made_on = [task for task in results["tasks"] if not task["aside"]]
    aside = [task for task in results["tasks"] if task["aside"]]
    parts = []
    for title, tasks in (("The tasks that the rules were made on", made_on), ("The tasks kept aside", aside)):
        if tasks:
            parts += [f"### {title} ({len(tasks)})", _summary(tasks)]
    parts += ["### Task by task", *_per_task(results["tasks"])]
    if digits := [task for task in results["tasks"] if task["name"].startswith("digits")]:
        parts += ["### Accuracy on the digits", _accuracies(digits)]
    if troubles := list(_troubles(results["tasks"])):
        parts += ["### Without an answer", *troubles]
    return "\n\n".join(parts)


def _methods(tasks: Iterable[Results]) -> list[str]:
    return list(dict.fromkeys(method for task in tasks for method in task["methods"]))


def _summary(tasks: list[Results]) -> str:
    head = ["", *(f"{short}: {what}" for short in SHORT.values() for what in ("median", "worst", "diverged"))]
    rows = []
    for method in _methods(tasks):
        row = [method]
        for kind in SHORT:
            found = [math.inf if (e := excess(task, method, kind)) is None else e for task in tasks]
            runs = [run for task in tasks for run in _runs(task, method, kind)]
            row += [_percent(statistics.median(found)), _percent(max(found)), _diverged(runs)]
        spreads = [spread for task in tasks if (spread := _spread(task, method)) is not None]
        row.append(f"{statistics.median(spreads):.2g} / {max(spreads):.2g}" if spreads else "-")
        costs = [_cost(task, method) for task in tasks]
        rows.append([*row, f"{statistics.median(costs):.0%} / {max(costs):.0%}"])
    return _table([*head, "LR over seeds", "cost"], rows)


def _diverged(runs: list[Results | None]) -> str:
    made = [run for run in runs if run is not None]
    unanswered = len(runs) - len(made)
    said = f"{sum(run['diverged'] for run in made)} of {len(made)}"
    return f"{said}, {unanswered} without an answer" if unanswered else said


def _per_task(tasks: list[Results]) -> Iterator[str]:
    """Excess of every method on every task, with the learning rates it came from."""
    for kind, short in SHORT.items():
        methods = _methods(tasks)
        rows = []
        for task in tasks:
            best = task["grid"][kind]["best"]
            name = f"{task['name']}{' (aside)' if task['aside'] else ''}"
            ground = "-" if best["lr"] is None else f"{best['loss']:.3g} +- {best['spread']:.1g} at {best['lr']:.2g}"
            rows.append([name, ground, *(_cell(task, method, kind) for method in methods)])
        yield f"With `{kind}`: excess, and the median learning rate it came from."
        yield _table([short, "best of the grid", *methods], rows)


def _cell(task: Results, method: str, kind: str) -> str:
    if method not in task["methods"]:
        return "-"
    over = excess(task, method, kind)
    lrs = [answer[kind] for answer in task["methods"][method]["answers"] if answer[kind] is not None]
    if over is None:
        return "no answer"
    failed = sum(run is not None and run["diverged"] for run in _runs(task, method, kind))
    return f"{_percent(over)} at {statistics.median(lrs):.2g}" + (f", {failed} diverged" if failed else "")


def _accuracies(tasks: list[Results]) -> str:
    methods = _methods(tasks)
    rows = []
    for task in tasks:
        for kind, short in SHORT.items():
            row = [f"{task['name']}, {short}", _share(task["grid"][kind]["best"]["accuracy"])]
            for method in methods:
                found = [run.get("accuracy", 0.0) for run in _runs(task, method, kind) if run is not None]
                row.append(_share(statistics.fmean(found) if found else None))
            rows.append(row)
    return _table(["", "best of the grid", *methods], rows)


def _troubles(tasks: list[Results]) -> Iterator[str]:
    """What methods said where they gave no learning rate."""
    for task in tasks:
        for method, found in task["methods"].items():
            silent = [a for a in found["answers"] if any(a[kind] is None for kind in SHORT)]
            if silent:
                why = silent[0].get("error") or silent[0].get("why") or "it returned nothing"
                yield f"- {task['name']}: {method}, {len(silent)} of {len(found['answers'])} seeds: {why}"


def _percent(share: float) -> str:
    if math.isinf(share):
        return "no answer"
    return f"{share:+.1%}" if abs(share) < 1 else f"{share:+.0%}"


def _share(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- a page --------------------------------------------------------------------------------------------


def block(results: Results) -> str:
    """What the docs show of a run: where it comes from, and its tables."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    seeds = " or ".join(map(str, sorted({len(task["untrained"]) for task in results["tasks"]})))
    origin = (
        f"Measured by `{results['command']}` on {results['date']}: {seeds} seeds, {results['points']} "
        f"points of the grid. {results['machine']}; {versions}."
    )
    left_out = [f"{peer} is not installed, and left out." for peer in results["left_out"]]
    if names := results["tasks_left_out"]:
        left_out.append(f"Tasks that are not in this run: {'; '.join(names)}.")
    return "\n\n".join([" ".join([origin, *left_out]), tables(results)])


def renew(page: str, inner: str) -> str:
    """The page with that between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{inner}\n\n{END}{after}"


# -- a picture -----------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """A strip for each method, a dot for each task: excess over the grid's best, with both schedules."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = _methods(results["tasks"])
    figure = Figure(figsize=(11, 1.8 + 0.5 * len(methods)), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    figure.suptitle("A dot for each task (hollow: kept aside), a bar for the median; dashed: 2% and 10%", fontsize=10)
    for axes, (kind, short) in zip(figure.subplots(1, 2, sharey=True), SHORT.items()):
        for row, method in enumerate(methods):
            _strip(axes, row, [task for task in results["tasks"] if method in task["methods"]], method, kind)
        for limit in (0.02, 0.1):
            axes.axvline(limit, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
        axes.set(xscale="log", title=short, xlabel="validation loss above the grid's best point")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xticks([1e-3, 1e-2, 1e-1, 1, 10], ["0.1% or less", "1%", "10%", "100%", "1000%"])
        axes.set_xlim(7e-4, 60)
        axes.set_ylim(len(methods) - 0.5, -0.5)
    figure.savefig(path, metadata={"Software": None})


def _strip(axes: Any, row: int, tasks: list[Results], method: str, kind: str) -> None:
    found = [(e, task["aside"]) for task in tasks if (e := excess(task, method, kind)) is not None]
    for index, (over, aside) in enumerate(found):
        height = row + 0.3 * ((index + 0.5) / len(found) - 0.5)
        axes.plot(
            max(over, FLOOR),
            height,
            "o",
            markersize=6,
            color="#0072B2",
            fillstyle="none" if aside else "full",
            alpha=0.8,
        )
    if found:
        middle = max(statistics.median(over for over, _ in found), FLOOR)
        axes.plot([middle, middle], [row - 0.3, row + 0.3], color="#C8102E", linewidth=2)
