"""What a trial came to, and which one wins: the lowest, a tie by preference, never one that diverged."""

from __future__ import annotations

import math

import pytest

from engine.range_test.curve import Curve
from engine.range_test.suggestion import Suggestion
from engine.tuning.candidates import PREFERENCE, Schedule, candidates_of
from engine.tuning.trials import Trial, judge, trial_of


def curve(losses: list[float], validation: list[float] | None = None, name: str = "trial") -> Curve:
    steps = tuple(range(len(losses)))
    every = max(1, len(losses) // 10)
    measured = tuple((index * every, loss) for index, loss in enumerate(validation or ()))
    return Curve(name, None, steps, tuple(0.1 for _ in steps), tuple(losses), measured, kind="cycle")


def trial(schedule: Schedule, loss: float, *, noise: float = 0.0, diverged: bool = False, lr: float = 0.1) -> Trial:
    return Trial(curve([2.0] * 20, name=f"{schedule} {lr:g}"), schedule, lr, loss, diverged, noise)


def test_the_loss_of_a_trial_is_its_last_validation_loss() -> None:
    validation = [2.0, 1.5, 1.2, 1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.42, 0.4]
    made = trial_of(curve([1.0] * 20, validation), "OneCycle", 0.1, "", updates=20)
    assert (made.loss, made.diverged) == (0.4, False)
    assert made.noise < 0.02


def test_without_validation_data_it_is_the_mean_of_its_last_training_losses() -> None:
    made = trial_of(curve([2.0] * 40 + [1.1, 0.9] * 5), "OneCycle", 0.1, "", updates=50)
    assert made.loss == pytest.approx(1.0)
    assert 0.01 < made.noise < 0.2


def test_a_trial_that_ended_early_or_without_a_number_has_diverged() -> None:
    assert trial_of(curve([1.0] * 15), "OneCycle", 0.1, "", updates=20).diverged
    assert trial_of(curve([1.0] * 20, [2.0, math.nan]), "OneCycle", 0.1, "", updates=20).diverged
    assert not trial_of(curve([-1.0] * 20), "OneCycle", 0.1, "", updates=20).diverged


def test_the_lowest_loss_wins() -> None:
    verdict = judge([trial("OneCycle", 0.5), trial("WarmupDecayLR", 0.4), trial("fixed", 0.6)], 100)
    assert (verdict.winner, verdict.tied) == (1, (1,))
    assert "the lowest by more than chance explains" in verdict.why


def test_a_tie_within_noise_goes_to_the_preferred_schedule_and_is_called_a_tie() -> None:
    first, second = PREFERENCE[0], PREFERENCE[1]
    verdict = judge([trial("fixed", 0.9), trial(second, 0.40, noise=0.02), trial(first, 0.42, noise=0.02)], 100)
    assert (verdict.winner, verdict.tied) == (2, (1, 2))
    assert "A tie within noise" in verdict.why and f"{first} is preferred" in verdict.why
    assert judge([trial("fixed", 0.40, noise=0.1), trial("fixed", 0.42, noise=0.1, lr=0.2)], 100).winner == 0


def test_a_diverged_trial_never_wins() -> None:
    assert judge([trial("OneCycle", 0.1, diverged=True), trial("fixed", 0.6)], 100).winner == 1
    verdict = judge([trial("OneCycle", 0.1, diverged=True), trial("fixed", math.nan, diverged=True)], 100)
    assert (verdict.winner, verdict.tied, verdict.why) == (None, (), "All 2 trials diverged.")


def test_a_fixed_rate_that_ends_lowest_wins_where_trials_are_long_enough() -> None:
    trials = [trial("WarmupDecayLR", 0.5), trial("OneCycle", 0.6), trial("fixed", 0.3)]  # of 20 updates
    assert judge(trials, 400).winner == 2


def test_in_a_trial_too_short_for_a_schedule_to_pay_the_lowest_schedule_wins_and_the_fixed_rate_is_named() -> None:
    verdict = judge([trial("WarmupDecayLR", 0.5), trial("OneCycle", 0.6), trial("fixed", 0.3)], 401)
    assert (verdict.winner, verdict.tied) == (0, (0,))
    assert "fixed 0.1 ended lower (0.3)" in verdict.why and "20 of 401 updates" in verdict.why


def test_where_every_schedule_diverged_a_fixed_rate_wins_in_a_short_trial_too() -> None:
    verdict = judge([trial("WarmupDecayLR", 0.5, diverged=True), trial("fixed", 0.3)], 100_000)
    assert (verdict.winner, verdict.why) == (1, "No other came to its end.")


def test_losses_may_be_negative() -> None:
    assert judge([trial("OneCycle", -5.0), trial("WarmupDecayLR", -6.0)], 100).winner == 1


# -- what is tried -------------------------------------------------------------------------------------------

SUGGESTION = Suggestion(0.001, 0.1, 30, 70, {"cycle_max_lr": "Because."}, "sweep", 0.05, 0.2)


def test_the_suggested_schedules_are_tried_first_and_then_fixed_rates() -> None:
    found = candidates_of(SUGGESTION, 0.001)
    assert [candidate.schedule for candidate in found] == ["WarmupDecayLR", "OneCycle", "fixed", "fixed", "fixed"]
    assert all(each.lr == 0.1 and each.why == "Because." for each in found[:2])
    assert found[2].lr == 0.001


def test_a_fixed_rate_near_another_is_not_tried_again() -> None:
    assert [candidate.lr for candidate in candidates_of(SUGGESTION, 0.09) if candidate.schedule == "fixed"] == [
        0.09,
        0.03,
    ]
    assert [candidate.lr for candidate in candidates_of(SUGGESTION, None) if candidate.schedule == "fixed"] == [
        0.03,
        0.1,
    ]


def test_a_cycle_keeps_its_shape_at_any_length() -> None:
    _, cycle, *_ = candidates_of(SUGGESTION, None)
    for steps, first in ((100, 30), (50, 15), (10_000, 3000), (2, 1)):
        section = cycle.section(steps)
        assert section is not None
        params = section["params"]
        assert (params["cycle_first_step_size"], params["cycle_second_step_size"]) == (first, steps - first)
    assert set(cycle.reasons(100)) == {"cycle_max_lr"}
    assert "30% of 50 updates" in cycle.reasons(50)["cycle_first_step_size"]


def test_groups_keep_their_ratios() -> None:
    decay, cycle = (candidate.section(100, (1.0, 0.5)) for candidate in candidates_of(SUGGESTION, None)[:2])
    assert cycle is not None and decay is not None
    assert cycle["params"]["cycle_max_lr"] == [0.1, 0.05]
    assert decay["params"]["warmup_max_lr"][0] == 2 * decay["params"]["warmup_max_lr"][1]
