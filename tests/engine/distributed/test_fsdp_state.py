"""What FSDP2 has no public API for: outputs of any kind, hooks of parameters, parameters of several dtypes."""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import EngineError, initialize
from redline.engine import Engine
from tests.distributed import run_ranks

STEPS, ROWS, RATE = 3, 8, 0.5


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
    from redline import initialize

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


# -- parameters that a forward returns ----------------------------------------------------------------------


class Bias(nn.Linear):
    """Leaves it to the caller to add the bias, as Megatron's layers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


class Prototypes(nn.Module):
    """Returns the vectors with which the loss compares its outputs, or a view of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Bias(4, 4), Bias(4, 4)
        self.prototypes = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor, *, transposed: bool = True) -> dict[str, Any]:
        for layer in (self.first, self.second):
            y, bias = layer(x)
            x = torch.tanh(y + bias)
        return {"outputs": [x], "prototypes": self.prototypes.t() if transposed else self.prototypes}

    def vectors(self, x: Tensor) -> Tensor:
        return self.prototypes


def losses_with_returned_params(stage: int) -> list[float]:
    torch.manual_seed(0)
    config = {"train_batch_size": ROWS, "redline": {"zero": {"blocks": ["Bias"]}} if stage else {}}
    engine = make_engine(Prototypes(), stage, train_micro_batch_size_per_gpu="auto", **config)
    share = ROWS // engine.world_size
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(STEPS):
        x = torch.randn(ROWS, 4, generator=generator)[engine.global_rank * share :][:share]
        found = engine(x, transposed=step > 0)
        vectors = found["prototypes"] if step > 0 else found["prototypes"].t()
        engine.backward((found["outputs"][0] @ vectors - 1).square().mean())
        engine.step()
        losses.append(float(engine.world.mean(engine.loss)))
    with torch.no_grad():
        losses.append(float(engine.module.vectors(x).sum()))
    return losses


def test_parameters_that_a_forward_returns_can_be_used_outside_of_it() -> None:
    assert run_ranks(losses_with_returned_params, 2, 3)[0] == pytest.approx(losses_with_returned_params(0), rel=1e-5)


# -- hooks and dtypes -------------------------------------------------------------------------------------


def make_engine(model: nn.Module, stage: int, **config: Any) -> Engine:
    base = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": RATE}}}
    zero = {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    return initialize(model, {**base, **zero, **config}, device="cpu")


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def moved_by_hooks(stage: int, before: bool, precision: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a step takes off the weights where a hook masks one row, and without it."""
    taken = []
    for masks in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

        def mask(gradient: Tensor) -> Tensor:
            return gradient * torch.tensor([[0.0], [1.0], [1.0], [1.0]]).to(gradient.dtype)

        if masks and before:
            model[0].weight.register_hook(mask)
        engine = make_engine(model, stage, **precision)
        if masks and not before:
            engine.module[0].weight.register_hook(mask)
        start = full(engine.module[0].weight).detach().float().clone()
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(engine.global_rank))
        engine.backward(engine(x).float().square().mean())
        engine.step()
        taken.append(start - full(engine.module[0].weight).detach().float())
    return taken[0], taken[1]


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("before", [True, False], ids=["before initialize", "after"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_hook_on_a_parameter_changes_its_gradient(stage: int, before: bool, precision: dict[str, Any]) -> None:
    for masked, plain in run_ranks(moved_by_hooks, 2, stage, before, precision):
        assert not masked[0].any() and plain[0].any()
        torch.testing.assert_close(masked[1:], plain[1:])


def hook_after_accumulation() -> str:
    model = nn.Linear(4, 2)
    model.weight.register_post_accumulate_grad_hook(lambda param: None)
    engine = make_engine(model, 3)
    with pytest.raises(EngineError) as error:
        engine(torch.ones(2, 4))
    return str(error.value)


def test_a_hook_that_fsdp_cannot_call_is_refused() -> None:
    for message in run_ranks(hook_after_accumulation, 2):
        assert "weight" in message and "register_hook" in message


def two_dtypes() -> str:
    with pytest.raises(EngineError) as error:
        make_engine(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double()), 3)
    return str(error.value)


def test_a_block_of_two_dtypes_is_refused() -> None:
    for message in run_ranks(two_dtypes, 2):
        assert "torch.float32 and torch.float64" in message


def fp64_step(stage: int) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    engine = make_engine(model, stage)
    start = full(model.weight).detach().clone()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(engine.global_rank)).double()
    engine.backward(engine(x).square().mean())
    engine.step()
    return (start - full(engine.module.weight).detach()) / RATE


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp64_gradients_are_not_rounded_to_fp32(stage: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    for rank in range(2):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(rank)).double()
        (model(x).square().mean() / 2).backward()
    assert model.weight.grad is not None
    for taken in run_ranks(fp64_step, 2, stage):
        torch.testing.assert_close(taken, model.weight.grad, rtol=1e-12, atol=1e-13)
