"""The report model: what a report shows, and its charts, as plain values.

A range test and a tuning are both a `Report`. `panels_of` derives the charts from it, which `figure` draws with
matplotlib, `html` with plotly and `terminal` with plotext.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean
from typing import Any, Literal, Protocol

from redline.range_test.curve import SMOOTHING, Curve, Mark, marks, smooth
from redline.range_test.result import CONFIG_NAME, RangeTestResult
from redline.range_test.suggest import Refusal, Suggestion

__all__ = [
    "OWN_RULE", "Axis", "Group", "Line", "Panel", "Report", "Sign", "Trial", "color_of", "dash_of",
    "groups_of", "loss_kind", "marks_of", "panels_of", "report_of", "start_of",
]  # fmt: skip

OWN_RULE = "redline"  # the suggestion's name among the rules

# Okabe and Ito's colors, which color-blind readers can tell apart, the pale ones darker for a white ground.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#C0629A", "#B97F00", "#2F95CC")
GRAY = "#777777"  # of baselines
DASHES = ("solid", "dash", "dot", "dashdot")  # where the colors begin again

ROOM = 0.1  # share of the losses' range that is left free above and below


class Trial(Protocol):
    """A short training with a schedule, and its outcome."""

    @property
    def curve(self) -> Curve: ...
    @property
    def schedule(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def diverged(self) -> bool: ...


@dataclass(frozen=True)
class Report:
    """All that a report shows."""

    title: str
    curves: tuple[Curve, ...]  # range tests, and runs at a fixed LR
    answer: Suggestion | Refusal
    train_steps: int  # optimizer steps of the planned training
    train_batch_size: int  # samples per step of curves that do not have their own
    facts: tuple[tuple[str, str], ...] = ()  # what else was measured with, by name
    beta: float = SMOOTHING  # weight of the past in the smoothing
    marks: tuple[Mark, ...] = ()  # the rules' answers
    batches: tuple[tuple[int, Suggestion | Refusal], ...] = ()  # the answer at each batch size that was tested
    trials: tuple[Trial, ...] = ()  # schedules that were tried
    winner: int | None = None  # index of the best trial
    search: tuple[Trial, ...] = ()  # that looked for the peak LR, of several lengths
    config: Mapping[str, Any] | None = None  # what to train with; None where there is no suggestion
    config_name: str = CONFIG_NAME  # its file, next to the report
    left_out: tuple[str, ...] = ()  # what was not done, and why: a sentence each

    @property
    def schedule(self) -> str:
        """What the config trains with: a class that was written, or "own" for the schedule that it had."""
        config = self.config or {}
        return str(config["_tune"]["schedule"] if "_tune" in config else config.get("scheduler", {}).get("type", ""))

    @property
    def cycle(self) -> tuple[float, float] | None:
        """The suggested 1Cycle's range; None where another schedule, or none, is suggested."""
        if isinstance(self.answer, Refusal) or self.schedule != "OneCycle":
            return None
        return self.answer.cycle_min_lr, self.answer.cycle_max_lr


def report_of(result: RangeTestResult) -> Report:
    """The report of a range test."""
    curves, answer, own, train_steps = result.curves, result.suggestion, result.train_batch_size, result.train_steps
    facts = {
        "optimizer": result.optimizer,
        "batch size": f"{own:,}" if own else "",
        "ranks": str(result.world_size),
        "planned training": f"{train_steps:,} steps",
    }
    return Report(
        "Learning rate range test", curves, answer, train_steps, own,
        facts=tuple((name, value) for name, value in facts.items() if value),
        beta=result.beta,
        marks=marks_of(curves, own, answer, beta=result.beta),
        batches=result.batches,
        config=result.to_config() if result.has_suggestion else None,
    )  # fmt: skip


def marks_of(
    curves: Sequence[Curve], own: int, answer: Suggestion | Refusal, *, beta: float = SMOOTHING
) -> tuple[Mark, ...]:
    """The rules' answers at the config's settings, the suggestion last; `own`: batch size of curves without another."""
    plain = [curve for curve in curves if not curve.settings and (curve.train_batch_size or own) == own]
    if isinstance(answer, Refusal):
        last = Mark(OWN_RULE, None, answer.reason, "")
    else:
        last = Mark(OWN_RULE, answer.cycle_max_lr, answer.reasons["cycle_max_lr"], answer.curve)
    others = marks(plain, beta=beta)
    return (*others, last) if others else ()


# -- curves as lines -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed only: one line with a band."""

    label: str
    curves: tuple[Curve, ...]  # one for each seed
    panel: str = ""  # where they are drawn: "" for the main one, else "batch size" or the name of a setting
    look: int = 0  # number of its color, from 0 in each panel; below 0 for a baseline, which does not grow


def groups_of(curves: Sequence[Curve], own: int) -> tuple[Group, ...]:
    """Curves as lines: seeds together; batch sizes other than `own`, and other settings, in panels of their own."""
    found: dict[Any, list[Curve]] = {}
    for curve in curves:
        # The name separates runs that the other fields do not: two fixed LRs, or those of an imported record.
        key = (curve.kind, curve.rate, curve.train_batch_size or own, curve.settings, _unseeded(curve))
        found.setdefault(key, []).append(curve)
    # Without a test at the own batch size and settings, the main panel would be empty.
    has_main = any(kind != "fixed" and size == own and not varied for kind, _, size, varied, _ in found)
    groups = []
    for (_, _, size, settings, _), members in found.items():
        panel = " and ".join(name for name, _ in settings) or ("" if size == own else "batch size")
        groups.append(Group(_label(members), tuple(members), panel if has_main else ""))
    main, others = [each for each in groups if not each.panel], [each for each in groups if each.panel]
    groups = [*main, *_to_compare(main, others, own), *others]
    count: Counter[tuple[str, bool]] = Counter()
    for index, group in enumerate(groups):
        is_baseline = group.curves[0].kind == "fixed"
        number = count[group.panel, is_baseline]
        count[group.panel, is_baseline] += 1
        groups[index] = replace(group, look=-1 - number if is_baseline else number)
    return tuple(groups)


def _to_compare(main: Sequence[Group], others: Sequence[Group], own: int) -> Iterator[Group]:
    """For each further panel the tests of the main one that differ from its own in nothing else."""
    for panel in dict.fromkeys(group.panel for group in others):
        shown = {(group.curves[0].kind, group.curves[0].rate) for group in others if group.panel == panel}
        how = f"batch {own}" if panel == "batch size" else "as configured"
        for group in main:
            first = group.curves[0]
            if first.is_test and (first.kind, first.rate) in shown:
                yield Group(f"{group.label}, {how}", group.curves, panel)


def _label(members: Sequence[Curve]) -> str:
    if len(members) == 1:
        return members[0].name
    is_repeated = len({curve.seed for curve in members}) < len(members)
    return f"{_unseeded(members[0])} ({'repeated' if is_repeated else f'{len(members)} seeds'})"


def _unseeded(curve: Curve) -> str:
    """The name without its seed: "rate 5" of "rate 5, seed 2"."""
    return re.sub(r"[\s,;(]*\bseed[ =]*\d+\)?", "", curve.name) or curve.name


def color_of(look: int) -> str:
    """The color of a look."""
    return GRAY if look < 0 else COLORS[look % len(COLORS)]


def dash_of(look: int) -> str:
    """The dash of a look, one of `DASHES`."""
    return DASHES[(-1 - look if look < 0 else look // len(COLORS)) % len(DASHES)]


# -- charts --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its title, whether it is logarithmic, and what it shows; None for everything."""

    title: str
    log: bool = False
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel."""

    label: str
    look: int
    x: Sequence[float]
    y: Sequence[float]  # nan is a gap
    low: Sequence[float] = ()  # the band around y, of several seeds; empty for none
    high: Sequence[float] = ()
    raw: tuple[tuple[Sequence[float], Sequence[float]], ...] = ()  # x and y of each run as measured, drawn behind
    details: tuple[tuple[str, Sequence[float]], ...] = ()  # further values of each point, by name, for a read-out
    value: str = "loss"  # what y is called there
    has_knots: bool = False  # whether each point is marked
    is_best: bool = False  # whether it is emphasized


@dataclass(frozen=True, slots=True)
class Sign:
    """Where a run diverged, or a step that the loss scaler skipped."""

    x: float
    y: float | None  # None for the upper edge, since the loss is far out of sight, or the lower of a skipped step
    line: str  # label of the run
    look: int
    text: str
    diverged: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart."""

    name: str  # of its kind: "rate", "loss", "schedule", "batch", "settings", "search", "trials"
    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]  # the first one at the back
    caption: str = ""  # what its signs mean
    span: tuple[float, float] | None = None  # the suggested range, on the x axis, or on the y axis if `span_on_y`
    span_on_y: bool = False
    marks: tuple[Mark, ...] = ()  # the rules' answers
    signs: tuple[Sign, ...] = ()


Column = Literal["lrs", "steps"]  # of a curve


def panels_of(report: Report) -> tuple[Panel, ...]:
    """All charts: the loss by LR, loss and LR by step, then whatever else was measured."""
    groups = groups_of(report.curves, report.train_batch_size)
    main = [group for group in groups if not group.panel]
    panels = []
    if main or not (report.search or report.trials):  # a small budget has no range test
        panels = [_by_lr(report, main), _by_step("loss", " by step", report, main), _schedules(report, main)]
    if len(report.batches) > 1:
        panels.append(_batches(report))
    for name in dict.fromkeys(group.panel for group in groups if group.panel):
        panels.append(_by_lr(report, [group for group in groups if group.panel == name], name))
    if report.search:
        panels.append(_search(report))
    if report.trials:
        trials = [Group(trial.curve.name, (trial.curve,), look=k) for k, trial in enumerate(report.trials)]
        panels.append(_by_step("trials", " of the trials", report, trials, report.winner))
    return tuple(panels)


def _by_lr(report: Report, groups: Sequence[Group], varied: str = "") -> Panel:
    """The training loss against the LR; the suggestion is in the main panel, where nothing was varied."""
    tests = [group for group in groups if group.curves[0].is_test]
    axes = Axis("learning rate", log=True), _loss_axis(tests, "training")
    lines, signs = tuple(_training_line(each, "lrs", report.beta) for each in tests), tuple(_signs(tests, "lrs"))
    if varied:
        return Panel("settings", f"Training loss by {varied.replace('_', ' ')}", *axes, lines, signs=signs)
    caption = "Line: smoothed; dots: as measured; cross: diverged."
    caption += " Yellow: the suggested 1Cycle." * bool(report.cycle)
    title = "Training loss by learning rate"
    return Panel("rate", title, *axes, lines, caption, report.cycle, marks=report.marks, signs=signs)


def _by_step(name: str, suffix: str, report: Report, groups: Sequence[Group], best: int | None = None) -> Panel:
    """The validation loss against the step, or without one the training loss."""
    if any(curve.validation for group in groups for curve in group.curves):
        kind, lines = "validation", [_validation_line(group) for group in groups]
    else:
        kind, lines = "training", [_training_line(group, "steps", report.beta) for group in groups]
    caption = ""
    if best is not None:
        lines[best], caption = replace(lines[best], is_best=True), "The widest line is the winner."
    axes, signs = (Axis("step"), _loss_axis(groups, kind)), tuple(_signs(groups, "steps"))
    return Panel(name, f"{kind.capitalize()} loss{suffix}", *axes, tuple(lines), caption, signs=signs)


def _schedules(report: Report, groups: Sequence[Group]) -> Panel:
    lines = []
    for group in groups:
        curve = max(group.curves, key=lambda each: len(each.steps))
        details = (("step", curve.steps),)
        lines.append(Line(group.label, group.look, curve.steps, curve.lrs, details=details, value="LR"))
    axes = Axis("step"), Axis("learning rate", log=True)
    signs = tuple(sign for sign in _signs(groups, "steps", "lrs") if sign.diverged)
    return Panel(
        "schedule", "Learning rate by step", *axes, tuple(lines), span=report.cycle, span_on_y=True, signs=signs
    )


def _batches(report: Report) -> Panel:
    answers = [(size, answer.params()) for size, answer in report.batches if isinstance(answer, Suggestion)]
    sizes, lines = [size for size, _ in answers], []
    for look, key in enumerate(("cycle_max_lr", "cycle_min_lr")):
        lrs, details = [params[key] for _, params in answers], (("batch size", sizes),)
        lines.append(Line(key, look, sizes, lrs, details=details, value="LR", has_knots=True))
    axes = Axis("batch size", log=True), Axis("learning rate", log=True)
    return Panel("batch", "Boundaries by batch size", *axes, tuple(lines))


def _search(report: Report) -> Panel:
    """The loss at the end against the peak, a line for each length; several orders of the data are a band."""
    lines, signs = [], []
    for look, steps in enumerate(sorted({trial.steps for trial in report.search})):
        label, losses = f"{steps} steps", dict[float, list[float]]()
        for trial in sorted((each for each in report.search if each.steps == steps), key=lambda each: each.lr):
            if trial.diverged:
                signs.append(Sign(trial.lr, None, label, look, f"diverged at {trial.lr:.4g}"))
            else:
                losses.setdefault(trial.lr, []).append(trial.loss)
        lrs, orders = list(losses), list(zip_longest(*losses.values(), fillvalue=math.nan))
        lines.append(Line(label, look, lrs, *_mean(orders), details=(("peak LR", lrs),), has_knots=True))
    ends = [loss for line in lines for loss in line.y]
    least, start = min(ends, default=0.0), max(map(start_of, report.search))
    room = ROOM * (start - least)  # what went far above its start would flatten the rest
    bounds = (least - room, start + room) if room > 0 and max(ends) > start + room else None
    axes = Axis("peak learning rate", log=True), Axis(f"{loss_kind(report.search)} loss at the end", bounds=bounds)
    caption, answer = "Loss at the end of short trainings. The line: the peak for the full one.", report.answer
    own = (Mark(OWN_RULE, answer.cycle_max_lr, "", ""),) if isinstance(answer, Suggestion) else ()
    return Panel("search", "Search for the peak", *axes, tuple(lines), caption, marks=own, signs=tuple(signs))


def start_of(trial: Trial) -> float:
    """The loss at a trial's start, of the kind that it is judged by."""
    return trial.curve.validation[0][1] if trial.curve.validation else trial.curve.losses[0]


def loss_kind(trials: Sequence[Trial]) -> str:
    """Which loss trials are compared by."""
    return "validation" if any(trial.curve.validation for trial in trials) else "training"


def _training_line(group: Group, column: Column, beta: float) -> Line:
    longest = max(group.curves, key=lambda curve: len(curve.steps))
    details: list[tuple[str, Sequence[float]]] = [("step", longest.steps), ("LR", longest.lrs)]
    if len(group.curves) == 1:
        details.append(("loss", longest.losses))
    x, raw = getattr(longest, column), tuple((getattr(curve, column), curve.losses) for curve in group.curves)
    band = _mean([smooth(curve.losses, beta) for curve in group.curves])
    return Line(group.label, group.look, x, *band, raw, tuple(details), "smoothed loss", has_knots=len(x) == 1)


def _validation_line(group: Group) -> Line:
    band = _mean([[loss for _, loss in curve.validation] for curve in group.curves])
    x = [steps for steps, _ in max((curve.validation for curve in group.curves), key=len)]
    details = (("after step", x),)
    return Line(group.label, group.look, x, *band, (), details, "validation loss", has_knots=len(x) < 60)


def _mean(rows: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, lowest and highest of the finite values in each column; the last two only for several rows."""
    columns = [[value for value in column if math.isfinite(value)] for column in zip_longest(*rows, fillvalue=math.nan)]
    mean, low, high = ([fold(each) if each else math.nan for each in columns] for fold in (fmean, min, max))
    return (mean, low, high) if len(rows) > 1 else (mean, [], [])


def _signs(groups: Sequence[Group], x: Column, y: Column | None = None) -> Iterator[Sign]:
    """Divergences of tests and skipped steps, at these columns of the curve."""
    for group, curve in [(each, curve) for each in groups for curve in each.curves]:
        end, skipped = curve.diverged_at if curve.is_test else None, set(curve.skipped)
        found = [] if end is None else [(end, f"diverged at step {curve.steps[end]}, LR {curve.lrs[end]:.2g}")]
        for index, step in enumerate(curve.steps):
            if step in skipped:
                found.append((index, f"step {step} was skipped: the loss scale was too high"))
        for index, text in found:
            place = getattr(curve, x)[index], getattr(curve, y)[index] if y else None
            yield Sign(*place, group.label, group.look, text, diverged=text.startswith("diverged"))


def _loss_axis(groups: Sequence[Group], kind: str) -> Axis:
    """Bounds a little beyond where the runs began, so that a diverging end does not flatten the rest."""
    is_training, title = kind == "training", f"{kind} loss"
    curves = [curve for group in groups for curve in group.curves]
    columns = [curve.losses if is_training else [loss for _, loss in curve.validation] for curve in curves]
    losses = [finite for column in columns if (finite := [loss for loss in column if math.isfinite(loss)])]
    if not losses:
        return Axis(title)
    high = max(max(each[: 5 if is_training else 2]) for each in losses)
    low = min(map(min, losses))
    room = ROOM * ((high - low) or 1.0)
    return Axis(title, bounds=(0.0 if low - room < 0 <= low else low - room, high + room))
