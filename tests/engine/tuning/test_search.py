"""The search for the peak: which trials are made, and what their losses say."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redline.tuning.search import MOST_TRIALS, Outcome, Peak, divide_search, find_peak, next_trial, spread_of


def search(loss: Callable[[float], float], first: float, lengths: tuple[int, ...] = (10,)) -> list[Outcome]:
    trials: list[Outcome] = []
    while found := next_trial(trials, first, lengths):
        lr, steps, seed = found
        trials.append(Outcome(lr, steps, loss(lr), 0.0, seed))
    return trials


def bowl(best: float) -> Callable[[float], float]:
    """1 at the best learning rate, more by the square of the decades to it, and diverged two of them above."""

    def loss(lr: float) -> float:
        away = math.log10(lr / best)
        return math.inf if away > 2 else 1 + away**2

    return loss


def found(trials: list[Outcome], **more: float) -> Peak:
    peak = find_peak(trials, 1000, **more)  # type: ignore[arg-type]
    assert peak is not None
    return peak


@given(st.floats(-5, 0), st.floats(-2, 2))
def test_it_finds_a_peak_that_is_two_decades_away_up_or_down(best: float, away: float) -> None:
    trials = search(bowl(10**best), 10 ** (best + away), (10, 40))
    assert trials[0].lr == pytest.approx(10 ** (best + away), rel=0.01), "the own rate is always tried"
    assert abs(math.log10(found(trials).lr) - best) < 0.3
    assert max(len({one.lr for one in trials if one.steps == steps}) for steps in (10, 40)) <= MOST_TRIALS


def test_where_the_lowest_rate_is_best_it_goes_on_downwards_and_so_it_does_from_one_that_diverges() -> None:
    assert [one.lr for one in search(bowl(0.006), 0.1) if not one.seed] == [0.1, 0.4, 0.025, 0.00625, 0.00156]
    assert [one.lr for one in search(bowl(1e-5), 0.01) if not one.seed][:4] == [0.01, 0.0025, 0.000625, 0.000156]


def test_where_even_the_best_trial_ends_above_the_initial_loss_it_goes_on_downwards() -> None:
    trials = [Outcome(0.01, 10, 1.5, initial=1.0), Outcome(0.04, 10, 1.2, initial=1.0)]
    assert next_trial(trials, 0.01, [10]) == (0.0025, 10, 0)
    lower = [one._replace(loss=one.loss - 0.3) for one in trials]
    assert next_trial(lower, 0.01, [10]) == (0.16, 10, 0)


def test_longer_trials_begin_upwards_only_where_nothing_higher_was_tried() -> None:
    inside = search(bowl(0.04), 0.01, (10,))
    edge = [one for one in inside if one.lr <= 0.04]
    for trials, following in ((inside, 0.02), (edge, 0.08)):
        assert next_trial([*trials, Outcome(0.04, 40, 0.9)], 0.01, (10, 40), shortest=40) == (following, 40, 0)


def test_where_a_longer_trial_ends_above_a_shorter_one_the_next_is_far_lower() -> None:
    shorter = [Outcome(0.01, 10, 0.9), Outcome(0.04, 10, 0.8, noise=0.02), Outcome(0.16, 10, 1.0)]
    for loss, following in ((0.82, 0.02), (0.9, 0.01)):
        assert next_trial([*shorter, Outcome(0.04, 40, loss)], 0.01, (10, 40), shortest=40) == (following, 40, 0)
    edge = [*shorter[:2], Outcome(0.04, 40, 0.9)]
    assert next_trial(edge, 0.01, (10, 40), shortest=40) == (0.01, 40, 0)


TRIALS = [
    Outcome(0.01, 10, 0.8),
    Outcome(0.04, 10, 0.5),
    Outcome(0.16, 10, 0.42),
    Outcome(0.64, 10, 0.7),
    Outcome(2.56, 10, math.inf),
]


@pytest.mark.parametrize(("factor", "constant"), [(1, 1000), (1, -0.5), (1000, 0), (1e-3, 42.5)])
def test_constants_added_to_losses_and_factors_on_them_change_nothing(factor: float, constant: float) -> None:
    other = [one._replace(loss=factor * one.loss + constant, noise=factor * 0.05) for one in TRIALS]
    assert found(other) == pytest.approx(found([one._replace(noise=0.05) for one in TRIALS]))


def test_a_tie_within_noise_is_no_cliff_and_gets_the_lower_end() -> None:
    quiet, noisy = (found([one._replace(noise=noise) for one in TRIALS]) for noise in (0.0, 0.1))
    assert 0.1 < quiet.lr <= 0.16 and 0.05 < noisy.lr < 0.07 and 0.03 < noisy.low < 0.04
    # One that is worse by less than the noise, above the best, lowers nothing.
    tied = [one._replace(noise=0.01, loss=0.425) if one.lr == 0.64 else one._replace(noise=0.01) for one in TRIALS]
    assert found(tied).lr >= found([one._replace(noise=0.01) for one in TRIALS]).lr


def test_the_best_one_counts_half_a_step_lower_if_it_is_the_highest_that_was_tried() -> None:
    edge = [one._replace(loss=loss) for one, loss in zip(TRIALS, (0.8, 0.7, 0.6, 0.5))]  # as far as a budget went
    assert found(edge).lr == pytest.approx(0.64 / 2, rel=0.1) and found(edge).best == 0.64
    assert found([*edge, TRIALS[-1]]).lr == pytest.approx(0.64, rel=0.1), "the next one has diverged: it is between"
    assert found(edge[:1]).lr == 0.01, "of one alone"


@pytest.mark.parametrize("own", [0.16, 0.14])
def test_an_own_rate_that_is_as_good_is_kept(own: float) -> None:
    assert found([one._replace(noise=0.02) for one in TRIALS], own=own) == Peak(
        own, 0.16, pytest.approx(0.113, 0.01), 10, True
    )
    assert not found(TRIALS, own=0.01).is_own


def test_heavy_ball_momentum_that_was_not_built_up_is_made_up_for() -> None:
    assert found(TRIALS, momentum=0.9).lr == pytest.approx(0.41 * 0.75 * found(TRIALS).lr, rel=0.1)


def test_a_spread_over_two_orders_of_the_data_is_the_noise() -> None:
    again = [Outcome(0.16, 10, 0.52, seed=1)]
    assert spread_of(TRIALS) is None and spread_of([*TRIALS, *again]) == pytest.approx(0.1 / math.sqrt(2))
    assert found([*TRIALS, *again]).lr < found(TRIALS).lr


def test_longer_tries_decide_if_there_are_two_and_tries_that_all_diverged_are_no_answer() -> None:
    assert found([*TRIALS, Outcome(0.04, 40, 0.3), Outcome(0.08, 40, 0.35)]).best == 0.04
    assert found([*TRIALS, Outcome(0.04, 40, 0.3)]).best == 0.16
    assert find_peak([Outcome(0.1, 10, math.inf), Outcome(0.01, 10, math.inf)], 1000) is None


def test_of_trainings_in_full_the_best_one_is_the_answer_as_it_is() -> None:
    in_full = [Outcome(0.04, 1000, 0.3), Outcome(0.02, 1000, 0.29), Outcome(0.01, 1000, 0.31)]
    assert found([*TRIALS, *in_full], own=0.018, momentum=0.9)[:4] == (0.02, 0.02, 0.02, 1000)


@given(st.integers(12, 50_000), st.integers(100, 20_000))
def test_lengths_grow_up_to_the_training_and_are_affordable(steps: int, planned: int) -> None:
    lengths = divide_search(steps, planned)
    assert list(lengths) == sorted(set(lengths)) and lengths[0] >= 1 and lengths[-1] <= planned
    assert 5 * lengths[0] + sum(3 * length for length in lengths[1:2] if length < planned) <= steps
    assert steps < 2 * planned or lengths[-1] == planned, "a training in full"


OVERFITTING = [
    Outcome(0.001, 20, 2.03, 0.02, training=2.0),
    Outcome(0.004, 20, 1.97, 0.02, training=1.9),
    Outcome(0.016, 20, 2.09, 0.02, training=2.1),
    Outcome(0.001, 80, 1.96, 0.01, training=1.7),
    Outcome(0.002, 80, 2.13, 0.01, training=1.3),
    Outcome(0.0005, 80, 1.99, 0.01, training=1.9),
]


def test_a_training_that_longer_trials_show_to_overfit_gets_the_sum_of_learning_rates_of_the_best_one() -> None:
    peak = find_peak(OVERFITTING, 800, own=0.001, epoch=10)
    assert peak is not None
    assert (peak.lr, peak.best, peak.overfits) == (0.0001, 0.001, True)
    assert next_trial(OVERFITTING, 0.001, (20, 80, 800), epoch=10) == (0.0001, 800, 0)


def test_nothing_overfits_before_two_epochs_within_noise_or_without_a_lower_training_loss() -> None:
    noisy = [one._replace(noise=0.1) for one in OVERFITTING]
    unstable = [one._replace(training=2 + one.lr) for one in OVERFITTING]
    for trials, epoch in ((OVERFITTING, 50.0), (OVERFITTING, None), (noisy, 10.0), (unstable, 10.0)):
        peak = find_peak(trials, 800, own=0.0003, epoch=epoch)
        assert peak is not None
        assert not peak.overfits and 0.0005 <= peak.lr <= 0.001
