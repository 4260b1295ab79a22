"""The rules that turn a range test's record into a schedule, on curves of every kind."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redline.range_test.curve import Curve, divergence
from redline.range_test.suggest import Refusal, Suggestion, cycle_at, rough_maximum, suggest
from tests.curves import FAST, SLOW, descent, flat, make_curve

INF, NAN = math.inf, math.nan


def suggestion(*curves: Curve, train_steps: int = 400) -> Suggestion:
    answer = suggest(curves, train_steps=train_steps)
    assert isinstance(answer, Suggestion), answer
    return answer


def refusal(*curves: Curve, train_steps: int = 400) -> Refusal:
    answer = suggest(curves, train_steps=train_steps)
    assert isinstance(answer, Refusal), answer
    return answer


# -- a suggestion ------------------------------------------------------------------------------------


def test_a_slow_and_a_fast_test_bracket_the_maximum() -> None:
    answer = suggestion(SLOW, FAST)
    # The slow test is done at update 60 of 100 (0.0061) and the fast one at 25 (0.025), read a few updates late.
    assert 0.0061 < answer.cycle_max_lr < 0.025
    assert answer.cycle_max_lr == pytest.approx(math.sqrt(0.0064 * 0.029), rel=0.1)
    assert answer.curve == "rate 5 and rate 50"
    assert answer.diverged_at_lr is not None and answer.diverged_at_lr > 0.07
    assert answer.cycle_min_lr == pytest.approx(answer.cycle_max_lr / 30, rel=0.1)
    assert (answer.cycle_first_step_size, answer.cycle_second_step_size) == (80, 320)
    assert answer.notes == ()


def test_a_baseline_and_validation_losses_change_nothing() -> None:
    baseline = make_curve(lambda k, lr: 2.3 - k / 100, rate=None, name="fixed 0.001")
    validated = Curve("rate 5", 5.0, SLOW.steps, SLOW.lrs, SLOW.losses, ((50, 0.1), (100, 9.0)))
    assert suggestion(SLOW, FAST, baseline) == suggestion(validated, FAST)


def test_a_test_alone_gives_the_middle_of_its_descent_or_a_lower_bound() -> None:
    diverged, ended = suggestion(FAST), suggestion(SLOW)
    assert diverged.curve == "rate 50"
    assert diverged.cycle_max_lr == pytest.approx(1e-4 * (1 + 50 * 20 * 20 / 100), rel=0.1)
    assert "50% of its drop" in diverged.reasons["cycle_max_lr"]
    assert ended.diverged_at_lr is None
    assert "80% of its drop" in ended.reasons["cycle_max_lr"]
    assert "no test diverged" in ended.reasons["cycle_max_lr"]
    assert any("lower bound" in note for note in ended.notes)


def test_the_minimum_is_where_descent_begins_if_that_is_low_enough() -> None:
    early = make_curve(descent(begin=0, done=90, up=None), rate=50.0)
    late = make_curve(descent(begin=0, done=90, up=None), rate=500.0)
    answer = suggestion(early, late)
    assert answer.cycle_min_lr == pytest.approx(answer.cycle_max_lr / 30, rel=0.1)
    slow = make_curve(descent(begin=2, done=90, up=None), rate=500.0, min_lr=1e-6)
    answer = suggestion(slow, late)
    assert answer.cycle_min_lr < answer.cycle_max_lr / 30 / 1.1
    assert "lowered" not in answer.reasons["cycle_min_lr"]


BESIDE = {  # a test next to good ones, which sets no learning rate
    "rate 500 made less than 80%": make_curve(descent(drop=0.8, up=30), rate=500.0),
    "rate 0.5 stayed flat: it sets no learning rate.": make_curve(flat(), rate=0.5),
    "rate 50 is not read: 15 steps are too few": make_curve(descent(up=None), n=15),
    "rate 7 is not read: its first loss is nan": make_curve(lambda k, lr: NAN, rate=7.0),
}


@pytest.mark.parametrize("note", BESIDE)
def test_a_test_that_shows_nothing_is_left_out_with_a_note(note: str) -> None:
    answer = suggestion(BESIDE[note], SLOW, FAST)
    assert answer.params() == suggestion(SLOW, FAST).params()
    assert [each.startswith(note) for each in answer.notes] == [True]


def test_the_maximum_keeps_its_margin_to_the_lowest_divergence_of_any_test() -> None:
    early = make_curve(descent(up=27), rate=50.0)
    answer = suggestion(early, make_curve(descent(), rate=500.0, name="rate 500"))
    assert answer.diverged_at_lr is not None
    assert answer.cycle_max_lr <= answer.diverged_at_lr / 3
    assert "lowered to a third" in answer.reasons["cycle_max_lr"]


def test_tests_that_disagree_are_reported() -> None:
    answer = suggestion(SLOW, make_curve(descent(begin=20, done=60, up=None), rate=500.0))
    assert any("disagree by a factor of" in note for note in answer.notes)


def test_several_seeds_at_one_rate_are_read_together() -> None:
    seeds = [make_curve(descent(seed=seed, done=20 + 5 * seed), name=f"seed {seed}") for seed in range(3)]
    answer = suggestion(*seeds)
    assert answer.curve == "seed 0 and seed 2"
    assert suggestion(seeds[0]).cycle_max_lr <= answer.cycle_max_lr <= suggestion(seeds[2]).cycle_max_lr


def test_a_noisy_descent_is_still_read() -> None:
    answers = [suggestion(make_curve(descent(noise=0.15, seed=seed))) for seed in range(10)]
    lrs = [answer.cycle_max_lr for answer in answers]
    assert min(lrs) > 0.01 and max(lrs) < 0.035


def test_an_outlier_batch_moves_the_suggestion_little() -> None:
    for at, size in itertools.product((0, 1, 10, 40), (1e6, -1e6, 1e30)):
        losses = (*FAST.losses[:at], size, *FAST.losses[at + 1 :])
        spiked = Curve("rate 50", 50.0, FAST.steps, FAST.lrs, losses)
        assert suggestion(SLOW, spiked).cycle_max_lr == pytest.approx(suggestion(SLOW, FAST).cycle_max_lr, rel=0.15)


def test_nan_in_the_middle_is_divergence_at_that_learning_rate() -> None:
    losses = (*FAST.losses[:50], *[NAN] * 50)
    answer = suggestion(SLOW, Curve("rate 50", 50.0, FAST.steps, FAST.lrs, losses))
    assert answer.diverged_at_lr == FAST.lrs[50]


def test_descent_at_the_first_learning_rate_asks_for_a_lower_start() -> None:
    curve = make_curve(descent(begin=0, done=6), rate=0.1, min_lr=0.1)
    assert any("start the test lower" in note for note in suggestion(curve).notes)


@pytest.mark.parametrize(
    ("train_steps", "first"),
    [(2, 1), (3, 1), (10, 5), (40, 14), (100, 20), (1000, 200), (1_000_000, 200_000)],
)
def test_the_cycle_fills_the_planned_length(train_steps: int, first: int) -> None:
    answer = suggestion(SLOW, FAST, train_steps=train_steps)
    assert answer.cycle_first_step_size == first
    assert answer.cycle_first_step_size + answer.cycle_second_step_size == train_steps
    assert answer.cycle_second_step_size >= 1


# -- invariances -------------------------------------------------------------------------------------

GRID = st.integers(-(2**12), 2**12).map(lambda number: number / 2**8)  # sums with whole numbers are exact


@st.composite
def grid_curves(draw: st.DrawFn) -> list[Curve]:
    curves = []
    for rate in draw(st.lists(st.sampled_from([5.0, 50.0, 500.0]), min_size=1, max_size=3)):
        begin = draw(st.integers(0, 20))
        shape = descent(
            begin=begin,
            done=begin + draw(st.integers(1, 60)),
            up=draw(st.none() | st.integers(10, 99)),
            noise=draw(st.sampled_from([0.0, 0.05, 0.3, 2.0])),
            seed=draw(st.integers(0, 999)),
        )
        outlier = draw(st.none() | st.tuples(st.integers(0, 99), GRID))

        def loss(k: int, lr: float, shape: Callable[[int, float], float] = shape) -> float:
            return round(shape(k, lr) * 2**8) / 2**8

        curve = make_curve(loss, rate=rate)
        if outlier is not None:
            losses = (*curve.losses[: outlier[0]], outlier[1], *curve.losses[outlier[0] + 1 :])
            curve = Curve(curve.name, rate, curve.steps, curve.lrs, losses)
        curves.append(curve)
    return curves


def mapped(curves: list[Curve], function: Callable[[float], float]) -> list[Curve]:
    return [Curve(c.name, c.rate, c.steps, c.lrs, tuple(function(loss) for loss in c.losses)) for c in curves]


@settings(deadline=None)
@given(grid_curves(), st.integers(-(10**6), 10**6), st.integers(-40, 40))
def test_a_constant_or_a_positive_factor_on_the_losses_changes_nothing(
    curves: list[Curve], constant: int, power: int
) -> None:
    answer = suggest(curves, train_steps=400)
    assert suggest(mapped(curves, lambda loss: loss + constant), train_steps=400) == answer
    assert suggest(mapped(curves, lambda loss: loss * 2.0**power), train_steps=400) == answer


@pytest.mark.parametrize(("factor", "constant"), [(1e-6, 0.0), (3.7, -1000.1), (0.3, 1e4), (1e8, 1.0)])
def test_any_scale_and_offset_give_the_same_numbers(factor: float, constant: float) -> None:
    changed = mapped([SLOW, FAST], lambda loss: factor * loss + constant)
    assert suggestion(*changed).params() == suggestion(SLOW, FAST).params()


@settings(deadline=None)
@given(grid_curves(), st.integers(2, 10**6), st.floats(1e-9, 10.0))
def test_whatever_is_suggested_keeps_its_promises(curves: list[Curve], train_steps: int, factor: float) -> None:
    curves = [Curve(c.name, c.rate, c.steps, tuple(lr * factor for lr in c.lrs), c.losses) for c in curves]
    answer = suggest(curves, train_steps=train_steps)
    if isinstance(answer, Refusal):
        assert answer.reason.endswith(".") and answer.remedy.endswith(".")
        return
    assert 0 < answer.cycle_min_lr < answer.cycle_max_lr <= max(max(curve.lrs) for curve in curves)
    ends = [(c, end) for c in curves if (end := divergence(c.losses)) is not None]
    assert answer.diverged_at_lr == min((c.lrs[end] for c, end in ends), default=None)
    if answer.diverged_at_lr is not None:
        assert answer.cycle_max_lr < answer.diverged_at_lr / 2
    assert answer.cycle_first_step_size >= 1 and answer.cycle_second_step_size >= 1
    assert answer.cycle_first_step_size + answer.cycle_second_step_size == train_steps
    assert answer.reasons.keys() == answer.params().keys()


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60))
def test_no_record_makes_it_raise(losses: list[float]) -> None:
    curve = Curve(
        "rate 5", 5.0, tuple(range(len(losses))), tuple(1e-4 * (k + 1) for k in range(len(losses))), tuple(losses)
    )
    suggest([curve], train_steps=100)


# -- refusals ----------------------------------------------------------------------------------------


def climbing(k: int, lr: float) -> float:
    return 2.3 * 1.2**k


REFUSED = {
    "no curve": ([], "no range test", "Run a range test"),
    "a baseline alone": ([make_curve(flat(), rate=None, name="fixed")], "fixed learning rate", "such as 5, 50 and 500"),
    **{
        f"{n} steps": ([make_curve(descent(begin=0, done=10, up=None), n=n)], f"{n} steps", "at least 20")
        for n in (0, 1, 2, 5, 19)
    },
    "flat": ([make_curve(flat())], "does not fall by more than its batch noise", "end higher"),
    "rising": ([make_curve(climbing, min_lr=0.5)], "not fall by .* from 0.5 on, .*, and diverges at", "min_lr 0.005"),
    "flat, then rising": (
        [make_curve(lambda k, lr: 2.3 * 1.2 ** max(0, k - 60), rate=50.0)],
        "0.0001 on",
        "in between",
    ),
    "one flat, one rising": ([make_curve(flat(), rate=0.1), make_curve(climbing, rate=500.0)], "", "in between"),
    "nan from the start": ([make_curve(lambda k, lr: NAN), make_curve(lambda k, lr: NAN)], "loss is nan", "data"),
    "inf from the start": ([make_curve(lambda k, lr: INF)], "first loss is inf", "data"),
    **{
        f"an LR of {lr}": ([replace(SLOW, lrs=(lr, *SLOW.lrs[1:]))], "not a positive number", "above 0")
        for lr in (0.0, -1e-3, NAN, INF)
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_record_without_an_answer_is_refused_with_the_reason_and_a_remedy(kind: str) -> None:
    curves, reason, remedy = REFUSED[kind]
    answer = refusal(*curves)
    assert re.search(reason, answer.reason) and remedy in answer.remedy


@pytest.mark.parametrize("train_steps", [1, 0, -5])
def test_a_run_without_room_for_a_cycle_is_refused(train_steps: int) -> None:
    assert str(train_steps) in refusal(SLOW, FAST, train_steps=train_steps).reason


def test_flat_noise_is_hardly_ever_read_as_descent() -> None:
    answers = [suggest([make_curve(flat(seed=seed))], train_steps=400) for seed in range(60)]
    assert sum(isinstance(answer, Suggestion) for answer in answers) <= 4


# -- exponential tests alone ---------------------------------------------------------------------------


def make_sweep(lowest: float, updates: int = 100, seed: int = 0) -> Curve:
    """Rates from 1e-5 to 10; the loss falls from 2.3 to 0.3, is lowest at a rate, and climbs steeply from there."""
    lrs = tuple(10 ** (-5 + 6 * k / (updates - 1)) for k in range(updates))
    falls = [2 / (1 + (lowest / 5 / lr) ** 2) for lr in lrs]
    losses = tuple(2.3 - fall + 4 * max(0.0, math.log10(lr / lowest)) ** 2 for lr, fall in zip(lrs, falls))
    name = "sweep" + (f", seed {seed}" if seed else "")
    return Curve(name, None, tuple(range(updates)), lrs, losses, kind="exponential", seed=seed)


def test_a_sweep_alone_gives_the_order_of_magnitude() -> None:
    answer = suggestion(make_sweep(0.8))
    assert 0.08 < answer.cycle_max_lr < 0.25
    assert answer.low_lr < 0.1 < answer.high_lr and answer.high_lr / answer.low_lr > 10
    assert answer.reasons["cycle_max_lr"].startswith("An eighth of")
    assert (answer.cycle_first_step_size, answer.cycle_second_step_size) == (80, 320)


def test_sweeps_of_several_seeds_are_read_together() -> None:
    one, other = (suggestion(make_sweep(lowest)) for lowest in (0.4, 1.6))
    both = suggestion(make_sweep(0.4), make_sweep(1.6, seed=1))
    assert one.cycle_max_lr < both.cycle_max_lr < other.cycle_max_lr
    assert "over 2 tests" in both.reasons["cycle_max_lr"]


def test_linear_tests_overrule_a_sweep() -> None:
    linear = make_curve(lambda k, lr: 2.3 - 0.02 * min(k, 90), rate=5.0)
    assert suggestion(linear, make_sweep(0.8)) == suggestion(linear)


@pytest.mark.parametrize(("updates", "why"), [(3, "3 steps are too few"), (30, "it stays flat")])
def test_a_sweep_is_read_where_a_linear_test_was_broken_off_before_it_told_anything(updates: int, why: str) -> None:
    broken_off = make_curve(flat(noise=0.001), rate=5.0, n=updates, name="slow (broken off)")
    answer, alone = suggestion(make_sweep(0.8), broken_off), suggestion(make_sweep(0.8))
    assert answer.params() == alone.params()
    assert answer.notes == (*alone.notes, f"slow (broken off) is not read: {why}.")
    assert "too short" in refusal(make_curve(flat(), n=15), make_sweep(0.8, updates=5)).reason


def test_smoothing_is_a_parameter_of_the_reading() -> None:
    noisy = make_sweep(0.8)
    losses = tuple(loss + 0.04 * (-1) ** (k // 2) for k, loss in enumerate(noisy.losses))
    sweep = Curve("sweep", None, noisy.steps, noisy.lrs, losses, kind="exponential")
    rough = suggest([sweep], train_steps=400, beta=0.0)
    smoothed = suggest([sweep], train_steps=400, beta=0.9)
    assert isinstance(rough, Suggestion) and isinstance(smoothed, Suggestion)
    assert rough.cycle_max_lr < 0.7 * smoothed.cycle_max_lr  # a longer memory sees the lowest loss later


def test_a_search_begins_a_hundredfold_below_the_end_of_a_test_that_is_refused() -> None:
    assert rough_maximum([Curve("sweep", None, (0, 1), (1e-4, 3.0), (2.3, 2.3), kind="exponential")]) == 0.03
    assert rough_maximum([Curve("sweep", None, (0,), (1e-4,), (math.nan,), kind="exponential")]) is None


def test_a_cycle_around_a_maximum_found_elsewhere_has_the_usual_shape() -> None:
    answer = cycle_at(0.3, "Found.", train_steps=400, low_lr=0.2, high_lr=0.5, curve="search", diverged_at_lr=None)
    assert list(answer.params().values()) == [0.01, 0.3, 80, 320]
    assert answer.reasons["cycle_max_lr"] == "Found."
