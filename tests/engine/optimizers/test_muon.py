"""Muon for matrices and Adam for the rest: who gets what, DeepSpeed's numbers, one optimizer to the outside."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import initialize
from redline.optimizers import build_optimizer
from redline.optimizers.muon import Muon, split


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 3)
        self.filters = nn.Conv2d(1, 2, 2)
        self.lm_head = nn.Linear(3, 5)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def halves(model: nn.Module, parameters: Any = None, **arguments: Any) -> list[dict[str, Any]]:
    return split(model.parameters() if parameters is None else parameters, arguments, names_of(model))


def members(model: nn.Module, group: dict[str, Any]) -> list[str]:
    return [names_of(model)[parameter] for parameter in group["params"]]


# -- who gets what ---------------------------------------------------------------------------------------------


def test_hidden_matrices_are_muons_and_embedding_head_and_the_rest_adams() -> None:
    model = Small()
    muon, adam = halves(model)
    assert (muon["use_muon"], adam["use_muon"]) == (True, False)
    assert members(model, muon) == ["hidden.weight"]
    assert len(members(model, adam)) == 6


def test_a_warning_says_how_many_weights_muon_would_have_in_deepspeed(caplog: pytest.LogCaptureFixture) -> None:
    halves(nn.Linear(2, 2))
    assert not caplog.records
    halves(Small())
    (record,) = caplog.records
    assert record.getMessage() == "Muon: torch's takes matrices only; weights of more dimensions that Adam updates: 1"


def test_a_parameter_may_choose_for_itself() -> None:
    model = Small()
    model.hidden.weight.use_muon = False  # type: ignore[assignment]
    model.embed.weight.use_muon = True  # type: ignore[assignment]
    assert members(model, halves(model)[0]) == ["embed.weight"]


def test_rates_go_from_the_general_to_the_particular() -> None:
    model = nn.Linear(2, 2)
    assert [group["lr"] for group in halves(model)] == [0.02, 3e-4]
    assert [group["lr"] for group in halves(model, lr=None, muon_lr=None)] == [0.02, 3e-4]
    assert [group["lr"] for group in halves(model, lr=0.5)] == [0.5, 0.5]
    assert [group["lr"] for group in halves(model, lr=0.5, muon_lr=0.1, adam_lr=0.2)] == [0.1, 0.2]
    own = [{"params": [model.weight], "lr": 0.7, "momentum": 0.5}, {"params": model.bias, "weight_decay": 0.3}]
    muon, adam = halves(model, own, lr=0.5, muon_lr=0.1, weight_decay=0.01)
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.7, 0.5, 0.01)
    assert (adam["lr"], adam["weight_decay"]) == (0.5, 0.3)


# -- the numbers -----------------------------------------------------------------------------------------------


def gradient(step: int) -> Tensor:
    return (torch.arange(6.0).reshape(2, 3) - 2.5) * (0.3 if step % 2 else -0.2) + 0.1 * step


def build(*parameters: nn.Parameter, **arguments: Any) -> Any:
    return build_optimizer("Muon", arguments, parameters)


def matrix_and_vector() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)), nn.Parameter(torch.linspace(-1, 1, 4))


def train(optimizer: Any, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for each in group["params"]:
                each.grad = gradient(step) if each.ndim == 2 else torch.linspace(-1, 2, 4) * (step - 1.3)
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "expected", "bound"),
    [
        # deepspeed 0.19.8 on the CPU, MuonWithAuxAdam by itself: 4 updates with these gradients; bfloat16 makes the
        # difference, and the matrix has moved by 0.08
        ("standard", [-0.986449, -0.602733, -0.219115, 0.180787, 0.587984, 0.99439], 3e-3),
        ("gram", [-0.987817, -0.603498, -0.219142, 0.181651, 0.58842, 0.995191], 3e-3),
    ],
)
def test_four_updates_are_deepspeeds(method: str, expected: list[float], bound: float) -> None:
    matrix, vector = matrix_and_vector()
    optimizer = build(matrix, vector, muon_lr=0.02, adam_lr=0.01, weight_decay=0.1, ns_method=method)
    train(optimizer, range(4))
    assert (matrix.detach().flatten() - torch.tensor(expected)).abs().max() < bound
    torch.testing.assert_close(
        vector.detach(), torch.tensor([-1.014046, -0.332002, 0.350042, 1.014046]), atol=1e-6, rtol=0
    )


def test_adam_w_mode_false_adds_the_decay_to_the_gradient() -> None:
    classic, decoupled = (build(nn.Parameter(torch.ones(2)), adam_w_mode=mode) for mode in (False, True))
    assert [type(each._parts[0]).__name__ for each in (classic, decoupled)] == ["Adam", "AdamW"]


# -- one optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["load_state_dict", "pickle", "deepcopy"])
def test_it_goes_on_from_a_saved_state_bit_for_bit(by: str) -> None:
    whole = build(*matrix_and_vector())
    train(whole, range(6))
    first = build(*matrix_and_vector())
    train(first, range(3))
    if by == "load_state_dict":
        second = build(*(each for group in first.param_groups for each in group["params"]), lr=0.5)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    else:
        second = pickle.loads(pickle.dumps(first)) if by == "pickle" else copy.deepcopy(first)
    train(second, range(3, 6))
    for ours, theirs in zip(second.param_groups, whole.param_groups):
        assert all(map(torch.equal, ours["params"], theirs["params"]))


def test_a_schedule_moves_both_rates() -> None:
    optimizer = build(*matrix_and_vector(), muon_lr=0.4, adam_lr=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(optimizer, range(1))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, range(1, 2))
    assert all(torch.equal(old, group["params"][0]) for old, group in zip(before, optimizer.param_groups))


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    matrix, vector = matrix_and_vector()
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        ((matrix**2).sum() + vector.sum()).backward()  # type: ignore[no-untyped-call]
        return 2.0

    assert build(matrix, vector).step(closure) == 2.0
    assert calls == [1]


def test_one_kind_of_parameter_is_enough() -> None:
    for each in matrix_and_vector():
        train(build(each), range(2))


def test_its_groups_say_whose_they_are() -> None:
    assert isinstance(build(*matrix_and_vector()), Muon)
    assert [group["use_muon"] for group in build(*matrix_and_vector()).param_groups] == [True, False]


@pytest.mark.parametrize("grouped", [False, True])
def test_named_parameters_go_where_their_names_say(grouped: bool) -> None:
    model = Small()
    named: Any = list(model.named_parameters())
    optimizer = build_optimizer("Muon", {"lr": 0.1}, [{"params": named}] if grouped else named)
    muon, adam = optimizer.param_groups
    assert muon["param_names"] == ["hidden.weight"] == members(model, muon)
    assert adam["param_names"] == members(model, adam)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (1, 1)], ids=str)
def test_parameters_of_any_size_are_trained(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = build(parameter, lr=0.1)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    assert bool((parameter < 0.95).all()) and parameter.isfinite().all()
    assert optimizer.param_groups[0]["use_muon"] is (shape == (1, 1))


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=str)
def test_an_engines_muon_has_its_state_where_checkpoints_look_for_it(precision: dict[str, Any]) -> None:
    config = {"train_batch_size": 2, "optimizer": {"type": "Muon", "params": {"lr": 0.01}}, **precision}
    engine = initialize(nn.Linear(4, 4), config, device="cpu")
    engine.backward(engine(torch.ones(2, 4)).float().square().mean())
    engine.step()
    assert engine.optimizer is not None
    kept = engine.optimizer.state_dict()["state"]
    assert [sorted(state) for state in kept.values()] == [["momentum_buffer"], ["exp_avg", "exp_avg_sq", "step"]]
