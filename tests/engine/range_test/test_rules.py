"""The rules of others, each read from curves whose answer is known by construction."""

from __future__ import annotations

import math

import pytest

from redline.range_test.curve import RULES, Curve, marks

LRS = tuple(10 ** (-5 + 6 * k / 120) for k in range(121))  # 1e-5 to 10, 20 to a decade


def sweep(losses: list[float], name: str = "sweep", seed: int = 0) -> Curve:
    lrs = LRS[: len(losses)]
    return Curve(name, None, tuple(range(len(losses))), lrs, tuple(losses), kind="exponential", seed=seed)


def logistic(lr: float) -> float:
    """Falls by 2 around 1e-2, where it is steepest, and rises by the square of what is above 1."""
    return 3 - 2 / (1 + (1e-2 / lr) ** 1.5) + max(0.0, math.log10(lr)) ** 2 * 3


def by_rule(*curves: Curve, beta: float = 0.0) -> dict[str, float | None]:
    return {mark.rule: mark.lr for mark in marks(curves, beta=beta)}


def test_each_rule_finds_its_place_on_a_smooth_curve() -> None:
    found = by_rule(sweep([logistic(lr) for lr in LRS]))
    assert found["steepest"] == pytest.approx(1e-2, rel=0.13)
    assert found["minimum / 10"] == pytest.approx(0.112, rel=0.13)  # lowest a little above 1
    assert found["valley"] == pytest.approx(math.sqrt(1e-5 * 1.12), rel=0.13)
    assert found["last stable"] == pytest.approx(10 ** math.sqrt(0.2 / 3), rel=0.2)


def test_smoothing_is_a_parameter_of_the_reading() -> None:
    noisy = sweep([logistic(lr) + 0.3 * (-1) ** k for k, lr in enumerate(LRS)])
    assert by_rule(noisy, beta=0.0)["last stable"] < 1  # the first high loss past the lowest ends it
    assert by_rule(noisy, beta=0.9)["last stable"] == pytest.approx(10 ** math.sqrt(0.2 / 3), rel=0.8)


@pytest.mark.parametrize("losses", [[1.0 + 0.01 * k for k in range(60)], [2.0] * 60])
def test_a_curve_that_never_falls_has_no_answer(losses: list[float]) -> None:
    found = marks([sweep(losses)])
    assert [mark.lr for mark in found] == [None] * len(RULES)
    assert "never falls" in found[0].why


def test_a_constant_and_a_factor_change_no_answer() -> None:
    losses = [logistic(lr) for lr in LRS]
    assert by_rule(sweep(losses)) == by_rule(sweep([8 * loss - 64 for loss in losses]))


def test_what_lies_past_the_divergence_is_not_read() -> None:
    losses = [logistic(lr) for lr in LRS]
    assert by_rule(sweep([*losses[:100], math.nan, *[-50.0] * 20])) == by_rule(sweep([*losses[:100], math.nan]))


def test_the_widest_exponential_test_of_the_first_seed_is_read() -> None:
    flat = sweep([2.0] * 121, "seed 1", seed=1)
    linear = Curve("rate 5", 5.0, (0, 1, 2), (1e-9, 1.0, 100.0), (3.0, 2.0, 1.0))
    found = marks([linear, flat, sweep([logistic(lr) for lr in LRS])])
    assert {mark.curve for mark in found} == {"sweep"}


def test_runs_that_are_no_tests_are_not_read() -> None:
    assert marks([Curve("fixed", None, (0, 1, 2), (1.0, 1.0, 1.0), (3.0, 2.0, 1.0), kind="fixed")]) == ()


def test_a_staircase_that_ended_on_its_first_stair_has_no_answer() -> None:
    found = marks([Curve("rate 5", 5.0, (0, 1, 2, 3), (0.1,) * 4, (3.0, 2.0, 1.5, 1.0))])
    assert [mark.lr for mark in found] == [None] * len(RULES)
    assert "never grows" in found[0].why
