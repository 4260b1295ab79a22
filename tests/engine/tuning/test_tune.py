"""A tuning from Python: what it runs, what it writes, what it refuses; the engine is as before, the config trains."""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Engine, RangeTestError, Tuning, initialize, tune
from engine.config import validate
from engine.range_test.suggestion import Refusal, Suggestion
from engine.range_test.task import Task
from engine.tuning.plan import TRIES, Request, make_plan
from engine.tuning.report import write_tuning
from engine.tuning.result import tries_of
from engine.tuning.stand import FreshEngines
from engine.tuning.store import load_tuning, save_tuning
from engine.tuning.summary import summarize
from engine.tuning.trials import Trial
from engine.tuning.tuner import facts_of
from tests.distributed import run_ranks
from tests.monitors import read_tensorboard


def make_data(size: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]]) + 0.1 * torch.randn(size, 1, generator=generator)


def make_engine(model: nn.Module | None = None, **config: Any) -> Engine:
    torch.manual_seed(0)
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        **config,
    }
    return initialize(model or nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)), config, device="cpu")


def run(engine: Engine | None = None, *, data: Any = None, loss: Any = None, **arguments: Any) -> Tuning:
    arguments = {"steps": 4000, "validation": make_data(64), "progress": False, **arguments}
    data = make_data() if data is None else data
    return tune(engine or make_engine(), data, loss or nn.MSELoss(), **arguments)


def names(tuning: Tuning) -> list[str]:
    return [curve.name for curve in tuning.test.curves]


def train(config: dict[str, Any] | Path, updates: int, *, seed: int = 0) -> float:
    """Validation loss after so many updates with a config."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    engine = initialize(model, config, device="cpu", training_data=torch.utils.data.TensorDataset(*make_data()))
    assert engine.training_dataloader is not None
    while engine.global_steps < updates:
        for x, y in engine.training_dataloader:
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()
    x, y = make_data(64)
    return float(nn.functional.mse_loss(model(x), y).detach())


# -- the whole way -------------------------------------------------------------------------------------------


def test_sweep_linear_tests_and_trials_come_to_a_config_that_trains_better_than_the_base(tmp_path: Path) -> None:
    engine = make_engine(optimizer={"type": "SGD", "params": {"lr": 1e-4}})
    tuning = run(engine, out=tmp_path)
    assert names(tuning) == ["sweep", "slow", "fast"]
    assert [curve.kind for curve in tuning.test.curves] == ["exponential", "linear", "linear"]
    assert {trial.schedule for trial in tuning.trials} >= {"OneCycle", "WarmupDecayLR"}
    assert tuning.winner is not None and not tuning.winner.diverged
    assert tuning.spent <= 400 and tuning.stopped is None
    written = tmp_path / "tuned.json"
    assert validate(written).exit_code == 0
    assert train(written, 200) < 0.5 * train(engine.config.document(), 200)


def test_the_engine_is_as_it_was_before() -> None:
    def trained(*, tunes: bool) -> list[Tensor]:
        torch.manual_seed(0)
        engine = make_engine(nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1)))
        data = make_data()
        if tunes:
            run(engine, data=data, seeds=2, batch_sizes=[16], sweep={"weight_decay": [0, 0.1]}, steps=8000)
        for start in range(0, 40, 8):
            x, y = (part[start : start + 8] for part in data)
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()
        return [*copy.deepcopy(engine.module.state_dict()).values(), torch.rand(3)]

    assert all(torch.equal(one, other) for one, other in zip(trained(tunes=False), trained(tunes=True)))


def test_eighteen_updates_are_a_sweep_whose_suggestion_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(640) % 10
    data = torch.randn(10, 64, generator=generator)[labels] + torch.randn(640, 64, generator=generator), labels
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    engine = make_engine(model, train_batch_size=32, optimizer={"type": "Adam", "params": {"lr": 0.001}})
    tuning = run(engine, data=data, loss=nn.CrossEntropyLoss(), validation=None, steps=180, out=tmp_path)
    assert names(tuning) == ["sweep"]
    assert tuning.trials == () and tuning.winner is None
    assert tuning.updates <= 18 and tuning.search == ()
    assert any(sentence.startswith("Trials are left out") for sentence in tuning.left_out)
    config = json.loads((tmp_path / "tuned.json").read_text())
    assert config["_tune"]["why"].startswith("No schedule was tried")
    assert validate(tmp_path / "tuned.json").exit_code == 0


def test_what_a_diverged_test_does_not_use_goes_to_the_trials() -> None:
    tuning = run(steps=4000)
    sweep = tuning.test.curves[0]
    assert len(sweep.losses) < 120, "the sweep is there to diverge"
    assert 400 - tuning.spent < 10 * len(tuning.trials)
    planned = make_plan(Request(steps=4000, batch_size=8)).trials
    assert len(tuning.trials) * len(tuning.trials[0].curve.losses) > planned


def test_a_config_that_names_the_start_is_not_swept() -> None:
    scheduler = {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3}}
    tuning = run(make_engine(scheduler=scheduler))
    assert names(tuning) == ["slow", "fast"]
    assert {curve.lrs[0] for curve in tuning.test.curves} == {1e-3}
    assert tuning.to_config().get("scheduler", {}).get("type") != "LRRangeTest"
    # DeepSpeed's default is nobody's choice.
    assert names(run(make_engine(scheduler={"type": "LRRangeTest"})))[0] == "sweep"


def test_without_validation_data_trials_are_judged_by_their_training_loss() -> None:
    tuning = run(validation=None)
    assert tuning.winner is not None and tuning.winner.loss > 0
    assert "There is no validation data: trials are judged by their training loss." in tuning.left_out


def test_parameter_groups_keep_their_ratios() -> None:
    tuning = run(make_engine_of_groups(0.1, 0.05), steps=8000)
    high = next(value for key, value in tuning.to_config()["scheduler"]["params"].items() if key.endswith("max_lr"))
    assert high[0] == pytest.approx(2 * high[1])
    assert tuning.own_lr == 0.1


def make_engine_of_groups(*lrs: float) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip((model[0], model[2]), lrs)]
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    return initialize(model, config, device="cpu", model_parameters=groups)


def test_a_parameter_group_whose_rate_is_0_keeps_it_and_has_no_1cycle(tmp_path: Path) -> None:
    tuning = run(make_engine_of_groups(0.1, 0.0), out=tmp_path)
    assert {trial.schedule for trial in tuning.trials} == {"WarmupDecayLR", "fixed"}
    assert any(sentence.startswith("1Cycle is left out: a parameter group") for sentence in tuning.left_out)
    config = tuning.to_config()
    assert config["scheduler"]["params"]["warmup_max_lr"][1] == 0.0
    assert validate(tmp_path / "tuned.json").exit_code == 0


def test_an_engine_whose_first_parameter_group_alone_has_the_rate_0_is_refused() -> None:
    with pytest.raises(RangeTestError, match=r"rates of the parameter groups are 0, 0\.1; expected the first one's"):
        run(make_engine_of_groups(0.0, 0.1), loss=lambda model, batch: pytest.fail("it was run"))


# -- the search ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "own"),
    [
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.05}}, 0.05),
        ({"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_momentum": False}}, 0.3),
        ({"type": "LRRangeTest", "params": {}}, 0.01),
    ],
)
def test_the_configs_own_rate_is_the_highest_of_its_schedule(scheduler: dict[str, Any], own: float) -> None:
    assert facts_of(make_engine(scheduler=scheduler), 100).own_lr == own


def test_with_heavy_ball_momentum_the_search_holds_its_rates() -> None:
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}}
    engine = initialize(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)), config, device="cpu")
    tuning = run(engine)
    assert tuning.momentum == 0.9 and len(tuning.search) == TRIES
    assert all(set(tried.curve.lrs) == {tried.lr} for tried in tuning.search)


def test_the_search_makes_short_linear_decays_and_the_peak_lies_among_them() -> None:
    tuning = run()
    assert len(tuning.search) == TRIES
    for tried in tuning.search:
        lrs = tried.curve.lrs
        assert tried.curve.kind == "decay" and lrs[0] == tried.lr
        assert all(one > other for one, other in pairwise(lrs))
        if not tried.diverged:
            assert lrs[-1] == pytest.approx(tried.lr / len(lrs)), "one step above zero"
            assert [updates for updates, _ in tried.curve.validation] == [0, len(lrs)]
    assert sum(not tried.diverged for tried in tuning.search) >= 3
    answer = tuning.answer
    assert isinstance(answer, Suggestion) and answer.curve == "search"
    peaks = sorted(trial.lr for trial in tuning.search)
    assert peaks[0] < answer.cycle_max_lr < peaks[-1]
    assert answer.low_lr < answer.cycle_max_lr < answer.high_lr
    assert {trial.lr for trial in tuning.trials if trial.schedule != "fixed"} == {answer.cycle_max_lr}


def test_a_search_rescues_a_sweep_that_is_too_short_to_be_read() -> None:
    engine = make_engine()
    tuning = run(engine, steps=400)
    assert isinstance(tuning.test.suggestion, Refusal), "the search is there to make up for it"
    assert tuning.refusal is None and tuning.trials == ()
    config = tuning.to_config()
    assert config["scheduler"]["type"] == "WarmupDecayLR"
    assert config["_tune"]["why"].startswith("No schedule was tried in whole")
    assert train(config, 400) < train(engine.config.document(), 400)


@pytest.mark.parametrize("validation", [None, make_data(64)], ids=["training loss", "validation loss"])
def test_a_model_that_gets_no_gradient_is_refused_whatever_the_sweep_says(validation: Any) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return nn.functional.mse_loss(out.detach(), batch[1]) + 0 * out.sum()

    tuning = run(loss=loss, validation=validation, steps=1000)
    assert isinstance(tuning.test.suggestion, Refusal)
    assert tuning.refusal is not None and "ended below its start" in tuning.refusal.reason
    assert "Check that gradients reach the parameters" in tuning.refusal.remedy
    # A record whose tests promise something is none the better for it.
    tuning = replace(tuning, test=run().test)
    assert tuning.test.has_suggestion and tuning.refusal is not None


def test_tries_that_diverge_early_give_their_updates_to_the_trials() -> None:
    x, y = make_data()
    tuning = run(data=(3 * x, 3 * y), validation=(3 * x[:64], 3 * y[:64]))
    plan = make_plan(Request(steps=4000, batch_size=8))
    assert any(trial.diverged and len(trial.curve.losses) < plan.search for trial in tuning.search)
    assert sum(len(trial.curve.losses) for trial in tuning.trials) > plan.trials
    assert tuning.answer != tuning.test.suggestion


def test_without_validation_data_tries_are_counted_from_the_loss_before_their_first_update() -> None:
    tuning = run(validation=None)
    (first,) = {trial.curve.losses[0] for trial in tuning.search}
    for trial, came in zip(tuning.search, tries_of(tuning.search)):
        later = trial.curve.losses[len(trial.curve.losses) // 2 :]
        assert came.loss == pytest.approx(sum(later) / len(later) - first)
    # The only sound one is an answer, the lowest peak though it be.
    lowest = min(tuning.search, key=lambda trial: trial.lr)
    broken = tuple(trial if trial is lowest else replace(trial, diverged=True) for trial in tuning.search)
    assert [came.loss for came in tries_of(broken)].count(math.inf) == TRIES - 1
    assert isinstance(replace(tuning, search=broken).answer, Suggestion)


@pytest.mark.parametrize("steps", [1000, 4000])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_a_finished_model_gets_no_config(optimizer: str, steps: int) -> None:
    x, y = make_data(600)
    model = nn.Linear(4, 1)
    solution = torch.linalg.lstsq(torch.cat([x[:500], torch.ones(500, 1)], 1), y[:500]).solution
    with torch.no_grad():
        model.weight.copy_(solution[:4].T)
        model.bias.copy_(solution[4])
    momentum = {"momentum": 0.9} if optimizer == "SGD" else {}
    engine = make_engine(model, optimizer={"type": optimizer, "params": {"lr": 0.001, **momentum}})
    tuning = run(engine, data=(x[:500], y[:500]), validation=(x[500:], y[500:]), steps=steps)
    assert isinstance(tuning.answer, Refusal), tries_of(tuning.search)
    assert tuning.choice is None


def test_an_answer_of_the_search_alone_says_so() -> None:
    tuning = run(steps=1000)
    curves = tuple(replace(curve, losses=(1.0,) * len(curve.losses)) for curve in tuning.test.curves)
    alone = replace(tuning, test=replace(tuning.test, curves=curves))
    assert isinstance(alone.answer, Suggestion)
    assert "The tests gave no answer, which is the search's alone. The loss does not fall" in " ".join(alone.notes())


def test_updates_that_the_loss_scaler_skipped_do_not_count_in_a_try() -> None:
    tuning = run(validation=None)
    first, *others = tuning.search
    length = len(first.curve.losses)
    losses = (*first.curve.losses[:-2], 1e6, 1e6)
    spoilt = replace(first, curve=replace(first.curve, losses=losses))
    skipped = replace(spoilt, curve=replace(spoilt.curve, skipped=(length - 2, length - 1)))

    def came(trial: Trial) -> float:
        return tries_of([trial, *others])[0].loss

    assert came(spoilt) > 1000
    assert came(skipped) == pytest.approx(came(first), abs=1.0)


def test_in_fp16_the_scale_is_looked_for_once_and_tries_lose_no_updates() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 32}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]).float(), batch[1])

    engine = make_engine(fp16=fp16, optimizer={"type": "Adam", "params": {"lr": 0.01}})
    tuning = run(engine, loss=loss, steps=1000)
    assert len(tuning.test.curves[0].skipped) >= 10
    assert len(tuning.search) == TRIES
    assert all(tried.curve.skipped == () for tried in tuning.search if not tried.diverged)
    assert engine.loss_scale == 2**32


def test_an_engine_that_is_built_for_another_seed_goes_on_with_the_scale() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 32}
    stand = FreshEngines(
        lambda: Task(nn.Linear(4, 1), make_data(), nn.MSELoss()), lambda task: make_engine(task.model, fp16=fp16), 0
    )
    scaler = stand.rig(0).engine.scaler
    assert scaler is not None
    settled = {**scaler.state_dict(), "value": 8.0}
    stand.rig(0).scale = settled
    assert stand.rig(1).scale == settled
    stand.close()


def test_updates_that_were_skipped_do_not_count_in_the_length_of_a_try() -> None:
    tuning = run()

    def with_skipped(trial: Trial) -> Trial:
        curve = trial.curve
        return replace(trial, curve=replace(curve, skipped=curve.steps[:10]))

    updates = max(len(trial.curve.losses) for trial in tuning.search)
    answer = replace(tuning, search=tuple(map(with_skipped, tuning.search))).answer
    assert isinstance(answer, Suggestion)
    assert f"of {updates - 10} updates each" in answer.reasons["cycle_max_lr"]


@pytest.mark.parametrize("steps", [120, 320, 1000, 2990, 4000])
def test_the_budget_is_never_exceeded_and_every_update_is_counted(steps: int) -> None:
    tuning = run(steps=steps)
    made = [*tuning.test.curves, *(trial.curve for trial in (*tuning.search, *tuning.trials))]
    assert sum(len(curve.losses) for curve in made) == tuning.spent == tuning.updates <= steps / 10


@pytest.mark.parametrize(
    ("optimizer", "momentum"),
    [
        ({"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}, 0.9),
        ({"type": "SGD", "params": {"lr": 0.01}}, 0.0),
        ({"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.9]}}, 0.0),
    ],
)
def test_the_momentum_of_a_heavy_ball_is_recorded(tmp_path: Path, optimizer: dict[str, Any], momentum: float) -> None:
    run(make_engine(optimizer=optimizer), steps=400, out=tmp_path)
    assert load_tuning(tmp_path).momentum == momentum


# -- monitors ------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_curves_of_tests_tries_and_trials(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    engine = make_engine(tensorboard={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    tuning = run(engine)
    engine.observers[0].close()  # type: ignore[union-attr]
    events = read_tensorboard(tmp_path / "job")
    groups = [("RangeTest", curve) for curve in tuning.test.curves]
    groups += [("Search", trial.curve) for trial in tuning.search]
    groups += [("Trials", trial.curve) for trial in tuning.trials]
    assert tuning.search and tuning.trials
    for group, curve in groups:
        found = events.Scalars(f"{group}/{curve.name}/loss")
        assert [event.value for event in found] == pytest.approx(list(curve.losses))
    (text,) = events.Tensors("RangeTest/suggestion/text_summary")
    assert b"short trainings" in text.tensor_proto.string_val[0]


# -- what else is asked for ----------------------------------------------------------------------------------


def test_other_seeds_repeat_the_tests_in_another_order_of_the_data() -> None:
    tuning = run(steps=5000, seeds=2)
    assert names(tuning) == ["sweep", "slow", "fast", "slow, seed 1", "fast, seed 1"]
    slow, again = tuning.test.curves[1], tuning.test.curves[3]
    assert again.seed == 1 and slow.losses != again.losses


def test_batch_sizes_and_settings_are_compared_by_tests_of_one_length() -> None:
    tuning = run(steps=8000, batch_sizes=[16], sweep={"weight_decay": [0, 0.5]})
    assert [curve.name for curve in tuning.comparisons] == [
        "sweep, batch 8", "sweep, batch 16", "sweep, weight_decay 0", "sweep, weight_decay 0.5",
    ]  # fmt: skip
    assert {curve.lrs[0] for curve in tuning.comparisons} == {tuning.comparisons[0].lrs[0]}
    assert [size for size, answer in tuning.batches if isinstance(answer, Suggestion)] == [8, 16]
    assert [(each.name, each.value) for each in tuning.settings] == [("weight_decay", 0.0), ("weight_decay", 0.5)]
    assert tuning.spent > tuning.updates, "an update of 16 costs two of 8"
    assert "The config keeps its own" in summarize(tuning)


def test_the_config_for_a_target_has_its_batch_and_sees_as_many_samples(tmp_path: Path) -> None:
    tuning = run(steps=8000, batch_sizes=[32], target_batch_size=16, target_processes=2, out=tmp_path)
    config = tuning.to_config()
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 8)
    assert config["gradient_accumulation_steps"] == 1
    assert config["_range_test"]["train_steps"] == 4000
    assert config["_tune"]["measured_at_batch_sizes"] == [8, 32]
    assert validate(tmp_path / "tuned.json", world_size=2).exit_code == 0
    assert tuning.scaled is not None and tuning.scaled.how == "interpolated"
    assert any("Interpolated for batch size 16" in note for note in tuning.notes())


def test_a_config_beyond_what_was_measured_warns_where_it_is_made_and_where_it_trains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tuning = run(target_batch_size=64)
    assert tuning.scaled is not None and tuning.scaled.how == "extrapolated"
    assert any("beyond all that was measured" in note for note in tuning.notes())
    caplog.set_level(logging.WARNING, "engine")
    initialize(nn.Linear(4, 1), tuning.to_config(), device="cpu")
    (record,) = (record for record in caplog.records if record.name == "engine" and "_range_test" in record.message)
    assert "were found at batch size 8, and train_batch_size is 64" in record.message


def test_without_a_test_at_the_own_batch_those_at_others_are_said_to_be_of_no_use() -> None:
    tuning = run(batch_sizes=[16], target_batch_size=16)
    lost = tuple(
        replace(curve, losses=(1.0,) * len(curve.losses)) if curve.train_batch_size == 8 else curve
        for curve in tuning.comparisons
    )
    scaled = replace(tuning, comparisons=lost).scaled
    assert scaled is not None and scaled.how == "extrapolated"
    assert "The test at 8 gave no answer, with which those at 16 would be compared" in scaled.why


def test_a_fixed_rate_for_groups_of_the_script_says_what_to_do_with_it() -> None:
    tuning = run()
    groups = replace(tuning.test, group_ratios=(1.0, 0.1))
    fixed = next(trial for trial in tuning.trials if trial.schedule == "fixed")
    config = replace(tuning, test=groups, trials=(fixed,)).to_config()
    assert config["_tune"]["schedule"] == "fixed"
    rates = f"{fixed.lr:g}, {0.1 * fixed.lr:.6g}"
    assert config["_tune"]["to_do"] == f"Give your script's parameter groups the learning rates {rates}, in this order."


def test_a_config_at_the_batch_size_that_was_measured_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = run().to_config()
    caplog.clear()
    caplog.set_level(logging.WARNING, "engine")
    initialize(nn.Linear(4, 1), config, device="cpu")
    assert [record.message for record in caplog.records if "_range_test" in record.message] == []


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: got 0; expected an integer >= 1"),
        ({"steps": 100}, "the shortest test takes 12"),
        ({"budget": 0}, "budget: got 0; expected a share of the planned updates, above 0 and at most 1"),
        ({"budget": float("nan")}, "budget: got nan"),
        ({"batch_sizes": [12]}, "12 is no multiple of 8 (micro-batch 8 x 1 processes)"),
        ({"sweep": {"lr": [1]}}, 'sweep: got "lr"; expected weight_decay or momentum'),
        ({"sweep": {"momentum": [-1]}}, "sweep: got momentum -1; expected numbers >= 0"),
        ({"sweep": {"momentum": [0.9, 1.0]}}, "momentum: got 1.0; expected a number from 0 to below 1"),
        ({"target_batch_size": 9, "target_processes": 2}, "9 samples cannot be shared evenly among 2 processes"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_run(arguments: dict[str, Any], message: str) -> None:
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    with pytest.raises(RangeTestError) as caught:
        run(loss=loss, **arguments)
    assert message in str(caught.value)
    assert calls == []


def test_a_setting_that_the_optimizer_has_not_is_refused_before_anything_is_run() -> None:
    engine = make_engine(optimizer={"type": "Adagrad", "params": {"lr": 0.01}})
    with pytest.raises(RangeTestError, match="momentum: the optimizer, Adagrad, has none; leave it out"):
        run(engine, loss=lambda model, batch: pytest.fail("it was run"), sweep={"momentum": [0.9]})


def test_a_flat_loss_gets_no_config_and_takes_that_of_an_earlier_tuning_away(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text("{}")
    x = torch.zeros(64, 4)
    tuning = run(make_engine(nn.Linear(4, 1, bias=False)), data=(x, x[:, :1] + 1), out=tmp_path)
    assert tuning.refusal is not None and tuning.trials == ()
    assert not (tmp_path / "tuned.json").exists()
    with pytest.raises(RangeTestError, match="no config can be suggested"):
        tuning.to_config()


def test_trials_that_all_diverge_get_no_config() -> None:
    tuning = run()
    broken = replace(tuning, trials=tuple(replace(trial, diverged=True) for trial in tuning.trials))
    assert broken.winner is None and broken.choice is None
    assert broken.refusal is not None and "trials diverged" in broken.refusal.reason


# -- on disk -------------------------------------------------------------------------------------------------


def test_a_tuning_can_be_kept_and_read_again_for_another_length(tmp_path: Path) -> None:
    tuning = run(steps=8000, batch_sizes=[16], sweep={"momentum": [0, 0.5]})
    save_tuning(tuning, tmp_path)
    again = load_tuning(tmp_path)
    assert again == tuning
    assert again.to_config() == tuning.to_config()
    assert again.planned_for(50_000).to_config()["_range_test"]["train_steps"] == 50_000
    assert len(again.search) == TRIES
    table = (tmp_path / "tune.csv").read_text()
    assert len(table.splitlines()) > tuning.updates
    assert all(trial.curve.name in table for trial in tuning.search)


def test_a_report_has_a_page_and_a_picture_and_says_what_to_type_next(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tuning = run()
    said = write_tuning(tuning, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tune.json", "tune.csv", "tuned.json", "tune.png", "report.html"
    }  # fmt: skip
    assert f"redline validate {tmp_path / 'tuned.json'}" in said
    assert "<- wins" in said
    page = (tmp_path / "report.html").read_text()
    assert "OneCycle" in page and "Search for the peak" in page
    for came in tries_of(tuning.search):
        told = f"{came.loss:+.4g}" if math.isfinite(came.loss) else "diverged"
        assert told in page and told in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"test": {}}'])
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RangeTestError, match=r"there is no tune\.json"):
        load_tuning(tmp_path)
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(RangeTestError, match="is no record of a tuning"):
        load_tuning(tmp_path)


# -- several processes ---------------------------------------------------------------------------------------


def tune_on_ranks() -> tuple[list[str], list[Trial], list[float], str, int]:
    tuning = run(seeds=2, steps=4000)
    torch.distributed.destroy_process_group()
    assert tuning.winner is not None
    losses = [trial.loss for trial in tuning.trials]
    return names(tuning), list(tuning.search), losses, tuning.winner.schedule, tuning.spent


def test_two_processes_come_to_the_same_answer() -> None:
    first, second = run_ranks(tune_on_ranks, 2)
    assert first == second
    assert first[0][:3] == ["sweep", "slow", "fast"]
    assert len(first[1]) == TRIES
