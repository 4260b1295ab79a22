"""Range tests of a known shape, for the rules that read them; `records` has those as they come out of training."""

from __future__ import annotations

import random
from collections.abc import Callable

from redline.range_test.curve import Curve

__all__ = ["FAST", "SLOW", "descent", "flat", "make_curve"]


def make_curve(
    loss: Callable[[int, float], float],
    *,
    rate: float | None = 50.0,
    n: int = 100,
    min_lr: float = 1e-4,
    name: str = "",
) -> Curve:
    """A test of n updates whose LR ends at min_lr * (1 + 20 * rate); the loss is a function of update and LR."""
    lrs = tuple(min_lr * (1 + (rate or 0.0) * 20 * k / n) for k in range(n))
    losses = tuple(loss(k, lr) for k, lr in enumerate(lrs))
    return Curve(name or f"rate {rate:g}", rate, tuple(range(n)), lrs, losses)


def descent(
    *,
    begin: int = 5,
    done: int = 25,
    up: int | None = 70,
    top: float = 2.3,
    drop: float = 2.0,
    noise: float = 0.02,
    seed: int = 0,
) -> Callable[[int, float], float]:
    """Flat, then a straight fall, then a floor; from update `up` on the loss climbs by 0.3 of the drop per update."""
    draw = random.Random(seed)

    def loss(k: int, lr: float) -> float:
        fallen = drop * min(1.0, max(0.0, (k - begin) / (done - begin)))
        risen = 0.0 if up is None else 0.3 * drop * max(0, k - up)
        return top - fallen + risen + noise * drop * draw.gauss(0.0, 1.0)

    return loss


def flat(*, noise: float = 0.1, seed: int = 0) -> Callable[[int, float], float]:
    draw = random.Random(seed)
    return lambda k, lr: 2.3 + noise * draw.gauss(0.0, 1.0)


SLOW = make_curve(descent(begin=20, done=60, up=None), rate=5.0)
FAST = make_curve(descent(), rate=50.0)
