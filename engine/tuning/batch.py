"""Learning rates at other batch sizes: what was measured, what lies between, what a target needs. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import RangeTestError

__all__ = ["Scaled", "lr_at_batch", "share_out_batch", "steps_at_batch"]


@dataclass(frozen=True, slots=True)
class Scaled:
    """A learning rate for a batch size.

    Attributes:
        lr: the rate.
        why: where it comes from, in a sentence.
        how: measured at this batch size, interpolated between two, or extrapolated: then nothing confirms it.
        measured_at: the batch size nearest to it that was measured.
    """

    lr: float
    why: str
    how: str
    measured_at: int


def lr_at_batch(measured: Mapping[int, float], target: int) -> Scaled:
    """The rate for a batch size, from those measured at others.

    Between two measured ones it is interpolated in the logarithms of both. Beyond them nothing is known: upwards the
    rate of the largest is taken as it is, downwards that of the smallest in proportion to the batch. Both err towards
    too low, which costs time where too high would cost the run.

    Args:
        measured: rate by batch size, at least one.
        target: samples of an update.

    >>> lr_at_batch({32: 0.1, 128: 0.2}, 64).lr, lr_at_batch({32: 0.1}, 256).lr, lr_at_batch({32: 0.1}, 8).lr
    (0.14, 0.1, 0.025)
    """
    if target in measured:
        return Scaled(measured[target], f"Measured at batch size {target}.", "measured", target)
    nearest = min(measured, key=lambda size: (abs(math.log(size / target)), size))
    smaller = max((size for size in measured if size < target), default=None)
    larger = min((size for size in measured if size > target), default=None)
    if smaller is not None and larger is not None:
        share = math.log(target / smaller) / math.log(larger / smaller)
        lr = measured[smaller] ** (1 - share) * measured[larger] ** share
        why = (
            f"Interpolated for batch size {target} between {measured[smaller]:.2g} at {smaller} and "
            f"{measured[larger]:.2g} at {larger}."
        )
        return Scaled(_round(lr), why, "interpolated", nearest)
    if smaller is not None:
        why = (
            f"{measured[smaller]:.2g}, measured at batch size {smaller}, is taken unchanged for {target}, which lies "
            f"beyond all that was measured: a larger batch mostly bears more. --batch-sizes {target} would tell."
        )
        return Scaled(measured[smaller], why, "extrapolated", smaller)
    assert larger is not None, "at least one batch size was measured"
    why = (
        f"{measured[larger]:.2g}, measured at batch size {larger}, is lowered in proportion to {target}, which lies "
        f"below all that was measured: a smaller batch mostly bears less. --batch-sizes {target} would tell."
    )
    return Scaled(_round(measured[larger] * target / larger), why, "extrapolated", larger)


def steps_at_batch(steps: int, measured_at: int, target: int) -> int:
    """Updates at a batch size that see as many samples as `steps` do at another; at least 2.

    >>> steps_at_batch(400, 32, 128)
    100
    """
    return max(2, round(steps * measured_at / target))


def share_out_batch(target: int, processes: int, largest_micro_batch: int) -> dict[str, int]:
    """The three batch keys of a config: as few micro-batches as fit, none larger than one that is known to fit.

    Raises:
        RangeTestError: the batch cannot be shared among so many processes.

    >>> share_out_batch(256, 4, 32)
    {'train_batch_size': 256, 'train_micro_batch_size_per_gpu': 32, 'gradient_accumulation_steps': 2}
    """
    if target % processes:
        below, above = target // processes * processes, -(-target // processes) * processes
        nearest = f"{below} or {above}" if below else f"{above}"
        raise RangeTestError(
            f"target batch: {target} samples cannot be shared evenly among {processes} processes; give {nearest}"
        )
    share = target // processes
    micro = next(size for size in range(min(share, largest_micro_batch), 0, -1) if share % size == 0)
    return {
        "train_batch_size": target,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
    }


def _round(lr: float) -> float:
    return float(f"{lr:.2g}")
