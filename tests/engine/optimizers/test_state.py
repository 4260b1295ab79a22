"""An optimizer's state when its parameters are replaced, and which steps can be put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.optimizers import build_optimizer
from redline.optimizers.lamb import Lamb
from redline.optimizers.muon import Muon, split
from redline.optimizers.state import can_put_back, carry_over, move_state, replace_params


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2,), float(index))) for index in range(count)]


def test_every_form_that_torch_takes_is_carried_over() -> None:
    old, new = parameters(3), parameters(3)
    moved: dict[Tensor, Tensor] = dict(zip(old, new))
    assert carry_over(iter(old), moved) == new
    assert carry_over([("a", old[0]), ("b", old[1])], moved) == [("a", new[0]), ("b", new[1])]
    groups = [{"params": old[0], "lr": 1.0}, {"params": iter(old[1:]), "lr": 2.0}]
    assert carry_over(groups, moved) == [{"params": new[0], "lr": 1.0}, {"params": new[1:], "lr": 2.0}]


def test_what_is_not_replaced_stays() -> None:
    other = parameters(1)
    assert carry_over(other, {}) == other


def test_an_optimizer_keeps_its_groups_settings_and_its_state() -> None:
    old, new = parameters(2), parameters(2)
    optimizer = torch.optim.SGD([{"params": old[:1], "lr": 0.5}, {"params": old[1:]}], lr=0.1, momentum=0.9)
    for parameter in old:
        parameter.grad = torch.ones(2)
    optimizer.step()
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in old]
    replace_params(optimizer, dict(zip(old, new)), lambda param, value: value * 2)
    assert [group["params"] for group in optimizer.param_groups] == [new[:1], new[1:]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert [torch.equal(optimizer.state[each]["momentum_buffer"], 2 * was) for each, was in zip(new, momenta)]
    assert set(optimizer.state) == set(new)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("AdamW", {}),
        ("Adam", {"adam_w_mode": False, "amsgrad": True}),
        ("SGD", {"momentum": 0.9}),
        ("Adagrad", {}),
        ("RMSprop", {"momentum": 0.9}),
        ("NAdam", {}),
        ("ASGD", {}),
        ("Rprop", {}),
        ("Lamb", {}),
    ],
    ids=str,
)
def test_moved_state_has_the_new_parameters_dtype_and_layout_and_goes_on(name: str, given: dict[str, Any]) -> None:
    low = nn.Parameter(torch.linspace(-1, 1, 48).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last).bfloat16())
    optimizer = build_optimizer(name, {"lr": 0.01, **given}, [low])
    low.grad = torch.randn_like(low)
    optimizer.step()
    before = optimizer.state[low]
    master = nn.Parameter(low.detach().float().contiguous())
    optimizer.param_groups[0]["params"][0] = master
    move_state(optimizer, low, master)
    assert low not in optimizer.state
    for key, value in optimizer.state.get(master, {}).items():
        if isinstance(value, Tensor) and value.shape == master.shape:
            assert (value.dtype, value.stride()) == (torch.float32, master.stride())
            torch.testing.assert_close(value, before[key].float())
    for _ in range(2):
        master.grad = torch.randn_like(master)
        optimizer.step()
    assert master.isfinite().all() and not torch.equal(master, low.float())


def test_the_step_count_is_where_torch_wants_it() -> None:
    for chosen, expected in (({"fused": True}, torch.float32), ({"foreach": True}, torch.float64)):
        low = nn.Parameter(torch.ones(2).bfloat16())
        optimizer = build_optimizer("AdamW", {"lr": 0.1, **chosen}, [low])
        low.grad = torch.ones_like(low)
        optimizer.step()
        optimizer.state[low]["step"] = torch.tensor(1.0, dtype=torch.float64)
        master = nn.Parameter(torch.ones(2))
        optimizer.param_groups[0]["params"][0] = master
        move_state(optimizer, low, master)
        assert optimizer.state[master]["step"].dtype is expected


class Own(torch.optim.SGD):
    """A script's own optimizer."""


@pytest.mark.parametrize(
    ("cls", "can"), [(torch.optim.SGD, True), (Lamb, True), (torch.optim.LBFGS, False), (Own, False)]
)
def test_steps_of_torchs_and_our_optimizers_can_be_put_back(cls: type[Optimizer], can: bool) -> None:
    assert can_put_back(cls(nn.Linear(2, 2).parameters())) is can  # type: ignore[call-arg]


def test_steps_of_muon_can_be_put_back() -> None:
    assert can_put_back(Muon(split(nn.Linear(2, 2).parameters(), {}, {})))
