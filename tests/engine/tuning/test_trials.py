"""Trials: which are tried, what each comes to, and what they answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from redline.range_test.curve import Curve
from redline.range_test.suggest import Refusal, Suggestion
from redline.tuning.trials import (
    PREFERENCE,
    Schedule,
    Trial,
    answer_of_search,
    candidates_of,
    judge,
    outcomes_of,
    trial_of,
)


def curve(losses: list[float], validation: list[float] | None = None, name: str = "trial") -> Curve:
    steps = tuple(range(len(losses)))
    every = max(1, len(losses) // 10)
    measured = tuple((index * every, loss) for index, loss in enumerate(validation or ()))
    return Curve(name, None, steps, tuple(0.1 for _ in steps), tuple(losses), measured, kind="cycle")


def trial(schedule: Schedule, loss: float, *, noise: float = 0.0, diverged: bool = False, lr: float = 0.1) -> Trial:
    return Trial(curve([2.0] * 20, name=f"{schedule} {lr:g}"), schedule, lr, 20, loss, diverged, noise)


def test_the_result_of_a_trial_is_its_last_validation_loss_or_the_mean_of_its_last_training_losses() -> None:
    validation = [2.0, 1.5, 1.2, 1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.42, 0.4]
    validated = trial_of(curve([1.0] * 20, validation), "OneCycle", 0.1, "", steps=20)
    assert (validated.loss, validated.diverged) == (0.4, False) and validated.noise < 0.02
    trained = trial_of(curve([2.0] * 40 + [1.1, 0.9] * 5), "OneCycle", 0.1, "", steps=50)
    assert trained.loss == pytest.approx(1.0) and 0.01 < trained.noise < 0.2


def test_a_trial_that_ended_early_or_without_a_finite_loss_has_diverged() -> None:
    assert trial_of(curve([1.0] * 15), "OneCycle", 0.1, "", steps=20).diverged
    assert trial_of(curve([1.0] * 20, [2.0, math.nan]), "OneCycle", 0.1, "", steps=20).diverged
    assert not trial_of(curve([-1.0] * 20), "OneCycle", 0.1, "", steps=20).diverged


OWN_IS_LOWEST = [trial("WarmupDecayLR", 0.5), trial("OneCycle", 0.6), trial("own", 0.3)]  # of 20 steps


@pytest.mark.parametrize(
    ("trials", "steps", "winner", "tied", "why"),
    [
        ([trial("OneCycle", 0.5), trial("WarmupDecayLR", 0.4), trial("own", 0.6)], 100, 1, (1,), "lowest by"),
        ([trial("OneCycle", -5.0), trial("WarmupDecayLR", -6.0)], 100, 1, (1,), "lowest"),
        (
            [trial("own", 0.9), trial(PREFERENCE[1], 0.40, noise=0.02), trial(PREFERENCE[0], 0.42, noise=0.02)],
            100, 2, (1, 2), f"A tie within noise between {PREFERENCE[1]} 0.1 (0.4), WarmupDecayLR 0.1 (0.42); ",
        ),
        ([trial("own", 0.40, noise=0.1), trial("own", 0.42, noise=0.1, lr=0.2)], 100, 0, (0, 1), "A tie"),
        ([trial("OneCycle", 0.1, diverged=True), trial("own", 0.6)], 100, 1, (1,), "without diverging"),
        ([trial("OneCycle", 0.1, diverged=True), trial("own", math.nan, diverged=True)], 100, None, (), "All 2"),
        (OWN_IS_LOWEST, 400, 2, (2,), "lowest"),
        (OWN_IS_LOWEST, 401, 0, (0,), "Its loss, 0.5, is the lowest by more than noise"),
        ([trial("WarmupDecayLR", 0.5, diverged=True), trial("own", 0.3)], 100_000, 1, (1,), "without diverging"),
    ],
    ids=["lowest", "negative", "tie", "tie of own", "diverged", "all diverged", "long trials", "short trials",
         "own in short trials"],
)  # fmt: skip
def test_the_lowest_loss_wins_then_the_preferred_schedule_and_the_own_only_in_long_trials_or_alone(
    trials: list[Trial], steps: int, winner: int | None, tied: tuple[int, ...], why: str
) -> None:
    verdict = judge(trials, steps)
    assert (verdict.winner, verdict.tied) == (winner, tied)
    assert why in verdict.why


# -- what is tried -------------------------------------------------------------------------------------------

SUGGESTION = Suggestion(0.001, 0.1, 30, 70, {"cycle_max_lr": "Because."}, "sweep", 0.05, 0.2)


SCHEDULES: tuple[Schedule, ...] = ("WarmupDecayLR", "OneCycle", "WarmupCosineLR")


def test_the_schedules_that_were_asked_for_are_tried_and_the_configs_own() -> None:
    found = candidates_of(SUGGESTION, 0.001, SCHEDULES)
    assert [candidate.schedule for candidate in found] == [*SCHEDULES, "own"]
    assert all((each.lr, each.why) == (0.1, "Because.") for each in found[:3])
    assert found[3].lr == 0.001
    assert len(candidates_of(SUGGESTION, None, SCHEDULES)) == 3
    cosine, _ = found[2].section(100)
    assert cosine is not None and "warmup_max_lr" not in cosine["params"], "it multiplies the optimizer's"


def test_a_cycle_keeps_its_shape_at_any_length() -> None:
    _, cycle, *_ = candidates_of(SUGGESTION, None, SCHEDULES)
    for steps, first in ((100, 30), (50, 15), (10_000, 3000), (2, 1)):
        section, _ = cycle.section(steps)
        assert section is not None
        params = section["params"]
        assert (params["cycle_first_step_size"], params["cycle_second_step_size"]) == (first, steps - first)
    assert set(cycle.section(100)[1]) == {"cycle_max_lr"}
    assert "30% of 50 steps" in cycle.section(50)[1]["cycle_first_step_size"]


def test_parameter_groups_keep_their_ratios() -> None:
    decay, cycle = (
        candidate.section(100, (1.0, 0.5))[0] for candidate in candidates_of(SUGGESTION, None, SCHEDULES)[:2]
    )
    assert cycle is not None and decay is not None
    assert cycle["params"]["cycle_max_lr"] == [0.1, 0.05]
    assert decay["params"]["warmup_max_lr"][0] == 2 * decay["params"]["warmup_max_lr"][1]


def search_of(steps: int, carried: float | None = None) -> list[Trial]:
    """Trials of so many steps, of which the second is the best, and which saw their data less than once."""
    fitted = None if carried is None else (2.0, 2.0 - 1.0 / carried)
    return [
        trial_of(replace(curve([2.0] * steps, [2.0, loss]), fitted=fitted), "WarmupDecayLR", lr, "", steps=steps)
        for lr, loss in {0.004: 1.9, 0.016: 1.0, 0.064: 1.9}.items()
    ]


@pytest.mark.parametrize(
    ("epoch", "carried", "own", "lr", "why"),
    [
        (3000.0, 0.5, None, 0.0085, "; a longer training takes less: 0.0085."),  # less than once
        (None, 0.5, None, 0.0085, "; a longer training takes less: 0.0085."),
        (50.0, 0.5, None, 0.00061, "50% of what it learned of its own batches was true of the validation data"),
        (50.0, 0.2, None, 0.00021, "20% of what it learned"),
        (50.0, 1.0, None, 0.0085, "; a longer training takes less: 0.0085."),
        (50.0, None, None, 0.0085, "; a longer training takes less: 0.0085."),
        (50.0, 0.5, 0.00007, 0.00061, "50% of what it learned"),
        (50.0, 1.0, 0.01, 0.01, "the config's own 0.01 is kept"),
    ],
)
def test_a_training_that_sees_its_data_often_gets_a_lower_rate_than_its_trials(
    epoch: float | None, carried: float | None, own: float | None, lr: float, why: str
) -> None:
    search = search_of(40, carried)
    answer = answer_of_search(search, own_lr=own, momentum=0.0, steps=2000, steps_per_epoch=epoch)
    assert isinstance(answer, Suggestion)
    assert answer.cycle_max_lr == pytest.approx(lr, rel=0.1)
    reason = answer.reasons["cycle_max_lr"]
    assert why in reason and ("more often" in reason) == ("learned" in why)


def test_trials_whose_steps_the_loss_scaler_skipped_are_no_answer() -> None:
    skipped = replace(curve([2.0] * 4, [2.0, 2.0]), skipped=(0, 1, 2, 3))
    trials = [trial_of(skipped, "WarmupDecayLR", lr, "", steps=4) for lr in (0.004, 0.016)]
    answer = answer_of_search(trials, own_lr=None, momentum=0.0, steps=2000)
    assert isinstance(answer, Refusal) and "larger budget" in answer.remedy


@pytest.mark.parametrize(
    ("losses", "momentum", "why"),
    [
        ({0.004: 1.9, 0.016: 1.5, 0.064: 1.0}, 0.0, "nothing higher was tried"),
        ({0.004: 1.9, 0.016: 1.0, 0.064: 1.9}, 0.9, "momentum is built up later"),
    ],
)
def test_the_reason_says_why_an_answer_is_below_the_best_trials(
    losses: dict[float, float], momentum: float, why: str
) -> None:
    trials = [
        trial_of(curve([2.0] * 40, [2.0, loss]), "WarmupDecayLR", lr, "", steps=40) for lr, loss in losses.items()
    ]
    answer = answer_of_search(trials, own_lr=None, momentum=momentum, steps=2000)
    assert isinstance(answer, Suggestion)
    reason = answer.reasons["cycle_max_lr"]
    assert why in reason and ("momentum" in reason) == bool(momentum)
    assert answer.cycle_max_lr < min(losses, key=lambda lr: losses[lr])


def test_what_differs_between_batches_is_in_a_trials_noise_and_not_in_that_of_its_difference_from_another() -> None:
    batches = [0.5 * (-1) ** (step // 2) for step in range(40)]
    own = [[0.01 * (-1) ** step for step in range(40)], [0.0] * 40, [0.0] * 40]
    series = [[3 - 0.01 * lr * step + batches[step] + own[lr][step] for step in range(40)] for lr in range(3)]
    trials = [trial_of(curve(losses), "WarmupDecayLR", 0.1 * 2**lr, "", steps=40) for lr, losses in enumerate(series)]
    alone = trial_of(curve(series[0] * 2), "WarmupDecayLR", 0.1, "", steps=80)
    outcomes = outcomes_of([*trials, alone])
    assert all(one.noise > 0.05 for one in outcomes)
    assert [round(one.paired, 3) for one in outcomes[:3]] == [0.004, 0.004, 0.0]
    assert outcomes[3].paired == outcomes[3].noise, "there is no other of its length"


@pytest.mark.parametrize(
    ("fitted", "steps", "carried"),
    [
        ((2.0, 1.0), 10, 0.5),
        ((2.2, 1.5), 10, 1.0),  # that its own batches were harder at first is chance
        ((1.8, 1.0), 10, 0.625),
        ((2.0, 2.1), 10, 1.0),  # it learned nothing by heart
        ((2.0, 1.0), 7, None),  # too few steps
        (None, 10, None),
    ],
)
def test_what_a_trial_carries_over_is_the_fall_of_the_validation_loss_by_that_on_its_own_batches(
    fitted: tuple[float, float] | None, steps: int, carried: float | None
) -> None:
    run = replace(curve([2.0] * steps, [2.0, 1.5]), fitted=fitted)
    found = outcomes_of([trial_of(run, "WarmupDecayLR", 0.1, "", steps=steps)])[0].carried
    assert found == (None if carried is None else pytest.approx(carried))


def test_where_the_loss_on_all_batches_rose_nothing_is_carried_over() -> None:
    run = replace(curve([2.0] * 10, [2.0, 50.0]), fitted=(2.0, 50.0))
    assert outcomes_of([trial_of(run, "WarmupDecayLR", 0.1, "", steps=10)])[0].carried == -math.inf


def test_a_trial_has_seen_its_part_of_the_data_as_often_as_that_goes_into_its_steps() -> None:
    def passes(part: int | None, epoch: float | None) -> float:
        trial = trial_of(replace(curve([2.0] * 40), part=part), "WarmupDecayLR", 0.1, "", steps=40)
        return outcomes_of([trial], epoch)[0].passes

    assert passes(8, 100.0) == 5 and passes(None, 10.0) == 4 and passes(None, 100.0) == passes(None, None) == 1


@pytest.mark.parametrize("add", [0.0, 1000.0])
@pytest.mark.parametrize("times", [1.0, 1000.0])
def test_neither_constants_nor_factors_change_what_is_carried_over(add: float, times: float) -> None:
    run = curve([times * 2.0 + add] * 10, [times * 2.0 + add, times * 1.5 + add])
    run = replace(run, fitted=(times * 1.9 + add, times * 1.1 + add))
    found = outcomes_of([trial_of(run, "WarmupDecayLR", 0.1, "", steps=10)])[0].carried
    assert found == pytest.approx(0.625)
