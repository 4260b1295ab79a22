"""Sharded models that return objects of any kind: on two ranks each trains as one whole model does."""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import run_ranks

STEPS, ROWS = 3, 8


@dataclass
class Output:
    y: Tensor


class Plain:
    def __init__(self, y: Tensor) -> None:
        self.y, self.itself = y, self


KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda y: y, lambda output: output),
    "nested": (lambda y: [{"y": (y,)}], lambda output: output[0]["y"][0]),
    "dataclass": (Output, lambda output: output.y),
    "object": (Plain, lambda output: output.y),
    "object in a tuple": (lambda y: (Plain(y), 1), lambda output: output[0].y),
    "namespace": (lambda y: SimpleNamespace(y=y), lambda output: output.y),
    "user dict": (lambda y: UserDict(y=y), lambda output: output["y"]),
    "deque": (lambda y: deque([y]), lambda output: output[0]),
}


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any], find: Callable[[Any], Tensor], width: int) -> None:
        super().__init__()
        self.layer, self.wrap, self.find = nn.Linear(4, width), wrap, find

    def forward(self, inputs: Any) -> Any:
        return self.wrap(torch.tanh(self.layer(self.find(inputs))))


def losses_of(kind: str, stage: int) -> list[float]:
    from engine import initialize

    wrap, find = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(wrap, find, 4) for _ in range(2)), Block(wrap, find, 1))
    own = {"zero": {"smallest_block": 1, "blocks": ["0", "1"]}}
    config = {
        "train_batch_size": ROWS,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "redline": own if stage else {},
    }
    engine = initialize(model, config, device="cpu")
    share = ROWS // engine.world_size
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(ROWS, 4, generator=generator)[engine.global_rank * share :][:share]
        loss = (find(engine(wrap(x))) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(engine.world.mean(engine.loss)))
    return losses


def on_ranks() -> dict[tuple[str, int], Any]:
    return {(kind, stage): losses_of(kind, stage) for kind in KINDS for stage in (2, 3)}


def test_outputs_of_any_kind_train_sharded_as_they_do_whole() -> None:
    sharded = run_ranks(on_ranks, 2)[0]
    for (kind, _), losses in sharded.items():
        assert losses == pytest.approx(losses_of(kind, 0), rel=1e-5)
