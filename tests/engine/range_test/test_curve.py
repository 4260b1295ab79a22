"""The record of a run: what it refuses, what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from engine.range_test.curve import Curve
from tests.curves import make_curve


def test_a_curve_with_unequal_columns_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 steps, 1 LRs and 2 losses"):
        Curve("rate 5", 5.0, (0, 1), (0.1,), (2.0, 1.0))


def test_a_skipped_update_is_none() -> None:
    """fp16 looks for its loss scale: the first updates are skipped, whatever their losses were."""
    test = make_curve(lambda k, lr: 2.3 - 0.02 * min(k, 90), rate=5.0)
    losses = (math.inf, math.nan, 50.0, *test.losses[3:])
    skipping = replace(test, losses=losses, skipped=(0, 1, 2))
    assert skipping.diverged_at is None and len(skipping.taken().losses) == len(losses) - 3
    assert replace(skipping, skipped=()).diverged_at == 0
