"""A small run that can be cut in two: what a checkpoint has to keep is all in it, and all of it can be compared.

whole = run(case, steps=7)                                  # never interrupted
run(case, steps=3, save=folder); cut = run(case, steps=4, load=folder)
assert cut == whole.last(4)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["CASES", "Case", "Net", "Run", "build", "run", "trained"]


class Net(nn.Module):
    """Repeated blocks, dropout, running statistics, tied weights, a frozen one and a buffer that moves."""

    def __init__(self, *, drops: float = 0.3, norm: bool = True) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, 12)
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.drop = nn.Dropout(drops)
        self.head = nn.Linear(12, 8, bias=False)

        self.scale = nn.Parameter(torch.ones(12), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = torch.tanh(self.inputs(x)) * self.scale
        for block in self.blocks:
            x = torch.tanh(block(self.drop(x)))
        out: Tensor = self.head(self.norm(x))
        return out


class Noisy(Dataset[tuple[int, Tensor]]):
    """Samples with noise that is drawn where they are read: by this process, or by its workers."""

    def __init__(self, size: int, noise: float) -> None:
        self.rows = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.rows[index] + self.noise * (torch.randn(8) + random.random())


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        config: over the defaults of `build`.
        noise: of the samples; 0 for a run that is the same on any number of processes.
        drops: dropout.
        norm: whether there is a batch norm.
        samples: in the dataset; no multiple of a batch, so that an update spans the end of an epoch.
        script: what the script brings: "SequentialLR", "groups".
    """

    config: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.1
    drops: float = 0.3
    norm: bool = True
    samples: int = 24
    script: str = ""


def _adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, **params}}}


_ONE_CYCLE = {
    "scheduler": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.02, "cycle_first_step_size": 4},
    }
}
_FOUR = {"gradient_accumulation_steps": 4}

CASES = {
    "fp32, AdamW, OneCycle, 2 workers, accumulation 4": Case(
        {**_adam(), **_ONE_CYCLE, **_FOUR, "redline": {"data": {"workers": 2}}}, samples=60
    ),
    "fp32, AdamW, OneCycle, accumulation 4": Case({**_adam(), **_ONE_CYCLE, **_FOUR}),
    "bf16, AdamW, WarmupLR, accumulation 4": Case(
        {
            **_adam(), **_FOUR, "bf16": {"enabled": True},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5}},
        }
    ),
    "fp16 with skipped updates, SGD, OneCycle": Case(
        {
            "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "nesterov": True}}, **_ONE_CYCLE,
            "fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 2},
        }
    ),
    "fp32, Adagrad, a script's schedule and groups": Case(
        {"optimizer": {"type": "Adagrad", "params": {"lr": 0.05}}}, script="SequentialLR"
    ),
    "fp32, Lamb, StepLR": Case(
        {
            "optimizer": {"type": "Lamb", "params": {"lr": 0.01}},
            "scheduler": {"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}},
        }
    ),
    "bf16 autocast, AMSGrad": Case(
        {**_adam(amsgrad=True, torch_adam=True), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    ),
}  # fmt: skip


def build(case: Case, **extra: Any) -> Any:
    """The engine of a case, with further keys of the config."""
    from redline import initialize

    torch.manual_seed(0)
    model = Net(drops=case.drops, norm=case.norm)
    config = {"gradient_clipping": 0.5, **case.config, **extra}
    if "train_batch_size" not in config:
        config["train_micro_batch_size_per_gpu"] = 2
    own = case.config.get("redline", {}) | extra.get("redline", {})
    config["redline"] = {"progress": False, "zero": {"smallest_block": 50}, **own}
    give: dict[str, Any] = {}
    if case.script:
        give["model_parameters"] = [
            {"params": [*model.inputs.parameters()], "lr": 0.02, "weight_decay": 0.1},
            {
                "params": [
                    each for name, each in model.named_parameters() if each.requires_grad and "inputs" not in name
                ]
            },
        ]
        give["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5),
            ],
            [2],
        )
    data = Noisy(case.samples, case.noise)
    return initialize(model, config, training_data=data, device="cpu", **give)


@dataclass
class Run:
    """What a run did and left.

    Attributes:
        updates: of each, its loss, rate, gradient norm and the samples that this process trained with.
        left: weights, buffers, the optimizer's state, counters, and the next random numbers.
    """

    updates: list[tuple[Any, ...]]
    left: dict[str, Any]

    def last(self, updates: int) -> Run:
        """The end of it."""
        return Run(self.updates[-updates:], self.left)


def run(
    case: Case,
    steps: int,
    *,
    save: Path | str | None = None,
    load: Path | str | None = None,
    often: Path | str | None = None,
    **extra: Any,
) -> Run:
    """Train for some updates with an engine of its own: after loading, before saving, saving after each of them."""
    engine = build(case, **extra)
    random.seed(engine.global_rank)
    torch.manual_seed(engine.global_rank)
    if load is not None:
        path, client_state = engine.load_checkpoint(load)
        assert path is not None
        assert client_state == {"rank": 0, "pair": (1, 2.5)}
    done = trained(engine, steps, lambda: None if often is None else engine.save_checkpoint(often))
    if save is not None:
        assert engine.save_checkpoint(save, client_state={"rank": engine.global_rank, "pair": (1, 2.5)})
    engine.wait_for_checkpoint()
    return Run(done, _left(engine))


def trained(engine: Any, steps: int, then: Callable[[], Any] = lambda: None) -> list[tuple[Any, ...]]:
    """Train an engine for some updates, doing something after each; what each of them did."""
    updates: list[tuple[Any, ...]] = []
    seen: list[int] = []
    done, end = engine.global_steps, engine.global_steps + steps
    while True:
        for indices, x in engine.training_dataloader:
            seen += indices.tolist()
            loss = (engine(x).float() - x.float()).square().mean()
            engine.backward(loss)
            engine.step()
            if engine.global_steps == done:
                continue
            done = engine.global_steps
            rate = float(engine.optimizer.param_groups[0]["lr"])
            updates.append((float(engine.loss), rate, repr(float(engine.grad_norm)), tuple(seen)))
            seen = []
            then()
            if engine.global_steps == end:
                return updates


def _left(engine: Any) -> dict[str, Any]:
    engine.reshard()
    left: dict[str, Any] = {f"model.{name}": _plain(each) for name, each in engine.module.state_dict().items()}
    weights = [weight for group in engine.optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(weights):
        left[f"weight.{index}"] = _plain(weight)
        for key, value in engine.optimizer.state[weight].items():
            left[f"state.{index}.{key}"] = _plain(value)
    left["counters"] = (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps)
    left["scale"] = None if engine.scaler is None else engine.scaler.state_dict()
    left["rates"] = [float(lr) for lr in engine.get_lr()]
    left["schedule"] = None if engine.lr_scheduler is None else str(engine.lr_scheduler.state_dict())
    left["draws"] = (random.random(), float(torch.rand(())))
    return left


def _plain(value: Any) -> Any:
    """A tensor's own part on this process, in a form that == compares bit for bit."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    local = value.to_local() if hasattr(value, "to_local") else value
    return str(local.dtype), tuple(local.shape), bytes(local.cpu().reshape(-1).view(torch.uint8).tolist())
