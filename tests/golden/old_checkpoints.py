"""The model and the training of the checkpoints of Redline 0.1.0 in ``tests/golden/checkpoints_0_1``.

There FSDP2 sharded at ZeRO stages 1 to 3 alike. ``scripts/dev/record_old_checkpoints.py`` recorded them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CASES = {f"stage{stage}-{precision}": (stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")}
STEPS = 3


class Net(nn.Module):
    """Layers of which two ranks get unequal numbers of rows, and a scalar, which every rank has in full."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.head = nn.Linear(4, 7), nn.Linear(7, 3)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inputs(x)) * self.gain)
        return out


def config_of(name: str) -> dict[str, Any]:
    stage, precision = CASES[name]
    return {
        "train_micro_batch_size_per_gpu": 5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 10}},
        "zero_optimization": {"stage": stage},
        "redline": {"progress": False},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }


def train(engine: Any, step: int) -> Tensor:
    """One optimizer step; its loss."""
    generator = torch.Generator().manual_seed(2 * step + engine.global_rank)
    x, y = torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)
    dtype = torch.bfloat16 if engine.config.bf16 is not None else torch.float32
    loss = (engine(x.to(dtype)).float() - y).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.detach()


def full(tensor: Any) -> Tensor:
    unsharded: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return unsharded.detach().clone()
