"""A tuning from Python: what it runs, what it writes, what it refuses; the engine is restored, the config trains."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from redline import Engine, RangeTestError, Tuning, initialize, tune
from redline.config import validate
from redline.range_test.suggest import Refusal, Suggestion
from redline.range_test.task import Task
from redline.tuning.api import Engines
from redline.tuning.budget import Request
from redline.tuning.report import summarize, write_tuning
from redline.tuning.result import load_tuning, save_tuning
from redline.tuning.search import part_of
from redline.tuning.trials import Trial
from redline.tuning.tuner import empty_tuning
from tests.distributed import run_ranks

MOMENTUM = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}


def make_data(size: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]]) + 0.1 * torch.randn(size, 1, generator=generator)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def make_engine(model: nn.Module | None = None, **config: Any) -> Engine:
    sgd = {"type": "SGD", "params": {"lr": 0.01}}
    config = {"train_batch_size": 8, "gradient_clipping": 0, "optimizer": sgd, **config}
    return initialize(model or make_model(), config, device="cpu")


def make_engine_of_groups(*lrs: float) -> Engine:
    model = make_model()
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip((model[0], model[2]), lrs)]
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    return initialize(model, config, device="cpu", model_parameters=groups)


def run(engine: Engine | None = None, *, data: Any = None, loss: Any = None, **arguments: Any) -> Tuning:
    arguments = {"steps": 4000, "validation": make_data(64), "progress": False, **arguments}
    data = make_data() if data is None else data
    return tune(engine or make_engine(), data, loss or nn.MSELoss(), **arguments)


whole = cache(run)  # one tuning for the tests that only read it
without_validation = cache(lambda: run(validation=None))


def float_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]).float(), batch[1])


def names(tuning: Tuning) -> list[str]:
    return [curve.name for curve in tuning.test.curves]


def train(config: dict[str, Any] | Path, steps: int) -> float:
    """Validation loss after so many steps with a config."""
    model = make_model()
    engine = initialize(model, config, device="cpu", training_data=torch.utils.data.TensorDataset(*make_data()))
    assert engine.training_dataloader is not None
    while engine.global_steps < steps:
        for x, y in engine.training_dataloader:
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()
    x, y = make_data(64)
    return float(nn.functional.mse_loss(model(x), y).detach())


# -- the stages ----------------------------------------------------------------------------------------------


def test_sweep_search_and_trials_come_to_a_config_that_trains_better_than_the_base(tmp_path: Path) -> None:
    engine = make_engine(optimizer={"type": "SGD", "params": {"lr": 1e-4}})
    tuning = run(engine, out=tmp_path)
    assert [(curve.name, curve.kind) for curve in tuning.test.curves] == [("sweep", "exponential")]
    assert {trial.schedule for trial in tuning.trials} == {"OneCycle", "WarmupDecayLR", "own"}
    assert tuning.winner is not None and not tuning.winner.diverged
    assert tuning.spent <= 400 and tuning.stopped is None
    assert validate(tmp_path / "tuned.json").exit_code == 0
    assert train(tmp_path / "tuned.json", 200) < 0.5 * train(engine.config.document(), 200)


def test_the_engine_is_as_it_was_before() -> None:
    def trained(*, tunes: bool) -> list[Tensor]:
        torch.manual_seed(0)
        engine = make_engine(nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1)))
        data = make_data()
        if tunes:
            run(engine, data=data, seeds=2, batch_sizes=[16], sweep={"weight_decay": [0.1]}, steps=5000)
        for start in range(0, 40, 8):
            x, y = (part[start : start + 8] for part in data)
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()
        return [*copy.deepcopy(engine.module.state_dict()).values(), torch.rand(3)]

    assert all(torch.equal(one, other) for one, other in zip(trained(tunes=False), trained(tunes=True)))


@pytest.mark.parametrize("validation", [None, make_data(64)], ids=["training loss", "validation loss"])
def test_a_small_budget_is_spent_on_tries_from_the_own_rate_on(validation: Any, tmp_path: Path) -> None:
    tuning = run(make_engine(optimizer=MOMENTUM), validation=validation, steps=400, out=tmp_path)
    assert (names(tuning), tuning.trials, tuning.winner) == ([], (), None)
    assert tuning.search[0].lr == 0.01 and len(tuning.search) >= 4
    assert any("schedule trials are left out" in sentence for sentence in tuning.left_out)
    assert tuning.to_config()["scheduler"]["type"] == "WarmupDecayLR"
    assert validate(tmp_path / "tuned.json").exit_code == 0 and (tmp_path / "report.html").exists() is False
    write_tuning(tuning, tmp_path)
    assert (tmp_path / "report.html").exists()


def test_the_seed_of_the_config_orders_the_data_of_a_tuning() -> None:
    one, same, other = (run(make_engine(redline={"data": {"seed": seed}}), steps=400) for seed in (0, 0, 1))
    assert one.search[0].curve.losses == same.search[0].curve.losses != other.search[0].curve.losses


def test_batch_norm_is_validated_with_statistics_of_the_present_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    x, y = make_data(600)
    tuning = run(make_engine(model, train_batch_size=32), data=(x, y), validation=(x, y), steps=1000)
    best = min(tuning.search, key=lambda trial: trial.loss)
    assert best.loss < 0.1, "it is 0.3 with the statistics of the training"
    assert model[1].momentum == 0.1 and model[1].num_batches_tracked == 0


def test_a_config_that_names_the_start_is_not_swept() -> None:
    scheduler = {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3}}
    tuning = run(make_engine(scheduler=scheduler))
    assert names(tuning) == ["slow", "fast"]
    assert {curve.lrs[0] for curve in tuning.test.curves} == {1e-3}
    assert tuning.to_config().get("scheduler", {}).get("type") != "LRRangeTest"
    # DeepSpeed's default was not named by anybody.
    assert names(run(make_engine(scheduler={"type": "LRRangeTest"}))) == ["sweep"]


def test_without_validation_data_training_losses_decide() -> None:
    tuning = without_validation()
    assert tuning.winner is not None and tuning.winner.loss > 0
    assert any("There is no validation data" in sentence for sentence in tuning.left_out)


def test_a_parameter_group_with_learning_rate_0_keeps_it_and_gets_no_cycle(tmp_path: Path) -> None:
    tuning = run(make_engine_of_groups(0.1, 0.0), out=tmp_path)
    assert {trial.schedule for trial in tuning.trials} == {"WarmupDecayLR", "own"}
    assert any(sentence.startswith("OneCycle is left out: a parameter group") for sentence in tuning.left_out)
    assert tuning.to_config()["scheduler"]["params"]["warmup_max_lr"][1] == 0.0
    assert validate(tmp_path / "tuned.json").exit_code == 0


@pytest.mark.parametrize("steps", [120, 1000, 2990])
def test_the_budget_is_never_exceeded_and_every_step_is_counted(steps: int) -> None:
    tuning = run(steps=steps, budget=0.1)
    curves = [*tuning.test.curves, *(trial.curve for trial in (*tuning.search, *tuning.trials))]
    assert sum(len(curve.losses) for curve in curves) == tuning.updates == tuning.spent - tuning.validation_cost
    assert 0 < tuning.validation_cost <= 0.3 * tuning.spent and tuning.spent <= steps / 10


@pytest.mark.parametrize(
    ("config", "own_lr", "momentum"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05}}}, 0.05, 0.0),
        (
            {"scheduler": {"type": "OneCycle", "params": {
                "cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_momentum": False}}},
            0.3, 0.0,
        ),
        ({"scheduler": {"type": "LRRangeTest", "params": {}}}, 0.01, 0.0),
        ({"optimizer": MOMENTUM}, 0.01, 0.9),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9]}}}, None, 0.0),
    ],
    ids=["warm-up", "cycle", "range test", "momentum", "Adam"],
)  # fmt: skip
def test_the_configs_own_learning_rate_is_its_highest_and_only_a_heavy_ball_has_momentum(
    config: dict[str, Any], own_lr: float | None, momentum: float
) -> None:
    tuning = empty_tuning(make_engine(**config), Request(steps=400, budget=0.1))
    assert (tuning.own_lr, tuning.momentum) == (own_lr, momentum)


# -- the peak search -----------------------------------------------------------------------------------------


def test_tries_are_short_linear_decays_and_the_answer_lies_among_them() -> None:
    tuning = whole()
    for trial in tuning.search:
        lrs = trial.curve.lrs
        assert trial.curve.kind == "decay" and lrs[0] == trial.lr
        assert all(one > other for one, other in pairwise(lrs))
        if not trial.diverged:
            assert lrs[-1] == pytest.approx(trial.lr / len(lrs)), "one step above zero"
            assert [step for step, _ in trial.curve.validation] == [0, len(lrs)]
    assert sum(not trial.diverged for trial in tuning.search) >= 3
    answer, peaks = tuning.answer, sorted(trial.lr for trial in tuning.search)
    assert isinstance(answer, Suggestion) and answer.curve == "search"
    assert peaks[0] < answer.cycle_max_lr < peaks[-1]
    assert answer.low_lr <= answer.cycle_max_lr <= answer.high_lr
    assert {trial.lr for trial in tuning.trials if trial.schedule != "own"} == {answer.cycle_max_lr}


@pytest.mark.parametrize("own", [{}, {"type": "WarmupLR", "params": {"warmup_num_steps": 2000}}], ids=["none", "own"])
def test_the_schedules_that_were_asked_for_and_the_own_one_are_tried_in_small(own: dict[str, Any]) -> None:
    tuning = run(make_engine(**({"scheduler": own} if own else {})), schedules=["cosine", "linear", "wsd"])
    assert [trial.schedule for trial in tuning.trials] == [
        "WarmupCosineLR",
        "WarmupDecayLR",
        "WarmupStableDecayLR",
        "own",
    ]
    lrs = [trial.curve.lrs for trial in tuning.trials]
    assert max(lrs[0]) == pytest.approx(max(lrs[1]), rel=0.1)
    assert lrs[2].count(max(lrs[2])) > len(lrs[2]) / 2
    assert (lrs[3][0] < lrs[3][-1]) == bool(own)
    cosine = replace(tuning, trials=tuning.trials[:1]).to_config()
    assert cosine["optimizer"]["params"]["lr"] == tuning.trials[0].lr


def test_of_several_trainings_the_best_one_is_kept_and_is_the_trained_model(tmp_path: Path) -> None:
    engine = make_engine()
    tuning = run(engine, steps=60, budget=3, out=tmp_path, validation=make_data(32))
    in_full = [trial for trial in tuning.search if trial.steps == 60]
    best = min(in_full, key=lambda trial: trial.loss)
    assert len(in_full) >= 2 and isinstance(tuning.answer, Suggestion)
    assert any("is kept" in note for note in tuning.notes())
    trained = make_engine()
    trained.load_checkpoint(tmp_path / "trained", load_lr_scheduler_states=False)
    x, y = make_data(32)
    loss = nn.functional.mse_loss(trained.module(x), y)
    assert float(loss.detach()) == pytest.approx(best.loss) and trained.global_steps == 60
    assert tuning.answer.cycle_max_lr == best.lr
    assert engine.global_steps == 0


def test_a_rise_on_the_way_ends_no_trial_and_a_loss_that_is_not_finite_does() -> None:
    def loss_with(spike: float) -> Any:
        steps = 0

        def loss(model: nn.Module, batch: Any) -> Tensor:
            nonlocal steps
            steps += model.training
            added = spike if model.training and 24 <= steps < 32 else 0.0  # of the second trial
            return nn.functional.mse_loss(model(batch[0]), batch[1]) + added

        return loss

    first, second, *_ = run(loss=loss_with(1000.0), steps=260, budget=0.5).search
    assert 8 < first.steps == second.steps < 24
    assert max(second.curve.losses) > 1000 and len(second.curve.losses) == second.steps and not second.diverged
    second = run(loss=loss_with(math.nan), steps=260, budget=0.5).search[1]
    assert second.diverged and len(second.curve.losses) < second.steps


def noisy_data(size: int, seed: int, signal: float = 4.0) -> tuple[Tensor, Tensor]:
    """Mostly noise: a wide network learns a few samples of it by heart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 20, generator=generator)
    return x, signal * x.sum(1, keepdim=True) / 20 + torch.randn(size, 1, generator=generator)


def test_a_training_that_learns_its_data_by_heart_gets_a_far_lower_rate() -> None:
    def rate(size: int) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 1))
        engine = make_engine(model, optimizer={"type": "Adam", "params": {"lr": 0.01}})
        tuning = run(engine, data=noisy_data(size, 0), validation=noisy_data(500, 1), steps=800, budget=0.2)
        assert isinstance(tuning.answer, Suggestion)
        assert any("The training sees the data" in note for note in tuning.notes()) == (size == 64)
        assert ("The training sees its data more often" in tuning.answer.reasons["cycle_max_lr"]) == (size == 64)
        return tuning.answer.cycle_max_lr

    assert rate(64) < rate(6400) / 10, "100 passes over 8 batches, and one over 800"


@pytest.mark.parametrize(
    ("size", "part"),
    [(64, 4), (960, 10), (4000, None)],  # of 8, 120 and 500 steps that see all: 50, 3.3 and less than one time
)
def test_trials_of_search_and_schedules_see_a_part_of_the_data_as_often_as_the_training_sees_all(
    size: int, part: int | None
) -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            seen.append(batch[0])
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    tuning = run(data=noisy_data(size, 0)[:2], loss=loss, engine=make_engine(nn.Linear(20, 1)), steps=400,
                 validation=noisy_data(100, 1), budget=1)  # fmt: skip
    tests = sum(len(curve.losses) for curve in tuning.test.curves)
    for trials in (tuning.search, tuning.trials):
        steps = trials[0].steps
        own = seen[tests : tests + steps]
        tests += sum(len(trial.curve.losses) for trial in trials)
        distinct = {tuple(x.flatten().tolist()) for x in own}
        assert len(distinct) == (part_of(steps, 400, size / 8) or steps)
        if part is not None:
            assert all(torch.equal(x, y) for x, y in zip(own, own[len(distinct) :])), "in the same order"
    assert tuning.search[0].curve.part == part


def test_without_validation_data_a_trial_sees_all_data_whose_loss_is_a_validation_of_its_own() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0])
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    tuning = run(loss=loss, validation=None, steps=400, budget=0.5)  # 25 epochs of 16 steps
    assert len({tuple(x.flatten().tolist()) for x in seen[: tuning.search[0].steps]}) >= 16


def test_trials_of_many_epochs_measure_the_loss_on_the_batches_that_they_started_with() -> None:
    measured: list[tuple[bool, int, float]] = []  # in training, samples, loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = nn.functional.mse_loss(model(batch[0]), batch[1])
        measured.append((model.training, len(batch[0]), found.item()))
        return found

    engine = make_engine()
    tuning = run(engine, loss=loss, validation=make_data(64), steps=400, budget=0.5)  # 25 epochs of 16 steps
    fitted = [trial.curve.fitted for trial in tuning.search]
    assert all((one is None) == (trial.curve.seed != 0 or trial.diverged) for one, trial in zip(fitted, tuning.search))
    assert all(one is None for one in (curve.fitted for curve in tuning.test.curves))
    assert len({one[0] for one in fitted if one is not None}) == 1, "all start with the same weights and batches"
    own = [loss for training, size, loss in measured if not training and size == 8]  # validation batches have 64
    assert [sum(own[:2]) / 2, sum(own[2:4]) / 2] == pytest.approx(fitted[0]), "of two steps, before and after"


@pytest.mark.parametrize(
    "other",
    [
        {"data": make_data(8000)},
        {"validation": lambda model: float(next(model.parameters()).norm())},
        {"validation": None},
        {"budget": 0.08},
    ],
    ids=["one epoch", "a metric", "no validation", "little room"],
)
def test_else_they_do_not(other: dict[str, Any]) -> None:
    tuning = run(**{"steps": 400, "budget": 0.5, **other})
    assert tuning.search and all(trial.curve.fitted is None for trial in tuning.search)


@pytest.mark.parametrize("validation", [None, make_data(64)], ids=["training loss", "validation loss"])
def test_a_model_that_gets_no_gradient_is_refused_whatever_the_sweep_says(validation: Any) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])
        return nn.functional.mse_loss(out.detach(), batch[1]) + 0 * out.sum()

    tuning = run(loss=loss, validation=validation, steps=1000)
    assert isinstance(tuning.test.suggestion, Refusal)
    assert tuning.refusal is not None and "above the loss of the initial weights" in tuning.refusal.reason
    assert "Check that gradients reach the parameters" in tuning.refusal.remedy
    with pytest.raises(RangeTestError, match="no config can be suggested"):
        tuning.to_config()


@pytest.mark.parametrize(
    ("optimizer", "steps"), [(MOMENTUM, 4000), ({"type": "Adam", "params": {"lr": 0.001}}, 1000)], ids=["SGD", "Adam"]
)
def test_a_trained_model_gets_no_config_or_at_most_its_own_rate(optimizer: dict[str, Any], steps: int) -> None:
    x, y = make_data(600)
    model = nn.Linear(4, 1)
    solution = torch.linalg.lstsq(torch.cat([x[:500], torch.ones(500, 1)], 1), y[:500]).solution
    with torch.no_grad():
        model.weight.copy_(solution[:4].T)
        model.bias.copy_(solution[4])
    engine = make_engine(model, optimizer=optimizer)
    tuning = run(engine, data=(x[:500], y[:500]), validation=(x[500:], y[500:]), steps=steps)
    if isinstance(tuning.answer, Refusal):
        assert tuning.choice is tuning.refusal is not None
    else:
        assert tuning.own_lr is not None and tuning.answer.cycle_max_lr <= tuning.own_lr, "it does no harm"


def test_in_fp16_the_loss_scale_is_found_once_and_later_runs_lose_no_steps() -> None:
    engine = make_engine(
        fp16={"enabled": True, "initial_scale_power": 32}, optimizer={"type": "Adam", "params": {"lr": 0.01}}
    )
    tuning = run(engine, loss=float_loss)
    assert len(tuning.test.curves[0].skipped) >= 10
    best = min(tuning.search, key=lambda trial: (trial.diverged, trial.loss)).lr
    assert all(trial.curve.skipped == () for trial in tuning.search if trial.lr <= best)
    assert engine.loss_scale == 2**32


def test_an_engine_that_is_built_for_another_seed_starts_at_the_loss_scale_that_was_found() -> None:
    def build(seed: int) -> tuple[Engine, Task]:
        task = Task(nn.Linear(4, 1), make_data(), nn.MSELoss())
        return make_engine(task.model, fp16={"enabled": True, "initial_scale_power": 32}), task

    engines = Engines(build, per_seed=True)
    scaler = engines.session(0).engine.scaler
    assert scaler is not None
    settled = {**scaler.state_dict(), "value": 8.0}
    engines.session(0).scale = settled
    assert engines.session(1).scale == settled
    engines.close()


# -- comparisons and targets ---------------------------------------------------------------------------------


def test_batch_sizes_and_settings_are_compared_by_tests_of_one_length(tmp_path: Path) -> None:
    tuning = run(data=make_data(6000), steps=8000, batch_sizes=[16], sweep={"weight_decay": [0, 0.5]})
    assert [curve.name for curve in tuning.comparisons] == [
        "sweep, batch 8", "sweep, batch 16", "sweep, weight_decay 0", "sweep, weight_decay 0.5",
    ]  # fmt: skip
    assert {curve.lrs[0] for curve in tuning.comparisons} == {tuning.comparisons[0].lrs[0]}
    assert [size for size, answer in tuning.batches if isinstance(answer, Suggestion)] == [8, 16]
    assert [(each.name, each.value) for each in tuning.settings] == [("weight_decay", 0.0), ("weight_decay", 0.5)]
    assert tuning.spent > tuning.updates, "a step at 16 costs two at 8"
    assert "The config keeps its own" in summarize(tuning)
    save_tuning(tuning, tmp_path)
    assert load_tuning(tmp_path) == tuning


def test_the_config_for_a_target_has_its_batch_and_sees_as_many_samples(tmp_path: Path) -> None:
    data = make_data(6000)  # fewer than 12 epochs
    tuning = run(data=data, steps=8000, batch_sizes=[32], target_batch_size=16, target_processes=2, out=tmp_path)
    config = tuning.to_config()
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 8)
    assert config["gradient_accumulation_steps"] == 1
    assert config["_range_test"]["train_steps"] == 4000
    assert config["_tune"]["measured_at_batch_sizes"] == [8, 32]
    assert validate(tmp_path / "tuned.json", world_size=2).exit_code == 0
    assert tuning.scaled is not None and tuning.scaled.how == "interpolated"
    assert any("Interpolated for batch size 16" in note for note in tuning.notes())


@pytest.mark.parametrize("target", [None, 64])
def test_only_a_config_beyond_what_was_measured_warns_where_it_is_made_and_where_it_trains(
    target: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    tuning = replace(whole(), target_batch_size=target)
    assert any("above every batch size measured" in note for note in tuning.notes()) == (target is not None)
    caplog.set_level(logging.WARNING, "redline")
    initialize(nn.Linear(4, 1), tuning.to_config(), device="cpu")
    warnings = [record.message for record in caplog.records if "_range_test" in record.message]
    assert len(warnings) == (target is not None)
    assert all("were found at batch size 8, and train_batch_size is 64" in warning for warning in warnings)


def test_without_a_test_at_the_own_batch_size_those_at_others_are_not_used() -> None:
    tuning = run(batch_sizes=[16], target_batch_size=16)
    flat = tuple(
        replace(curve, losses=(1.0,) * len(curve.losses)) if curve.train_batch_size == 8 else curve
        for curve in tuning.comparisons
    )
    scaled = replace(tuning, comparisons=flat).scaled
    assert scaled is not None and scaled.how == "extrapolated"
    assert "The tests at 16 were not used: the one at 8" in scaled.why


def test_fixed_learning_rates_for_the_scripts_own_groups_are_named() -> None:
    tuning = whole()
    fixed = next(trial for trial in tuning.trials if trial.schedule == "own")
    groups = replace(tuning.test, group_ratios=(1.0, 0.1))
    how = replace(tuning, test=groups, trials=(fixed,)).to_config()["_tune"]
    assert how["schedule"] == "own"
    assert f"learning rates {fixed.lr:g}, {0.1 * fixed.lr:.6g}, in this order" in how["to_do"]


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_where_every_rate_that_was_tried_is_too_high_the_remedy_is_a_lower_one(budget: float) -> None:
    x = 30 * torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    config = {"train_batch_size": 16, "gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"lr": 10.0}}}
    engine = initialize(nn.Linear(4, 1), config, device="cpu")
    tuning = tune(engine, data, nn.MSELoss(), steps=300, budget=budget, validation=data, progress=False)
    assert tuning.refusal is not None and "above the loss of the initial weights" in tuning.refusal.reason
    assert tuning.refusal.remedy.startswith("Start lower")


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (make_engine, {"steps": 0}, "steps: got 0; expected an integer >= 1"),
        (make_engine, {"seeds": 1.5}, "seeds: got 1.5"),
        (make_engine, {"steps": 20}, "a search takes 12 at least"),
        (make_engine, {"budget": 0}, "budget: got 0; expected a multiple of the planned steps"),
        (make_engine, {"budget": float("nan")}, "budget: got nan"),
        (make_engine, {"batch_sizes": [12]}, "got 12; expected a multiple of 8, the micro-batch of 8 on 1 rank"),
        (make_engine, {"batch_sizes": [8, 0]}, "got 0; expected a multiple of 8"),
        (make_engine, {"sweep": {"lr": [1]}}, 'got "lr"; expected weight_decay or momentum'),
        (make_engine, {"sweep": {"weight_decay": [-1]}}, "weight_decay: got -1.0; expected a number >= 0"),
        (make_engine, {"sweep": {"momentum": [0.9, 1.0]}}, "momentum: got 1.0; expected a number from 0 to below 1"),
        (make_engine, {"target_batch_size": 9, "target_processes": 2}, "9 is not divisible by 2 processes"),
        (
            lambda: make_engine(optimizer={"type": "Adagrad", "params": {"lr": 0.01}}), {"sweep": {"momentum": [0.9]}},
            "momentum: the optimizer, Adagrad, has none",
        ),
        (lambda: make_engine_of_groups(0.0, 0.1), {}, "are 0, 0.1; expected"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused_before_anything_is_run(
    make: Callable[[], Engine], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RangeTestError) as caught:
        run(make(), loss=lambda model, batch: pytest.fail("it was run"), **arguments)
    assert message in str(caught.value)


def test_trials_that_all_diverge_get_no_config() -> None:
    broken = replace(whole(), trials=tuple(replace(trial, diverged=True) for trial in whole().trials))
    assert broken.winner is None
    assert broken.refusal is not None and "trials diverged" in broken.refusal.reason


# -- files -------------------------------------------------------------------------------------------------


def test_a_tuning_is_read_again_for_another_length_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tuning = whole()
    lines = write_tuning(tuning, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tune.json", "tune.csv", "tuned.json", "tune.png", "report.html"
    }  # fmt: skip
    again = load_tuning(tmp_path)
    assert again == tuning and again.to_config() == tuning.to_config()
    assert again.planned_for(50_000).to_config()["_range_test"]["train_steps"] == 50_000
    table = (tmp_path / "tune.csv").read_text()
    assert len(table.splitlines()) > tuning.updates
    assert all(trial.curve.name in table for trial in tuning.search)
    assert f"redline validate {tmp_path / 'tuned.json'}" in lines
    page, summary = (tmp_path / "report.html").read_text(), summarize(tuning)
    assert "<- wins" in summary and "OneCycle" in page
    for trial in tuning.search:
        loss = "diverged" if trial.diverged else f"{trial.loss:.4g}"
        assert loss in page and loss in summary
    assert "Suggested linear decay" in page and tuning.summary() in summary
    assert repr(tuning).endswith(f": WarmupDecayLR {tuning.choice.lr:g}>")
    assert "Suggested linear decay" in tuning._repr_html_()
    assert tuning.plot(tmp_path / "a.png").exists() and tuning.save(tmp_path)["config"] == tmp_path / "tuned.json"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"test": {}}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RangeTestError, match=r"there is no tune\.json"):
        load_tuning(tmp_path)
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(RangeTestError, match="is not the record of a tuning"):
        load_tuning(tmp_path)


# -- several processes ---------------------------------------------------------------------------------------


def tune_on_ranks(stage: int) -> tuple[list[str], bool, list[Trial], list[float], str, int]:
    tuning = run(make_engine(zero_optimization={"stage": stage}), seeds=2, steps=4000)
    torch.distributed.destroy_process_group()
    assert tuning.winner is not None
    losses = [trial.loss for trial in tuning.trials]
    one, other = (curve.losses for curve in tuning.test.curves)
    return names(tuning), one == other, list(tuning.search), losses, tuning.winner.schedule, tuning.spent


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.long)])
def test_two_ranks_come_to_the_same_answer_and_other_seeds_have_the_data_in_another_order(stage: int) -> None:
    first, second = run_ranks(tune_on_ranks, 2, stage)
    assert first == second
    assert first[:2] == (["sweep", "sweep, seed 1"], False)
    assert any(trial.curve.fitted is not None for trial in first[2])


def tune_on_unequal_loaders() -> tuple[float | None, list[float], float]:
    rank = int(os.environ["RANK"])
    x, y = make_data(80)
    data = [(x[start : start + 4], y[start : start + 4]) for start in range(0, 40 - 4 * rank, 4)]  # 10 batches, or 9
    tuning = run(data=data, steps=60, budget=1)
    torch.distributed.destroy_process_group()
    assert isinstance(tuning.answer, Suggestion)
    return tuning.steps_per_epoch, [trial.lr for trial in tuning.search], tuning.answer.cycle_max_lr


def test_ranks_whose_loaders_have_unequal_lengths_make_the_same_trials() -> None:
    first, second = run_ranks(tune_on_unequal_loaders, 2)
    assert first == second and first[0] == 10
