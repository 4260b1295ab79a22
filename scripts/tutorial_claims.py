"""What scripts/tutorials.py is made of, the part that judges: what the two tutorials saw, and whether it is seen here.

A comparison is made seed by seed, between runs from the same initial network: "yes" and "no" mean in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean

from tutorial_runs import Method
from tutorial_tables import Outcome, lowest, mean_losses, table

from engine.range_test import Curve
from engine.range_test.divergence import divergence

CLAIMS_HEAD = ("what the tutorial saw", "digits", "text")
REFUSED = "no schedule was suggested"

Answer = Callable[[Outcome], str]


def claims_table(claims: dict[str, Answer], outcomes: Sequence[Outcome]) -> str:
    return table(CLAIMS_HEAD, [(claim, *map(answer, outcomes)) for claim, answer in claims.items()])


def below(low: Sequence[float], high: Sequence[float]) -> str:
    """Whether each is below its counterpart."""
    count = sum(a < b for a, b in zip(low, high))
    verdict = {len(low): "yes", 0: "no"}.get(count, f"in {count} of {len(low)}")
    return f"{verdict}: {mean(low):.3f} against {mean(high):.3f}"


# -- range tests -------------------------------------------------------------------------------------


def fast_is_ahead(outcome: Outcome) -> str:
    fixed, _, fast = outcome.tests()
    best = [lowest(curve) for curve in fast]
    return below([loss for _, loss in best], [loss_at(curve, updates) for curve, (updates, _) in zip(fixed, best)])


def fast_is_ahead_of_the_small_batch_rate(outcome: Outcome) -> str:
    best = [lowest(curve) for curve in outcome.tests()[2]]
    runs = [[(updates, loss) for updates, loss, _ in run.held_out] for run in outcome.fixed.runs]
    return below([loss for _, loss in best], [nearest(run, updates) for run, (updates, _) in zip(runs, best)])


def slow_ends_below(outcome: Outcome) -> str:
    fixed, slow, _ = outcome.tests()
    return below([lowest(curve)[1] for curve in slow], [lowest(curve)[1] for curve in fixed])


def fast_diverges_first(outcome: Outcome) -> str:
    _, slow, fast = outcome.tests()
    ends = [[end_of(curve) for curve in curves] for curves in (fast, slow)]
    count = sum(a < b for a, b in zip(*ends))
    told = [
        f"at update {mean(at):.0f}" if (at := [end for end in kind if end < math.inf]) else "never" for kind in ends
    ]
    verdict = {len(fast): "yes", 0: "no"}.get(count, f"in {count} of {len(fast)}")
    return f"{verdict}: the fast one {told[0]}, the slow one {told[1]}"


def costs_little(outcome: Outcome) -> str:
    tests = [curve for curve in outcome.result.curves if curve.is_test and curve.seed == 0]
    share = sum(len(curve.losses) for curve in tests) / outcome.result.train_steps
    return f"{'yes' if share < 0.02 else 'no'}: {share:.0%}, so short is the training"


def end_of(curve: Curve) -> float:
    end = divergence(curve.losses)
    return math.inf if end is None else curve.steps[end]


def loss_at(curve: Curve, updates: int) -> float:
    return nearest(curve.validation, updates)


def nearest(points: Sequence[tuple[int, float]], updates: int) -> float:
    """The loss that was measured nearest to so many updates."""
    return min(points, key=lambda point: abs(point[0] - updates))[1]


RANGE_TEST_CLAIMS: dict[str, Answer] = {
    "rates that grow are ahead of the best fixed one for a while (at the fast test's best)": fast_is_ahead,
    "the same, against the rate that was best for the small batch": fast_is_ahead_of_the_small_batch_rate,
    "the slow test comes to a lower loss than the best fixed rate in as many updates": slow_ends_below,
    "the fast test diverges early, the slow one later": fast_diverges_first,
    "both tests take less than 2% of the training's data": costs_little,
}


# -- trainings ---------------------------------------------------------------------------------------


def fixed_is_slow(outcome: Outcome) -> str:
    """Where Fixed ends, the small batch has been before."""
    points = mean_losses(outcome.methods[0])
    found = next((updates for updates, value in points if value <= outcome.fixed.loss), None)
    return "no: it ends below the small batch" if not found else f"{points[-1][0] / found:.1f} times, to where it ends"


def linear_scale_diverges(outcome: Outcome) -> str:
    method = outcome.method("LinearScale")
    assert method is not None
    count = sum(not run.held_out[-1][1] < run.held_out[0][1] for run in method.runs)  # nan is not below either
    verdict = {len(method.runs): "yes", 0: "no"}.get(count, f"in {count} of {len(method.runs)}")
    return f"{verdict}; it ends at {method.loss:.3f}, Fixed at {outcome.fixed.loss:.3f}"


def cycle_against(name: str) -> Answer:
    def answer(outcome: Outcome) -> str:
        cycle, other = outcome.method("1Cycle"), outcome.method(name)
        return below(cycle.losses, other.losses) if cycle and other else REFUSED

    return answer


def cycle_is_as_fast(outcome: Outcome) -> str:
    cycle = outcome.method("1Cycle")
    if cycle is None:
        return REFUSED
    return f"{below(cycle.losses, outcome.methods[0].losses)}; {half_way(cycle)} against {half_way(outcome.methods[0])}"


def half_way(method: Method) -> str:
    points = mean_losses(method)
    at = nearest(points, points[-1][0] // 2)
    return f"{at:.3f} half way"


def cycle_rates(outcome: Outcome) -> str:
    cycle, scaled = outcome.method("1Cycle"), outcome.method("LinearScale")
    if cycle is None or scaled is None:
        return REFUSED
    above = sum(lr > outcome.fixed.lr for lr in cycle.runs[0].lrs) / len(cycle.runs[0].lrs)
    over = sum(lr > scaled.lr for lr in cycle.runs[0].lrs) / len(cycle.runs[0].lrs)
    return f"above Fixed in {above:.0%} of the updates, above LinearScale in {over:.0%}"


ONE_CYCLE_CLAIMS: dict[str, Answer] = {
    "Fixed is slow: it needs about five times the data that the small batch needs": fixed_is_slow,
    "LinearScale diverges": linear_scale_diverges,
    "1Cycle ends below Fixed": cycle_against("Fixed"),
    "1Cycle ends below LinearScale": cycle_against("LinearScale"),
    "1Cycle is as fast as the small batch": cycle_is_as_fast,
    "its rate is above Fixed's throughout, above LinearScale's for a short while": cycle_rates,
    "*not in the tutorial:* 1Cycle ends below the best of the fixed rates": cycle_against("best"),
    "*not in the tutorial:* 1Cycle ends below the linear decay": cycle_against("linear decay"),
}
