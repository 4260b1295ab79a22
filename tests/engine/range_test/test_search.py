"""The search for a peak: brackets the lowest loss, and finds the lowest rate that comes close to it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.range_test.search import Try, find_peak, for_long_training, is_chance, next_peak


def bowl(lr: float, best: float) -> float:
    """-19 at the best rate, more by the square of the decades to it, and diverged three of them above."""
    away = math.log10(lr / best)
    return math.inf if away > 3 else away**2 - 19


def search(best: float, first: float, count: int) -> list[Try]:
    tries: list[Try] = []
    for _ in range(count):
        lr = next_peak(tries, first)
        tries.append(Try(lr, bowl(lr, best)))
    return tries


@given(st.floats(-5, 0), st.floats(-1, 1))
def test_six_tries_find_a_peak_that_is_a_decade_away(best: float, away: float) -> None:
    found = find_peak(search(10**best, 10 ** (best + away), 6))
    assert found is not None and -0.7 < math.log10(found) - best < 0.1


def test_of_peaks_that_are_as_good_it_is_the_lowest() -> None:
    tries = [Try(0.01, -0.5), Try(0.1, -0.99), Try(0.2, -1.0), Try(0.4, -0.995), Try(1.6, -0.2)]
    found = find_peak(tries)
    assert found is not None and 0.09 < found <= 0.1


def test_a_lower_peak_that_is_as_good_only_beyond_a_worse_one_does_not_count() -> None:
    found = find_peak([Try(0.01, -1.0), Try(0.1, -0.5), Try(1.0, -1.01), Try(10.0, -0.1)])
    assert found is not None and 0.9 < found <= 1.0


def test_where_the_lowest_try_is_as_good_it_is_the_lowest_try() -> None:
    assert find_peak([Try(0.01, -1.0), Try(0.1, -1.0), Try(1.0, -0.5)]) == 0.01


def test_the_order_of_tries_brackets_and_then_refines() -> None:
    assert [one.lr for one in search(0.1, 0.1, 5)] == [0.1, 0.025, 0.4, 0.05, 0.2]


def test_a_search_climbs_and_descends_to_where_the_best_is() -> None:
    assert [one.lr for one in search(1.6, 0.1, 4)] == [0.1, 0.025, 0.4, 1.6]
    assert [one.lr for one in search(0.006, 0.1, 4)] == [0.1, 0.025, 0.00625, 0.00156]


def test_losses_far_above_the_start_and_infinite_ones_say_the_same() -> None:
    tries = [Try(0.025, -0.5), Try(0.1, -1.5), Try(0.4, math.inf)]
    assert find_peak(tries) == find_peak([*tries[:2], Try(0.4, 1e6)])
    assert 0.09 <= find_peak(tries) < 0.1  # type: ignore[operator]


def test_a_factor_changes_nothing() -> None:
    tries = search(0.07, 0.1, 4)
    assert find_peak([Try(one.lr, 3 * one.loss) for one in tries]) == pytest.approx(find_peak(tries))


def test_tries_that_all_end_above_their_start_have_no_peak() -> None:
    assert find_peak([Try(0.1, 0.5), Try(0.025, 0.1)]) is None


def test_where_no_try_fell_off_the_best_of_the_short_is_best_for_the_long() -> None:
    assert for_long_training(1.0, [Try(0.5, -0.2), Try(1.0, -0.9), Try(2.0, -0.1)], 10, 0.0, 1000) == 1.0


def test_tries_that_hold_their_rate_say_less_than_a_schedule_bears() -> None:
    assert for_long_training(1.0, [Try(0.5, -0.2), Try(1.0, -0.9), Try(2.0, -0.8)], 10, 0.9, 1000) == 1.75


def test_a_long_training_stays_well_below_the_peak_at_which_a_short_one_was_thrown_off() -> None:
    tries = [Try(0.5, -0.2), Try(1.0, -0.9), Try(2.0, 0.1)]
    assert for_long_training(1.0, tries, 1000, 0.0, 1000) == pytest.approx(0.5)
    assert for_long_training(1.0, tries, 10, 0.9, 1000) == pytest.approx(0.5 * 0.41, rel=0.01)


def test_a_held_rate_that_gives_half_back_was_thrown_off_and_a_decay_that_does_was_not() -> None:
    tries = [Try(0.5, -0.2), Try(1.0, -0.9), Try(2.0, -0.4)]
    assert for_long_training(1.0, tries, 10, 0.9, 1000) == pytest.approx(0.5 * 0.41, rel=0.01)
    assert for_long_training(1.0, tries, 10, 0.0, 1000) == 1.0


def test_what_is_given_back_of_a_fall_within_the_noise_is_chance() -> None:
    tries = [Try(0.5, -0.2, 0.1), Try(1.0, -0.9, 0.3), Try(2.0, -0.4, 5.0)]
    assert for_long_training(1.0, tries, 10, 0.9, 1000) == 1.75
    tries = [Try(one.lr, one.loss, 0.8 * one.noise) for one in tries]
    assert for_long_training(1.0, tries, 10, 0.9, 1000) < 0.5


def test_a_fall_of_less_than_half_the_noise_is_chance_where_tries_are_long_enough_to_tell() -> None:
    tries = [Try(0.1, 0.1, 0.3), Try(0.2, -0.1, 0.25)]
    assert is_chance(tries, 8) and not is_chance(tries, 7)
    assert not is_chance([Try(one.lr, one.loss, one.noise / 2) for one in tries], 8)


def test_a_rate_below_the_best_is_no_cliff() -> None:
    assert for_long_training(1.0, [Try(0.1, -0.1), Try(1.0, -0.9), Try(4.0, -0.8)], 10, 0.9, 1000) == 1.75


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_training_of_more_than_a_hundred_times_a_try_gets_less(momentum: float) -> None:
    tries = [Try(0.5, -0.2), Try(1.0, -0.9), Try(2.0, -0.8)]

    def peak(steps: int) -> float:
        return for_long_training(1.0, tries, 10, momentum, steps)

    assert peak(100) == peak(1300)
    assert peak(13_000) == pytest.approx(peak(1300) / 2, rel=0.01)  # ten to the power of 0.3 is two
