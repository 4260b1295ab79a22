"""The record of a run: for every update its rate and loss, with validation losses along the way.

Taking a note costs microseconds and never waits for the device. On several processes the losses are
averaged as they come, by an all-reduce of one number that the step does not wait for, so that reading
the record later concerns rank zero alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed import World
from engine.range_test.curve import Curve, Kind

__all__ = ["Recorder", "name_test"]


class Recorder:
    """Notes of one run, kept on the device until they are read.

    Args:
        world: the processes whose losses are averaged.
        start: index of the first update, which the record counts as 0.
    """

    def __init__(self, world: World, start: int = 0) -> None:
        self._world = world
        self._start = start
        self._steps: list[int] = []
        self._lrs: list[Any] = []
        self._losses: list[float] = []  # read from the device so far
        self._unread: list[Tensor] = []
        self._validation: list[tuple[int, Tensor | float]] = []
        self._sending: list[Any] = []
        self._skipped: list[int] = []

    def __len__(self) -> int:
        return len(self._steps)

    def record(self, step: int, lr: float | Tensor, loss: Tensor) -> None:
        """Note an update.

        Args:
            step: its index.
            lr: the rate it ran at (first parameter group).
            loss: scalar, detached; this process's mean over the update's micro-batches.
        """
        self._steps.append(step - self._start)
        self._lrs.append(lr.detach().clone() if isinstance(lr, Tensor) else lr)
        self._unread.append(self._shared(loss))

    def skip(self, step: int) -> None:
        """Note that an update which was recorded has been skipped: weights and rate have stayed as they were."""
        self._skipped.append(step - self._start)

    def count_last(self) -> None:
        """Take the last update as one that was made, though it was skipped: it shows that the run had diverged."""
        if self._skipped and self._skipped[-1] == self._steps[-1]:
            self._skipped.pop()

    def record_validation(self, step: int, loss: Tensor | float) -> None:
        """Note a validation loss.

        Args:
            step: number of updates the model has had.
            loss: this process's.
        """
        value = torch.as_tensor(loss, dtype=torch.float32, device=self._world.device).detach()
        self._validation.append((step - self._start, self._shared(value)))

    def last_loss(self) -> float:
        """The newest update's loss over all processes; waits for the device."""
        self._read()
        return self._losses[-1]

    def curve(self, name: str, rate: float | None, *, kind: Kind = "linear") -> Curve:
        """All notes, read from the device.

        Args:
            name: of the run, for the picture.
            rate: its `lr_range_test_step_rate`; None for a run of another kind.
            kind: see :class:`Curve`.
        """
        self._read()
        return Curve(
            name=name,
            rate=rate,
            steps=tuple(self._steps),
            lrs=tuple(float(lr) for lr in self._lrs),
            losses=tuple(self._losses),
            validation=tuple((step, float(loss) / self._world.size) for step, loss in self._validation),
            kind=kind,
            skipped=tuple(self._skipped),
        )

    def _shared(self, loss: Tensor) -> Tensor:
        """The sum over the processes, on its way."""
        if self._world.size == 1:
            return loss
        total = loss.float().clone()
        self._sending.append(dist.all_reduce(total, async_op=True))
        return total

    def _read(self) -> None:
        for work in self._sending:
            work.wait()
        self._sending.clear()
        if self._unread:
            sums = torch.stack([loss.reshape(()) for loss in self._unread]).float() / self._world.size
            self._losses.extend(sums.tolist())
            self._unread.clear()


def name_test(rate: float, growth: Kind) -> str:
    """What a person calls a range test: ``rate 5``, or ``rate 5, exponential``."""
    return f"rate {rate:g}" if growth == "linear" else f"rate {rate:g}, {growth}"
