"""What DeepSpeed's recorded checkpoints were made of: the model, its data, its parameter groups.

Knows torch only, so that the same file runs beside DeepSpeed and beside this engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MICRO_BATCH = 4
STEPS_BEFORE = 7  # updates until the checkpoint
STEPS_AFTER = 4  # updates after it


class Tiny(nn.Module):
    """Sizes that no number of processes divides, a tied weight, a frozen layer, buffers of three kinds."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(7, 3)
        self.register_buffer("counts", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.linspace(0.1, 0.5, 5))
        self.register_buffer("passing", torch.ones(5), persistent=False)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.counts += 1
        hidden = self.embed(tokens).mean(1) + self.shift.to(self.embed.weight.dtype)
        hidden = torch.tanh(self.mix(hidden)) + self.frozen(hidden)
        answer: Tensor = self.out(self.head(hidden * self.scale))
        return answer


def build_model() -> Tiny:
    """The model, its weights drawn after ``torch.manual_seed(0)``."""
    torch.manual_seed(0)
    return Tiny()


def trainable(model: nn.Module) -> list[Tensor]:
    """What the optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices, and the rest without weight decay."""
    parameters = trainable(model)
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim == 2]},
        {"params": [parameter for parameter in parameters if parameter.ndim != 2], "weight_decay": 0.0},
    ]


def loss_of(engine: Callable[..., Tensor], step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """The loss of one update on one process, in fp32."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(7, (world_size * MICRO_BATCH, 6), generator=generator)
    targets = torch.randn(world_size * MICRO_BATCH, 3, generator=generator)
    rows = slice(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH)
    return nn.functional.mse_loss(engine(tokens[rows]).float(), targets[rows])
