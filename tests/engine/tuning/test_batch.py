"""Rates at other batch sizes: measured, between, beyond; and the batch keys of a target."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.batch import World, resolve_batch
from engine.errors import RangeTestError
from engine.tuning.batch import lr_at_batch, share_out_batch, steps_at_batch

sizes = st.integers(1, 100_000)


def test_a_measured_batch_size_has_its_own_rate() -> None:
    scaled = lr_at_batch({32: 0.1, 256: 0.4}, 256)
    assert (scaled.lr, scaled.how, scaled.measured_at) == (0.4, "measured", 256)


def test_between_two_the_rate_lies_on_a_straight_line_of_logarithms() -> None:
    scaled = lr_at_batch({32: 0.1, 128: 0.4, 512: 0.5}, 64)
    assert (scaled.lr, scaled.how, scaled.measured_at) == (0.2, "interpolated", 32)
    assert scaled.why == "Interpolated for batch size 64 between 0.1 at 32 and 0.4 at 128."


def test_beyond_the_largest_its_rate_is_kept_and_below_the_smallest_it_falls_with_the_batch() -> None:
    above, below = lr_at_batch({32: 0.1, 64: 0.2}, 1024), lr_at_batch({32: 0.1, 64: 0.2}, 8)
    assert (above.lr, above.how, above.measured_at) == (0.2, "extrapolated", 64)
    assert (below.lr, below.how, below.measured_at) == (0.025, "extrapolated", 32)
    assert "beyond all that was measured" in above.why and "--batch-sizes 1024 would tell" in above.why
    assert "below all that was measured" in below.why


@given(st.dictionaries(sizes, st.floats(1e-6, 10), min_size=1, max_size=6), sizes)
def test_no_rate_is_above_the_largest_that_was_measured(measured: dict[int, float], target: int) -> None:
    scaled = lr_at_batch(measured, target)
    assert 0 < scaled.lr <= max(measured.values()) * 1.06  # two digits
    assert scaled.measured_at in measured
    assert math.isfinite(scaled.lr)


@given(sizes, st.integers(1, 64), st.integers(1, 512))
def test_the_batch_keys_of_a_target_are_what_the_config_wants(target: int, processes: int, micro_batch: int) -> None:
    if target % processes:
        with pytest.raises(RangeTestError, match="cannot be shared evenly"):
            share_out_batch(target, processes, micro_batch)
        return
    keys = share_out_batch(target, processes, micro_batch)
    assert resolve_batch(keys, World(processes, "")) == tuple(keys.values())
    assert keys["train_micro_batch_size_per_gpu"] <= micro_batch


def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can() -> None:
    with pytest.raises(RangeTestError, match="33 samples cannot be shared evenly among 2 processes; give 32 or 34"):
        share_out_batch(33, 2, 32)
    with pytest.raises(RangeTestError, match=r"give 8$"):
        share_out_batch(3, 8, 32)


def test_steps_see_as_many_samples_as_before() -> None:
    assert [steps_at_batch(400, 32, size) for size in (32, 128, 8, 100_000)] == [400, 100, 1600, 2]
