"""Full trainings by the engine, and which learning rates of a grid to train with."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from redline import initialize
from redline.range_test.task import loss_of
from suggestions.ours import engine_config
from suggestions.tasks import task_of

__all__ = ["HOPELESS", "above", "batches", "digest", "last_tenth", "score", "train", "untrained", "worth_repeating"]

# A rate whose mean loss is above the best times this gets no neighbors, no second seed, and no more seeds.
HOPELESS = (1.25, 1.1, 1.05)


def batches(data: TensorDataset, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches for ever, each epoch in an order of its own; the rest of an epoch is left out."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data) - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(tensor[chosen] for tensor in data.tensors)


def train(name: str, seed: int, lr: float) -> dict[str, Any]:
    """Train a task from the start to its end; the loss on the validation data, None where it is not finite.

    A training whose loss is not finite ends there.
    """
    logging.getLogger("redline").setLevel(logging.ERROR)
    task = task_of(name)
    torch.manual_seed(seed)
    model, data, criterion, validation = task.build()
    loss_fn = loss_of(criterion)
    engine = initialize(model, engine_config(task, seed, lr), device="cpu")
    feed = batches(data, engine.train_micro_batch_size_per_gpu(), seed)
    losses, began = [], time.process_time()
    for _ in range(task.steps * engine.gradient_accumulation_steps()):
        loss = loss_fn(engine, next(feed))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"loss": None}
        engine.backward(loss)
        engine.step()
    seconds = time.process_time() - began
    return {"seconds": seconds, "training": last_tenth(losses), **score(engine, criterion, validation)}


def last_tenth(losses: Sequence[float]) -> float:
    """The mean training loss at the end, which is high where a training diverged, and low where it overfits."""
    return statistics.fmean(losses[-math.ceil(len(losses) / 10) :])


@torch.no_grad()
def score(model: nn.Module, criterion: Any, validation: TensorDataset) -> dict[str, Any]:
    """Loss on the validation data and, of a classifier, accuracy."""
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
    return score(model, criterion, validation)["loss"]


@cache
def digest(name: str) -> str:
    """Of all that a task is made of: its config, its data, its initial weights."""
    task = task_of(name)
    torch.manual_seed(0)
    model, data, criterion, validation = task.build()
    made_of = (engine_config(task, 0, task.own_lr), task.steps, criterion)
    summed = hashlib.sha256(repr(made_of).split(" at 0x")[0].encode())
    for tensor in (*model.state_dict().values(), *data.tensors, *validation.tensors):
        summed.update(tensor.contiguous().numpy().tobytes())
    return summed.hexdigest()[:16]


def worth_repeating(losses: Mapping[float, Sequence[float | None]], limit: float, *, log_scale: bool) -> list[float]:
    """Which rates are trained with more seeds, by the losses of those that they were trained with."""
    means = {lr: statistics.fmean(of) for lr, of in losses.items() if of and None not in of}
    best = min(means.values(), default=0.0)
    return [lr for lr, mean in means.items() if above(mean, best, log_scale=log_scale) <= limit - 1]


def above(loss: float, best: float, *, log_scale: bool) -> float:
    """How far a loss is above the best one, as a fraction: of the loss, or of the likelihood where that is its log."""
    return math.expm1(min(loss - best, 50.0)) if log_scale else loss / best - 1
