"""What the recorded numbers were recorded on: the model, its data, and the optimizers of the schedule cases.

Owns everything that a recording and the test that replays it must generate alike. Knows torch only, so that the same
file runs beside DeepSpeed and beside this engine.

    schedules.json   ``build_optimizer(case)``, ``decode(case["args"])``, ``snapshot(optimizer)``
    training.json    ``build_model()``, ``build_dataset()``, ``micro_batch(dataset, index, ...)``, ``loss_fn``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MODEL_SEED = 0
DATA_SEED = 1234
NUM_STEPS = 24  # optimizer steps of a training case
MICRO_BATCH = 8  # rows per process and backward
NUM_ROWS = NUM_STEPS * MICRO_BATCH * 8  # enough for 2 processes that accumulate 4 micro-batches

loss_fn = nn.functional.mse_loss


def build_model() -> nn.Sequential:
    """A 16-32-4 perceptron with Tanh, its weights drawn after ``torch.manual_seed(0)``."""
    torch.manual_seed(MODEL_SEED)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def build_dataset() -> tuple[Tensor, Tensor]:
    """Inputs and the answers of a fixed random teacher, large enough that gradient norms pass 1.

    Returns:
        Inputs (NUM_ROWS, 16) and targets (NUM_ROWS, 4).
    """
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = torch.randn(NUM_ROWS, 16, generator=generator)
    teacher = torch.randn(16, 4, generator=generator)
    return x, torch.sin(x @ teacher) * 3 + x[:, :4]


def micro_batch(
    dataset: tuple[Tensor, Tensor], index: int, rank: int = 0, world_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows of one backward: micro-batch ``index`` (counted from 0 over the whole run) of process ``rank``.

    The processes' slices of one index lie side by side, so two processes that accumulate 1 see, step by step, the
    same rows as one process that accumulates 2.
    """
    start = (index * world_size + rank) * MICRO_BATCH
    x, y = dataset
    return x[start : start + MICRO_BATCH], y[start : start + MICRO_BATCH]


def fingerprint() -> dict[str, float]:
    """Sums over the weights and the data: equal where torch's generators draw the same numbers."""
    x, y = build_dataset()
    weights = torch.cat([parameter.detach().flatten() for parameter in build_model().parameters()])
    return {
        "weights": float(weights.double().abs().sum()),
        "inputs": float(x.double().abs().sum()),
        "targets": float(y.double().abs().sum()),
    }


def build_optimizer(case: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a schedule case: one parameter of one element per group, and no gradients."""
    groups = []
    for given in case["groups"]:
        group = decode(given)
        if case["tensor_lr"]:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        groups.append({"params": [nn.Parameter(torch.zeros(1))], **group})
    optimizer: torch.optim.Optimizer = getattr(torch.optim, case["optimizer"])(groups, **decode(case["optimizer_args"]))
    return optimizer


def decode(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as Python means them: ``{"tuple": [..]}`` stands for a tuple, which JSON lacks."""
    return {name: _decode_value(value) for name, value in arguments.items()}


def _decode_value(value: Any) -> Any:
    return tuple(value["tuple"]) if isinstance(value, dict) else value


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a schedule can move, per parameter group: ``lr``, ``betas``, ``momentum`` (None where there is none)."""
    return [
        {
            "lr": float(group["lr"]),
            "betas": list(group["betas"]) if "betas" in group else None,
            "momentum": group.get("momentum"),
        }
        for group in optimizer.param_groups
    ]
