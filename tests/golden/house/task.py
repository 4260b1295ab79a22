"""Three small tasks for `tune` and `range-test`: one learns in a line, one on a curve, one not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def linear() -> tuple[Any, ...]:
    """A linear model of a linear target, with validation data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
    return nn.Linear(4, 1), (x, y), nn.MSELoss(), (x[:32], y[:32])


def classes() -> tuple[Any, ...]:
    """A perceptron for three classes that overlap, without validation data."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(3, 6, generator=generator)
    targets = torch.arange(192) % 3
    x = centers[targets] + 0.7 * torch.randn(192, 6, generator=generator)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, (x, targets), nn.CrossEntropyLoss()


def flat() -> tuple[Any, ...]:
    """A loss that no learning rate changes."""
    x = torch.zeros(64, 4)
    return nn.Linear(4, 1, bias=False), (x, x[:, :1]), nn.MSELoss()
