"""A small engine, its data, and what the log prints, for tests of what goes with training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from redline import Engine, initialize

__all__ = ["X", "Y", "listen", "make_engine", "train"]

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(16, 1)


def make_engine(*, data: Any = None, **config: Any) -> Engine:
    """A linear model and SGD on the CPU, always with the same weights."""
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, **config}
    return initialize(nn.Linear(4, 1), config, training_data=data, device="cpu")


def train(engine: Engine, micro_steps: int) -> list[float]:
    """Train on the same rows again and again, each rank on its own; the losses."""
    rows = slice(4 * engine.global_rank, 4 * engine.global_rank + 4)
    losses: list[Tensor] = []
    for _ in range(micro_steps):
        output = engine(X[rows]).float()  # before torch 2.10 mse_loss has no gradient for mixed dtypes
        losses.append(engine.backward(nn.functional.mse_loss(output, Y[rows])).detach())
        engine.step()
    return [float(loss) for loss in losses]


def listen() -> list[str]:
    """What the engine logs from here on, on a rank of `run_ranks`."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("redline").addHandler(handler)
    logging.getLogger("redline").setLevel(logging.INFO)
    return messages
