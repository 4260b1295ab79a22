"""How the budget is divided: never more than there is, and every omission is reported."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from redline.errors import RangeTestError
from redline.range_test.suggest import MIN_STEPS, MIN_SWEEP_STEPS
from redline.tuning import budget
from redline.tuning.budget import Plan, Request, cost_of, divide_trials, make_plan


def plan_of(
    steps: int, *, batch_size: int = 32, start_named: bool = False, validates: bool = True, **more: Any
) -> Plan:
    request = Request(**{"steps": steps, "budget": 0.1, **more})
    return make_plan(request, batch_size=batch_size, start_named=start_named, validates=validates)


arguments = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 200_000),
        "batch_size": st.integers(1, 4096),
        "budget": st.floats(0.001, 1.0),
        "max_updates": st.integers(1, 5000),
        "start_named": st.booleans(),
        "seeds": st.integers(1, 12),
        "batch_sizes": st.lists(st.integers(1, 8192), max_size=4),
        "sweep": st.dictionaries(st.just("weight_decay"), st.lists(st.floats(0, 1), max_size=4)),
        "validates": st.booleans(),
    }
)


@given(arguments)
def test_a_plan_keeps_to_its_budget_and_its_limits_and_reports_every_omission(given: dict[str, Any]) -> None:
    try:
        plan = plan_of(**given)
    except RangeTestError:
        assume(False)
    own, start_named = given["batch_size"], given["start_named"]
    cost = plan.seeds * (plan.sweep + plan.slow + plan.fast) + plan.search + plan.schedule_trials
    cost += sum(cost_of(plan.comparison, change.get("train_batch_size"), own) for change in plan.comparisons)
    assert cost <= plan.total <= min(given["budget"] * given["steps"], given["max_updates"])
    # Every test is long enough to be read.
    assert not (plan.sweep and plan.slow) and bool(plan.sweep or plan.slow) == bool(plan.schedule_trials)
    for steps in (plan.sweep, plan.comparison, plan.schedule_trials):
        assert steps == 0 or steps >= MIN_SWEEP_STEPS
    assert plan.slow == plan.fast == 0 or (start_named and min(plan.slow, plan.fast) >= MIN_STEPS)
    assert plan.search > 0, "there is always a search"
    assert bool(plan.comparison) == bool(plan.comparisons)
    # What was asked for and is not done is reported.
    reasons = " ".join(plan.left_out)
    for size in set(given["batch_sizes"]) - {own} - {change.get("train_batch_size") for change in plan.comparisons}:
        assert f"at batch size {size} " in reasons
    compared = {setting for change in plan.comparisons for setting in change.get("settings", {}).items()}
    for value in given["sweep"].get("weight_decay", ()):
        assert ("weight_decay", value) in compared or f"with weight_decay {value:g} " in reasons
    assert (f"of {given['seeds']} seeds" in reasons) == (plan.seeds < given["seeds"])
    assert ("schedule trials are left out" in reasons) == (not plan.schedule_trials)


def test_the_stages_follow_the_size_of_the_budget() -> None:
    def stages(total: int) -> list[bool]:
        plan = plan_of(10 * total)
        return [bool(steps) for steps in (plan.sweep, plan.slow, plan.search, plan.schedule_trials)]

    assert stages(12) == stages(299) == [False, False, True, False]
    assert stages(300) == [True, False, True, True]
    assert "29 steps are enough for the search only" in plan_of(290).left_out[0]
    named = plan_of(10_000, start_named=True)
    assert named.sweep == 0 and "the config names lr_range_test_min_lr" in named.left_out[0]


def test_from_half_a_training_on_there_is_no_limit() -> None:
    assert plan_of(50_000, budget=0.4).total == 1000 and plan_of(50_000, budget=0.5).total == 25_000
    assert plan_of(4000, budget=5.0, max_updates=500).total == 500


def test_by_default_a_short_training_is_tuned_with_100_steps_or_half_of_its_own() -> None:
    totals = {steps: plan_of(steps, budget=None).total for steps in (24, 199, 200, 357, 999, 1010, 4000, 50_000)}
    assert totals == {24: 12, 199: 99, 200: 100, 357: 100, 999: 100, 1010: 101, 4000: 400, 50_000: 1000}
    with pytest.raises(RangeTestError, match=r"0\.5 of 23 steps is 11, and a search takes 12 .* at least 24 steps"):
        plan_of(23, budget=None)


def test_a_long_training_is_tuned_with_two_percent_of_its_steps() -> None:
    plan = plan_of(50_000)
    assert (plan.total, plan.left_out) == (1000, ())
    assert plan.sweep and plan.search and plan.schedule_trials
    assert plan_of(50_000, max_updates=3000).total == 3000


def test_batch_sizes_are_compared_with_a_test_of_the_same_length_at_the_configs_own() -> None:
    def sizes(plan: Plan) -> list[int | None]:
        return [change.get("train_batch_size") for change in plan.comparisons]

    assert sizes(plan_of(10_000, batch_sizes=[128])) == [32, 128]
    assert sizes(plan_of(10_000, batch_sizes=[32])) == []
    # Where the other one is left out, there is nothing to compare.
    plan = plan_of(2000, batch_sizes=[4096])
    assert (sizes(plan), plan.comparison) == ([], 0)
    assert "at batch size 4096 is left out: it would cost at least 1536 steps" in plan.left_out[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 100}, "is 10, and a search takes 12 at least; plan at least 120"),
        ({"steps": 10_000, "max_updates": 10}, "max_updates: got 10, and a search takes 12 at least"),
        ({"steps": 100, "budget": 11}, "budget: got 11; expected a multiple of the planned steps"),
        (
            {"steps": 1000, "schedules": ["linear", "wave"]},
            "schedules: got 'wave'; expected some of linear, onecycle, cosine, wsd",
        ),
    ],
)
def test_a_budget_too_small_for_a_test_is_refused_and_a_sufficient_one_named(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RangeTestError) as caught:
        plan_of(**arguments)
    assert message in str(caught.value)


@given(st.integers(0, 3000), st.integers(0, 8), st.integers(1, 5000))
def test_schedule_trials_take_no_more_than_is_left_and_end_with_a_validation(
    left: int, candidates: int, steps: int
) -> None:
    count, length = divide_trials(left, candidates, steps)
    assert count * length <= left and length <= steps and length % budget.TRIAL_MULTIPLE == 0
    assert count == 0 or (2 <= count <= candidates and length >= budget.LEAST_TRIAL)
