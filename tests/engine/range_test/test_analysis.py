"""The rules that turn a range test's record into a schedule, on curves of every kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.range_test.analysis import rough_maximum, suggest
from engine.range_test.curve import Curve
from engine.range_test.divergence import divergence
from engine.range_test.suggestion import Refusal, Suggestion
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


def test_every_number_has_its_reason_in_one_sentence_with_figures() -> None:
    answer = suggestion(SLOW, FAST)
    assert answer.reasons.keys() == answer.params().keys()
    for reason in answer.reasons.values():
        assert reason.endswith(".") and any(letter.isdigit() for letter in reason)
    assert "rate 50 diverged at 0.07" in answer.reasons["cycle_max_lr"]
    assert "rate 5 had made 10%" in answer.reasons["cycle_min_lr"]
    assert "20% of 400" in answer.reasons["cycle_first_step_size"]


def test_the_order_of_the_tests_does_not_matter() -> None:
    assert suggestion(SLOW, FAST).params() == suggestion(FAST, SLOW).params()


def test_a_baseline_and_validation_losses_change_nothing() -> None:
    baseline = make_curve(lambda k, lr: 2.3 - k / 100, rate=None, name="fixed 0.001")
    validated = Curve("rate 5", 5.0, SLOW.steps, SLOW.lrs, SLOW.losses, ((50, 0.1), (100, 9.0)))
    assert suggestion(SLOW, FAST, baseline) == suggestion(validated, FAST)


def test_a_test_alone_that_diverged_gives_the_middle_of_its_descent() -> None:
    answer = suggestion(FAST)
    assert answer.curve == "rate 50"
    assert answer.cycle_max_lr == pytest.approx(1e-4 * (1 + 50 * 20 * 20 / 100), rel=0.1)
    assert "50% of its drop" in answer.reasons["cycle_max_lr"]


def test_a_test_that_ends_before_it_diverges_gives_a_lower_bound() -> None:
    answer = suggestion(SLOW)
    assert answer.diverged_at_lr is None
    assert "80% of its drop" in answer.reasons["cycle_max_lr"]
    assert "no test diverged" in answer.reasons["cycle_max_lr"]
    assert any("lower bound" in note for note in answer.notes)


def test_the_minimum_is_where_descent_begins_if_that_is_low_enough() -> None:
    early = make_curve(descent(begin=0, done=90, up=None), rate=50.0)
    late = make_curve(descent(begin=0, done=90, up=None), rate=500.0)
    answer = suggestion(early, late)
    assert answer.cycle_min_lr == pytest.approx(answer.cycle_max_lr / 30, rel=0.1)
    slow = make_curve(descent(begin=2, done=90, up=None), rate=500.0, min_lr=1e-6)
    answer = suggestion(slow, late)
    assert answer.cycle_min_lr < answer.cycle_max_lr / 30 / 1.1
    assert "lowered" not in answer.reasons["cycle_min_lr"]


def test_a_test_that_learned_too_little_sets_no_learning_rate() -> None:
    weak = make_curve(descent(drop=0.8, up=30), rate=500.0)
    answer = suggestion(SLOW, FAST, weak)
    assert answer.curve == "rate 5 and rate 50"
    assert any(note.startswith("rate 500 made less than 80%") for note in answer.notes)


def test_a_flat_test_beside_a_good_one_sets_no_learning_rate() -> None:
    answer = suggestion(make_curve(flat(), rate=0.5), FAST)
    assert answer.curve == "rate 50"
    assert any(note == "rate 0.5 stayed flat: it sets no learning rate." for note in answer.notes)


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


def test_a_staircase_is_read_like_a_slope() -> None:
    lrs = tuple(FAST.lrs[k // 5 * 5] for k in range(100))
    answer = suggestion(SLOW, Curve("rate 50", 50.0, FAST.steps, lrs, FAST.losses))
    assert answer.cycle_max_lr == pytest.approx(suggestion(SLOW, FAST).cycle_max_lr, rel=0.15)


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


def test_the_numbers_have_two_significant_digits() -> None:
    answer = suggestion(SLOW, FAST)
    for value in (answer.cycle_min_lr, answer.cycle_max_lr):
        assert value == float(f"{value:.1e}")


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
@given(grid_curves(), st.integers(-(10**6), 10**6))
def test_a_constant_added_to_the_losses_changes_nothing(curves: list[Curve], constant: int) -> None:
    assert suggest(mapped(curves, lambda loss: loss + constant), train_steps=400) == suggest(curves, train_steps=400)


@settings(deadline=None)
@given(grid_curves(), st.integers(-40, 40))
def test_a_positive_factor_on_the_losses_changes_nothing(curves: list[Curve], power: int) -> None:
    assert suggest(mapped(curves, lambda loss: loss * 2.0**power), train_steps=400) == suggest(curves, train_steps=400)


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


def test_no_curve_is_refused() -> None:
    assert "no range test" in refusal().reason


def test_a_baseline_alone_is_refused() -> None:
    answer = refusal(make_curve(lambda k, lr: 2.3 - k / 100, rate=None, name="fixed 0.001"))
    assert "fixed learning rate" in answer.reason
    assert "rates, such as 5, 50 and 500" in answer.remedy


@pytest.mark.parametrize("n", [0, 1, 2, 5, 19])
def test_too_few_points_are_refused(n: int) -> None:
    answer = refusal(make_curve(descent(begin=0, done=10, up=None), n=n))
    assert f"{n} updates" in answer.reason
    assert "at least 20" in answer.remedy


def test_a_short_test_beside_a_long_one_is_left_out_with_a_note() -> None:
    answer = suggestion(SLOW, make_curve(descent(up=None), n=15))
    assert answer.curve == "rate 5"
    assert any("15 updates are too few" in note for note in answer.notes)


def test_a_flat_curve_is_refused() -> None:
    answer = refusal(make_curve(flat()))
    assert "does not fall by more than its batch noise" in answer.reason
    assert "end higher" in answer.remedy


def test_a_constant_loss_is_refused_as_flat() -> None:
    assert "does not fall" in refusal(make_curve(lambda k, lr: 0.7)).reason


def test_flat_noise_is_hardly_ever_read_as_descent() -> None:
    answers = [suggest([make_curve(flat(seed=seed))], train_steps=400) for seed in range(60)]
    assert sum(isinstance(answer, Suggestion) for answer in answers) <= 4


def test_a_loss_that_rises_from_the_start_is_refused_with_a_lower_minimum() -> None:
    answer = refusal(make_curve(lambda k, lr: 2.3 * 1.2**k, min_lr=0.5))
    assert "never falls" in answer.reason and "0.5" in answer.reason
    assert "lr_range_test_min_lr 0.005" in answer.remedy


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_first_loss_that_is_not_finite_is_refused_and_no_learning_rate_blamed(bad: float) -> None:
    answer = refusal(make_curve(lambda k, lr: bad), make_curve(lambda k, lr: bad, rate=5.0))
    assert f"first loss is {bad}" in answer.reason
    assert "data" in answer.remedy


def test_a_test_that_began_with_nan_beside_a_good_one_is_left_out_with_a_note() -> None:
    answer = suggestion(make_curve(lambda k, lr: NAN, rate=5.0), FAST)
    assert answer.curve == "rate 50"
    assert any("first loss is nan" in note for note in answer.notes)


def test_nan_soon_after_the_start_is_refused_as_too_high_a_start() -> None:
    assert "never falls" in refusal(make_curve(lambda k, lr: NAN if k > 2 else 2.3)).reason


def test_a_flat_and_a_diverging_test_without_descent_ask_for_a_rate_in_between() -> None:
    answer = refusal(make_curve(flat(), rate=0.1), make_curve(lambda k, lr: 2.3 * 1.2**k, rate=500.0))
    assert "in between" in answer.remedy


@pytest.mark.parametrize("train_steps", [1, 0, -5])
def test_a_run_without_room_for_a_cycle_is_refused(train_steps: int) -> None:
    assert str(train_steps) in refusal(SLOW, FAST, train_steps=train_steps).reason


@pytest.mark.parametrize("lr", [0.0, -1e-3, NAN, INF])
def test_a_learning_rate_that_is_no_positive_number_is_refused(lr: float) -> None:
    curve = Curve("rate 5", 5.0, SLOW.steps, (lr, *SLOW.lrs[1:]), SLOW.losses)
    assert "not a positive number" in refusal(curve).reason


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


@pytest.mark.parametrize(("updates", "why"), [(3, "3 updates are too few"), (30, "it stays flat")])
def test_a_sweep_is_read_where_a_linear_test_was_broken_off_before_it_told_anything(updates: int, why: str) -> None:
    broken_off = make_curve(flat(noise=0.001), rate=5.0, n=updates, name="slow (broken off)")
    answer, alone = suggestion(make_sweep(0.8), broken_off), suggestion(make_sweep(0.8))
    assert answer.params() == alone.params()
    assert answer.notes == (*alone.notes, f"slow (broken off) is not read: {why}.")
    assert "too short" in refusal(make_curve(flat(), n=15), make_sweep(0.8, updates=5)).reason


def test_a_sweep_of_eighteen_updates_can_be_read() -> None:
    assert 0.05 < suggestion(make_sweep(0.8, updates=18)).cycle_max_lr < 0.4


def test_a_flat_sweep_is_refused() -> None:
    flat = Curve(
        "sweep", None, tuple(range(60)), tuple(1e-5 * 1.2**k for k in range(60)), (2.3,) * 60, kind="exponential"
    )
    assert "does not fall" in refusal(flat).reason


def test_smoothing_is_a_parameter_of_the_reading() -> None:
    noisy = make_sweep(0.8)
    losses = tuple(loss + 0.04 * (-1) ** (k // 2) for k, loss in enumerate(noisy.losses))
    sweep = Curve("sweep", None, noisy.steps, noisy.lrs, losses, kind="exponential")
    rough = suggest([sweep], train_steps=400, beta=0.0)
    smoothed = suggest([sweep], train_steps=400, beta=0.9)
    assert isinstance(rough, Suggestion) and isinstance(smoothed, Suggestion)
    assert rough.cycle_max_lr < 0.7 * smoothed.cycle_max_lr  # a longer memory sees the lowest loss later


def test_the_same_note_is_said_once() -> None:
    slow = make_curve(lambda k, lr: 2.3 - 0.02 * min(k, 90), rate=5.0)
    answer = suggestion(slow, slow, slow)
    assert len(set(answer.notes)) == len(answer.notes)


def test_a_skipped_update_is_not_read() -> None:
    """fp16 looks for its loss scale: the first updates are skipped, whatever their losses were."""
    test = make_curve(lambda k, lr: 2.3 - 0.02 * min(k, 90), rate=5.0)
    skipping = replace(test, losses=(math.inf, math.nan, 50.0, *test.losses[3:]), skipped=(0, 1, 2))
    assert suggestion(skipping).cycle_max_lr == pytest.approx(suggestion(test).cycle_max_lr, rel=0.05)


def test_a_search_can_begin_a_hundredfold_below_the_end_of_a_test_that_is_refused() -> None:
    assert rough_maximum([Curve("sweep", None, (0, 1), (1e-4, 3.0), (2.3, 2.3), kind="exponential")]) == 0.03
    assert rough_maximum([Curve("sweep", None, (0,), (1e-4,), (math.nan,), kind="exponential")]) is None
