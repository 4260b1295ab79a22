"""The values of a schedule around a given maximum."""

from __future__ import annotations

from engine.range_test.suggestion import cycle_at


def test_a_cycle_around_a_maximum_found_elsewhere_has_the_usual_shape() -> None:
    answer = cycle_at(0.3, "Found.", train_steps=400, low_lr=0.2, high_lr=0.5, curve="search", diverged_at_lr=None)
    assert answer.params() == {
        "cycle_min_lr": 0.01,
        "cycle_max_lr": 0.3,
        "cycle_first_step_size": 80,
        "cycle_second_step_size": 320,
    }
    assert answer.reasons["cycle_max_lr"] == "Found."
