"""The learning rates of an engine's parameter groups: their own, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from engine.errors import RangeTestError

__all__ = ["own_rates", "ratios_of"]


def own_rates(engine: Engine) -> list[float]:
    """The optimizer's own rate of each group, before a schedule wrote over it."""
    lrs = getattr(engine.lr_scheduler, "base_lrs", None) or engine.get_lr()
    return [float(lr) for lr in lrs]


def ratios_of(lrs: Sequence[float]) -> list[float]:
    """Each group's rate as a multiple of the first one's, which is "the rate" of curves and suggestions.

    A group whose rate is 0 keeps it; where all are 0, none says more than another, and all get the same.

    Raises:
        RangeTestError: the first one's is 0 and another's is not, so that no rate can be told by it.

    >>> ratios_of([0.1, 0.05, 0.0]), ratios_of([0.0, 0.0])
    ([1.0, 0.5, 0.0], [1.0, 1.0])
    """
    first = lrs[0]
    if first:
        return [lr / first for lr in lrs]
    if any(lrs):
        told = ", ".join(f"{lr:g}" for lr in lrs)
        raise RangeTestError(
            f"range test: the learning rates of the parameter groups are {told}; expected the first one's above 0, "
            "since all others are multiples of it; where that group is not to be trained, freeze it with "
            "requires_grad_(False) and leave it out of the optimizer, else put another one first"
        )
    return [1.0] * len(lrs)
