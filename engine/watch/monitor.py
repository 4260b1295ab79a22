"""What a run writes down about every update, for TensorBoard, Weights & Biases, Comet and CSV files.

Names and x-axis are DeepSpeed's: ``Train/Samples/train_loss``, ``lr`` and ``loss_scale`` against the samples that all
processes have trained on, and the times of `wall_clock_breakdown`; ``grad_norm`` is ours. An update's rate is the one
it ran at; DeepSpeed writes the next one.

Numbers stay on the device and are written in batches: every so many updates, with each line of `steps_per_print`, and
at the end of the process, also after an exception. Losses are averaged over the processes once a batch. At the end that
would be a collective which a process that has failed would never join, so the last losses travel through the store
that the processes met at, and whoever says nothing in time is left out.
"""

from __future__ import annotations

import atexit
import itertools
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed import World
from engine.engine import Engine
from engine.log import log

__all__ = ["Line", "Monitor", "Point", "Record", "Writer"]

FLUSH_EVERY = 50  # updates: the device is waited for that rarely, and a chart is that much behind
PATIENCE = timedelta(seconds=5)  # for the other processes' last words

_count = itertools.count()


class Point(NamedTuple):
    """One number of one update: its name, its value, and the samples trained on so far."""

    name: str
    value: float
    samples: int


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True, slots=True)
class Record:
    """Curves that are no part of the training, such as a range test's; written at once when they are known.

    Attributes:
        title: of the whole, the first part of names.
        points: as numbers over time; their `samples` count the curve's own updates.
        lines: the same as a chart, for writers that have charts.
        axes: what the chart's x and y are.
        numbers: what came out, by name.
        text: the same in words, as Markdown.
    """

    title: str
    points: list[Point]
    lines: list[Line]
    axes: tuple[str, str]
    numbers: dict[str, float | int]
    text: str


class Writer(Protocol):
    """Where points go."""

    name: str

    def write(self, points: list[Point]) -> None: ...
    def show(self, record: Record) -> None: ...
    def close(self) -> None: ...


class _Note(NamedTuple):
    samples: int
    loss: Tensor
    lr: Any
    norm: Tensor | float | None
    loss_scale: float | None


class Monitor:
    """Notes every update and hands it to writers in batches.

    Args:
        world: the processes whose losses are averaged; each has a monitor.
        writers: on rank zero; none elsewhere.
    """

    def __init__(self, world: World, writers: list[Writer]) -> None:
        self._world = world
        self._writers = writers
        self._notes: list[_Note] = []
        self._store = _store_of(world)
        self._key = f"redline/monitor/{next(_count)}"
        atexit.register(self.close)

    def updated(self, engine: Engine) -> None:
        assert engine.loss is not None and engine.optimizer is not None
        lr = engine.optimizer.param_groups[0]["lr"]
        # Copies: whose memory the numbers have is the model's and the optimizer's affair.
        norm = engine.grad_norm.detach().clone() if isinstance(engine.grad_norm, Tensor) else engine.grad_norm
        lr = lr.detach().clone() if isinstance(lr, Tensor) else lr
        self._notes.append(_Note(engine.global_samples, engine.loss.clone(), lr, norm, engine.loss_scale))
        every = engine.steps_per_print
        if len(self._notes) >= FLUSH_EVERY or (every and engine.global_steps % every == 0):
            self.flush()

    def flush(self) -> None:
        """Write what has been noted; a collective, and the device is waited for."""
        if not self._notes:
            return
        losses = self._world.mean(_stacked([note.loss for note in self._notes])).tolist()
        notes, self._notes = self._notes, []  # now, and not above: Ctrl-C may come while the device is waited for
        self._write(notes, losses)

    def publish(self, values: dict[str, float], samples: int) -> None:
        """Write numbers that rank zero has at hand.

        Args:
            values: by name, such as "Train/Samples/lr".
            samples: trained on so far.
        """
        self._send([Point(name, value, samples) for name, value in values.items()])

    def show(self, record: Record) -> None:
        """Write curves that are no part of the training; on rank zero, which has writers."""
        for writer in list(self._writers):
            self._attempt(writer, lambda writer=writer: writer.show(record))

    def close(self) -> None:
        """Write what has been noted so far and let the writers go; no collective."""
        atexit.unregister(self.close)
        notes, self._notes = self._notes, []
        try:
            if notes:
                self._write(notes, self._last_words(_stacked([note.loss for note in notes]).tolist()))
        except Exception as error:  # the process is ending, maybe for an error: that one is to be seen
            log.warning("monitors: the last %d updates could not be read: %s", len(notes), error)
        for writer in self._writers:
            self._attempt(writer, writer.close)
        self._writers = []

    def _write(self, notes: list[_Note], losses: list[float]) -> None:
        if not self._writers:
            return
        with_norm = [note.norm for note in notes if note.norm is not None]
        norms = iter(_stacked(with_norm).tolist() if with_norm else [])
        points = []
        for note, loss in zip(notes, losses):
            values = {"train_loss": loss, "lr": float(note.lr)}
            if note.norm is not None:
                values["grad_norm"] = next(norms)
            if note.loss_scale is not None:
                values["loss_scale"] = float(note.loss_scale)
            points += [Point(f"Train/Samples/{name}", value, note.samples) for name, value in values.items()]
        self._send(points)

    def _send(self, points: list[Point]) -> None:
        for writer in list(self._writers):
            self._attempt(writer, lambda writer=writer: writer.write(points))

    def _attempt(self, writer: Writer, call: Any) -> None:
        try:
            call()
        except Exception as error:  # a full disk or a service that is gone: no reason to end a training
            log.warning("%s: %s; nothing more is written there", writer.name, error)
            self._writers = [other for other in self._writers if other is not writer]

    def _last_words(self, losses: list[float]) -> list[float]:
        """The means over all processes, on rank zero; what a process does not tell in time is left out."""
        if self._world.size == 1 or self._store is None:
            return losses
        if self._world.rank != 0:
            self._store.set(f"{self._key}/{self._world.rank}", json.dumps(losses))
            return losses
        keys = [f"{self._key}/{rank}" for rank in range(1, self._world.size)]
        try:
            self._store.wait(keys, PATIENCE)
            told = [losses, *(json.loads(self._store.get(key)) for key in keys)]
        except RuntimeError:
            told = [losses]
        together = min(map(len, told)) if len(told) > 1 else 0
        if together < len(losses):
            log.warning(
                "monitors: the loss of the last %d updates is rank 0's own, not the mean over the processes",
                len(losses) - together,
            )
        means = [sum(each) / len(told) for each in zip(*told)] if together else []
        return means + losses[together:]


def _stacked(values: list[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(value).reshape(()).float() for value in values])


def _store_of(world: World) -> Any:
    """The store that the process group was made with, to be used when the group is gone."""
    return None if world.size == 1 else dist.distributed_c10d._get_default_store()
