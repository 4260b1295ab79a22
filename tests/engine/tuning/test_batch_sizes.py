"""Learning rates at other batch sizes, and the batch keys of a target."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redline.config.root import World, resolve_batch
from redline.errors import RangeTestError
from redline.tuning.batch_sizes import batch_keys, lr_at_batch, steps_at_batch

sizes = st.integers(1, 100_000)


@pytest.mark.parametrize(
    ("measured", "target", "lr", "how", "measured_at", "why"),
    [
        ({32: 0.1, 256: 0.4}, 256, 0.4, "measured", 256, "Measured at batch size 256"),
        ({32: 0.1, 128: 0.4, 512: 0.5}, 64, 0.2, "interpolated", 32, "between 0.1 at 32 and 0.4 at 128"),
        ({32: 0.1, 64: 0.2}, 1024, 0.2, "extrapolated", 64, "above every batch size measured"),
        ({32: 0.1, 64: 0.2}, 8, 0.025, "extrapolated", 32, "below every batch size measured"),
    ],
)
def test_a_learning_rate_is_measured_interpolated_or_extrapolated_to_the_low_side(
    measured: dict[int, float], target: int, lr: float, how: str, measured_at: int, why: str
) -> None:
    scaled = lr_at_batch(measured, target)
    assert (scaled.lr, scaled.how, scaled.measured_at) == (lr, how, measured_at)
    assert why in scaled.why and (how != "extrapolated" or f"--batch-sizes {target}" in scaled.why)


@given(st.dictionaries(sizes, st.floats(1e-6, 10), min_size=1, max_size=6), sizes)
def test_no_learning_rate_is_above_the_largest_that_was_measured(measured: dict[int, float], target: int) -> None:
    scaled = lr_at_batch(measured, target)
    assert 0 < scaled.lr <= max(measured.values()) * 1.06  # two digits
    assert scaled.measured_at in measured and math.isfinite(scaled.lr)


@given(sizes, st.integers(1, 64), st.integers(1, 512))
def test_the_batch_keys_of_a_target_are_those_that_the_config_resolves(
    target: int, processes: int, micro_batch: int
) -> None:
    if target % processes:
        with pytest.raises(RangeTestError, match="not divisible"):
            batch_keys(target, processes, micro_batch)
        return
    keys = batch_keys(target, processes, micro_batch)
    assert resolve_batch(keys, World(processes, "")) == tuple(keys.values())
    assert keys["train_micro_batch_size_per_gpu"] <= micro_batch


def test_an_indivisible_batch_names_the_nearest_divisible_ones() -> None:
    with pytest.raises(RangeTestError, match="33 is not divisible by 2 processes; give 32 or 34"):
        batch_keys(33, 2, 32)
    with pytest.raises(RangeTestError, match=r"give 8$"):
        batch_keys(3, 8, 32)


def test_steps_at_another_batch_size_see_as_many_samples() -> None:
    assert [steps_at_batch(400, 32, size) for size in (32, 128, 8, 100_000)] == [400, 100, 1600, 2]
