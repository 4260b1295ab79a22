"""Smoothing: what it starts from, what it drops, what it repeats."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.range_test.smoothing import smooth

INF, NAN = math.inf, math.nan


def test_smoothing_starts_at_the_first_loss_and_not_at_zero() -> None:
    assert smooth([3.0, 3.0, 3.0]) == [3.0, 3.0, 3.0]


def test_smoothing_drops_a_single_outlier_whole() -> None:
    assert smooth([1.0, 1.0, 1.0, 1e9, 1.0, 1.0]) == [1.0] * 6


def test_smoothing_follows_the_moving_average_by_hand() -> None:
    # The medians of three are 4, 4, 2; the last weighs 0.5 / (0.5 + 0.25 + 0.125) = 4 / 7.
    assert smooth([4.0, 4.0, 9.0, 2.0, 1.0], beta=0.5) == pytest.approx([4.0, 4.0, 4.0, 4.0, 20 / 7])


def test_smoothing_repeats_itself_where_a_value_is_not_finite() -> None:
    values = smooth([NAN, 2.0, INF, 2.0, NAN])
    assert math.isnan(values[0])
    assert values[1:] == [2.0, 2.0, 2.0, 2.0]


def test_smoothing_forgets_a_first_loss_that_is_an_outlier() -> None:
    assert smooth([1e9, 1.0, 1.0, 1.0]) == [1e9, 1e9, 1.0, 1.0]


def test_smoothing_of_nothing_is_nothing() -> None:
    assert smooth([]) == []


@pytest.mark.parametrize("beta", [-0.1, 1.0, NAN])
def test_smoothing_refuses_a_weight_outside_its_range(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be in"):
        smooth([1.0], beta=beta)


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.floats(0, 0.99))
def test_smoothing_of_finite_losses_stays_between_their_extremes(losses: list[float], beta: float) -> None:
    values = smooth(losses, beta)
    assert len(values) == len(losses)
    slack = 1e-9 * max(map(abs, losses), default=0.0)
    assert all(min(losses) - slack <= value <= max(losses) + slack for value in values)
