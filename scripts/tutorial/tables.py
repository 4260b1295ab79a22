"""The tables of the two tutorials' pages, and the files of numbers behind them.

In a page a table stands between `<!-- by scripts/tutorials.py: NAME -->` and `<!-- by scripts/tutorials.py: end -->`.
Comparisons are made seed by seed, between runs from the same initial network: "yes" and "no" mean in all of them.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from redline import RangeTestResult
from redline.range_test import Curve, Suggestion
from redline.range_test.curve import divergence
from tutorial.runs import Method, Task

MARK = "<!-- by scripts/tutorials.py: {} -->"
BLOCK = re.compile(f"{MARK.format('(?P<name>[a-z ]+)')}\n.*?{MARK.format('end')}", re.DOTALL)
TESTS_HEAD = ("run", "learning rate", "lowest validation loss", "after steps", "diverged")
METHODS_HEAD = (
    "schedule", "highest learning rate", "steps x batch", "validation loss", "accuracy (%)", "as good as Fixed after",
)  # fmt: skip
REFUSED = "no schedule was suggested"


@dataclass(frozen=True)
class Outcome:
    """What one task came to."""

    task: Task
    result: RangeTestResult
    methods: list[Method]  # the small batch first

    def method(self, name: str) -> Method | None:
        """The first whose name begins so; None if there was no suggestion to train with."""
        return next((method for method in self.methods if method.name.startswith(name)), None)

    @property
    def fixed(self) -> Method:
        """The small batch's learning rate at the large batch."""
        return next(method for method in self.methods if method.name == "Fixed")

    def tests(self) -> list[list[Curve]]:
        """Fixed, slow and fast, each with one curve per seed."""
        names = dict.fromkeys(curve.name for curve in self.result.curves)
        return [[curve for curve in self.result.curves if curve.name == name] for name in names]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} +- {deviation:.{digits}f}"


def between(values: Iterable[float], form: str) -> str:
    ordered = [format(value, form) for value in sorted(values)]
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def verdict(count: int, total: int) -> str:
    return {total: "yes", 0: "no"}.get(count, f"in {count} of {total}")


def lowest(curve: Curve) -> tuple[int, float]:
    """The step of the lowest validation loss, and that loss."""
    return min(curve.validation, key=lambda point: point[1])


def nearest(points: Sequence[tuple[int, float]], step: int) -> float:
    """The loss that was measured nearest to a step."""
    return min(points, key=lambda point: abs(point[0] - step))[1]


def first_as_low(method: Method, loss: float) -> int | None:
    """The first step at which the mean validation loss is as low as this."""
    return next((step for step, value in method.curve() if value <= loss), None)


# -- tables -------------------------------------------------------------------------------------------


def tests_table(outcome: Outcome) -> str:
    rows = []
    for kind, curves in zip(("best fixed", "slow", "fast"), outcome.tests()):
        lows = [lowest(curve) for curve in curves]
        first, last = curves[0].lrs[0], max(curve.lrs[-1] for curve in curves)
        row = (
            kind if kind == "best fixed" else f"{kind}, {curves[0].name}",
            f"{first:.3g}" if first == last else f"{first:.3g} to {last:.2g}",
            spread([loss for _, loss in lows], 3),
            between([step for step, _ in lows], "d"),
            diverged(curves),
        )
        rows.append(row)
    return table(TESTS_HEAD, rows)


def diverged(curves: list[Curve]) -> str:
    ends = [(curve, end) for curve in curves if curve.is_test and (end := divergence(curve.losses)) is not None]
    if not ends:
        return "no"
    steps = between([curve.steps[end] for curve, end in ends], "d")
    lrs = between([curve.lrs[end] for curve, end in ends], ".2g")
    return f"{len(ends)} of {len(curves)}: at step {steps}, at {lrs}"


def suggestion_block(outcome: Outcome) -> str:
    """The schedule as in one_cycle.json, its reasons, and what the tests of each seed alone suggest."""
    result, answer = outcome.result, outcome.result.suggestion
    if not isinstance(answer, Suggestion):
        return f"```\n{result.summary()}\n```"
    scheduler = json.dumps({"scheduler": result.to_config()["scheduler"]}, indent=2)
    why = "\n".join(f"- `{key}`: {answer.reasons[key]}" for key in answer.params() if key in answer.reasons)
    notes = "".join(f"\n- Note: {note}" for note in dict.fromkeys(answer.notes))  # one for each seed
    peaks = []
    for seed in sorted({curve.seed for curve in result.curves}):
        alone = replace(result, curves=tuple(curve for curve in result.curves if curve.seed == seed)).suggestion
        peaks.append(f"{alone.cycle_max_lr:g}" if isinstance(alone, Suggestion) else "none")
    alone_text = f"The tests of one network alone suggest a `cycle_max_lr` of {', '.join(peaks)}."
    return f"```json\n{scheduler}\n```\n\n{why}{notes}\n\n{alone_text}"


def methods_table(outcome: Outcome) -> str:
    rows = []
    for method in outcome.methods:
        found = first_as_low(method, outcome.fixed.loss)
        row = (
            method.name,
            f"{method.lr:g}",
            f"{outcome.task.steps(method.batch)} x {method.batch}",
            spread(method.losses, 4),
            spread(method.accuracies, 1),
            "never" if found is None else f"{found / method.curve()[-1][0]:.0%} of the data",
        )
        rows.append(row)
    return table(METHODS_HEAD, rows)


# -- what the tutorials claim ---------------------------------------------------------------------------


def below(low: Sequence[float], high: Sequence[float]) -> str:
    """Whether each value is below its counterpart."""
    count = sum(a < b for a, b in zip(low, high))
    return f"{verdict(count, len(low))}: {mean(low):.3f} against {mean(high):.3f}"


def fast_is_ahead(outcome: Outcome) -> str:
    fixed, _, fast = outcome.tests()
    best = [lowest(curve) for curve in fast]
    others = [nearest(curve.validation, step) for curve, (step, _) in zip(fixed, best)]
    return below([loss for _, loss in best], others)


def fast_is_ahead_of_the_small_batch_lr(outcome: Outcome) -> str:
    best = [lowest(curve) for curve in outcome.tests()[2]]
    runs = [[(step, loss) for step, loss, _ in run.held_out] for run in outcome.fixed.runs]
    return below([loss for _, loss in best], [nearest(run, step) for run, (step, _) in zip(runs, best)])


def slow_ends_below(outcome: Outcome) -> str:
    fixed, slow, _ = outcome.tests()
    return below([lowest(curve)[1] for curve in slow], [lowest(curve)[1] for curve in fixed])


def fast_diverges_first(outcome: Outcome) -> str:
    def ends(curves: list[Curve]) -> list[float]:
        found = [divergence(curve.losses) for curve in curves]
        return [math.inf if end is None else curve.steps[end] for curve, end in zip(curves, found)]

    def text(kind: list[float]) -> str:
        at = [end for end in kind if end < math.inf]
        return f"at step {mean(at):.0f}" if at else "never"

    slow, fast = (ends(curves) for curves in outcome.tests()[1:])
    count = sum(a < b for a, b in zip(fast, slow))
    return f"{verdict(count, len(fast))}: the fast one {text(fast)}, the slow one {text(slow)}"


def costs_little(outcome: Outcome) -> str:
    tests = [curve for curve in outcome.result.curves if curve.is_test and curve.seed == 0]
    fraction = sum(len(curve.losses) for curve in tests) / outcome.result.train_steps
    return f"{'yes' if fraction < 0.02 else 'no'}: {fraction:.0%}, because the training is so short"


def fixed_is_slow(outcome: Outcome) -> str:
    small = outcome.methods[0]
    found = first_as_low(small, outcome.fixed.loss)
    if not found:
        return "no: it ends below the small batch"
    return f"{small.curve()[-1][0] / found:.1f} times, to where it ends"


def linear_scale_diverges(outcome: Outcome) -> str:
    method = outcome.method("LinearScale")
    assert method is not None
    count = sum(not run.held_out[-1][1] < run.held_out[0][1] for run in method.runs)  # nan is not below either
    ends = f"it ends at {method.loss:.3f}, Fixed at {outcome.fixed.loss:.3f}"
    return f"{verdict(count, len(method.runs))}; {ends}"


def cycle_against(name: str) -> Callable[[Outcome], str]:
    def answer(outcome: Outcome) -> str:
        cycle, other = outcome.method("1Cycle"), outcome.method(name)
        return below(cycle.losses, other.losses) if cycle and other else REFUSED

    return answer


def cycle_is_as_fast(outcome: Outcome) -> str:
    cycle, small = outcome.method("1Cycle"), outcome.methods[0]
    if cycle is None:
        return REFUSED
    half = [f"{nearest(each.curve(), each.curve()[-1][0] // 2):.3f} half way" for each in (cycle, small)]
    return f"{below(cycle.losses, small.losses)}; {half[0]} against {half[1]}"


def cycle_lrs(outcome: Outcome) -> str:
    cycle, scaled = outcome.method("1Cycle"), outcome.method("LinearScale")
    if cycle is None or scaled is None:
        return REFUSED
    lrs = cycle.runs[0].lrs
    above, over = (sum(lr > other.lr for lr in lrs) / len(lrs) for other in (outcome.fixed, scaled))
    return f"above Fixed in {above:.0%} of the steps, above LinearScale in {over:.0%}"


RANGE_TEST_CLAIMS: dict[str, Callable[[Outcome], str]] = {
    "growing learning rates are ahead of the best fixed one for a while (at the fast test's best)": fast_is_ahead,
    "the same, against the fixed one that was best for the small batch": fast_is_ahead_of_the_small_batch_lr,
    "the slow test comes to a lower loss than the best fixed one in as many steps": slow_ends_below,
    "the fast test diverges early, the slow one later": fast_diverges_first,
    "both tests take less than 2% of the training's data": costs_little,
}
ONE_CYCLE_CLAIMS: dict[str, Callable[[Outcome], str]] = {
    "Fixed is slow: it needs about five times the data that the small batch needs": fixed_is_slow,
    "LinearScale diverges": linear_scale_diverges,
    "1Cycle ends below Fixed": cycle_against("Fixed"),
    "1Cycle ends below LinearScale": cycle_against("LinearScale"),
    "1Cycle is as fast as the small batch": cycle_is_as_fast,
    "its learning rate is above Fixed's throughout, above LinearScale's for a short while": cycle_lrs,
    "*not in the tutorial:* 1Cycle ends below the best fixed one": cycle_against("best"),
    "*not in the tutorial:* 1Cycle ends below linear decay": cycle_against("linear decay"),
}


def claims_table(claims: dict[str, Callable[[Outcome], str]], outcomes: Sequence[Outcome]) -> str:
    head = ("claim of the tutorial", "digits", "text")
    return table(head, [(claim, *(answer(outcome) for outcome in outcomes)) for claim, answer in claims.items()])


# -- files --------------------------------------------------------------------------------------------


def save_numbers(outcome: Outcome, out: Path) -> None:
    """Every number behind the tables of the trainings, as JSON and CSV; the tests' are in range_test."""
    (out / "runs.json").write_text(json.dumps([asdict(method) for method in outcome.methods], indent=1) + "\n")
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("schedule", "batch_size", "seed", "step", "lr", "validation_loss", "accuracy"))
        for method in outcome.methods:
            for run in method.runs:
                for step, loss, accuracy in run.held_out:
                    lr = run.lrs[max(0, step - 1)] if run.lrs else ""  # of the step before
                    writer.writerow((method.name, method.batch, run.seed, step, lr, loss, accuracy))


def render(page: str, blocks: dict[str, str]) -> str:
    """A page with the tables of this run."""

    def block(found: re.Match[str]) -> str:
        return f"{MARK.format(found['name'])}\n\n{blocks[found['name']]}\n\n{MARK.format('end')}"

    return BLOCK.sub(block, page)
