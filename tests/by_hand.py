"""A training loop written by hand for one case of a grid: precision, ZeRO stage, accumulation and ranks.

One process in plain torch, which plays all ranks in turn: a model in the dtype of the computation, fp32 copies that a
torch optimizer updates, gradients summed in fp32 and divided by the ranks. `tests.plain_loop` knows more operations and
fewer precisions.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, initialize
from redline.run_state import named_weights
from tests.plain_loop import Net, batch, mse

__all__ = [
    "GRIDS", "PRECISIONS", "ByHand", "Case", "Check", "Kinds", "build", "differences", "exact", "failures_of_kinds",
    "grid", "loss_of",
]  # fmt: skip

# Ranks, and of each kind of script one case of the grid in so many. Three ranks divide rows unevenly.
GRIDS = pytest.mark.parametrize(
    ("ranks", "every"),
    [(1, 1), (2, 3), pytest.param(2, 1, marks=pytest.mark.long), pytest.param(3, 1, marks=pytest.mark.long)],
)

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
}
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# With a small eps, rounding in bf16 decides the first steps.
SETTINGS = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.5}
NAMES = ("trunk", "gain", "branch", "a", "b")  # of the modules that the optimizer has; `late` is left out


@dataclass(frozen=True)
class Case:
    """A place in the grid."""

    precision: str = "fp32"
    stage: int = 0
    accumulation: int = 1
    clipping: float = 0.0
    names: tuple[str, ...] = NAMES
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return _LOW.get(self.precision, torch.float32)

    @property
    def config(self) -> dict[str, Any]:
        settings = {**SETTINGS, "betas": list(SETTINGS["betas"])}  # type: ignore[call-overload]
        return {
            "train_micro_batch_size_per_gpu": 5,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "optimizer": {"type": "AdamW", "params": settings},
            "zero_optimization": {"stage": self.stage},
            "steps_per_print": 1_000_000,
            "redline": {"progress": False, "zero": {"blocks": [*NAMES, "late"]}},
            **PRECISIONS[self.precision],
            **self.more,
        }


def grid(
    ranks: int,
    *,
    precisions: Iterable[str] = tuple(PRECISIONS),
    stages: Iterable[int] = (0, 1, 2, 3),
    accumulations: Iterable[int] = (1, 2),
    **more: Any,
) -> Iterator[Case]:
    """All cases; on one rank every stage is stage 0."""
    for precision, stage, accumulation in itertools.product(precisions, stages if ranks > 1 else (0,), accumulations):
        yield replace(Case(precision, stage, accumulation), **more)


def build(case: Case, model: nn.Module | None = None, **arguments: Any) -> Engine:
    """An engine of which the optimizer has the parameters of `case.names`, frozen ones included."""
    model = Net() if model is None else model
    arguments.setdefault("model_parameters", [p for name in case.names for p in getattr(model, name).parameters()])
    return initialize(model, case.config, device="cpu", **arguments)


def loss_of(call: Callable[..., Tensor], number: int, rank: int, *route: str, dtype: torch.dtype) -> Tensor:
    """The loss of a rank's micro-batch of this number."""
    x, y = batch(number, rank, dtype)
    return mse(call(x, route), y)


class ByHand:
    """The loop: what an engine of this case has to come to."""

    def __init__(self, case: Case, world_size: int = 1, model: nn.Module | None = None) -> None:
        self.case, self.world_size = case, world_size
        self.model: Any = Net() if model is None else model
        self.masters = {name: p.detach().clone().float() for name, p in self.model.named_parameters()}
        self.model.to(case.dtype)
        self.names = [f"{m}.{name}" for m in case.names for name, _ in getattr(self.model, m).named_parameters()]
        self.optimizer = torch.optim.AdamW([self.masters[name] for name in self.names], **SETTINGS)  # type: ignore[arg-type]
        self.scale = 64.0 if case.precision == "fp16" else 1.0
        self.norm = 0.0
        self.gradients: dict[str, Tensor] = {}

    def write(self, name: str, value: Tensor) -> None:
        """Write into a parameter, as a script does."""
        self.params[name].data.copy_(value)
        self.masters[name].copy_(self.params[name])

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def call(self, x: Tensor, route: Any) -> Tensor:
        context: Any = contextlib.nullcontext()
        if self.case.precision == "autocast":
            context = torch.autocast("cpu", torch.bfloat16)
        with context:
            out: Tensor = self.model(x, route)
        return out

    def backward(self, loss: Callable[[int], Tensor], *, divide: bool = True) -> None:
        """A micro-batch on every rank."""
        for rank in range(self.world_size):
            self.model.zero_grad()
            value = loss(rank).float() * self.scale / (self.case.accumulation if divide else 1)
            if value.requires_grad:
                value.backward()
            for name, param in self.model.named_parameters():
                if param.grad is not None:
                    gradient = param.grad.float() / (self.scale * self.world_size)
                    self.gradients[name] = self.gradients.get(name, torch.zeros(())) + gradient
        self.model.zero_grad()

    def micro_batch(self, number: int, *routes: tuple[str, ...], divide: bool = True) -> None:
        """Each rank its own batch, and its own route where there are several."""
        self.backward(
            lambda rank: loss_of(self.call, number, rank, *routes[rank % len(routes)], dtype=self.case.dtype),
            divide=divide,
        )

    def step(self, factor: float = 1.0) -> None:
        """An optimizer step; `factor` of the gradients."""
        trained = [name for name in self.names if self.params[name].requires_grad]
        for name in self.names:
            gradient = self.gradients.get(name, torch.zeros_like(self.masters[name])) * factor
            self.masters[name].grad = gradient if name in trained else None
        counted = [self.masters[name].grad for name in trained]
        if self.case.precision in ("fp32", "autocast") and self.case.stage == 0:
            counted += [
                gradient for name, gradient in self.gradients.items()
                if name not in self.names and self.params[name].requires_grad
            ]  # fmt: skip
        self.norm = float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in counted if each is not None])))
        if self.case.clipping and self.norm > self.case.clipping:
            for name in trained:
                self.masters[name].grad.mul_(self.case.clipping / (self.norm + 1e-6))  # type: ignore[union-attr]
        self.optimizer.step()
        for name in trained:
            self.params[name].data.copy_(self.masters[name])
        self.gradients = {}

    def add(self, *modules: str, **settings: Any) -> None:
        """Give the optimizer a group with the parameters of further modules."""
        names = [f"{m}.{name}" for m in modules for name, _ in getattr(self.model, m).named_parameters()]
        self.names += names
        self.optimizer.add_param_group({"params": [self.masters[name] for name in names], **settings})


def exact(engine: Engine) -> dict[str, Tensor]:
    """The fp32 weights that the optimizer updates, in full; a collective."""
    found = {}
    for name, weight in named_weights(engine).items():
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        found[name] = whole.detach().float().clone()
    return found


def differences(case: Case, engine: Engine, hand: ByHand, *, norm: bool = True) -> str:
    """How the engine's weights, and the norm of the last step, differ from the loop's; empty where they agree."""
    low = case.precision != "fp32"
    relative, absolute = (2e-2, 4e-3) if low else (1e-4, 2e-5)
    found = []
    for name, value in exact(engine).items():
        want = hand.masters[name]
        if not torch.allclose(value, want, relative, absolute):
            found.append(f"{name} differs by {(value - want).abs().max():.2g}")
    for name, param in engine.module.named_parameters():
        if not hasattr(param, "full_tensor"):
            shown = hand.masters[name].to(case.dtype).float()
            if param.dtype != case.dtype or not torch.allclose(param.detach().float(), shown, relative, absolute):
                found.append(f"the model's {name} is {param.dtype} and differs")
    mine = engine.get_global_grad_norm()
    if norm and hand.norm and (mine is None or abs(mine - hand.norm) > 3 * relative * hand.norm):
        found.append(f"the norm is {mine} instead of {hand.norm}")
    return "; ".join(found)


Check = Callable[[Case, int], str | None]  # of a case, on a rank: what is wrong
Kinds = Mapping[str, tuple[Check, dict[str, Any]]]  # each with the part of the grid that it is about


def failures_of_kinds(kinds: Kinds, ranks: int, every: int, **options: Any) -> dict[str, list[str]]:
    """What each kind's check says of its cases: of one in `every`, which all kinds together make the whole grid of."""
    found = {}
    for number, (name, (check, own)) in enumerate(kinds.items()):
        cases = list(grid(ranks, **own, **options))
        found[name] = _failures(check, cases[number % every :: every])
    return found


def _failures(check: Check, cases: Iterable[Case]) -> list[str]:
    """What a check says of each case, on this rank, where it finds a fault."""
    logging.getLogger("redline").setLevel(logging.WARNING)
    rank = int(os.environ["RANK"])
    found = []
    for case in cases:
        try:
            fault = check(case, rank)
        except Exception:
            fault = traceback.format_exc(limit=-4)
        if fault:
            found.append(f"{case.precision}, stage {case.stage}, accumulation {case.accumulation}: {fault}")
    return found
