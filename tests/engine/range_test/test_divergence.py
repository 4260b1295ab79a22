"""When a range test has diverged, and what only looks like it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.range_test.divergence import DivergenceDetector, divergence
from tests.curves import FAST, SLOW, descent, flat, make_curve

INF, NAN = math.inf, math.nan


def test_a_loss_that_climbs_back_has_diverged() -> None:
    end = divergence(FAST.losses)
    assert end is not None and 70 < end < 80


def test_a_loss_that_falls_and_stays_has_not() -> None:
    assert divergence(SLOW.losses) is None


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("index", [0, 1, 4, 50])
def test_a_loss_that_is_not_finite_has_diverged_at_once(bad: float, index: int) -> None:
    losses = [1.0] * index + [bad] + [1.0] * 10
    assert divergence(losses) == index


@pytest.mark.parametrize("at", [0, 1, 2, 5, 40, 98])
@pytest.mark.parametrize("size", [1e3, -1e3, 1e30])
def test_one_outlier_batch_is_no_divergence(at: int, size: float) -> None:
    losses = [*SLOW.losses[:at], size, *SLOW.losses[at + 1 :]]
    assert divergence(losses) is None


def test_a_plateau_above_the_lowest_loss_is_no_divergence() -> None:
    losses = make_curve(lambda k, lr: 2.0 - min(k, 30) / 20 + (0.4 if k > 60 else 0.0)).losses
    assert divergence(losses) is None


def test_negative_losses_diverge_by_their_drop_and_not_by_a_ratio() -> None:
    losses = make_curve(descent(top=-5.0)).losses
    assert max(losses[:70]) < 0
    end = divergence(losses)
    assert end is not None and 70 < end < 80


def test_a_loss_that_changes_sign_has_not_diverged() -> None:
    assert divergence(make_curve(descent(top=1.0, up=None)).losses) is None


def test_a_loss_that_rises_from_the_start_has_diverged_soon() -> None:
    end = divergence([2.0 * 1.5**k for k in range(60)])
    assert end is not None and 9 <= end < 30


def test_a_constant_loss_has_not_diverged() -> None:
    assert divergence([0.7] * 500) is None


@pytest.mark.parametrize("n", [100, 1000])
def test_flat_noise_hardly_ever_counts_as_divergence(n: int) -> None:
    false_alarms = sum(divergence(make_curve(flat(seed=seed), n=n).losses) is not None for seed in range(40))
    assert false_alarms <= 1


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=120))
def test_the_detector_says_live_what_the_function_says_afterwards(losses: list[float]) -> None:
    detector = DivergenceDetector()
    answers = [detector.update(loss) for loss in losses]
    end = divergence(losses)
    assert answers == [end is not None and index >= end for index in range(len(losses))]
    assert detector.diverged == (end is not None)
    assert detector.num_updates == len(losses)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=80), st.integers(0, 80))
def test_what_comes_later_does_not_change_an_answer(losses: list[float], cut: int) -> None:
    end = divergence(losses)
    assert divergence(losses[:cut]) == (end if end is not None and end < cut else None)
