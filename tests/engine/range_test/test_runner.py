"""The active range test: what it runs, on which data, at which rates, when it stops, and what it refuses.

That it leaves no trace is in test_no_trace.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from redline import EngineError, RangeTestError, initialize, run_range_test
from tests.range_tests import make_data, make_engine, mse, only, run

# -- the runs ------------------------------------------------------------------------------------------------


def test_there_is_one_run_for_each_rate_and_one_at_the_fixed_lr_before_them() -> None:
    result = run(rates=[5, 50.5], baseline=True)
    assert [(curve.name, curve.rate) for curve in result.curves] == [
        ("fixed 0.01", None), ("rate 5", 5.0), ("rate 50.5", 50.5)
    ]  # fmt: skip
    assert set(result.curves[0].lrs) == {0.01}
    assert len({curve.losses[0] for curve in result.curves}) == 1, "all start from the same weights and batch"
    default = run_range_test(make_engine(), make_data(), nn.MSELoss(), steps=20, progress=False)
    assert [curve.name for curve in default.curves] == ["fixed 0.01", "rate 5", "rate 50", "rate 500"]
    assert (default.curves[1].lrs[0], default.train_steps) == (1e-4, 200)


def test_a_sweep_goes_from_the_lowest_to_the_highest_learning_rate() -> None:
    curve = only(run(rates=None, min_lr=1e-6, max_lr=1e-3, steps=31))
    assert (curve.name, curve.kind) == ("sweep to 0.001", "exponential")
    assert (curve.lrs[0], curve.lrs[10], curve.lrs[30]) == pytest.approx((1e-6, 1e-5, 1e-3))
    linear = only(run(rates=None, min_lr=0.001, max_lr=0.004, steps=31, growth="linear"))
    assert (linear.lrs[10], linear.lrs[30]) == pytest.approx((0.002, 0.004))


def test_rates_that_look_like_learning_rates_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    run(rates=[0.5, 50], steps=40)
    assert caplog.messages == []
    run(rates=[1e-4, 0.1], steps=40)
    assert "to test the learning rates from 0.0001 to 0.1 give these as min_lr and max_lr" in caplog.messages[-1]


def test_what_is_not_given_comes_from_the_configs_own_range_test() -> None:
    params = {"lr_range_test_min_lr": 0.002, "lr_range_test_step_size": 4, "lr_range_test_step_rate": 3.0,
              "lr_range_test_staircase": True}  # fmt: skip
    engine = make_engine(scheduler={"type": "LRRangeTest", "params": params})
    fixed, test = run(engine, min_lr=None, baseline=True).curves
    assert test.lrs[:5] == pytest.approx((0.002, 0.002, 0.002, 0.002, 0.012))
    assert fixed.name == "fixed 0.01"
    engine = make_engine(scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}})
    assert engine.get_lr() == [0.0]
    assert run(engine, baseline=True).curves[0].name == "fixed 0.01", "not the LR that the schedule has set"


def test_groups_keep_the_ratios_of_their_rates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.001}]
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    engine = initialize(model, config, model_parameters=groups, device="cpu")
    seen: list[list[float]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(engine.get_lr())
        return mse(model(batch[0]), batch[1])

    run(engine, loss=loss, baseline=0.02, min_lr=0.003)
    assert all(first == pytest.approx(10 * second) for first, second in seen)
    assert seen[0] == pytest.approx([0.02, 0.002])
    assert seen[20] == pytest.approx([0.003, 0.0003])
    seen.clear()
    run(engine, loss=loss, min_lr=[0.003, 0.004])
    assert seen[0] == pytest.approx([0.003, 0.004])


def test_a_run_is_what_a_loop_by_hand_does() -> None:
    data = [(x, y) for x, y in zip(*(part.split(8) for part in make_data()))]
    engine = make_engine()
    model = copy.deepcopy(engine.module)
    held_out = make_data(10)
    curve = only(run(engine, data, steps=12, step_size=4, validation=held_out, validations=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    losses, validation = [], [(0, mse(model(held_out[0]), held_out[1]).item())]
    for step in range(12):
        optimizer.param_groups[0]["lr"] = lr = 1e-3 * (1 + 5.0 * step / 4)
        assert curve.lrs[step] == pytest.approx(lr)
        x, y = data[step % 8]
        loss = mse(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 4 == 3:
            validation.append((step + 1, mse(model(held_out[0]), held_out[1]).item()))
    assert curve.steps == tuple(range(12))
    assert curve.losses == pytest.approx(losses, rel=1e-6)
    assert [updates for updates, _ in curve.validation] == [0, 4, 8, 12]
    assert [loss for _, loss in curve.validation] == pytest.approx([loss for _, loss in validation], rel=1e-5)


def test_accumulation_gives_one_point_for_each_step_with_the_mean_loss() -> None:
    data = [(x, y) for x, y in zip(*(part.split(8) for part in make_data()))]
    accumulated = only(run(make_engine(accumulation=4), data, steps=10))
    whole = only(run(make_engine(micro_batch=32), [make_batch(data, i) for i in (0, 4)], steps=10))
    assert accumulated.steps == tuple(range(10))
    assert accumulated.lrs == whole.lrs
    assert accumulated.losses == pytest.approx(whole.losses, rel=1e-5)


def make_batch(data: list[tuple[Tensor, Tensor]], start: int) -> tuple[Tensor, Tensor]:
    parts = data[start : start + 4]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_a_run_that_diverges_is_stopped_and_others_are_not_nor_is_a_baseline() -> None:
    fixed, slow, fast = run(rates=[5, 5000], steps=60, baseline=5.0).curves
    assert (len(fixed.steps), len(slow.steps)) == (60, 60)
    assert 10 <= len(fast.steps) < 60
    assert fast.losses[-1] > fast.losses[0]


# -- growth, seeds, batch sizes, settings --------------------------------------------------------------------


def test_an_exponential_test_is_by_default_one_sweep_over_eight_powers_of_ten() -> None:
    curve = only(run(growth="exponential", rates=None, min_lr=None, steps=20, loss=lambda m, b: 0 * mse(m(b[0]), b[1])))
    assert (curve.name, curve.lrs[0]) == ("rate 1.5, exponential", 1e-7)
    assert curve.lrs[-1] == pytest.approx(1e-7 * 2.5**19)


def test_the_growth_is_the_configs_unless_given() -> None:
    redline = {"range_test": {"growth": "exponential"}}
    assert only(run(make_engine(redline=redline))).kind == "exponential"
    assert only(run(make_engine(redline=redline), growth="linear")).kind == "linear"
    params = {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 4}
    engine = make_engine(redline=redline, scheduler={"type": "LRRangeTest", "params": params})
    assert only(run(engine, min_lr=None)).lrs[4] == pytest.approx(0.006)
    assert only(run(engine, min_lr=None)).lrs[8] == pytest.approx(0.036)


def test_seeds_differ_in_order_and_not_in_weights_or_rates() -> None:
    first, second, third = run(seeds=3).curves
    assert [curve.name for curve in (first, second, third)] == ["rate 5", "rate 5, seed 1", "rate 5, seed 2"]
    assert (first.seed, second.seed, third.seed) == (0, 1, 2)
    assert first.lrs == second.lrs
    assert len({first.losses, second.losses, third.losses}) == 3
    assert first == only(run())
    whole = [make_data(8)]  # one batch, whose order is nobody's: what is left are the weights
    assert len({curve.losses for curve in run(data=whole, seeds=2).curves}) == 1


def test_a_batch_size_is_that_of_an_engine_that_was_made_with_it() -> None:
    base, large = run(batch_sizes=[8, 32]).curves
    assert (base.name, large.name) == ("rate 5", "rate 5, batch 32")
    assert (base.train_batch_size, large.train_batch_size) == (None, 32)
    assert base == only(run())
    assert large.losses == only(run(make_engine(accumulation=4))).losses


def test_settings_are_those_of_an_engine_that_was_made_with_them() -> None:
    engine = make_engine(optimizer={"type": "SGD", "params": {"lr": 0.01, "weight_decay": 0.1}})
    result = run(engine, sweep={"weight_decay": [0.1, 2.0], "momentum": [0.5]})
    assert [curve.name for curve in result.curves] == ["rate 5", "rate 5, weight_decay 2", "rate 5, momentum 0.5"]
    assert [curve.settings for curve in result.curves] == [(), (("weight_decay", 2.0),), (("momentum", 0.5),)]
    for curve, params in zip(result.curves[1:], ({"weight_decay": 2.0}, {"weight_decay": 0.1, "momentum": 0.5})):
        made = make_engine(optimizer={"type": "SGD", "params": {"lr": 0.01, **params}})
        assert curve.losses == only(run(made)).losses
    assert result.select(settings={"momentum": 0.5}).curves == result.curves[2:]


def test_every_change_is_made_with_every_rate_and_seed_and_the_baseline_once() -> None:
    names = [curve.name for curve in run(rates=[5, 50], baseline=True, seeds=2, batch_sizes=[16], steps=3).curves]
    assert names == [
        "fixed 0.01", "rate 5", "rate 5, seed 1", "rate 50", "rate 50, seed 1", "rate 5, batch 16",
        "rate 5, batch 16, seed 1", "rate 50, batch 16", "rate 50, batch 16, seed 1",
    ]  # fmt: skip


def test_without_managed_accumulation_a_step_is_still_all_its_micro_batches() -> None:
    data = [(x, y) for x, y in zip(*(part.split(8) for part in make_data()))]
    managed = only(run(make_engine(accumulation=4), data))
    by_hand = only(run(make_engine(accumulation=4, managed_gradient_accumulation=False), data))
    assert by_hand.losses == pytest.approx(managed.losses, rel=1e-6)


# -- steps that the loss scaler skips ----------------------------------------------------------------------


FP16 = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}


def steep(model: nn.Module, batch: Any) -> Tensor:
    """Gradients of some hundreds: in fp16 a scale of 2 ** 20 is too much."""
    return 100 * mse(model(batch[0]).float(), batch[1])


def test_skipped_steps_are_marked_and_later_runs_begin_with_the_scale_that_was_found() -> None:
    engine = make_engine(fp16=FP16)
    first, *others = run(engine, loss=steep, min_lr=1e-6, steps=30, rates=[5, 7, 50]).curves
    assert len(first.steps) == 30, "skipped steps are no divergence"
    assert 10 <= len(first.skipped) <= 20
    assert first.skipped[:10] == tuple(range(10))  # while the scale is searched
    assert set(first.lrs[:11]) == {1e-6}  # in which the LR does not grow
    assert len(set(first.lrs)) == 30 - len(first.skipped)
    assert [curve.skipped for curve in others] == [(), ()]
    assert engine.loss_scale == 2**20, "the engine has its own back"


def test_a_run_that_diverges_leaves_the_scale_of_its_lowest_loss() -> None:
    scales = []

    def loss(model: Any, batch: Any) -> Tensor:
        scales.append(model.loss_scale)
        return steep(model, batch)

    diverged, after = run(make_engine(fp16=FP16), loss=loss, rates=[1e5, 1], min_lr=1e-6, steps=60).curves
    assert (len(diverged.steps) < 60, len(after.steps)) == (True, 60)
    lowest = min((loss, step) for step, loss in enumerate(diverged.losses) if step not in diverged.skipped)[1]
    last = len(diverged.steps) - 1
    assert scales[last] < scales[lowest]
    assert scales[last + 1] == scales[lowest]


def test_what_the_device_skips_by_itself_is_marked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    for reads in (True, False):
        engine = make_engine(fp16=FP16)
        if not reads:  # as on CUDA, where a step is known to be skipped when the next one begins
            monkeypatch.setattr("redline.device._READ_AT_ONCE", ())
        curves.append(only(run(engine, loss=steep, min_lr=1e-6, steps=30)))
    host, device = curves
    assert (device.skipped, device.lrs) == (host.skipped, host.lrs)
    assert device.losses == pytest.approx(host.losses, rel=1e-2)


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale_and_ends_the_run() -> None:
    calls = iter(range(1000))

    def broken(model: nn.Module, batch: Any) -> Tensor:
        value = mse(model(batch[0]).float(), batch[1])
        return value * math.nan if next(calls) >= 12 else value

    curve = only(run(make_engine(fp16=FP16 | {"initial_scale_power": 4}), loss=broken, steps=30))
    assert len(curve.steps) == 17  # the fifth such step in a row
    assert curve.skipped == (12, 13, 14, 15)  # the last one shows the divergence
    assert math.isnan(curve.losses[-1])


def test_a_scale_at_its_minimum_ends_the_run_and_not_the_script() -> None:
    def overflowing(model: nn.Module, batch: Any) -> Tensor:
        return 1e30 * mse(model(batch[0]).float(), batch[1])

    engine = make_engine(fp16=FP16 | {"initial_scale_power": 3})
    result = run(engine, loss=overflowing, rates=[5, 50], baseline=True)
    assert [len(curve.steps) for curve in result.curves] == [4, 4, 4]
    assert result.curves[0].skipped == (0, 1, 2)
    assert engine.loss_scale == 8.0


# -- losses and data of every form ---------------------------------------------------------------------------


TOO_SHORT = DataLoader(TensorDataset(*make_data(4)), batch_size=8, drop_last=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": 3}, "data: got int; expected a dataset, tensors, or a loader of batches"),
        ({"data": TensorDataset(torch.zeros(0, 4), torch.zeros(0, 1))}, "data: the dataset is empty"),
        ({"data": TOO_SHORT}, "data: it yields no batch"),
        ({"data": [(*make_data(8), 1)]}, r"data: a batch is tuple of 3 \(Tensor, Tensor, int\); the criterion expects"),
        ({"data": [torch.ones(3)]}, "data: a batch is a tensor of shape.*; the criterion expects"),
        ({"validation": []}, "validation: it yields no sample; is it empty"),
        ({"validation": TOO_SHORT}, "validation: it yields no sample; is it empty"),
        ({"rates": []}, "rates: got none; give at least one"),
        ({"rates": [0]}, "rates: got 0; expected numbers > 0"),
        ({"rates": [math.inf]}, "rates: got inf"),
        ({"rates": [math.nan]}, "rates: got nan"),
        ({"steps": 0}, "steps: got 0; expected an integer >= 1"),
        ({"step_size": 0}, "step_size: got 0; expected an integer >= 1"),
        ({"step_size": 2.5}, "step_size: got 2.5; expected an integer >= 1"),
        ({"validations": 0}, "validations: got 0; expected an integer >= 1"),
        ({"train_steps": 0}, "train_steps: got 0; expected an integer >= 1"),
        ({"min_lr": 0.0}, "min_lr: got 0.0; expected a number > 0"),
        ({"min_lr": [0.1, 0.2]}, "min_lr: got 2 values for 1 parameter groups; give one each"),
        ({"max_lr": 1.0}, "max_lr: the growth follows from min_lr and max_lr; leave out rates"),
        ({"max_lr": 1e-4, "rates": None}, "max_lr: got 0.0001; expected a number above min_lr, 0.001"),
        ({"mode": "max"}, 'mode: got .max.; expected "min", or "max" with a function'),
        ({"validation": lambda model: "high"}, "validation: the function returned 'high'; expected a number"),
        ({"baseline": -1.0}, "baseline: got -1.0; expected a number > 0"),
        ({"loss": lambda batch: batch}, r"loss: takes \['batch'\]; expected loss\(model, batch\)"),
    ],
    ids=lambda part: None if isinstance(part, str) else next(iter(part)),
)
def test_arguments_that_make_no_test_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RangeTestError, match=message):
        run(**arguments)


def test_an_engine_without_an_optimizer_or_inside_a_step_is_refused() -> None:
    engine = initialize(nn.Linear(4, 1), {"train_batch_size": 8}, device="cpu")
    with pytest.raises(RangeTestError, match="the engine has no optimizer"):
        run(engine)
    engine = make_engine(accumulation=2)
    x, y = make_data(8)
    engine.backward(mse(engine(x), y))
    for _ in range(2):
        with pytest.raises(RangeTestError, match="the engine is inside an optimizer step"):
            run(engine)
        if engine._state.pending:
            engine.step()
    assert engine.micro_steps == 1


# -- validation ----------------------------------------------------------------------------------------------


def test_validation_is_measured_in_evaluation_mode_over_all_samples_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    config = {"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    engine = initialize(model, config, device="cpu")
    held_out = make_data(11)  # a last batch of 3
    with torch.no_grad():
        expected = mse(model[1](held_out[0]), held_out[1]).item()
    for data in (held_out, TensorDataset(*held_out), DataLoader(TensorDataset(*held_out), batch_size=5)):
        curve = only(run(engine, validation=data, validations=4))
        assert [updates for updates, _ in curve.validation] == [0, 5, 10, 15, 20]
        assert curve.validation[0][1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_validation_may_be_a_function_of_the_model(mode: Any, sign: int) -> None:
    modes = []

    def metric(model: nn.Module) -> Tensor:
        modes.append((model.training, torch.is_grad_enabled()))
        return torch.tensor(len(modes))

    curve = only(run(validation=metric, mode=mode, validations=4))
    assert curve.validation == tuple((step, sign * (k + 1)) for k, step in enumerate((0, 5, 10, 15, 20)))
    assert set(modes) == {(False, False)}


def test_batches_of_dicts_are_weighed_by_their_samples_too() -> None:
    x, y = make_data(11)
    batches = [{"x": x[:8], "y": y[:8]}, {"x": x[8:], "y": y[8:]}]
    engine = make_engine()
    with torch.no_grad():
        expected = mse(engine(x), y).item()
    curve = only(run(engine, batches, lambda model, batch: mse(model(batch["x"]), batch["y"]), validation=batches))
    assert curve.validation[0][1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("given", ["tuple", "float", r"a tensor of shape \(8, 1\)"])
def test_a_loss_that_is_no_scalar_tensor_is_refused_in_training_and_in_validation(given: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        out = model(batch[0])
        value = mse(out, batch[1])
        return {"tuple": (value, out), "float": value.item()}.get(given, value * torch.ones_like(out))

    expected = r"expected a scalar tensor, such as loss\.mean"
    with pytest.raises(RangeTestError, match=rf"loss: returned {given}.*; {expected}"):
        run(loss=loss, validation=make_data(8))
    with pytest.raises(EngineError, match="expected a scalar tensor"):
        run(loss=loss)


def test_a_loss_of_one_element_is_one_in_training_and_in_validation() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return mse(model(batch[0]), batch[1]).reshape(1)

    curve, plain = only(run(loss=loss, validation=make_data(8))), only(run(validation=make_data(8)))
    assert (curve.losses, curve.validation) == (plain.losses, plain.validation)


# -- the result ----------------------------------------------------------------------------------------------


def test_progress_is_a_bar_or_lines_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run(progress=True, rates=[5, 5000], steps=40)
    shown = capsys.readouterr().err
    assert "rate 5000: diverged at step 10, learning rate 25\n" in shown
    assert shown.splitlines()[-1].startswith("rate 5000 ")
    assert "80/80" in shown and "step 10, lr 25, loss" in shown
    with caplog.at_level(logging.INFO, logger="redline"):
        run(rates=[5, 5000], steps=50, progress=None)
    lines = [record.getMessage() for record in caplog.records]
    progress = [line for line in lines if "loss" in line]
    assert progress[0].startswith("rate 5: step 9, lr ") and 5 <= len(progress) <= 10
    assert any(line.startswith("rate 5000: diverged at step") for line in lines)


def test_the_engines_own_progress_is_silent_during_a_test(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1)
    with caplog.at_level(logging.INFO, logger="redline"):
        run(engine)
    assert not [record for record in caplog.records if record.getMessage().startswith("step=")]
    assert engine.steps_per_print == 1
