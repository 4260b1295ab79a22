"""Where an optimizer step stands: how many micro-batches have been accumulated, and when the step is due."""

from __future__ import annotations

__all__ = ["AccumulationState"]


class AccumulationState:
    """The micro-batches since the last optimizer step. Pure counting; no tensors.

    Args:
        steps: micro-batches of one optimizer step.
        managed: whether they are counted; otherwise every call of step() is an optimizer step.

    Attributes:
        micro_batches: ended by a step() since the last optimizer step.
        backwards: since the last optimizer step.
        reached: whether a gradient was reduced since the last optimizer step, of whatever rank.
        no_graph: whether a loss on this rank had no graph, which the ranks find out when they reduce.
        shown_exception: what Python had last shown to the user at the last backward.
        pending: whether there was a backward whose step() has not come yet.
        in_no_sync: inside the context of the same name.
        boundary: whether micro-batches end their optimizer step, as the script says; None where they are counted.
    """

    def __init__(self, steps: int, *, managed: bool) -> None:
        self.steps, self.managed = steps, managed
        self.in_no_sync = False
        self.boundary: bool | None = None  # as the script says; None: as the micro-batches count
        self.reset()

    def reset(self) -> None:
        """Begin a new accumulation."""
        self.micro_batches = 0
        self.backwards = 0
        self.pending = False
        self.reached = self.no_graph = False
        self.shown_exception: object = None
        self._divided = 0  # backwards whose loss was divided by `steps`

    def is_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its optimizer step; see `Engine`."""
        if not self.managed:
            return False
        if self.boundary is not None:
            return self.boundary
        return self.micro_batches + 1 >= self.steps

    def set_boundary(self, boundary: bool | None) -> None:
        """Say whether the micro-batches from here on end their optimizer step; None counts them again."""
        self.boundary = boundary

    def add_backward(self, *, divided: bool) -> None:
        """Count a backward; `divided`: its loss was divided by `steps`."""
        self.backwards += 1
        self._divided += divided
        self.pending = not self.in_no_sync

    def end_micro_batch(self) -> bool:
        """Count a step(); whether it is an optimizer step."""
        ends = not self.managed or self.is_boundary()
        self.pending = False
        self.micro_batches += 1
        return ends

    @property
    def accumulated(self) -> int:
        """The micro-batches whose gradients have been accumulated; one without its step() counts, too."""
        if not self.managed:
            return self.backwards
        held = self.micro_batches + self.pending
        return max(held, 1) if self.backwards else 0

    @property
    def scaling(self) -> str:
        """Who has divided the losses so far: "engine", "script", "both", or "none" before the first backward."""
        if self.backwards == 0:
            return "none"
        if self._divided == self.backwards:
            return "engine"
        return "script" if self._divided == 0 else "both"
