"""What a learning rate is worth: whole trainings by the engine, and which of a grid to make."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine import initialize
from engine.range_test.task import loss_of
from suggestions.ours import engine_config, schedule_config
from suggestions.tasks import Task, task_of

__all__ = ["HOPELESS", "batches", "digest", "points", "train", "untrained", "worth_repeating"]

HOPELESS = (1.25, 1.1)  # a rate whose mean over one seed, or two, is above the best times this is not repeated further


def points(task: Task, count: int) -> list[float]:
    """So many learning rates of the task's grid, evenly spread, both ends among them."""
    last = len(task.grid) - 1
    return [task.grid[round(index * last / (count - 1))] for index in range(count)]


def batches(data: TensorDataset, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches for ever, each epoch in an order of its own; the rest of an epoch is left out."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data) - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(tensor[chosen] for tensor in data.tensors)


def train(name: str, seed: int, kind: str, lr: float) -> dict[str, Any]:
    """Train a task from the start to its end; the loss on the validation data, None where it is not finite.

    A training whose loss is not finite ends there.
    """
    for package in ("engine", "schedulers"):
        logging.getLogger(package).setLevel(logging.ERROR)
    task = task_of(name)
    torch.manual_seed(seed)
    model, data, criterion, validation = task.build()
    loss_fn = loss_of(criterion)
    config = engine_config(task, seed, schedule_config(kind, lr, task.steps))
    engine = initialize(model, config, device="cpu")
    feed = batches(data, task.batch_size, seed)
    for _ in range(task.steps):
        loss = loss_fn(engine, next(feed))
        if not math.isfinite(loss.item()):
            return {"loss": None}
        engine.backward(loss)
        engine.step()
    return _judge(model, criterion, validation)


@torch.no_grad()
def _judge(model: nn.Module, criterion: Any, validation: TensorDataset) -> dict[str, Any]:
    model.eval()
    loss = float(loss_of(criterion)(model, validation.tensors))
    found: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None}
    if isinstance(criterion, nn.CrossEntropyLoss):
        x, y = validation.tensors
        found["accuracy"] = float((model(x).argmax(1) == y).float().mean())
    return found


@cache
def untrained(name: str, seed: int) -> float:
    """The validation loss of the initial weights."""
    torch.manual_seed(seed)
    model, _, criterion, validation = task_of(name).build()
    return _judge(model, criterion, validation)["loss"]


@cache
def digest(name: str) -> str:
    """Of all that a task is made of: its numbers, its data, its initial weights."""
    task = task_of(name)
    torch.manual_seed(0)
    model, data, criterion, validation = task.build()
    summed = hashlib.sha256(repr((task.optimizer, task.batch_size, task.steps, criterion)).split(" at 0x")[0].encode())
    for tensor in (*model.state_dict().values(), *data.tensors, *validation.tensors):
        summed.update(tensor.contiguous().numpy().tobytes())
    return summed.hexdigest()[:16]


def worth_repeating(losses: Mapping[float, Sequence[float | None]], limit: float) -> list[float]:
    """Which rates are trained with more seeds, by the losses of those that they were trained with."""
    means = {lr: statistics.fmean(of) for lr, of in losses.items() if None not in of}
    return [lr for lr, mean in means.items() if mean <= limit * min(means.values())]
