"""A model and a config become an engine: the forms of both, the script's own parts, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from redline import ConfigError, Engine, EngineError, initialize, load_config, schedulers
from redline.optimizers import fused, register

ADAM = {"type": "Adam", "params": {"lr": 0.25}}
CONFIG = {"train_batch_size": 4, "optimizer": ADAM}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 2, "warmup_type": "linear"}}


def start(config: Any = None, model: nn.Module | None = None, **arguments: Any) -> Engine:
    return initialize(model or nn.Linear(2, 1), CONFIG if config is None else config, device="cpu", **arguments)


def take(engine: Engine, updates: int = 1) -> None:
    for _ in range(updates * engine.gradient_accumulation_steps()):
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()


def with_optimizer(name: str, **params: Any) -> Any:
    return start({"train_batch_size": 4, "optimizer": {"type": name, "params": params}}).optimizer


# -- the config ----------------------------------------------------------------------------------------------


def test_a_config_may_be_a_path_a_dict_a_text_or_a_loaded_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    for config in (path, str(path), CONFIG, json.dumps(CONFIG), load_config(CONFIG)):
        assert start(config).get_lr() == [0.25]


def test_a_dict_is_left_as_it_was() -> None:
    given = json.loads(json.dumps(CONFIG))
    start(given)
    assert given == CONFIG


def test_the_config_in_force_has_every_batch_size() -> None:
    config = start({"train_batch_size": 12, "gradient_accumulation_steps": 3}).config
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        12,
        4,
        3,
    )


def test_a_bad_config_is_refused_before_a_process_group_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def join(device: object) -> None:
        raise AssertionError("joined")

    monkeypatch.setattr(sys.modules["redline.start"], "join_world", join)
    with pytest.raises(ConfigError, match="2 problems") as caught:
        start({"train_batch_size": 4, "shceduler": {}, "gradient_clipping": "abc"})
    assert {problem.path for problem in caught.value.problems} == {"shceduler", "gradient_clipping"}


def test_what_deepspeed_has_and_redline_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel"):
        start({"train_batch_size": 4, "tensor_parallel": {"autotp_size": 2}})


# -- alone and in company ------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}], ids=str)
def test_one_process_makes_no_process_group(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = start()
    assert (engine.global_rank, engine.world_size) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}],
    ids=str,
)
def test_half_an_environment_is_an_error_that_shows_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=r"environment: got .*; start with `torchrun") as caught:
        start()
    assert all(f"{name}={value}" in str(caught.value) for name, value in environment.items())


# -- the optimizer -------------------------------------------------------------------------------------------


TORCHS = torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"]


@pytest.mark.parametrize(
    ("name", "params", "made", "weight_decay"),
    [
        ("Adam", {}, fused.AdamW, 0.0),
        ("AdamW", {}, fused.AdamW, 0.0),
        ("AdamW", {"weight_decay": 0.1}, fused.AdamW, 0.1),
        ("Adam", {"adam_w_mode": False}, fused.Adam, 0.0),
        ("AdamW", {"adam_w_mode": False}, fused.AdamW, 0.0),
        ("Adam", {"torch_adam": True}, fused.AdamW, TORCHS),
    ],
)
def test_adam_is_adamw_unless_told_otherwise_and_has_no_weight_decay_unless_given(
    name: str, params: Any, made: Any, weight_decay: float
) -> None:
    optimizer = with_optimizer(name, lr=0.5, **params)
    assert type(optimizer) is made
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, weight_decay)


@pytest.mark.parametrize("choice", [{}, {"fused": False}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_the_fused_kernel_is_taken_unless_another_was_chosen(name: str, choice: dict[str, bool]) -> None:
    optimizer = with_optimizer(name, **choice)
    assert bool(optimizer.defaults["fused"]) is (not choice)
    assert all(optimizer.defaults[key] is value for key, value in choice.items())


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Rprop"])
def test_torchs_other_optimizers_go_by_their_names(name: str) -> None:
    assert type(with_optimizer(name, lr=0.125)) is getattr(torch.optim, name)


def test_a_registered_optimizer_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(torch.optim.SGD):
        pass

    monkeypatch.setattr("redline.optimizers._registered", {})
    assert register("Mine", Mine) is Mine
    assert type(with_optimizer("Mine", lr=0.5)) is Mine
    with pytest.raises(ValueError, match="the name is taken"):
        register("Mine", torch.optim.SGD)
    with pytest.raises(ValueError, match="the name is taken"):
        register("SGD", Mine)


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(False)


@pytest.mark.parametrize(
    "give",
    [
        lambda model: {},
        lambda model: {"model_parameters": model.parameters()},
        lambda model: {"model_parameters": filter(lambda each: each.requires_grad, model.parameters())},
        lambda model: {"model_parameters": [{"params": [*model[0].parameters()]}, {"params": model[1].parameters()}]},
        lambda model: {"model_parameters": model.named_parameters()},
        lambda model: {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)},
        lambda model: {"optimizer": partial(torch.optim.SGD, lr=0.1)},
    ],
)
def test_a_model_whose_parameters_are_all_frozen_is_refused_for_that(give: Any) -> None:
    model = frozen()
    with pytest.raises(
        EngineError, match=r"nothing to train: of the 4 parameters of the model, Sequential, 0 require grad"
    ):
        start(model=model, **give(model))


def test_an_optimizer_needs_a_parameter_that_trains_and_gets_those_that_do_by_default() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    with pytest.raises(EngineError, match="nothing to train: of the 4 parameters of the model, Sequential, 2 require"):
        start(model=model, model_parameters=model[0].parameters())
    start(model=model, model_parameters=model.parameters())  # some of them train
    assert len(start(model=model).optimizer.param_groups[0]["params"]) == 2
    with pytest.raises(EngineError, match="nothing to train: of the 0 parameters of the model, Flatten"):
        start(model=nn.Flatten())
    assert initialize(frozen(), {"train_batch_size": 4}, device="cpu")(torch.ones(4, 2)).shape == (4, 1)


def test_model_parameters_take_the_models_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    assert start(model=model, model_parameters=groups).get_lr() == [0.5, 0.25]


def test_the_scripts_own_optimizer_may_be_an_object_or_a_function() -> None:
    model = nn.Linear(2, 1)
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    config = {"train_batch_size": 4}
    assert start(config, model, optimizer=own).optimizer is own
    for function in (torch.optim.SGD, partial(torch.optim.SGD, lr=0.5), lambda parameters: torch.optim.SGD(parameters)):
        made = start(config, model, optimizer=function).optimizer
        assert type(made) is torch.optim.SGD
        assert made.param_groups[0]["params"] == list(model.parameters())


# -- the schedule --------------------------------------------------------------------------------------------


def test_the_configs_schedule_moves_the_configs_optimizer() -> None:
    engine = start({**CONFIG, "scheduler": WARMUP})
    assert type(engine.lr_scheduler) is schedulers.WarmupLR
    take(engine, 3)
    assert engine.get_lr() == [0.5]


def test_torchs_schedules_go_by_their_names() -> None:
    engine = start({**CONFIG, "scheduler": {"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}}})
    assert type(engine.lr_scheduler) is lr_scheduler.StepLR
    take(engine, 3)
    assert engine.get_lr() == [0.125]
    one = start({**CONFIG, "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1.0, "total_steps": 10}}})
    assert type(one.lr_scheduler) is lr_scheduler.OneCycleLR
    take(one, 2)
    assert one.get_lr() == [1.0]


def test_a_registered_schedule_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halving(lr_scheduler.ExponentialLR):
        def __init__(self, optimizer: Any, base: float = 0.5) -> None:
            super().__init__(optimizer, gamma=base)

    monkeypatch.setattr("schedulers.registry._registered", {})
    schedulers.register("Halving", Halving)
    engine = start({**CONFIG, "scheduler": {"type": "Halving"}})
    take(engine, 2)
    assert engine.get_lr() == [0.0625]


@pytest.mark.parametrize(
    "make",
    [
        lr_scheduler.ReduceLROnPlateau,
        partial(lr_scheduler.ReduceLROnPlateau, patience=3),
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer),
    ],
)
def test_reduce_on_plateau_by_code_is_refused_and_can_be_stepped_by_the_script(make: Any) -> None:
    with pytest.raises(EngineError, match=r"lr_scheduler ReduceLROnPlateau: .*missing a required argument: 'metrics'"):
        start(lr_scheduler=make)
    engine = start()
    plateau = lr_scheduler.ReduceLROnPlateau(engine.optimizer, patience=0)
    for _ in range(3):
        take(engine, 1)
        plateau.step(1.0)
    assert engine.get_lr() == [pytest.approx(0.0025)]


def test_a_schedule_whose_step_wants_more_is_refused_before_the_first_step() -> None:
    class Timed(lr_scheduler.StepLR):
        def step(self, epoch: int, metric: float | None = None) -> None:  # type: ignore[override]
            super().step()

        def _initial_step(self) -> None:
            self._step_count, self.last_epoch = 0, 0

    with pytest.raises(EngineError, match=r"lr_scheduler Timed: .*missing a required argument: 'epoch'"):
        start(lr_scheduler=lambda optimizer: Timed(optimizer, 3))
    with pytest.raises(EngineError, match="lr_scheduler: got int; expected a schedule"):
        start(lr_scheduler=lambda optimizer: 3)


# -- an optimizer that finds its own learning rate -----------------------------------------------------------


class Own(torch.optim.SGD):
    """Its lr is None, as of Adafactor with relative_step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= 0.01 * parameter.grad


def test_an_optimizer_that_finds_its_own_learning_rate_trains() -> None:
    engine = start({"train_batch_size": 4, "steps_per_print": 1}, optimizer=Own)
    take(engine, 2)
    assert engine.get_lr() == [None]


class Around(torch.optim.Optimizer):
    """Two optimizers as one, whose groups have no lr."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, defaults={})
        weight, bias = self.param_groups[0]["params"]
        self.parts = (torch.optim.SGD([weight], lr=0.1), torch.optim.Adam([bias]))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def test_an_optimizer_around_others_trains() -> None:
    engine = start({"train_batch_size": 4, "steps_per_print": 1}, optimizer=Around)
    take(engine, 2)
    assert engine.get_lr() == [None]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("LRRangeTest", {}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}),
        ("WarmupLR", {"warmup_max_lr": 0.1}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9, "cycle_momentum": False}),
    ],
)
def test_a_schedule_with_rates_of_its_own_is_taken_with_a_warning(
    kind: str, params: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {
        "train_batch_size": 4,
        "scheduler": {"type": kind, "params": params},
        "redline": {"range_test": {"output_dir": str(tmp_path / "range_test")}},  # written when the interpreter exits
    }
    engine = start(config, optimizer=Own)
    take(engine, 3)
    assert (
        f"optimizer Own: its lr was None, that is, it finds its own learning rate; what scheduler {kind}" in caplog.text
    )


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {}),
        ("WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 2}),
        ("StepLR", {"step_size": 2}),
        ("CosineAnnealingLR", {"T_max": 2}),
        ("LinearLR", {}),
        ("CosineAnnealingWarmRestarts", {"T_0": 2}),
    ],
)
def test_a_schedule_of_a_learning_rate_that_is_none_is_refused(kind: str, params: Any) -> None:
    with pytest.raises(
        EngineError, match=f"scheduler {kind}: it starts from the optimizer's learning rate, which is None"
    ):
        start({"train_batch_size": 4, "scheduler": {"type": kind, "params": params}}, optimizer=Own)


def test_corrected_schedules_are_switched_on_as_one() -> None:
    config = {**CONFIG, "scheduler": WARMUP}
    assert start(config).get_lr() == [0.0]
    assert start({**config, "redline": {"schedules": "corrected"}}).get_lr() == [0.25]


def test_the_scripts_own_schedule_may_be_an_object_a_function_or_a_class() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    own = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    config = {"train_batch_size": 4}
    assert start(config, model, optimizer=optimizer, lr_scheduler=own).lr_scheduler is own
    for function in (
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
        partial(lr_scheduler.StepLR, step_size=1),
    ):
        engine = start(lr_scheduler=function)
        assert engine.lr_scheduler.optimizer is engine.optimizer
    engine = start(lr_scheduler=schedulers.WarmupLR)
    assert type(engine.lr_scheduler) is schedulers.WarmupLR
    take(engine, 2)


# -- parts that do not fit -----------------------------------------------------------------------------------

BARE = {"train_batch_size": 4}


@pytest.mark.parametrize(
    ("config", "parts", "words"),
    [
        (CONFIG, {"model_parameters": [3]}, "optimizer Adam: .*one of the params is int"),
        (BARE, {"optimizer": lambda parameters: "Adam"}, "optimizer: got str; expected a torch optimizer"),
        (
            BARE,
            {"optimizer": lambda parameters: torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(1))], lr=0.1)},
            "1 of its parameters are not the model's; make them part of the model",
        ),
        (
            {**CONFIG, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}},
            {},
            "scheduler WarmupLR: warmup_max_lr: got 2 values for 1 parameter groups",
        ),
        ({**CONFIG, "scheduler": {"type": "ReduceLROnPlateau"}}, {}, "ReduceLROnPlateau.*metric"),
        ({**BARE, "scheduler": WARMUP}, {}, "scheduler: there is no optimizer to schedule"),
        (BARE, {"lr_scheduler": schedulers.WarmupLR}, "a function .* was given, but there is no optimizer"),
        (
            CONFIG,
            {"lr_scheduler": schedulers.WarmupLR(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.5))},
            "lr_scheduler: it moves another optimizer than the engine's",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(config: Any, parts: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        start(config, **parts)


@pytest.mark.parametrize(
    ("part", "given", "of_config"),
    [("optimizer", torch.optim.SGD, "Adam"), ("lr_scheduler", partial(lr_scheduler.StepLR, step_size=1), "WarmupLR")],
)
def test_the_scripts_own_part_goes_before_the_configs_with_a_warning(
    part: str, given: Any, of_config: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG if part == "optimizer" else {**CONFIG, "scheduler": WARMUP}
    engine = start(config, **{part: given})
    assert type(getattr(engine, part)).__name__ in ("SGD", "StepLR")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == f"{part}: the script's own is used; the config's {of_config} is not"


# -- what is said at the start -------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture, config: Any) -> list[str]:
    with caplog.at_level(logging.INFO, logger="redline"):
        start(config)
    return [record.getMessage() for record in caplog.records if record.name == "redline"]


def test_a_line_says_what_will_run_and_a_table_the_dtypes_that_are_not_fp32(caplog: pytest.LogCaptureFixture) -> None:
    line = (
        "redline: 1 rank on cpu; batch 4 = 4 x 1 accumulated x 1; AdamW (Adam with adam_w_mode, fused), fixed "
        "learning rate, gradients clipped at 1"
    )
    assert said(caplog, CONFIG) == [line]
    caplog.clear()
    assert said(caplog, {**CONFIG, "bf16": {"enabled": True}}) == [
        f"{line}\n"
        "parameters  computation  gradients  reduction  master weights  optimizer state\n"
        "bfloat16    bfloat16     float32    float32    float32         float32"
    ]


def test_each_quirk_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5}
    *quirks, _ = said(caplog, {**CONFIG, "scheduler": {"type": "OneCycle", "params": params}})
    remedy = 'as in DeepSpeed; "redline": {"schedules": "corrected"} does otherwise'
    assert quirks == [
        f"OneCycle: the first step has momentum 0.8, the minimum, {remedy}",
        f"OneCycle: the second beta is set to 0.99, {remedy}",
        "OneCycle sets the learning rate; the optimizer's own 0.25 is not used",
    ]


GROWING = {"type": "OneCycle", "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 3,
                                          "decay_step_size": 1, "decay_mom_rate": 0.05}}  # fmt: skip


def test_a_momentum_that_grows_past_1_is_said_at_the_start_with_its_step(caplog: pytest.LogCaptureFixture) -> None:
    engine = start({**CONFIG, "scheduler": GROWING})
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == (
        "scheduler OneCycle: the beta1 of parameter group 0 leaves what optimizers accept at optimizer step 9, counted "
        "from 0: it is 1.035 there; expected 0 <= beta1 < 1; decay_mom_rate makes the momentum grow, as in DeepSpeed; "
        '"redline": {"schedules": "corrected"} lets it fall instead, and decay_mom_rate 0 keeps it'
    )
    take(engine, 9)
    assert engine.get_mom()[0][0] == pytest.approx(1.035)
    caplog.clear()
    corrected = start({**CONFIG, "scheduler": GROWING, "redline": {"schedules": "corrected"}})
    take(corrected, 30)
    assert "scheduler OneCycle" not in caplog.text and corrected.get_mom()[0][0] < 0.9


def test_a_learning_rate_that_becomes_negative_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    start(lr_scheduler=partial(lr_scheduler.StepLR, step_size=3, gamma=-1.0))
    assert (
        "scheduler StepLR: the learning rate of parameter group 0 leaves what optimizers accept at optimizer step 3"
        in (caplog.text)
    )


def test_a_corrected_schedule_has_nothing_to_confess(caplog: pytest.LogCaptureFixture) -> None:
    config = {"train_batch_size": 4, "optimizer": ADAM, "redline": {"schedules": "corrected"},
              "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}  # fmt: skip
    assert len(said(caplog, config)) == 1


def test_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert said(caplog, {**CONFIG, "scheduler": WARMUP}) == []


def test_training_data_becomes_a_loader_of_micro_batches() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(10.0))
    engine = start({"train_micro_batch_size_per_gpu": 4}, training_data=data)
    assert [len(x) for (x,) in engine.training_dataloader] == [4, 4, 2]
    dropping = start({"train_micro_batch_size_per_gpu": 4, "dataloader_drop_last": True}, training_data=data,
                     collate_fn=lambda samples: len(samples))  # fmt: skip
    assert list(dropping.training_dataloader) == [4, 4]


def test_the_data_section_reaches_the_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(10))
    engine = start({"train_batch_size": 2, "redline": {"data": {"shuffle": False}}}, training_data=data)
    assert [x.tolist() for (x,) in engine.training_dataloader] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    orders = [
        [
            x.tolist()
            for (x,) in start({"train_batch_size": 2, "redline": redline}, training_data=data).training_dataloader
        ]
        for redline in ({}, {"data": {"seed": 0}}, {"data": {"seed": 1}})
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("accumulated", "words"),
    [
        (1, "data: 10 samples; an epoch is 5 micro-batches and 5 optimizer steps"),
        (2, "data: 10 samples; an epoch is 5 micro-batches and 2.5 optimizer steps; 2 accumulated do not divide it, so "
            "that a step spans the end of an epoch; engine.flush() makes the last one"),
    ],
)  # fmt: skip
def test_the_length_of_an_epoch_is_said(accumulated: int, words: str, caplog: pytest.LogCaptureFixture) -> None:
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulated}
    caplog.set_level("INFO", "redline")
    start(config, training_data=torch.utils.data.TensorDataset(torch.arange(10)))
    assert caplog.messages[-1] == words


def test_a_loader_of_other_data_is_in_order_for_an_evaluation() -> None:
    engine = start(
        {"train_micro_batch_size_per_gpu": 2}, training_data=torch.utils.data.TensorDataset(torch.arange(10)),
        collate_fn=list,
    )  # fmt: skip
    assert list(engine.deepspeed_io(range(5), route="eval")) == [[0, 1], [2, 3], [4]]
    assert list(engine.deepspeed_io(range(5), 5, data_sampler=[3, 1], collate_fn=sum)) == [4]
    assert sorted(*engine.deepspeed_io(range(5), 5)) == [0, 1, 2, 3, 4]


def test_without_training_data_there_is_no_loader() -> None:
    assert start().training_dataloader is None
