"""What a report shows, as plain pieces: curves, marks, the answer, trials, the config.

A range test and a tuning are both brought into this form; page, picture, terminal chart and monitors draw it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from engine.range_test import rules
from engine.range_test.analysis import suggest
from engine.range_test.curve import Curve
from engine.range_test.smoothing import SMOOTHING
from engine.range_test.suggestion import Refusal, Suggestion

if TYPE_CHECKING:
    from engine.range_test.result import RangeTestResult

__all__ = [
    "Contents",
    "Group",
    "Mark",
    "Trial",
    "batch_boundaries",
    "contents_of",
    "groups_of",
    "label_of",
    "looks_of",
    "marks_of",
    "trial_groups",
]

TRIALS = "trials"  # their panel
OURS = "redline"  # what our own rule is called beside others


class Mark(Protocol):
    """One rule's answer: an LR, or None where it has none, and why."""

    @property
    def rule(self) -> str: ...
    @property
    def lr(self) -> float | None: ...
    @property
    def why(self) -> str: ...


class Trial(Protocol):
    """A short training with a schedule, and what it came to."""

    @property
    def curve(self) -> Curve: ...
    @property
    def schedule(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def diverged(self) -> bool: ...


@dataclass(frozen=True)
class Contents:
    """All that a report shows.

    Attributes:
        title: one line.
        curves: range tests, and runs at a fixed LR beside them.
        answer: the suggested 1Cycle, or why there is none.
        train_steps: updates of the planned training.
        train_batch_size: samples of an update of curves that do not say otherwise.
        facts: what else was measured with, by name.
        beta: weight of the past in the smoothing.
        marks: the rules' answers.
        batches: the answer at each batch size that was tested.
        trials: schedules that were tried, in the order in which they are listed.
        winner: index of the best trial.
        search: short trainings that looked for the peak, each with how far its loss came from where it began.
        config: what to train with; None where there is no suggestion.
        config_name: its file, beside the report.
        left_out: what was not done, and why: a sentence each.
    """

    title: str
    curves: tuple[Curve, ...]
    answer: Suggestion | Refusal
    train_steps: int
    train_batch_size: int
    facts: tuple[tuple[str, str], ...] = ()
    beta: float = SMOOTHING
    marks: tuple[Mark, ...] = ()
    batches: tuple[tuple[int, Suggestion | Refusal], ...] = ()
    trials: tuple[Trial, ...] = ()
    winner: int | None = None
    search: tuple[tuple[Trial, float], ...] = ()
    config: Mapping[str, Any] | None = None
    config_name: str = "one_cycle.json"
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed only: one line with a band.

    Attributes:
        label: what a person calls them.
        curves: one for each seed.
        panel: where they are drawn: "" with the tests, else "batch size" or the name of a setting.
    """

    label: str
    curves: tuple[Curve, ...]
    panel: str = ""


def contents_of(result: RangeTestResult, *, beta: float = SMOOTHING) -> Contents:
    """A range test in this form.

    Args:
        result: the test.
        beta: weight of the past in the smoothing of what is drawn.
    """
    facts = {
        "optimizer": result.optimizer,
        "batch size": f"{result.train_batch_size:,}" if result.train_batch_size else "",
        "processes": str(result.world_size),
        "planned training": f"{result.train_steps:,} updates",
    }
    return Contents(
        title="Learning rate range test",
        curves=result.curves,
        answer=result.suggestion,
        train_steps=result.train_steps,
        train_batch_size=result.train_batch_size,
        facts=tuple((name, value) for name, value in facts.items() if value),
        beta=beta,
        marks=marks_of(result.curves, result.train_batch_size, result.suggestion, beta=beta),
        batches=batch_boundaries(result.curves, result.train_batch_size, result.train_steps),
        config=result.to_config() if result.has_suggestion else None,
    )


def marks_of(
    curves: Sequence[Curve], own: int, answer: Suggestion | Refusal, *, beta: float = SMOOTHING
) -> tuple[Mark, ...]:
    """What the rules say of the tests as configured, our own last.

    Args:
        curves: of a range test.
        own: batch size of curves that say none.
        answer: what our own rule says.
        beta: weight of the past in the other rules' smoothing.
    """
    plain = [curve for curve in curves if not curve.settings and (curve.train_batch_size or own) == own]
    others = rules.marks(plain, beta=beta)
    if not others:
        return ()
    if isinstance(answer, Refusal):
        return (*others, rules.Mark(OURS, None, answer.reason, ""))
    return (*others, rules.Mark(OURS, answer.cycle_max_lr, answer.reasons.get("cycle_max_lr", ""), answer.curve))


def batch_boundaries(
    curves: Sequence[Curve], own: int, train_steps: int
) -> tuple[tuple[int, Suggestion | Refusal], ...]:
    """The answer at each batch size, where there are at least two.

    Args:
        curves: those that say no batch size were measured at `own`.
        own: samples of an update.
        train_steps: updates of the planned training.
    """
    by_size: dict[int, list[Curve]] = {}
    for curve in curves:
        if curve.is_test and not curve.settings:
            by_size.setdefault(curve.train_batch_size or own, []).append(replace(curve, train_batch_size=None))
    if len(by_size) < 2:
        return ()
    return tuple((size, suggest(tests, train_steps=train_steps)) for size, tests in sorted(by_size.items()))


def groups_of(curves: Sequence[Curve], own: int) -> tuple[Group, ...]:
    """Curves as lines to draw: seeds together, tests at other batch sizes or settings in a panel of their own.

    Args:
        curves: of a range test.
        own: batch size of curves that say none.
    """
    found: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        # The name tells runs apart that these fields do not: two fixed rates, or a foreign record's.
        alike = (curve.kind, curve.rate, curve.train_batch_size or own, curve.settings, label_of(curve))
        found.setdefault(alike, []).append(curve)
    panels = dict(_panels(list(found), own))
    groups = [Group(_label(members), tuple(members), panels[alike]) for alike, members in found.items()]
    beside = list(_to_compare(groups, own))  # first in their panels
    return (*(group for group in groups if group.panel == ""), *beside, *(group for group in groups if group.panel))


def _to_compare(groups: Sequence[Group], own: int) -> Iterator[Group]:
    """For each panel the tests as configured that differ from its own in nothing else."""
    for panel in dict.fromkeys(group.panel for group in groups if group.panel):
        shown = {(g.curves[0].kind, g.curves[0].rate) for g in groups if g.panel == panel}
        for group in groups:
            first = group.curves[0]
            if group.panel == "" and first.is_test and (first.kind, first.rate) in shown:
                how = f"batch {own}" if panel == "batch size" else "as configured"
                yield Group(f"{group.label}, {how}", group.curves, panel)


def looks_of(groups: Sequence[Group]) -> list[int]:
    """A number for each group's look, from 0 in each panel; a baseline, which does not grow, has one below 0."""
    grown: Counter[str] = Counter()
    fixed: Counter[str] = Counter()
    looks = []
    for group in groups:
        plain = group.curves[0].kind == "fixed" and group.panel != TRIALS
        count = fixed if plain else grown
        looks.append(-1 - count[group.panel] if plain else count[group.panel])
        count[group.panel] += 1
    return looks


def trial_groups(trials: Sequence[Trial]) -> tuple[Group, ...]:
    """Trials as lines to draw, each by itself."""
    return tuple(Group(trial.curve.name, (trial.curve,), TRIALS) for trial in trials)


def _label(members: Sequence[Curve]) -> str:
    if len(members) == 1:
        return members[0].name
    seeds = len({curve.seed for curve in members})
    return f"{label_of(members[0])} ({seeds} seeds)" if seeds == len(members) else f"{label_of(members[0])} (repeated)"


def label_of(curve: Curve) -> str:
    """The name without its seed.

    >>> label_of(Curve("rate 5, seed 2", 5.0, (), (), ()))
    'rate 5'
    """
    return re.sub(r"[\s,;(]*\bseed[ =]*\d+\)?", "", curve.name) or curve.name


def _panels(keys: list[tuple[Any, ...]], own: int) -> Iterator[tuple[tuple[Any, ...], str]]:
    varied = {name for key in keys for name, _ in key[3]}
    plain = [key for key in keys if not key[3] and key[2] == own]
    for key in keys:
        if not any(each[0] in ("linear", "exponential") for each in plain):
            yield key, ""  # nothing else would be in the first panel
        elif key[3]:
            yield key, " and ".join(name for name, _ in key[3] if name in varied)
        else:
            yield key, "" if key[2] == own else "batch size"
