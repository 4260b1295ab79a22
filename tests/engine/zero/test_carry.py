"""Groups and optimizers that were made of parameters which are replaced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.zero.carry import carry_optimizer_over, carry_over


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
    carry_optimizer_over(optimizer, dict(zip(old, new)), lambda value, before, after: value * 2)
    assert [group["params"] for group in optimizer.param_groups] == [new[:1], new[1:]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert [torch.equal(optimizer.state[each]["momentum_buffer"], 2 * was) for each, was in zip(new, momenta)]
    assert set(optimizer.state) == set(new)
