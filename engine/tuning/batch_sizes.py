"""The learning rate and the keys of a config for another batch size than the tuning's own. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from redline.errors import RangeTestError

__all__ = ["ScaledLR", "batch_keys", "lr_at_batch", "steps_at_batch"]


class ScaledLR(NamedTuple):
    """A learning rate for a batch size."""

    lr: float
    why: str  # where it comes from, in a sentence
    how: Literal["measured", "interpolated", "extrapolated"]
    measured_at: int  # the nearest batch size that was measured


def lr_at_batch(measured: Mapping[int, float], target: int) -> ScaledLR:
    """The learning rate for a batch size, from those measured at other sizes.

    Between two measured sizes it is interpolated, log over log. Above all of them the learning rate of the largest is
    kept; below, that of the smallest is lowered in proportion. Both err on the low side: a learning rate that is too
    low costs time, one that is too high costs the run.

    >>> lr_at_batch({32: 0.1, 128: 0.2}, 64).lr, lr_at_batch({32: 0.1}, 256).lr, lr_at_batch({32: 0.1}, 8).lr
    (0.14, 0.1, 0.025)
    """
    if target in measured:
        return ScaledLR(measured[target], f"Measured at batch size {target}.", "measured", target)
    nearest = min(measured, key=lambda size: (abs(math.log(size / target)), size))
    lr = measured[nearest]
    if min(measured) < target < max(measured):
        smaller, larger = max(s for s in measured if s < target), min(s for s in measured if s > target)
        share = math.log(target / smaller) / math.log(larger / smaller)
        low, high = measured[smaller], measured[larger]
        why = f"Interpolated for batch size {target} between {low:.2g} at {smaller} and {high:.2g} at {larger}."
        return ScaledLR(float(f"{low ** (1 - share) * high**share:.2g}"), why, "interpolated", nearest)
    if nearest < target:
        done, where, sizes, more = f"is kept for {target}", "above", "Larger", "more"
    else:
        done, where, sizes, more = f"is lowered in proportion to {target}", "below", "Smaller", "less"
    why = (
        f"{lr:.2g}, measured at batch size {nearest}, {done}, which is {where} every batch size measured. {sizes} "
        f"batches usually tolerate {more}: measure with --batch-sizes {target}."
    )
    return ScaledLR(lr if nearest < target else float(f"{lr * target / nearest:.2g}"), why, "extrapolated", nearest)


def steps_at_batch(steps: int, measured_at: int, target: int) -> int:
    """Optimizer steps that see as many samples at the target's batch size as `steps` do at another; at least 2.

    >>> steps_at_batch(400, 32, 128)
    100
    """
    return max(2, round(steps * measured_at / target))


def batch_keys(target: int, ranks: int, largest_micro_batch: int) -> dict[str, int]:
    """The three batch keys of a config, with the fewest micro-batches of at most a size that is known to fit.

    >>> batch_keys(256, 4, 32)
    {'train_batch_size': 256, 'train_micro_batch_size_per_gpu': 32, 'gradient_accumulation_steps': 2}

    Raises:
        RangeTestError: The batch is not divisible by the number of ranks.
    """
    if target % ranks:
        below, above = target // ranks * ranks, -(-target // ranks) * ranks
        nearest = f"{below} or {above}" if below else f"{above}"
        raise RangeTestError(f"target batch: {target} is not divisible by {ranks} processes; give {nearest}")
    per_rank = target // ranks
    micro_batch = next(n for n in range(min(per_rank, largest_micro_batch), 0, -1) if per_rank % n == 0)
    return {
        "train_batch_size": target,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": per_rank // micro_batch,
    }
