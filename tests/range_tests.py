"""A small regression task on a live engine, and a range test of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from redline import Engine, RangeTestResult, initialize, run_range_test
from redline.range_test.curve import Curve

__all__ = ["loss_of", "make_data", "make_engine", "mse", "only", "run"]

mse = nn.functional.mse_loss


def make_data(size: int = 64, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]]) + noise * torch.randn(size, 1, generator=generator)


def make_engine(*, lr: float = 0.01, accumulation: int = 1, micro_batch: int = 8, **config: Any) -> Engine:
    """A linear model and SGD on the CPU, always with the same weights."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": lr}},
        **config,
    }
    return initialize(nn.Linear(4, 1), config, device="cpu")


def run(engine: Engine | None = None, data: Any = None, loss: Any = None, **arguments: Any) -> RangeTestResult:
    """A short range test at one rate, without a baseline, unless the arguments say otherwise."""
    arguments = {"rates": [5], "steps": 20, "min_lr": 1e-3, "baseline": False, "progress": False, **arguments}
    data = make_data() if data is None else data
    return run_range_test(engine or make_engine(), data, loss or nn.MSELoss(), **arguments)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss as a function of model and batch, in fp32."""
    return mse(model(batch[0]).float(), batch[1])


def only(result: RangeTestResult) -> Curve:
    (curve,) = result.curves
    return curve
