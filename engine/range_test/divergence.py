"""When a range test has diverged: the runner asks live, a reader of the record afterwards, and both get one answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from engine.range_test.smoothing import SMOOTHING, Smoother

__all__ = ["DivergenceDetector", "divergence"]

START_UPDATES = 5  # the test starts from the median loss of this many updates
NOISE_UPDATES = 10  # updates from which the batch noise is known well enough
CHANGE_CAP = 4.0  # a change above this many times the batch noise before it counts as that many
GIVEN_BACK = 0.5  # diverged: the loss has given back this share of its drop ...
DIVERGENCE_NOISE = 8.0  # ... and more than this many times its batch noise
DESCENT_NOISE = 6.0  # a drop below this many times the batch noise is no descent


class DivergenceDetector:
    """Says, update by update, whether a range test has diverged; each answer takes the same short time.

    It has when a loss is not finite, or when (from the tenth update on) the smoothed loss stands above its lowest by
    more than half of the drop from start to lowest, and by more than eight times the batch noise. Once diverged it
    stays so. Batch noise is the mean change of the median-filtered loss from one update to the next; a change counts
    at most four times the noise before it, so that the swings of a diverging test do not pass for noise.

    A step that a loss scaler skipped is no update: do not hand its loss in.

    Attributes:
        diverged: the answer so far.
        num_updates: losses taken.
        best_index: update with the lowest smoothed loss.
        start: median of the first five losses, the level that drop and rise are measured from.
        drop: from the start to the lowest smoothed loss.
        noise: the batch noise up to there.
    """

    def __init__(self) -> None:
        self.diverged = False
        self.num_updates = 0
        self.best_index = 0
        self.start = 0.0
        self.drop = 0.0
        self.noise = 0.0
        self._first: list[float] = []
        self._smoother = Smoother(SMOOTHING)
        self._best = math.inf
        self._noise = 0.0

    def update(self, loss: float) -> bool:
        """Takes the next training loss; returns whether the test has diverged."""
        self.num_updates += 1
        if self.diverged or not math.isfinite(loss):
            self.diverged = True
        elif self.num_updates > START_UPDATES:
            self.diverged = self._take(loss, self.num_updates - 1)
        else:
            self._first.append(loss)
            if self.num_updates == START_UPDATES:
                self.start = median(self._first)
                for index, first in enumerate(self._first):
                    self._take(first, index)
        return self.diverged

    def _take(self, loss: float, index: int) -> bool:
        before = self._smoother.filtered
        smoothed = self._smoother.update(loss - self.start)  # so that a constant in the losses cancels
        if index > 2:  # the median has its three losses, now and before
            change = abs(self._smoother.filtered - before)
            if index >= NOISE_UPDATES and self._noise > 0:
                change = min(change, CHANGE_CAP * self._noise)
            self._noise += (change - self._noise) / (index - 2)
        if index < START_UPDATES or smoothed < self._best:
            self._best, self.best_index = smoothed, index
            self.drop = max(0.0, -smoothed)
        if index < NOISE_UPDATES or self.best_index == index:
            self.noise = self._noise
        risen = smoothed - self._best > max(GIVEN_BACK * self.drop, DIVERGENCE_NOISE * self._noise)
        return risen and self.num_updates >= NOISE_UPDATES

    @property
    def descended(self) -> bool:
        """Whether the drop stands out of the batch noise."""
        return self.drop > DESCENT_NOISE * self.noise


def divergence(losses: Iterable[float]) -> int | None:
    """Index of the update at which a test has diverged, by `DivergenceDetector`; None if it never does."""
    detector = DivergenceDetector()
    return next((index for index, loss in enumerate(losses) if detector.update(loss)), None)
