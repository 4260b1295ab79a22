"""The record of a run: its columns, its smoothing, and when it has diverged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redline.range_test.curve import Curve, DivergenceDetector, divergence, smooth
from tests.curves import FAST, SLOW, descent, flat, make_curve

INF, NAN = math.inf, math.nan


def test_a_curve_with_unequal_columns_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 steps, 1 LRs and 2 losses"):
        Curve("rate 5", 5.0, (0, 1), (0.1,), (2.0, 1.0))


def test_a_skipped_step_is_not_read() -> None:
    test = make_curve(lambda k, lr: 2.3 - 0.02 * min(k, 90), rate=5.0)
    losses = (INF, NAN, 50.0, *test.losses[3:])
    skipping = replace(test, losses=losses, skipped=(0, 1, 2))
    assert skipping.diverged_at is None and len(skipping.taken().losses) == len(losses) - 3
    assert replace(skipping, skipped=()).diverged_at == 0


def test_json_has_every_field_and_no_constant_that_json_lacks() -> None:
    curve = Curve(
        "a", None, (0, 1), (0.1, INF), (NAN, -INF), ((0, INF),), "exponential", 2, (1,), 64, (("momentum", 0.5),)
    )
    text = json.dumps(curve.to_json(), allow_nan=False)
    assert repr(Curve.from_json(json.loads(text))) == repr(curve)
    old = {key: curve.to_json()[key] for key in ("name", "rate", "steps", "lrs", "losses", "validation")}
    assert Curve.from_json(old).kind == "fixed"


# -- smoothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "smoothed"),
    [
        ([], []),
        ([3.0, 3.0, 3.0], [3.0, 3.0, 3.0]),
        ([1.0, 1.0, 1.0, 1e9, 1.0, 1.0], [1.0] * 6),  # an outlier is dropped entirely
        ([1e9, 1.0, 1.0, 1.0], [1e9, 1e9, 1.0, 1.0]),  # as the first loss it shows at the third
        # The medians of three are 4, 4, 2; the last weighs 0.5 / (0.5 + 0.25 + 0.125) = 4 / 7.
        ([4.0, 4.0, 9.0, 2.0, 1.0], [4.0, 4.0, 4.0, 4.0, 20 / 7]),
        ([NAN, 2.0, INF, 2.0, NAN], [NAN, 2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_smoothing_by_hand(losses: list[float], smoothed: list[float]) -> None:
    assert smooth(losses, beta=0.5) == pytest.approx(smoothed, nan_ok=True)


@pytest.mark.parametrize("beta", [-0.1, 1.0, NAN])
def test_smoothing_refuses_a_weight_outside_its_range(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be in"):
        smooth([1.0], beta=beta)


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.floats(0, 0.99))
def test_smoothed_losses_stay_between_their_extremes(losses: list[float], beta: float) -> None:
    values = smooth(losses, beta)
    slack = 1e-9 * max(map(abs, losses), default=0.0)
    assert len(values) == len(losses)
    assert all(min(losses) - slack <= value <= max(losses) + slack for value in values)


# -- divergence ----------------------------------------------------------------------------------------

DIVERGE = {
    "climbs back": FAST.losses,
    "negative": make_curve(descent(top=-5.0)).losses,
}
STAY = {
    "falls and stays": SLOW.losses,
    "a plateau above the lowest": make_curve(lambda k, lr: 2.0 - min(k, 30) / 20 + (0.4 if k > 60 else 0.0)).losses,
    "changes sign": make_curve(descent(top=1.0, up=None)).losses,
    "constant": [0.7] * 500,
}


@pytest.mark.parametrize("kind", DIVERGE)
def test_a_loss_that_climbs_back_has_diverged(kind: str) -> None:
    end = divergence(DIVERGE[kind])
    assert end is not None and 70 < end < 80


@pytest.mark.parametrize("kind", STAY)
def test_other_losses_have_not(kind: str) -> None:
    assert divergence(STAY[kind]) is None


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("index", [0, 4, 50])
def test_a_loss_that_is_not_finite_has_diverged_at_once(bad: float, index: int) -> None:
    assert divergence([1.0] * index + [bad] + [1.0] * 10) == index


@pytest.mark.parametrize("at", [0, 2, 5, 40, 98])
@pytest.mark.parametrize("size", [1e3, -1e3, 1e30])
def test_one_outlier_is_no_divergence(at: int, size: float) -> None:
    assert divergence([*SLOW.losses[:at], size, *SLOW.losses[at + 1 :]]) is None


def test_a_loss_that_rises_from_the_start_has_diverged_soon() -> None:
    end = divergence([2.0 * 1.5**k for k in range(60)])
    assert end is not None and 9 <= end < 30


@pytest.mark.parametrize("n", [100, 1000])
def test_flat_noise_hardly_ever_counts_as_divergence(n: int) -> None:
    assert sum(divergence(make_curve(flat(seed=seed), n=n).losses) is not None for seed in range(40)) <= 1


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=120))
def test_the_detector_and_the_function_agree(losses: list[float]) -> None:
    detector = DivergenceDetector()
    answers = [detector.update(loss) for loss in losses]
    end = divergence(losses)
    assert answers == [end is not None and index >= end for index in range(len(losses))]
    assert (detector.diverged, detector.num_steps) == (end is not None, len(losses))
