"""The scheduler section: DeepSpeed's five schedules, and the others."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import schedulers
from engine.config import SchedulerConfig, UnsupportedConfigError, load_config
from engine.errors import ConfigError
from schedulers import registry


def load(scheduler: Any, optimizer: Any = None) -> SchedulerConfig:
    config = load_config({"train_batch_size": 8, "scheduler": scheduler, "optimizer": optimizer})
    assert config.scheduler is not None
    return config.scheduler


def problems(scheduler: Any, optimizer: Any = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(scheduler, optimizer)
    return [str(problem) for problem in caught.value.problems]


def wrong(name: str, **params: Any) -> list[str]:
    return problems({"type": name, "params": params})


@pytest.mark.parametrize("name", SchedulerConfig.models)
def test_a_model_has_the_names_and_defaults_of_its_constructor(name: str) -> None:
    signature = {
        parameter.name: ... if parameter.default is parameter.empty else parameter.default
        for parameter in inspect.signature(getattr(schedulers, name)).parameters.values()
        if parameter.name not in ("optimizer", "corrected", "growth")  # the last two stand under `redline`
    }
    fields = SchedulerConfig.models[name].model_fields
    assert {key: ... if field.is_required() else field.default for key, field in fields.items()} == signature


def test_arguments_are_what_was_given_and_nothing_else() -> None:
    params = {
        "cycle_min_lr": [0.1, 0.2],
        "cycle_max_lr": 1,
        "cycle_first_step_size": 2e3,
        "cycle_second_step_size": None,
    }
    assert load({"type": "OneCycle", "params": params}).arguments() == {
        "cycle_min_lr": (0.1, 0.2),
        "cycle_max_lr": 1.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
    }
    assert load({"type": "WarmupLR"}).arguments() == {}
    assert load({"type": "StepLR", "params": {"step_size": 30}}).arguments() == {"step_size": 30}


@pytest.mark.parametrize(
    ("name", "params", "messages"),
    [
        (
            "LRRangeTest",
            {"lr_range_test_min_lr": 0},
            ["lr_range_test_min_lr: got 0; expected a number > 0 or a list of numbers > 0"],
        ),
        (
            "LRRangeTest",
            {"lr_range_test_min_lr": [0.1, -1]},
            ["lr_range_test_min_lr[1]: got -1; expected a number > 0"],
        ),
        (
            "LRRangeTest",
            {"lr_range_test_step_size": 0},
            ["lr_range_test_step_size: got 0; expected a whole number >= 1"],
        ),
        (
            "LRRangeTest",
            {"lr_range_test_step_size": 2.5},
            ["lr_range_test_step_size: got 2.5; expected a whole number >= 1"],
        ),
        (
            "LRRangeTest",
            {"lr_range_test_staircase": "false"},
            ['lr_range_test_staircase: got "false"; expected true or false; remove the quotes'],
        ),
        (
            "LRRangeTest",
            {"lr_range_test_min_rl": 1},
            ['lr_range_test_min_rl: unknown key; did you mean "lr_range_test_min_lr"?'],
        ),
        (
            "OneCycle",
            {},
            [
                "cycle_min_lr: missing; expected a number >= 0 or a list of numbers >= 0",
                "cycle_max_lr: missing; expected a number > 0 or a list of numbers > 0",
            ],
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 0.01},
            ["cycle_min_lr: got 0.1; expected at most cycle_max_lr, which is 0.01"],
        ),
        (
            "OneCycle",
            {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": [1, 0.15]},
            ["cycle_min_lr: got [0.1, 0.2]; expected at most cycle_max_lr, which is [1.0, 0.15]"],
        ),
        (
            "OneCycle",
            {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": [1, 1, 1]},
            ["cycle_max_lr: got 3 values; expected 2, one per parameter group, as in cycle_min_lr"],
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_min_mom": 0.95},
            ["cycle_min_mom: got 0.95; expected at most cycle_max_mom, which is 0.9 by default"],
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0, "cycle_max_lr": 1, "decay_lr_rate": -1},
            ["decay_lr_rate: got -1; expected a number >= 0"],
        ),
        ("WarmupLR", {"warmup_num_steps": -1}, ["warmup_num_steps: got -1; expected a whole number >= 0"]),
        ("WarmupLR", {"warmup_type": "cosine"}, ['warmup_type: got "cosine"; expected "log" or "linear"']),
        (
            "WarmupLR",
            {"warmup_type": "Linear"},
            ['warmup_type: got "Linear"; expected "log" or "linear"; did you mean "linear"?'],
        ),
        (
            "WarmupLR",
            {"warmup_min_lr": 1, "warmup_max_lr": 0.1},
            ["warmup_min_lr: got 1.0; expected at most warmup_max_lr, which is 0.1"],
        ),
        ("WarmupDecayLR", {}, ["total_num_steps: missing; expected a whole number >= 1"]),
        (
            "WarmupDecayLR",
            {"total_num_steps": 500},
            ["warmup_num_steps: got 1000 by default; expected at most total_num_steps, which is 500"],
        ),
        (
            "WarmupCosineLR",
            {"total_num_steps": 5000, "warmup_min_ratio": 2},
            ["warmup_min_ratio: got 2; expected a number >= 0 and <= 1"],
        ),
        ("StepLR", {"gama": 0.1}, ['gama: unknown key; did you mean "gamma"?', "step_size: missing; StepLR needs it"]),
        ("CosineAnnealingLR", {"T_max": "x"}, ['T_max: got "x"; expected a whole number']),
    ],
)
def test_a_wrong_parameter_says_what_is_allowed(name: str, params: dict[str, Any], messages: list[str]) -> None:
    assert wrong(name, **params) == [f"scheduler.params.{message}" for message in messages]


def test_momenta_that_are_not_cycled_are_not_compared() -> None:
    load(
        {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_min_mom": 0.95, "cycle_momentum": False},
        }
    )


def test_a_schedule_needs_no_optimizer_in_the_config() -> None:
    assert load({"type": "WarmupLR"}, optimizer=None).type == "WarmupLR"


def test_momentum_cannot_be_cycled_where_there_is_none() -> None:
    one_cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_max_mom": 0.95}}
    assert problems(one_cycle, {"type": "Adagrad"}) == [
        "scheduler.params.cycle_max_mom: Adagrad has no momentum to cycle; "
        "set cycle_momentum to false and leave its bounds out"
    ]
    for name in ("Adam", "SGD", "RMSprop", "RAdam"):
        load(one_cycle, {"type": name})
    del one_cycle["params"]["cycle_max_mom"]  # type: ignore[attr-defined]
    load(one_cycle, {"type": "Adagrad"})


def test_a_warm_up_cannot_start_above_the_rate_it_ends_at() -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}
    assert problems(warmup, {"type": "Adam", "params": {"lr": 0.01}}) == [
        "scheduler.params.warmup_min_lr: got 0.1; expected at most optimizer.params.lr, which is 0.01: "
        "warmup_max_lr is null"
    ]


def test_a_rule_is_silent_about_a_section_that_is_wrong_by_itself() -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}
    assert problems(warmup, {"type": "Adam", "params": {"lr": "0.01"}}) == [
        'optimizer.params.lr: got "0.01"; expected a number >= 0; remove the quotes'
    ]


def test_an_unknown_schedule_names_the_nearest() -> None:
    assert wrong("WarmupDecay") == ['scheduler.type: unknown scheduler "WarmupDecay"; did you mean "WarmupDecayLR"?']
    assert problems({"params": {}}) == ['scheduler.type: missing; expected a string such as "WarmupLR"']


@pytest.mark.parametrize("name", ["LambdaLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"])
def test_what_json_cannot_build_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=f'scheduler.type: "{name}" is not built'):
        load({"type": name})


def test_a_registered_schedule_is_checked_against_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wave:
        def __init__(self, optimizer: Any, length: int, deep: bool = False) -> None: ...

    monkeypatch.setattr(registry, "_registered", {"Wave": Wave})
    assert load({"type": "Wave", "params": {"length": 3}}).arguments() == {"length": 3}
    assert wrong("Wave", lenght=3, deep="true") == [
        'scheduler.params.lenght: unknown key; did you mean "length"?',
        'scheduler.params.deep: got "true"; expected true or false; remove the quotes',
        "scheduler.params.length: missing; Wave needs it",
    ]
