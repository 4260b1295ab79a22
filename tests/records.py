"""Range tests as they come out of training, made of arithmetic: curves of every kind, for whatever draws them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

from redline.range_test.curve import Curve, Kind, Mark
from redline.range_test.result import RangeTestResult
from redline.reports.model import Report, report_of

__all__ = ["KINDS", "ATrial", "make_result", "make_run", "tuning"]


@dataclass(frozen=True)
class ATrial:
    curve: Curve
    schedule: str
    lr: float
    loss: float
    diverged: bool = False
    steps: int = 100


def make_run(
    rate: float | None,
    *,
    name: str = "",
    updates: int = 100,
    best: float = 3e-2,
    noise: float = 0.03,
    lift: float = 0.0,
    validated: bool = False,
    **fields: Any,
) -> Curve:
    """A run whose loss falls from 2.3, fastest near the LR `best`, and diverges above eight times that."""
    kind: Kind = fields.pop("kind", "linear" if rate else "fixed")
    name = name or (f"rate {rate:g}" if rate else "fixed 0.001")
    draw = random.Random(f"{name} {fields.get('seed', 0)}")
    lrs, losses, level = [], [], 2.3
    for k in range(updates):
        lr = 1e-4 * (1 + (rate or 9) * (k / 5 if rate else 1))
        level = level * 1.1 if lr > 8 * best else level - (level - 0.3) * min(0.08, 2 * lr / (1 + lr / best))
        lrs.append(lr)
        losses.append(level + draw.gauss(0, noise) + lift)
        if level > 6:
            break
    every = max(1, updates // 20)
    validation = tuple((k, losses[max(0, k - 1)] + 0.05) for k in range(0, len(losses) + 1, every)) if validated else ()
    return Curve(name, rate, tuple(range(len(lrs))), tuple(lrs), tuple(losses), validation, kind, **fields)


def make_result(*curves: Curve, train_steps: int = 1000, **config: Any) -> RangeTestResult:
    given = {"train_batch_size": 32, "optimizer": {"type": "AdamW"}, **config}
    return RangeTestResult(curves, given, 32, 1, "AdamW", train_steps)


def _with_nan() -> Curve:
    curve = make_run(50, updates=40)
    losses = (*curve.losses[:20], math.nan, *curve.losses[21:38], math.inf, -math.inf)
    return replace(curve, losses=losses)


MARKS = (
    Mark("steepest", 8e-3, "It says so.", ""),
    Mark("valley", 2e-2, "It says so.", ""),
    Mark("minimum / 10", 1.1e-2, "It says so.", ""),
    Mark("last stable", None, "No test diverged.", ""),
    Mark("redline", 3.2e-2, "It says so.", ""),
)


TRIES = ((0.03, 1.2, False), (0.0075, 1.6, False), (0.12, 1.4, False), (0.48, math.inf, True), (0.06, 1.1, False))


def tuning() -> Report:
    """Everything at once: seeds, batch sizes, a sweep, rules, a search, trials, and what was left out."""
    curves = [make_run(rate, name=f"rate {rate:g}, seed {seed}", seed=seed) for rate in (5, 50) for seed in range(3)]
    curves += [make_run(50, name=f"batch size {size}", train_batch_size=size, best=1e-3 * size) for size in (64, 256)]
    for decay in (0.0, 1e-4, 1e-2):
        curves.append(make_run(50, name=f"weight decay {decay:g}", settings=(("weight_decay", decay),)))
    trials = [
        ATrial(make_run(20, name="OneCycle to 0.03", kind="cycle", best=9.0, validated=True), "OneCycle", 0.03, 0.35),
        ATrial(make_run(20, name="linear decay", kind="decay", best=9.0, validated=True), "WarmupDecayLR", 0.03, 0.41),
        ATrial(make_run(None, name="fixed 0.1", validated=True), "fixed", 0.1, math.nan, True),
    ]
    return replace(
        report_of(make_result(*curves)),
        title="Learning rate tuning",
        marks=MARKS,
        trials=tuple(trials),
        winner=0,
        search=tuple(
            ATrial(make_run(None, name=f"try {lr:g}", validated=True), "WarmupDecayLR", lr, came, diverged)
            for lr, came, diverged in TRIES
        ),
        left_out=("The fast test was left out: the budget was 18 updates.",),
    )


KINDS: dict[str, Any] = {
    "search alone": lambda: replace(tuning(), curves=(), marks=(), trials=(), batches=()),
    "several": lambda: replace(
        report_of(
            make_result(
                make_run(None, validated=True),
                make_run(5, validated=True, skipped=(0, 7)),
                make_run(50, validated=True),
                make_run(500, validated=True),
            )
        ),
        marks=MARKS,
    ),
    "one": lambda: report_of(make_result(make_run(50))),
    "twelve": lambda: report_of(make_result(*(make_run(2.0**k) for k in range(12)))),
    "flat": lambda: report_of(make_result(make_run(5, best=1e9, noise=0.2, name="flat", updates=30))),
    "nan": lambda: report_of(make_result(_with_nan(), make_run(5))),
    "only nan": lambda: report_of(make_result(replace(make_run(5, updates=30), losses=(math.nan,) * 30))),
    "negative": lambda: report_of(make_result(make_run(5, lift=-100), make_run(50, lift=-100))),
    "one update": lambda: report_of(make_result(make_run(5, updates=1))),
    "no updates": lambda: report_of(make_result(make_run(5, updates=0))),
    "only a baseline": lambda: report_of(make_result(make_run(None))),
    "nothing": lambda: report_of(make_result()),
    "long": lambda: report_of(make_result(make_run(0.01, updates=5001), make_run(0.02, updates=1999))),
    "tuning": tuning,
}
