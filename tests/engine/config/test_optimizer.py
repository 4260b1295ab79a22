"""The optimizer section: names, parameters, ranges."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from engine import optimizers
from engine.config import OptimizerConfig, UnsupportedConfigError, load_config
from engine.config.optimizer import AdagradParams, AdamParams, SGDParams
from engine.errors import ConfigError


def load(optimizer: Any) -> OptimizerConfig:
    config = load_config({"train_batch_size": 8, "optimizer": optimizer})
    assert config.optimizer is not None
    return config.optimizer


def problems(optimizer: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(optimizer)
    return [str(problem) for problem in caught.value.problems]


def wrong(name: str, **params: Any) -> list[str]:
    return problems({"type": name, "params": params})


def test_adam_has_the_parameters_and_defaults_of_deepspeeds_fused_adam() -> None:
    # deepspeed 0.19.8, inspect.signature(deepspeed.ops.adam.FusedAdam)
    signature = {
        "lr": 1e-3,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "adam_w_mode": True,
        "weight_decay": 0.0,
        "amsgrad": False,
        "set_grad_none": True,
    }
    assert {name: AdamParams.model_fields[name].default for name in signature} == signature


def test_sgd_has_torchs_parameters_and_defaults() -> None:
    _, *parameters = inspect.signature(torch.optim.SGD).parameters.values()
    assert {name: field.default for name, field in SGDParams.model_fields.items()} == {
        parameter.name: parameter.default for parameter in parameters
    }


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        # deepspeed 0.19.8, inspect.signature of FusedLamb, less max_grad_norm, which is refused, and of FusedLion
        ("Lamb", {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "eps_inside_sqrt": False,
                  "weight_decay": 0.0, "max_coeff": 10.0, "min_coeff": 0.01, "amsgrad": False}),
        ("Lion", {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "set_grad_none": True}),
        # what MuonWithAuxAdam sets where the config says nothing
        ("Muon", {"momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram", "betas": (0.9, 0.95), "eps": 1e-10}),
    ],
    ids=["Lamb", "Lion", "Muon"],
)  # fmt: skip
def test_deepspeeds_own_have_its_parameters_and_defaults(name: str, signature: dict[str, Any]) -> None:
    model = OptimizerConfig.models[name]
    assert {each: model.model_fields[each].default for each in signature} == signature


def test_adagrad_has_torchs_parameters_and_defaults() -> None:
    _, *parameters = inspect.signature(torch.optim.Adagrad).parameters.values()
    assert {name: field.default for name, field in AdagradParams.model_fields.items()} == {
        parameter.name: parameter.default for parameter in parameters
    }


def test_deepspeeds_own_refuse_by_path_what_they_cannot_do() -> None:
    assert wrong("Lamb", max_coeff=-1, amsgrad=True) == [
        "optimizer.params.max_coeff: got -1; expected a number >= 0",
        "optimizer.params.amsgrad: got true; expected false",
    ]
    assert wrong("Lamb", max_coeff=0.1, min_coeff=0.5) == [
        "optimizer.params.min_coeff: got 0.5; expected at most max_coeff, which is 0.1"
    ]
    assert wrong("Muon", momentum=1, ns_method="grams") == [
        "optimizer.params.momentum: got 1; expected a number >= 0 and < 1",
        'optimizer.params.ns_method: got "grams"; expected "gram" or "standard"; did you mean "gram"?',
    ]
    with pytest.raises(UnsupportedConfigError, match=r"optimizer\.params\.per_head_muon: true is not built"):
        load({"type": "Muon", "params": {"per_head_muon": True}})


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("adam", "Adam"),
        ("ADAMW", "AdamW"),
        ("AdaGrad", "Adagrad"),
        ("RMSprop", "RMSprop"),
        ("LAMB", "Lamb"),
        ("lion", "Lion"),
        ("muon", "Muon"),
    ],
)
def test_names_are_read_in_the_case_that_deepspeed_reads_them_in(written: str, canonical: str) -> None:
    assert load({"type": written}).type == canonical


def test_arguments_are_what_was_given_and_nothing_else() -> None:
    assert load({"type": "Adam"}).arguments() == {}
    assert load({"type": "Adam", "params": None}).arguments() == {}
    assert load({"type": "Adam", "params": {"betas": [0, 0.5], "lr": 1}}).arguments() == {
        "lr": 1.0,
        "betas": (0.0, 0.5),
    }
    rmsprop = load({"type": "RMSprop", "params": {"alpha": 0.9, "centered": True}})
    assert rmsprop.arguments() == {"alpha": 0.9, "centered": True}


def test_every_optimizer_of_torch_that_can_step_without_the_loss_is_accepted() -> None:
    for name in optimizers.known():
        if name != "LBFGS":
            assert load({"type": name, "params": {"lr": 0.1}}).arguments() == {"lr": 0.1}


@pytest.mark.parametrize(
    "name", ["MuAdam", "MuAdamW", "MuSGD", "OneBitAdam", "OneBitLamb", "ZeroOneAdam", "CPUAdam", "LBFGS"]
)
def test_what_only_deepspeed_has_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=f'optimizer.type: "{name}" is not built; .*use'):
        load({"type": name, "params": {"lr": 0.1, "freeze_step": 3}})


def test_a_registered_optimizer_is_checked_against_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, *, nuance: int = 1, schema: str = "") -> None:
            super().__init__(params, lr)

    monkeypatch.setattr(optimizers, "_registered", {"Mine": Mine})
    given = {"lr": 0.1, "nuance": 2e3, "schema": "x"}
    assert load({"type": "Mine", "params": given}).arguments() == {"lr": 0.1, "nuance": 2000, "schema": "x"}
    assert wrong("Mine", nuanse=2, schema=1) == [
        'optimizer.params.nuanse: unknown key; did you mean "nuance"?',
        "optimizer.params.schema: got 1; expected a string",
        "optimizer.params.lr: missing; Mine needs it",
    ]


def test_a_missing_or_unknown_type_is_an_error_that_helps() -> None:
    assert problems({}) == ['optimizer.type: missing; expected a string such as "Adam"']
    assert problems({"type": 3}) == ['optimizer.type: got 3; expected a string such as "Adam"']
    assert problems({"type": "sgd"}) == ['optimizer.type: unknown optimizer "sgd"; did you mean "SGD"?']
    assert problems("Adam") == ['optimizer: got "Adam"; expected an object: { ... }']
    assert problems({"type": "Adam", "params": []}) == ["optimizer.params: got []; expected an object: { ... }"]


def test_a_parameter_beside_params_is_sent_into_them() -> None:
    assert problems({"type": "Adam", "adam_w_mode": True}) == [
        "optimizer.adam_w_mode: unknown key here; move it into optimizer.params"
    ]


def test_the_gradient_norm_is_sent_to_the_key_that_clips() -> None:
    assert wrong("Adam", max_grad_norm=1.0) == [
        "optimizer.params.max_grad_norm: unknown key here; gradients are clipped by the top-level key "
        '"gradient_clipping"; '
        "move the number there"
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": -1}, "lr: got -1; expected a number >= 0"),
        ({"lr": "0.1"}, 'lr: got "0.1"; expected a number >= 0; remove the quotes'),
        ({"lr": True}, "lr: got true; expected a number >= 0"),
        ({"betas": [0.9]}, "betas: got [0.9]; expected a list of 2 numbers >= 0 and < 1"),
        ({"betas": [0.9, 1]}, "betas[1]: got 1; expected a number >= 0 and < 1"),
        ({"eps": -1e-8}, "eps: got -1e-08; expected a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1; expected a number >= 0"),
        ({"adam_w_mode": 1}, "adam_w_mode: got 1; expected true or false; write true"),
        ({"amsgrad": True}, 'amsgrad: got true; expected false, or "torch_adam": true beside it, as in DeepSpeed'),
        ({"fused": True, "foreach": True}, "fused: got true beside foreach: true; torch takes one of the two"),
        ({"weightdecay": 0.1}, 'weightdecay: unknown key; did you mean "weight_decay"?'),
    ],
)
def test_a_wrong_parameter_says_what_is_allowed(params: dict[str, Any], message: str) -> None:
    assert wrong("Adam", **params) == [f"optimizer.params.{message}"]


def test_what_torchs_adam_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedConfigError, match=r"optimizer\.params\.bias_correction: false is not built"):
        load({"type": "Adam", "params": {"bias_correction": False}})


def test_parameters_without_a_model_are_still_checked() -> None:
    assert wrong("RMSprop", lr=-1, alhpa=0.9, centered=1, eps="x") == [
        "optimizer.params.lr: got -1; expected a number >= 0",
        'optimizer.params.alhpa: unknown key; did you mean "alpha"?',
        "optimizer.params.centered: got 1; expected true or false; write true",
        'optimizer.params.eps: got "x"; expected a number or a list of numbers',
    ]


def test_nesterov_needs_momentum() -> None:
    assert wrong("SGD", nesterov=True) == [
        "optimizer.params.nesterov: got true; expected false, or a momentum > 0 and a dampening of 0 beside it"
    ]
    assert load({"type": "SGD", "params": {"nesterov": True, "momentum": 0.9}}).type == "SGD"
