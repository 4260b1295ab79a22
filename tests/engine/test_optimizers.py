"""Names of optimizers to classes; what a config's names mean is in test_initialize."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import EngineError
from engine.optimizers import build_optimizer, known, register, resolve


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.optimizers._registered", {})


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


def test_torchs_names_give_torchs_classes_and_no_base_class() -> None:
    assert resolve("RMSprop") is torch.optim.RMSprop
    assert "Optimizer" not in known()


def test_a_miss_names_the_nearest_and_all_that_are_known() -> None:
    with pytest.raises(LookupError, match=r'"RMSProb": unknown optimizer; did you mean "RMSprop"\? Known: .*SGD'):
        resolve("RMSProb")


def test_registering_twice_is_fine_and_taking_a_name_is_not() -> None:
    class Mine(torch.optim.SGD):
        pass

    assert register("Mine", Mine) is register("Mine", Mine) is resolve("Mine") is Mine
    for name in ("Mine", "Adam"):
        with pytest.raises(ValueError, match=f"{name}: the name is taken; register the optimizer under another one"):
            register(name, torch.optim.RMSprop)


@pytest.mark.parametrize("given", [{"fused": True, "foreach": True}, {"lr": -1.0}, {"nonsense": 1}])
def test_what_torch_refuses_is_said_with_the_optimizers_name(given: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="optimizer SGD: "):
        build_optimizer("SGD", given, parameters())


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_parameters_that_no_fused_kernel_takes_are_left_to_the_plain_one(name: str) -> None:
    odd = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = build_optimizer(name, {"lr": 0.1}, [{"params": [odd]}, {"params": parameters()}])
    assert [bool(group["fused"]) for group in optimizer.param_groups] == [False, True]
    assert not optimizer.defaults["fused"]
    odd.grad = torch.ones_like(odd)
    optimizer.step()
    assert odd[0].item() != 1


def test_keys_that_only_deepspeeds_own_adam_has_do_not_reach_torch() -> None:
    given = {"lr": 0.1, "adam_w_mode": True, "torch_adam": False, "bias_correction": True, "set_grad_none": True}
    assert build_optimizer("Adam", given, parameters()).defaults["lr"] == 0.1


def test_parameters_may_come_from_a_generator() -> None:
    optimizer = build_optimizer("SGD", {"lr": 0.1}, (parameter for parameter in parameters()))
    assert len(optimizer.param_groups[0]["params"]) == 1
