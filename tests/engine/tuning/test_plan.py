"""How the budget is shared out: never more than there is, and every omission said."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import RangeTestError
from engine.tuning import plan as constants
from engine.tuning.plan import Plan, Request, cost_of, make_plan, share_out_trials

requests = st.builds(
    Request,
    steps=st.integers(1, 200_000),
    batch_size=st.integers(1, 4096),
    budget=st.floats(0.001, 1.0),
    max_updates=st.integers(1, 5000),
    named_start=st.booleans(),
    seeds=st.integers(1, 12),
    batch_sizes=st.lists(st.integers(1, 8192), max_size=4).map(tuple),
    settings=st.lists(st.tuples(st.just("weight_decay"), st.floats(0, 1)), max_size=4).map(tuple),
    validates=st.booleans(),
)


def planned(request: Request) -> Plan:
    try:
        return make_plan(request)
    except RangeTestError:
        assume(False)
        raise


@given(requests)
def test_all_of_it_together_never_takes_more_than_the_share_of_the_planned_updates(request: Request) -> None:
    plan = planned(request)
    assert plan.cost(request.batch_size) <= plan.total <= request.budget * request.steps
    assert plan.total <= request.max_updates


@given(requests)
def test_every_test_that_is_made_is_long_enough_to_be_read(request: Request) -> None:
    plan = planned(request)
    assert plan.sweep or plan.slow
    for updates in (plan.sweep, plan.slow, plan.fast, plan.asked, plan.trials):
        assert updates == 0 or updates >= constants.LEAST_SWEEP
    assert plan.search == 0 or constants.LEAST_TRY <= plan.search <= constants.MOST_TRY
    assert not plan.trials or plan.search, "trials go around the peak that the search finds"
    assert bool(plan.sweep) != request.named_start
    assert bool(plan.asked) == bool(plan.batch_sizes or plan.settings)


@given(requests)
def test_what_was_asked_for_and_is_not_done_is_said(request: Request) -> None:
    plan = planned(request)
    said = " ".join(plan.left_out)
    for size in set(request.batch_sizes) - {request.batch_size} - set(plan.batch_sizes):
        assert f"at batch size {size} " in said
    for _, value in set(request.settings) - set(plan.settings):
        assert f"with weight_decay {value:g} " in said
    assert ("seeds there is room for" in said) == (plan.seeds < request.seeds)
    assert ("Trials are left out" in said) == (not plan.trials)
    assert ("and the search for the peak, too" in said) == (not plan.search)
    assert ("linear test" in said) == (not plan.fast)


def test_eighteen_updates_are_a_sweep_and_the_plan_says_what_is_left_out() -> None:
    plan = make_plan(Request(steps=180, batch_size=32))
    assert (plan.total, plan.sweep, plan.slow, plan.fast, plan.search, plan.trials) == (18, 18, 0, 0, 0, 0)
    assert [sentence.partition(":")[0] for sentence in plan.left_out] == [
        "The slow and the fast linear test are left out",
        "Trials are left out, and the search for the peak, too",
    ]


def test_with_a_little_more_there_is_a_search_and_with_three_hundred_updates_all_of_it() -> None:
    def stages(total: int) -> list[bool]:
        plan = make_plan(Request(steps=10 * total, batch_size=32))
        return [bool(updates) for updates in (plan.sweep, plan.slow, plan.search, plan.trials)]

    assert stages(31) == [True, False, False, False]
    assert stages(32) == stages(299) == [True, False, True, False]
    assert stages(300) == [True, True, True, True]
    (_, trials) = make_plan(Request(steps=1000, batch_size=32)).left_out
    assert trials.startswith("Trials are left out: 100 updates are enough for the search only")


@pytest.mark.parametrize("named_start", [False, True])
def test_where_there_is_room_for_trials_there_is_room_for_both_schedules_and_two_fixed_rates(named_start: bool) -> None:
    for steps in (3000, 4000, 10_000, 50_000):
        plan = make_plan(Request(steps=steps, batch_size=32, named_start=named_start))
        assert share_out_trials(plan.trials, 4, steps)[0] == 4


def test_a_long_training_is_tuned_with_two_percent_of_its_updates() -> None:
    plan = make_plan(Request(steps=50_000, batch_size=32))
    assert (plan.total, plan.left_out) == (1000, ())
    assert plan.sweep and plan.slow and plan.fast and plan.search and plan.trials
    assert make_plan(Request(steps=50_000, batch_size=32, max_updates=3000)).total == 3000


def test_a_config_that_names_the_start_needs_no_sweep() -> None:
    plan = make_plan(Request(steps=10_000, batch_size=32, named_start=True))
    assert plan.sweep == 0
    assert plan.left_out[0].startswith("The coarse sweep is left out: the config names lr_range_test_min_lr")


def test_batch_sizes_are_compared_with_a_test_of_the_same_length_at_the_configs_own() -> None:
    assert make_plan(Request(steps=10_000, batch_size=32, batch_sizes=(128,))).batch_sizes == (32, 128)
    assert make_plan(Request(steps=10_000, batch_size=32, batch_sizes=(32,))).batch_sizes == ()
    # Where the other one is left out, there is nothing to compare.
    plan = make_plan(Request(steps=2000, batch_size=32, batch_sizes=(4096,)))
    assert (plan.batch_sizes, plan.asked) == ((), 0)
    assert "The test at batch size 4096 is left out: it would cost 1536 updates at the least" in plan.left_out[-1]


def test_a_larger_batch_costs_what_it_takes_and_a_smaller_one_an_update() -> None:
    assert [cost_of(10, size, 32) for size in (8, 32, 33, 256)] == [10, 10, 11, 80]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request(steps=100, batch_size=8),
            "is 10, and the shortest test takes 12; plan at least 120",
        ),
        (Request(steps=100, batch_size=8), "or a budget of 0.12, or train at two or three learning rates in full"),
        (Request(steps=10, batch_size=8), "plan at least 120 updates or train"),
        (
            Request(steps=190, batch_size=8, named_start=True),
            "is 19, and the shortest test takes 20; plan at least 200",
        ),
        (Request(steps=10_000, batch_size=8, max_updates=10), "max_updates: got 10; the shortest test takes 12"),
    ],
)
def test_a_budget_that_holds_no_test_is_refused_with_one_that_does(request_: Request, message: str) -> None:
    with pytest.raises(RangeTestError) as caught:
        make_plan(request_)
    assert message in str(caught.value)


@given(st.integers(0, 3000), st.integers(0, 8), st.integers(1, 5000))
def test_trials_take_no_more_than_is_left_and_end_with_a_validation(left: int, candidates: int, steps: int) -> None:
    count, updates = share_out_trials(left, candidates, steps)
    assert count * updates <= left
    assert updates <= steps
    assert updates % constants.TRIAL_MULTIPLE == 0
    assert count == 0 or (2 <= count <= candidates and updates >= constants.LEAST_TRIAL)
