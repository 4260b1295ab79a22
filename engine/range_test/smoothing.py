"""Smoothing a loss curve. The record of a range test stays raw: it is smoothed where it is read or drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["SMOOTHING", "Smoother", "ema", "smooth"]

SMOOTHING = 0.8  # weight of the past in the moving average of the loss: a memory of 5 updates ...
MEMORY_SHARE = 0.05  # ... or of this share of the updates so far, once that is longer


@dataclass(slots=True)
class Smoother:
    """Median of the last three losses, then a moving average whose memory grows with the test."""

    beta: float
    filtered: float = math.nan  # the median of the last three
    smoothed: float = math.nan
    _count: int = 0
    _window: list[float] = field(default_factory=list)
    _weight: float = 0.0

    def update(self, loss: float) -> float:
        """Takes the next loss; returns the smoothed one."""
        if not math.isfinite(loss):
            return self.smoothed
        self._window = [*self._window[-2:], loss]
        self.filtered = sorted(self._window)[1] if len(self._window) == 3 else self._window[0]
        self._count += 1
        new = min(1 - self.beta, 1 / (MEMORY_SHARE * self._count))
        if self._count in (1, 3):  # a first loss that is an outlier is not seen as one before the third
            self.smoothed, self._weight = self.filtered, new
        else:
            self._weight = (1 - new) * self._weight + new
            self.smoothed += new / self._weight * (self.filtered - self.smoothed)
        return self.smoothed


def smooth(losses: Iterable[float], beta: float = SMOOTHING) -> list[float]:
    """Smooths a loss curve: the median of the last three values, then an exponential moving average.

    The median drops a single outlier whole. The average begins at the first loss, and its memory grows with the test:
    1 / (1 - beta) updates, or 5% of the updates so far if that is longer. A value that is not finite repeats the
    smoothed loss before it (nan if there is none).

    Args:
        losses: one per update.
        beta: weight of the past, in [0, 1); 0 leaves the median of three (in the first 20 updates).

    >>> smooth([2.0, 2.0, 50.0, 2.0, 1.0], beta=0.0)
    [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    smoother = Smoother(beta)
    return [smoother.update(loss) for loss in losses]


def ema(losses: Iterable[float], beta: float = SMOOTHING) -> list[float]:
    """The moving average of a loss curve, corrected for its start at nothing, so that it begins at the first loss.

    A value that is not finite repeats the average before it (nan if there is none).

    Args:
        losses: one per update.
        beta: weight of the past, in [0, 1); 0 leaves the losses as they are.

    >>> [round(value, 3) for value in ema([4.0, 2.0, 2.0], beta=0.5)]
    [4.0, 2.667, 2.286]
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    averages, average, weight = [], math.nan, 0.0
    for loss in losses:
        if math.isfinite(loss):
            weight = beta * weight + 1 - beta
            average = loss if math.isnan(average) else average + (1 - beta) / weight * (loss - average)
        averages.append(average)
    return averages
