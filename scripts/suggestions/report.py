"""The results as tables and as pictures. Pure functions of the results, which are JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from suggestions.grid import above
from suggestions.judge import BUDGETS, OWN, redline

__all__ = ["BEGIN", "END", "block", "draw", "draw_budgets", "excess", "renew", "tables", "worse_than_own"]

BEGIN, END = "<!-- scripts/quality: begin -->", "<!-- scripts/quality: end -->"
FLOOR = 1e-3  # the pictures' edge: better than that is drawn there
BLUE, RED, GRAY = "#0072B2", "#C8102E", "#999999"

Results = dict[str, Any]


# -- figures -------------------------------------------------------------------------------------------


def excess(task: Results, method: str) -> float | None:
    """How far the mean loss of a method's trainings is above that of the grid's best point, with the same seeds.

    A fraction of the loss, or of the likelihood where the loss is its logarithm. A run that diverged counts as an
    untrained model. None where the method made no training.
    """
    runs = task["methods"].get(method)
    if not runs:
        return None
    best = task["grid"]["best"]["runs"]
    loss = statistics.fmean(run["loss"] for run in runs)
    return above(loss, statistics.fmean(best[run["seed"]]["loss"] for run in runs), log_scale=task["log_scale"])


def worse_than_own(task: Results, method: str) -> bool:
    """Is the mean loss above that with the config's own learning rate by 2% and two standard deviations of that?"""
    own = {run["seed"]: run["loss"] for run in task["methods"].get(OWN, ())}
    runs = [run for run in task["methods"].get(method, ()) if run["seed"] in own]
    if not runs:
        return False
    mean = statistics.fmean(own[run["seed"]] for run in runs)
    noise = 2 * statistics.stdev(own.values()) if len(own) > 1 else 0.0
    margin = 0.02 if task["log_scale"] else 0.02 * mean
    return statistics.fmean(run["loss"] for run in runs) > mean + margin + noise


def _spread(task: Results, method: str) -> float | None:
    """Highest by lowest answer over the seeds."""
    lrs = [run["lr"] for run in task["methods"].get(method, ()) if run["lr"] is not None]
    return max(lrs) / min(lrs) if len(lrs) > 1 else None


def _time(task: Results, method: str) -> float | None:
    """Seconds of asking as a fraction of those of the training that follows; of the middle seed."""
    runs = [run["asking"] / run["seconds"] for run in task["methods"].get(method, ()) if run.get("seconds")]
    return statistics.median(runs) if runs and any(runs) else None


# -- tables --------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    tasks = results["tasks"]
    development, held_out = ([task for task in tasks if task["held_out"] is side] for side in (False, True))
    parts = []
    for title, group in (("Held-out tasks", held_out), ("Development tasks", development)):
        if group:
            parts += [f"### {title} ({len(group)})", _summary(group)]
    parts += ["### By kind of task", _kinds(tasks), "### Task by task", _per_task(tasks)]
    if refusals := list(_refusals(tasks)):
        parts += ["### Without an answer", *refusals]
    return "\n\n".join(parts)


def _methods(tasks: Iterable[Results]) -> list[str]:
    return list(dict.fromkeys(method for task in tasks for method in task["methods"]))


def _summary(tasks: list[Results]) -> str:
    head = ["", "median", "worst", "above 10%", "above the own", "diverged", "LR over seeds", "steps", "time"]
    rows = []
    for method in _methods(tasks):
        found = [e for task in tasks if (e := excess(task, method)) is not None]
        runs = [run for task in tasks for run in task["methods"].get(method, ())]
        spreads = [spread for task in tasks if (spread := _spread(task, method)) is not None]
        steps = [run["steps"] / task["steps"] for task in tasks for run in task["methods"].get(method, ())]
        times = [share for task in tasks if (share := _time(task, method)) is not None]
        rows.append(
            [
                method,
                _percent(statistics.median(found)),
                _percent(max(found)),
                f"{sum(over > 0.1 for over in found)} of {len(found)}",
                f"{sum(worse_than_own(task, method) for task in tasks)} of {len(found)}",
                f"{sum(run['diverged'] for run in runs)} of {len(runs)}",
                f"{statistics.median(spreads):.2g} / {max(spreads):.2g}" if spreads else "-",
                f"{statistics.median(steps):.0%}",
                f"{statistics.median(times):.0%}" if times else "-",
            ]
        )
    return _table(head, rows)


def _kinds(tasks: list[Results]) -> str:
    """The worst excess of every method in each kind of task."""
    methods = _methods(tasks)
    rows = []
    for kind in dict.fromkeys(task["kind"] for task in tasks):
        group = [task for task in tasks if task["kind"] == kind]
        worst = [max(found, default=None) for found in ([*_excesses(group, method)] for method in methods)]
        rows.append([f"{kind} ({len(group)})", *("-" if over is None else _percent(over) for over in worst)])
    return _table(["worst", *methods], rows)


def _excesses(tasks: list[Results], method: str) -> Iterator[float]:
    for task in tasks:
        if (over := excess(task, method)) is not None:
            yield over


def _per_task(tasks: list[Results]) -> str:
    """Excess of every method on every task, with the learning rates it came from."""
    methods = _methods(tasks)
    rows = []
    for task in tasks:
        best = task["grid"]["best"]
        losses = [run["loss"] for run in best["runs"]]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        name = f"{task['name']} ({task['kind']}{', held out' if task['held_out'] else ''})"
        ground = f"{statistics.fmean(losses):.3g} +- {spread:.1g} at {best['lr']:.2g}"
        rows.append([name, ground, *(_cell(task, method) for method in methods)])
    return _table(["excess and median learning rate", "best of the grid", *methods], rows)


def _cell(task: Results, method: str) -> str:
    over = excess(task, method)
    if over is None:
        return "-"
    runs = task["methods"][method]
    lrs = [run["lr"] for run in runs if run["lr"] is not None]
    at = f" at {statistics.median(lrs):.2g}" if lrs else ""
    refused = sum("why" in run for run in runs)
    failed = sum(run["diverged"] for run in runs)
    notes = [f", {count} {what}" for count, what in ((refused, "without an answer"), (failed, "diverged")) if count]
    return f"{_percent(over)}{at}{''.join(notes)}"


def _refusals(tasks: list[Results]) -> Iterator[str]:
    """Why methods gave no learning rate."""
    for task in tasks:
        for method, runs in task["methods"].items():
            if silent := [run for run in runs if "why" in run]:
                yield f"- {task['name']}: {method}, {len(silent)} of {len(runs)} seeds: {silent[0]['why']}"


def _percent(fraction: float) -> str:
    return f"{fraction:+.1%}" if abs(fraction) < 1 else f"{fraction:+.0%}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- a page --------------------------------------------------------------------------------------------


def block(results: Results) -> str:
    """The part of docs/quality.md that a run writes: its origin and its tables."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    seeds = " or ".join(map(str, sorted({len(runs) for task in results["tasks"] for runs in task["methods"].values()})))
    origin = (
        f"Measured by `{results['command']}` on {results['date']}: {len(results['tasks'])} tasks, {seeds} seeds, 18 "
        f"points of the grid. {results['machine']}; {versions}."
    )
    left_out = [f"{peer} is not installed, and left out." for peer in results["left_out"]]
    if names := results["tasks_left_out"]:
        left_out.append(f"Tasks that are not in this run: {'; '.join(names)}.")
    picture = ["![Excess against the budget](images/quality_budget.png)"] if len(_budgets(results)) > 1 else []
    return "\n\n".join([" ".join([origin, *left_out]), *picture, tables(results)])


def renew(page: str, inner: str) -> str:
    """The page with that between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{inner}\n\n{END}{after}"


# -- pictures ------------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """A strip for each method, a dot for each task: excess over the grid's best."""
    methods = _methods(results["tasks"])
    figure, axes = _figure((10, 1.5 + 0.4 * len(methods)))
    for row, method in enumerate(methods):
        tasks = [task for task in results["tasks"] if method in task["methods"]]
        for index, task in enumerate(tasks):
            height = row + 0.5 * ((index + 0.5) / len(tasks) - 0.5)
            style = {"fillstyle": "none" if task["held_out"] else "full", "alpha": 0.8, "markersize": 5}
            axes.plot(min(max(excess(task, method), FLOOR), 50), height, "o", color=BLUE, **style)
        middle = max(statistics.median(excess(task, method) for task in tasks), FLOOR)
        axes.plot([middle, middle], [row - 0.35, row + 0.35], color=RED, linewidth=2)
    for limit in (0.02, 0.1):
        axes.axvline(limit, color=GRAY, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xscale="log", xlabel="validation loss above the grid's best point")
    axes.set_title("A dot for each task (hollow: held out), a bar for the median; dashed: 2% and 10%", fontsize=10)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xticks([1e-3, 1e-2, 1e-1, 1, 10], ["0.1% or less", "1%", "10%", "100%", "1000%"])
    axes.set_xlim(7e-4, 60)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    figure.savefig(path, metadata={"Software": None})


def draw_budgets(results: Results, path: Path) -> None:
    """Excess against the budget: a thin line for each task, thick ones for the median and the worst."""
    budgets = _budgets(results)
    if len(budgets) < 2:
        return
    figure, axes = _figure((7, 4))
    tasks = [task for task in results["tasks"] if all(redline(budget) in task["methods"] for budget in budgets)]
    curves = [[max(excess(task, redline(budget)), FLOOR) for budget in budgets] for task in tasks]
    for curve, task in zip(curves, tasks):
        style = "--" if task["held_out"] else "-"
        axes.plot(budgets, curve, style, color=BLUE, alpha=0.25, linewidth=0.8)
    if curves:
        for name, combine, color in (("worst", max, GRAY), ("median", statistics.median, RED)):
            axes.plot(budgets, [combine(each) for each in zip(*curves)], "o-", color=color, linewidth=2, label=name)
        axes.legend()
    axes.set(xscale="log", yscale="log", xlabel="budget, as a fraction of the training's steps")
    axes.set_ylabel("validation loss above the grid's best point")
    axes.set_title(f"{len(tasks)} tasks (dashed: held out)", fontsize=10)
    axes.set_xticks(budgets, [f"{budget:.0%}" for budget in budgets])
    axes.minorticks_off()
    axes.set_yticks([1e-3, 1e-2, 1e-1, 1, 10], ["0.1% or less", "1%", "10%", "100%", "1000%"])
    figure.savefig(path, metadata={"Software": None})


def _budgets(results: Results) -> list[float]:
    """Those that were measured on any task."""
    return [budget for budget in BUDGETS if any(redline(budget) in task["methods"] for task in results["tasks"])]


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
