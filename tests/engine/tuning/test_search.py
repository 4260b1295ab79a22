"""The search for the peak: which trials are made, and what their losses say."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redline.tuning.search import (
    LEAST_PART,
    MOST_TRIALS,
    Outcome,
    Peak,
    Room,
    divide_search,
    find_peak,
    next_trial,
    part_of,
    spread_of,
)

PLANNED = 1000
FALL = 20**-0.2  # of the peak in a training of 20 times the steps of a trial, or more


def search(loss: Callable[[float], float], first: float) -> list[Outcome]:
    """The trials that a search makes of 400 steps, the first ones of 10 steps."""
    trials: list[Outcome] = []
    room = Room(400)
    while found := next_trial(trials, first, 10, PLANNED, room):
        lr, steps, seed = found
        trials.append(Outcome(lr, steps, loss(lr), seed=seed))
        room = room._replace(left=room.left - steps - room.overhead)
    return trials


def following(trials: list[Outcome], steps: int, **more: float) -> float:
    """The learning rate after these, with room for a trial of `steps` alone."""
    found = next_trial(trials, 0.01, trials[0].steps, PLANNED, Room(PLANNED + 15, kept=PLANNED + 15 - steps), **more)
    assert found is not None and found[1:] == (steps, 0)
    return found[0]


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
    trials = search(bowl(10**best), 10 ** (best + away))
    assert trials[0].lr == pytest.approx(10 ** (best + away), rel=0.01), "the own rate is always tried"
    assert abs(math.log10(found(trials).best) - best) < 0.31
    assert {one.steps for one in trials} == {10} and len({one.lr for one in trials}) <= MOST_TRIALS


def test_where_the_lowest_rate_is_best_it_goes_on_downwards_and_so_it_does_from_one_that_diverges() -> None:
    first = [one.lr for one in search(bowl(0.006), 0.1) if not one.seed]
    assert first == [0.1, 0.4, 0.025, 0.00625, 0.00156, 0.00313, 0.0125], "at last between the best and its neighbors"
    assert [one.lr for one in search(bowl(1e-5), 0.01)][:4] == [0.01, 0.0025, 0.000625, 0.000156]


def test_where_even_the_best_trial_ends_above_the_initial_loss_it_goes_once_downwards_and_then_up() -> None:
    trials = [Outcome(lr, 10, loss, initial=1.0, carried=-0.2) for lr, loss in ((0.01, 1.5), (0.04, 1.6))]
    assert following(trials, 10) == 0.0025
    assert following([one._replace(loss=one.loss - 0.55) for one in trials], 10) == 0.0025, "the lowest is the best"
    lower = Outcome(0.0025, 10, 1.2, initial=1.0, carried=-0.1)
    assert following([*trials, lower], 10) == 0.16, "lower ones would come nearer to the initial loss only"
    assert following([*trials, lower._replace(loss=0.9)], 10) == 0.000625
    thrown_off = trials[1]._replace(loss=5.0, carried=-2.0)  # its own batches' loss fell by 2
    assert following([trials[0], thrown_off, lower], 10) == 0.000625, "and where that throws it off, lower"


@pytest.mark.parametrize("carried", [None, -3.0, -math.inf], ids=["of new data", "thrown off", "its own batches, too"])
def test_from_far_too_high_a_rate_it_goes_down_until_the_loss_falls(carried: float | None) -> None:
    def loss(lr: float) -> float:
        return 1 + math.log10(lr / 0.005) ** 2 / 4 if lr < 0.02 else 100 * lr

    trials: list[Outcome] = []
    while (found := next_trial(trials, 3.0, 10, PLANNED, Room(400 - 10 * len(trials)))) and not found[2]:
        high = found[0] >= 0.02
        trials.append(Outcome(found[0], 10, loss(found[0]), initial=1.5, carried=carried if high else 0.9))
    assert [one.lr for one in trials] == [3.0, 12.0, 0.75, 0.188, 0.047, 0.0118, 0.00295, 0.000737]


def test_where_nothing_is_learned_at_all_it_goes_on_upwards() -> None:
    flat = [Outcome(0.01, 10, 0.99, 0.01, initial=1.0), Outcome(0.04, 10, 1.01, 0.02, initial=1.0)]
    assert following(flat[:1], 10) == 0.04 and following(flat, 10) == 0.16
    assert following([flat[0], flat[1]._replace(loss=1.05)], 10) == 0.0025, "more than noise, in which it rises, too"
    assert following([flat[0]._replace(loss=0.9), flat[1]], 10) == 0.0025


def test_trials_stop_only_at_a_clear_rise() -> None:
    trials = [Outcome(0.01, 10, 2.0), Outcome(0.04, 10, 1.0), Outcome(0.16, 10, 1.05)]
    assert following(trials, 10) == 0.64
    overflowed = [Outcome(0.01, 10, math.inf), *trials[1:]]
    assert following(overflowed, 10) == 0.02
    clear = [*trials[:2], Outcome(0.16, 10, 1.2)]
    assert following(clear, 10) == 0.02
    assert following([*clear[:2], clear[2]._replace(paired=0.15)], 10) == 0.64, "within noise"
    between = [*clear, Outcome(0.02, 10, 1.3), Outcome(0.08, 10, 1.1)]
    assert next_trial(between, 0.01, 10, PLANNED, Room(15)) == (0.04, 10, 1), "once more"


def test_the_first_training_in_full_has_the_rate_that_its_trials_answer_and_the_next_is_lower_or_unseen() -> None:
    inside = [Outcome(lr, 10, bowl(0.04)(lr)) for lr in (0.01, 0.02, 0.04, 0.08, 0.16)]
    edge = [one for one in inside if one.lr <= 0.04]
    room = Room(PLANNED, PLANNED)
    for trials, factor in ((inside, 1 / 2), (edge, 2)):
        first = next_trial(trials, 0.01, 10, PLANNED, room)
        assert first == (found(trials).lr, PLANNED, 0)
        trained = Outcome(first[0], PLANNED, 0.9)
        assert next_trial([*trials, trained], 0.01, 10, PLANNED, room) == (
            pytest.approx(first[0] * factor, rel=0.01), PLANNED, 0
        )  # fmt: skip


def test_where_a_training_in_full_ends_above_a_trial_the_next_is_far_lower() -> None:
    trials = [Outcome(0.01, 10, 0.9), Outcome(0.04, 10, 0.8, noise=0.02), Outcome(0.16, 10, 1.0)]
    room = Room(PLANNED, PLANNED)
    for loss, lr in ((0.82, 0.01), (0.9, 0.005)):
        trained = Outcome(0.02, PLANNED, loss, initial=0.85, carried=-0.1)
        assert next_trial([*trials, trained], 0.01, 10, PLANNED, room) == (lr, PLANNED, 0)
    again = Outcome(0.005, PLANNED, 0.88, initial=0.85, carried=-0.1)
    assert next_trial([*trials, trained, again], 0.01, 10, PLANNED, room) == (0.00125, PLANNED, 0)


TRIALS = [
    Outcome(0.01, 10, 0.8),
    Outcome(0.04, 10, 0.5),
    Outcome(0.16, 10, 0.42),
    Outcome(0.64, 10, 0.7),
    Outcome(2.56, 10, math.inf),
]


@pytest.mark.parametrize(("factor", "constant"), [(1, 1000), (1, -0.5), (1000, 0), (1e-3, 42.5)])
def test_constants_added_to_losses_and_factors_on_them_change_nothing(factor: float, constant: float) -> None:
    other = [one._replace(loss=factor * one.loss + constant, paired=factor * 0.05) for one in TRIALS]
    assert found(other) == pytest.approx(found([one._replace(paired=0.05) for one in TRIALS]))


def test_a_tie_within_noise_is_no_cliff_and_gets_the_lower_end() -> None:
    quiet, noisy = (found([one._replace(paired=noise) for one in TRIALS]) for noise in (0.0, 0.1))
    assert 0.1 < quiet.lr / FALL <= 0.16 and 0.05 < noisy.lr / FALL < 0.07 and 0.03 < noisy.low < 0.04
    # One that is worse by less than the noise, above the best, lowers nothing.
    noisy_trials = [one._replace(paired=0.01) for one in TRIALS]
    tied = [one._replace(loss=0.425) if one.lr == 0.64 else one for one in noisy_trials]
    assert found(tied).lr >= found(noisy_trials).lr


def test_the_best_one_counts_half_a_step_lower_if_it_is_the_highest_that_was_tried() -> None:
    edge = [one._replace(loss=loss) for one, loss in zip(TRIALS, (0.8, 0.7, 0.6, 0.5))]  # as far as a budget went
    assert found(edge).lr == pytest.approx(0.64 / 2 * FALL, rel=0.1) and found(edge).best == 0.64
    diverged = found([*edge, TRIALS[-1]])
    assert diverged.lr == pytest.approx(0.64 * FALL, rel=0.1), "the next one has diverged: it is between"
    assert found(edge[:1]).lr == pytest.approx(0.01 * FALL, rel=0.01), "of one alone"
    assert found(edge[:1], own=0.01).is_own, "only the length of the training speaks against it"
    trained = [Outcome(0.02, 500, 0.4), Outcome(0.01, 500, 0.45)]  # in full, read for a training twice as long
    assert not found([*edge, *trained]).unseen, "of their own length none is higher, but others are"


@pytest.mark.parametrize("own", [0.16, 0.14])
def test_an_own_rate_that_is_as_good_is_kept(own: float) -> None:
    assert found([one._replace(paired=0.02) for one in TRIALS], own=own) == Peak(
        own, 0.16, pytest.approx(0.113, 0.01), 10, True
    )
    assert not found(TRIALS, own=0.01).is_own


def test_an_own_rate_above_the_best_one_is_kept_if_its_loss_is_as_low_within_noise() -> None:
    tied = [one._replace(loss=0.44, noise=0.03) if one.lr == 0.64 else one._replace(noise=0.03) for one in TRIALS]
    assert found(tied, own=0.64)[:2] == (0.64, 0.16)
    assert found(tied, own=0.6400123).lr == 0.6400123, "it is tried to three digits"
    assert not found(tied, own=0.5).is_own, "it was not tried"
    assert not found([one._replace(noise=0.01) for one in tied], own=0.64).is_own


def test_the_longer_the_training_the_lower_the_peak() -> None:
    def of(steps: int, planned: int) -> float:
        peak = find_peak([one._replace(steps=steps) for one in TRIALS], planned)
        assert peak is not None
        return peak.lr

    assert of(10, 20) == pytest.approx(of(9, 90) / 2**0.2, rel=0.05)
    assert of(10, 200) == of(10, 20_000) == pytest.approx(of(9, 90) * FALL, rel=0.05), "nothing longer was measured"
    assert of(9, 90) == of(9, 900), "of fewer steps than ten it may be higher as well"


def test_heavy_ball_momentum_that_was_not_built_up_is_made_up_for() -> None:
    assert found(TRIALS, momentum=0.9).lr == pytest.approx(0.41 * found(TRIALS).lr, rel=0.1)


def test_a_spread_over_two_orders_of_the_data_is_the_noise() -> None:
    again = [Outcome(0.16, 10, 0.52, seed=1)]
    assert spread_of(TRIALS) is None and spread_of([*TRIALS, *again]) == pytest.approx(0.1 / math.sqrt(2))
    assert found([*TRIALS, *again]).lr < found(TRIALS).lr


def test_trials_that_all_diverged_are_no_answer() -> None:
    diverged = [Outcome(0.1, 10, math.inf), Outcome(0.01, 10, math.inf)]
    assert find_peak(diverged, 1000) is None
    assert next_trial([*diverged, Outcome(0.0025, 10, math.inf)], 0.1, 10, PLANNED, Room(15)) == (0.000625, 10, 0)


def test_of_trainings_in_full_the_best_one_is_the_answer_as_it_is() -> None:
    in_full = [Outcome(0.04, 1000, 0.3), Outcome(0.02, 1000, 0.29), Outcome(0.01, 1000, 0.31)]
    assert found([*TRIALS, *in_full], own=0.018, momentum=0.9)[:4] == (0.02, 0.02, 0.02, 1000)


@given(st.integers(12, 50_000), st.integers(100, 20_000), st.floats(0, 3), st.integers(-2, 2))
def test_the_room_is_used_for_trials_and_then_for_trainings_in_full(
    steps: int, planned: int, overhead: float, away: int
) -> None:
    short, whole = divide_search(steps, planned, overhead)
    assert 1 <= short <= planned
    loss, trials, room = bowl(0.01), [], whole
    while found := next_trial(trials, 0.01 * 4.0**away, short, planned, room):
        trials.append(Outcome(found[0], found[1], loss(found[0]), seed=found[2]))
        room = room._replace(left=room.left - found[1] - overhead)
    lengths = [one.steps for one in trials]
    assert lengths == sorted(lengths) and set(lengths) <= {short, planned}
    assert sum(lengths) + overhead * len(lengths) <= max(steps, short + overhead) + 1e-6
    assert steps < 2 * planned + 2 * overhead or lengths[-1] == planned, "a training in full"
    if steps >= 60 + 5 * overhead:
        assert lengths.count(short) >= 5 or short == planned


@given(st.integers(1, 2000), st.integers(2, 20_000), st.floats(0.5, 5000))
def test_a_trial_sees_its_part_of_the_data_as_often_as_the_training_sees_all(
    steps: int, planned: int, epoch: float
) -> None:
    part = part_of(steps, planned, epoch)
    if part is None:  # all data
        assert planned <= epoch or min(steps, epoch) <= max(LEAST_PART, math.ceil(epoch * steps / planned))
    else:
        assert LEAST_PART <= part < min(steps, epoch)
        assert part == LEAST_PART or planned / epoch == pytest.approx(steps / part, rel=1 / (part - 1))


BY_HEART = [  # four passes each
    Outcome(0.001, 20, 2.03, 0.02, carried=0.2, passes=4),
    Outcome(0.004, 20, 1.97, 0.02, carried=0.1, passes=4),
    Outcome(0.016, 20, 2.09, 0.02, carried=-0.1, passes=4),
]


def by_heart(carried: float | None, own: float | None = None, epoch: float | None = 40) -> Peak:
    trials = [one._replace(carried=carried) for one in BY_HEART]
    peak = find_peak(trials, 800, own=own, epoch=epoch)
    assert peak is not None
    return peak


def test_the_peak_of_a_training_that_learns_by_heart_falls_as_the_number_of_passes_grows() -> None:
    once = by_heart(0.1, epoch=None)
    peak = by_heart(0.1)
    assert peak.by_heart and not once.by_heart
    assert peak.lr == pytest.approx(once.lr / 5, rel=0.05), "20 passes, five times as many as the trials"
    assert by_heart(1.0).lr == by_heart(None).lr == by_heart(1.3).lr == by_heart(0.1, epoch=200).lr == once.lr
    assert peak.lr < by_heart(0.8).lr < by_heart(0.9).lr < once.lr
    assert by_heart(0.1, epoch=170).lr == once.lr and not by_heart(0.1, epoch=170).by_heart, "4.7 passes, nearly four"
    room = Room(810, kept=800)
    assert next_trial(BY_HEART, 0.001, 20, 800, room._replace(left=800), epoch=40) == (peak.lr, 800, 0)


def test_the_own_rate_is_kept_if_only_the_length_of_the_training_speaks_against_it() -> None:
    assert by_heart(1.0, own=0.0039).is_own and by_heart(1.0, own=0.002).is_own
    assert not by_heart(0.1, own=0.0039).is_own and not by_heart(0.1, own=0.016).is_own
    assert by_heart(0.1, own=0.0006).is_own
