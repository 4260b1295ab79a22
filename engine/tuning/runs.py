"""The range tests of a tuning, as runs for the rig: at which rates each begins and ends.

A coarse exponential sweep over all rates that make sense; then a slow linear test that ends a little above the maximum
it suggests, and a fast one that passes it early and goes on to where the sweep diverged, and beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer

from engine.range_test.rig import Run
from engine.range_test.suggestion import Refusal, Suggestion
from schedulers import LRRangeTest, WarmupDecayLR

__all__ = [
    "Span",
    "Variant",
    "fixed_run",
    "linear_runs",
    "named_runs",
    "span_around",
    "span_of",
    "sweep_run",
    "try_run",
]

ADAPTIVE = (1e-5, 1.0)  # rates that make sense for an optimizer that scales its own steps (it has betas) ...
PLAIN = (1e-4, 10.0)  # ... and for one that does not
BELOW = 100.0  # linear tests start this factor below the suggested maximum
ABOVE = 30.0  # tests that compare batch sizes and settings end this factor above it
SLOW_PAST = 1.5  # the slow one ends at so many times the suggested maximum
FAST_PAST = 5.0  # the fast one at so many times ...
DIVERGES_PAST = 2.0  # ... and at so many times the rate at which the sweep diverged, if that is more
DIVERGED_MARGIN = 10.0  # of a sweep that diverged and suggests nothing, the maximum is looked for this factor below
NAMED_RATES = (5.0, 500.0)  # growth of the slow and the fast test where the config names their start ...
NAMED_STAIRS = 20  # ... in one part of so many of the test's updates
TEST_VALIDATIONS = 5  # for the eye; each costs a pass over the validation data


@dataclass(frozen=True, slots=True)
class Span:
    """The rates that a sweep covers."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Variant:
    """What a test is made with apart from the config's own: the suffix of its name says it."""

    seed: int = 0
    train_batch_size: int | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        parts = [f"{name} {value:g}" for name, value in self.settings.items()]
        if self.train_batch_size is not None:
            parts.append(f"batch {self.train_batch_size}")
        if self.seed:
            parts.append(f"seed {self.seed}")
        return "".join(f", {part}" for part in parts)


def span_of(optimizer: Optimizer) -> Span:
    """The rates that make sense for an optimizer, wide enough for all that people use."""
    return Span(*(ADAPTIVE if "betas" in optimizer.defaults else PLAIN))


def span_around(answer: Suggestion | Refusal, diverged_at: float | None, whole: Span) -> Span:
    """The part of a span that tests of batch sizes and settings cover, all alike, where the order is known."""
    maximum = _maximum(answer, diverged_at)
    if maximum is None:
        return whole
    return Span(_round(maximum / BELOW), _round(max(ABOVE * maximum, DIVERGES_PAST * (diverged_at or 0))))


def _maximum(answer: Suggestion | Refusal, diverged_at: float | None) -> float | None:
    """The maximum that is suggested, or a guess from where a sweep diverged."""
    if isinstance(answer, Suggestion):
        return answer.cycle_max_lr
    return None if diverged_at is None else diverged_at / DIVERGED_MARGIN


def _round(lr: float) -> float:
    return float(f"{lr:.2g}")


def sweep_run(span: Span, updates: int, ratios: Sequence[float], variant: Variant) -> Run:
    """From the lowest rate to the highest, by equal factors."""
    last = max(1, updates - 1)
    growth = span.high / span.low - 1  # in `last` updates

    def schedule(optimizer: Optimizer) -> LRRangeTest:
        return LRRangeTest(optimizer, _scaled(span.low, ratios), last, growth, growth="exponential")

    return _run(f"sweep{variant.suffix}", "exponential", schedule, updates, growth, variant)


def linear_runs(
    answer: Suggestion | Refusal,
    diverged_at: float | None,
    slow: int,
    fast: int,
    ratios: Sequence[float],
    variant: Variant,
) -> list[Run]:
    """The slow and the fast test around what a sweep suggests; none where it gives nothing to go by.

    Args:
        answer: the sweep's.
        diverged_at: the rate at which it diverged.
        slow, fast: updates.
        ratios: each group's rate as a multiple of the first one's.
        variant: what they are made with.
    """
    # The highest that the sweep allows for: its own answer errs towards too low.
    maximum = answer.high_lr if isinstance(answer, Suggestion) else _maximum(answer, diverged_at)
    if maximum is None:
        return []
    low = _round(maximum / BELOW)
    ends = {"slow": SLOW_PAST * maximum, "fast": max(FAST_PAST * maximum, DIVERGES_PAST * (diverged_at or 0))}
    step_size = max(1, slow // NAMED_STAIRS)  # the same for both, so that their rates compare
    runs = []
    for name, updates in (("slow", slow), ("fast", fast)):
        rate = float(f"{(ends[name] / low - 1) * step_size / max(1, updates - 1):.3g}")
        runs.append(_linear(name, low, step_size, rate, updates, ratios, variant))
    return runs


def named_runs(low: float, slow: int, fast: int, ratios: Sequence[float], variant: Variant) -> list[Run]:
    """The slow and the fast test from the rate that the config names."""
    runs = []
    for name, rate, updates in zip(("slow", "fast"), NAMED_RATES, (slow, fast)):
        if updates:
            runs.append(_linear(name, low, max(1, updates // NAMED_STAIRS), rate, updates, ratios, variant))
    return runs


def fixed_run(name: str, lrs: Sequence[float], updates: int, validations: int) -> Run:
    """A trial at a fixed rate, one for each group: a test that does not grow."""
    return Run(
        name, "fixed", lambda optimizer: LRRangeTest(optimizer, list(lrs), 1, 0.0), updates, validations=validations
    )


def try_run(lr: float, updates: int, ratios: Sequence[float], *, holds: bool) -> Run:
    """A short training for the search: at a rate that it holds, or from a peak down to nothing by equal amounts."""
    lrs = _scaled(lr, ratios)
    if holds:
        return fixed_run(f"try {lr:g}", lrs, updates, 1)

    def schedule(optimizer: Optimizer) -> WarmupDecayLR:
        # No warm-up: it would be all of so short a run. Corrected, the first update has the peak.
        return WarmupDecayLR(optimizer, updates, 0.0, lrs, 1, warmup_type="linear", corrected=True)

    return Run(f"try {lr:g}", "decay", schedule, updates, validations=1)


def _linear(
    name: str, low: float, step_size: int, rate: float, updates: int, ratios: Sequence[float], variant: Variant
) -> Run:
    def schedule(optimizer: Optimizer) -> LRRangeTest:
        return LRRangeTest(optimizer, _scaled(low, ratios), step_size, rate)

    return _run(f"{name}{variant.suffix}", "linear", schedule, updates, rate, variant)


def _run(
    name: str,
    kind: str,
    schedule: Callable[[Optimizer], LRRangeTest],
    updates: int,
    rate: float,
    variant: Variant,
) -> Run:
    return Run(
        name,
        "exponential" if kind == "exponential" else "linear",
        schedule,
        updates,
        rate=rate,
        validations=min(TEST_VALIDATIONS, math.ceil(updates / 10)),
        seed=variant.seed,
        train_batch_size=variant.train_batch_size,
        settings=variant.settings,
    )


def _scaled(lr: float, ratios: Sequence[float]) -> list[float]:
    return [lr * ratio for ratio in ratios]
