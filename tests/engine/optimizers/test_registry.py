"""Names of optimizers to classes; what a config's names mean is in test_initialize."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import initialize
from redline.errors import EngineError
from redline.optimizers import build_optimizer, known, register, resolve, unfuse_on_shards
from redline.optimizers.lamb import Lamb
from tests.callbacks import drop_recorder
from tests.distributed import run_ranks


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redline.optimizers._registered", {})


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


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": False, "foreach": False}], ids=str)
def test_without_bias_correction_adam_divides_by_the_means_as_they_are(name: str, how: dict[str, Any]) -> None:
    odd = nn.Parameter(torch.ones(2, dtype=torch.complex64))  # which no fused kernel takes
    params = [*parameters(), *([] if how else [odd])]
    given = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "bias_correction": False, **how}
    optimizer = build_optimizer(name, {**given, "adam_w_mode": False}, [{"params": [each]} for each in params])
    plain = [param.detach().clone() for param in params]
    means, squares = ([torch.zeros_like(param) for param in plain] for _ in range(2))
    for step in range(1, 4):
        for param, mine, mean, square in zip(params, plain, means, squares):
            param.grad = torch.full_like(param, 0.2 * step) - 0.1 * param.detach()
            grad = param.grad.clone()
            if name == "AdamW":
                mine.mul_(1 - 0.1 * 0.1)
            else:
                grad += 0.1 * mine
            mean.mul_(0.9).add_(0.1 * grad)
            for part, own in zip(_parts(square), _parts(grad)):
                part.mul_(0.99).addcmul_(own, own, value=0.01)
            for part, top, under in zip(_parts(mine), _parts(mean), _parts(square)):
                part.sub_(0.1 * top / (under.sqrt() + 1e-3))
        optimizer.step()
        assert [float(optimizer.state[param]["step"]) for param in params] == [step] * len(params)
    for param, mine in zip(params, plain):
        torch.testing.assert_close(param.detach(), mine)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Real and imaginary part, as views; a real tensor itself."""
    return [tensor.real, tensor.imag] if tensor.is_complex() else [tensor]


def test_parameters_may_come_from_a_generator() -> None:
    optimizer = build_optimizer("SGD", {"lr": 0.1}, (parameter for parameter in parameters()))
    assert len(optimizer.param_groups[0]["params"]) == 1


# -- DeepSpeed's own -------------------------------------------------------------------------------------------


def test_deepspeeds_names_cannot_be_registered() -> None:
    for name in ("Lamb", "Lion", "Muon"):
        with pytest.raises(ValueError, match=f"{name}: the name is taken"):
            register(name, torch.optim.SGD)


def test_lambs_parameters_reach_it() -> None:
    given = {"lr": 0.1, "max_coeff": 0.3, "min_coeff": 0.01, "bias_correction": False, "amsgrad": False}
    optimizer = build_optimizer("Lamb", given, parameters())
    assert isinstance(optimizer, Lamb)
    assert (optimizer.defaults["max_coeff"], optimizer.defaults["bias_correction"]) == (0.3, False)


def test_lion_makes_deepspeeds_updates() -> None:
    pytest.importorskip("pytorch_optimizer", reason="needs the extra optimizers")
    parameter = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
    optimizer = build_optimizer("Lion", {"lr": 0.01, "weight_decay": 0.1, "set_grad_none": True}, [parameter])
    for step in range(4):
        factor = 0.3 if step % 2 else -0.2
        parameter.grad = (torch.arange(6.0).reshape(2, 3) - 2.5) * factor + 0.1 * step
        optimizer.step()
    # deepspeed 0.19.8, DeepSpeedCPULion with these gradients
    expected = [-0.9959861, -0.5975837, -0.2191812, 0.1792012, 0.5975837, 0.9959861]
    torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_lion_updates_sharded_parameters_one_by_one_those_of_later_groups_too() -> None:
    pytest.importorskip("pytorch_optimizer", reason="needs the extra optimizers")
    optimizer = build_optimizer("Lion", {}, parameters())
    unfuse_on_shards(optimizer)
    optimizer.add_param_group({"params": parameters()})
    assert [group["foreach"] for group in optimizer.param_groups] == [False, False]


def test_without_the_extra_lion_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(EngineError, match=r"optimizer Lion: needs pytorch-optimizer; .*pip install 'redline\[opt"):
        build_optimizer("Lion", {}, parameters())


# -- what a script may bring, on one process and on two ------------------------------------------------------------


class Tied(nn.Module):
    """A frozen layer, and two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, batch: Tensor) -> Any:
        return self.second(torch.tanh(self.first(self.frozen(batch))))


def two_groups(model: Tied) -> list[dict[str, Any]]:
    return [
        {"params": [model.first.weight], "lr": 0.05},
        {"params": [model.first.bias, model.second.bias], "lr": 0.01, "weight_decay": 0.0},
    ]


def own_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


BRINGS = ("nothing", "an optimizer", "a function", "groups", "Lamb", "Muon")


def train(brings: str) -> tuple[list[float], list[Tensor], list[float]]:
    """Losses, weights and rates of six updates over the same 8 samples, however many processes share them."""
    torch.manual_seed(0)
    model = Tied()
    frozen = model.frozen.weight.clone()
    section = {"type": brings if brings in ("Lamb", "Muon") else "AdamW", "params": {"lr": 0.02}}
    given: dict[str, Any] = {}
    if brings == "an optimizer":
        given["optimizer"] = torch.optim.SGD(two_groups(model), lr=0.1, momentum=0.9)
    elif brings == "a function":
        given["optimizer"] = own_adam
    elif brings == "groups":
        given["model_parameters"] = two_groups(model)
    config: dict[str, Any] = {"train_batch_size": 8, "gradient_clipping": 1.0}
    if "optimizer" not in given:
        config["optimizer"] = section
    engine = initialize(model, config, device="cpu", **given)
    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    share = batch.chunk(engine.world_size)[engine.global_rank]
    losses = []
    for _ in range(6):
        loss = (engine(share) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert model.first.weight is model.second.weight
    assert torch.equal(model.frozen.weight, frozen)
    return losses, [parameter.detach() for parameter in model.parameters()], engine.get_lr()


def train_all() -> list[Any]:
    return [train(brings) for brings in BRINGS]


@pytest.mark.parametrize("brings", BRINGS)
def test_whatever_a_script_brings_it_trains(brings: str) -> None:
    losses, _, rates = train(brings)
    assert losses[-1] < losses[0]
    if brings in ("an optimizer", "groups"):
        assert rates == [0.05, 0.01]


def test_two_processes_make_the_updates_of_one() -> None:
    alone = train_all()
    for together in run_ranks(train_all, 2):
        for (_, weights, rates), (_, theirs, their_rates) in zip(alone, together):
            assert rates == their_rates
            # bfloat16's last bits, in Muon, are a two hundredth of an update
            torch.testing.assert_close(weights, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        ({"type": "WarmupLR", "params": {"warmup_max_lr": [0.2, 0.04], "warmup_num_steps": 4}}, 5),
        (
            {
                "type": "WarmupDecayLR",
                "params": {"warmup_max_lr": [0.2, 0.04], "warmup_num_steps": 2, "total_num_steps": 9},
            },
            5,
        ),
        ({"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 9}}, 5),
        ({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": [0.2, 0.04]}}, 5),
        ({"type": "OneCycle", "params": {"cycle_min_lr": [0.1, 0.02], "cycle_max_lr": [0.5, 0.1]}}, 5),
        ({"type": "StepLR", "params": {"step_size": 2}}, 5),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_groups_keep_their_proportion_under_a_schedule(
    schedule: dict[str, Any], ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the range test writes its record
    model = Tied()
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "scheduler": schedule}
    engine = initialize(model, config, device="cpu", model_parameters=two_groups(model))
    for _ in range(6):
        engine.backward(engine(torch.ones(8, 3)).mean())
        engine.step()
        first, second = engine.get_lr()
        assert first == pytest.approx(ratio * second)
    assert first > 0
    drop_recorder(engine)
