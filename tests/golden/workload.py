"""What the recorded numbers were recorded on: the model, its data, and the optimizers of the schedule cases.

Owns everything that a recording and the test that replays it must generate alike. Knows torch only, so that the same
file runs beside DeepSpeed and beside this engine.

    schedules.json   ``build_optimizer(case)``, ``decode(case["args"])``, ``snapshot(optimizer)``
    training.json    ``build_model()``, ``build_dataset()``, ``micro_batch(dataset, index, ...)``, ``loss_fn``
    precision.json   the same
    sharding.json    the same
    all three        ``build_model_of(case)``, ``parameters_of(case, model)``, ``micro_steps(case, step)``,
                     ``loss_of(case, engine, dataset, ...)``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MODEL_SEED = 0
DATA_SEED = 1234
NUM_STEPS = 24  # optimizer steps of a training case
MICRO_BATCH = 8  # rows per process and backward
NUM_ROWS = NUM_STEPS * MICRO_BATCH * 8  # enough for 2 processes that accumulate 4 micro-batches; then all over again

loss_fn = nn.functional.mse_loss


def build_model() -> nn.Sequential:
    """A 16-32-4 perceptron with Tanh, its weights drawn after ``torch.manual_seed(0)``."""
    torch.manual_seed(MODEL_SEED)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


class Turns(nn.Module):
    """A trunk and two heads, of which a forward uses one: the other gets no gradient, but has moments and decays."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(MODEL_SEED)
        self.trunk = nn.Linear(16, 32)
        self.heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])

    def forward(self, x: Tensor, turn: int) -> Tensor:
        answer: Tensor = self.heads[turn % 2](torch.tanh(self.trunk(x)))
        return answer


class Odd(nn.Module):
    """First dimensions that 2 and 4 do not divide; one layer and one weight have a single row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(MODEL_SEED)
        self.body = nn.Sequential(nn.Linear(16, 13), nn.Tanh(), nn.Linear(13, 3), nn.Tanh(), nn.Linear(3, 4))
        self.gate = nn.Linear(13, 1)
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[:2](x)
        answer: Tensor = self.body[2:](hidden) * self.gain + self.gate(hidden)
        return answer


class Tied(nn.Module):
    """Two layers that share one weight, and not their biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(MODEL_SEED)
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return answer


def build_frozen() -> nn.Sequential:
    """The perceptron with another layer in its middle that does not learn, and a bias that does not either."""
    torch.manual_seed(MODEL_SEED)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "turns": Turns, "turns by rank": Turns, "odd": Odd, "tied": Tied, "frozen": build_frozen,
}  # fmt: skip


def build_model_of(case: dict[str, Any]) -> nn.Module:
    """The perceptron, or the one of ``MODELS`` that the case's ``model`` names."""
    return MODELS[case["model"]]() if "model" in case else build_model()


def parameters_of(case: dict[str, Any], model: nn.Module) -> list[Any]:
    """What the config's optimizer is built on.

    All parameters; or, with the case's ``groups``, the settings of two, those of weights and those of biases.
    """
    if "groups" not in case:
        return list(model.parameters())
    members: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in model.parameters():
        members[parameter.dim() < 2].append(parameter)
    return [{"params": params, **settings} for params, settings in zip(members, case["groups"])]


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
    start = (index * world_size + rank) * MICRO_BATCH % NUM_ROWS
    x, y = dataset
    return x[start : start + MICRO_BATCH], y[start : start + MICRO_BATCH]


def micro_steps(case: dict[str, Any], step: int) -> range:
    """Micro-batches of one update, counted from 0 over the whole run.

    There are ``accumulation`` of them, or as many as the case's ``backwards`` says, over and over.
    """
    counts: list[int] = case.get("backwards", [case["accumulation"]])
    before = sum(counts[earlier % len(counts)] for earlier in range(step))
    return range(before, before + counts[step % len(counts)])


def loss_of(
    case: dict[str, Any],
    engine: Callable[..., Tensor],
    dataset: tuple[Tensor, Tensor],
    step: int,
    index: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """The loss of one micro-batch, in fp32.

    The inputs have the config's number format. In the steps of the case's ``overflow`` the last process finds an
    infinity in its first micro-batch: the loss stays finite, as Tanh bounds it, but the gradients do not.
    """
    x, y = micro_batch(dataset, index, rank, world_size)
    x = x.to(compute_dtype(case["config"]))
    if step in case.get("overflow", []) and index == micro_steps(case, step)[0] and rank == world_size - 1:
        x = x.clone()
        x[0, 0] = torch.inf
    model = case.get("model", "")
    turn = (step + rank if model == "turns by rank" else step,) if model.startswith("turns") else ()
    return loss_fn(engine(x, *turn).float(), y)


def compute_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the config's model computes in."""
    return torch.float16 if "fp16" in config else torch.bfloat16 if "bf16" in config else torch.float32


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
