"""The record of one short run: the LR and the loss of each update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from engine.range_test.divergence import DivergenceDetector

__all__ = ["Curve", "Kind"]

Kind = Literal["linear", "exponential", "fixed", "cycle", "decay"]


@dataclass(frozen=True, slots=True)
class Curve:
    """The record of one short run, one entry per optimizer step taken.

    Attributes:
        name: what a person calls it: ``rate 5``, ``fixed 0.001``.
        rate: a range test's ``lr_range_test_step_rate``; None for a run of another kind.
        steps: index of the update, from 0.
        lrs: LR that the update used (first parameter group).
        losses: training loss of the update, before it was applied; nan, inf and negative values are allowed.
        validation: (number of updates done, validation loss), if it was measured; for the eye, no rule reads it.
        kind: how its LR goes: a range test's grows by equal amounts (linear) or equal factors (exponential); a run
            beside it has a fixed one; a trial of a schedule has a 1Cycle's or one that decays linearly.
        seed: of the order of the data and of the initial weights; runs of other seeds show how far chance goes.
        skipped: updates of `steps` that the loss scaler skipped.
        train_batch_size: samples of an update; None for the record's own.
        settings: what else was set for this run: ``(("weight_decay", 1e-4),)``.
    """

    name: str
    rate: float | None
    steps: tuple[int, ...]
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...] = ()
    kind: Kind = "linear"
    seed: int = 0
    skipped: tuple[int, ...] = ()
    train_batch_size: int | None = None
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def is_test(self) -> bool:
        """Whether it is a range test."""
        return self.kind == "exponential" or (self.kind == "linear" and self.rate is not None)

    @property
    def diverged_at(self) -> int | None:
        """Place in `steps` of the update at which the run diverged; None if it did not."""
        detector, skipped = DivergenceDetector(), set(self.skipped)
        updates = ((index, loss) for index, loss in enumerate(self.losses) if self.steps[index] not in skipped)
        return next((index for index, loss in updates if detector.update(loss)), None)

    def taken(self) -> Curve:
        """The same without what the loss scaler skipped: such a step is no update."""
        if not self.skipped:
            return self
        kept = [index for index, step in enumerate(self.steps) if step not in self.skipped]
        lrs, losses = (tuple(of[index] for index in kept) for of in (self.lrs, self.losses))
        return replace(self, steps=tuple(self.steps[index] for index in kept), lrs=lrs, losses=losses, skipped=())

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.lrs) == len(self.losses):
            raise ValueError(
                f"curve {self.name!r} has {len(self.steps)} steps, {len(self.lrs)} LRs and {len(self.losses)} "
                "losses; expected as many of each"
            )
