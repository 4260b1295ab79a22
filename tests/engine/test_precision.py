"""Formats of parameters, gradients and the loss; whole runs against DeepSpeed are in test_deepspeed_training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from redline import EngineError, initialize, run_range_test
from redline.engine import Engine
from redline.precision import AmpLossScale, LossScale
from tests.distributed import run_ranks
from tests.tiny import listen

LOW = pytest.mark.parametrize("low", ["bf16", "fp16"])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Linear(8, 1))


def make_engine(model: nn.Module | None = None, /, *, lr: float = 0.01, **config: Any) -> Engine:
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "eps": 1e-3}},
        **config,
    }
    return initialize(model or make_model(), settings, device="cpu")


def on(low: str, **rest: Any) -> dict[str, Any]:
    return {low: {"enabled": True, **rest}}


def data(index: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def train(engine: Engine, micro_batches: int, first: int = 0) -> list[float]:
    losses = []
    for index in range(first, first + micro_batches):
        x, y = data(index)
        loss = nn.functional.mse_loss(engine(x).float(), y)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


# -- parameters and masters --------------------------------------------------------------------------------


@LOW
def test_parameters_are_low_and_the_optimizer_has_fp32_masters(low: str) -> None:
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine = make_engine(model, **on(low))
    assert {parameter.dtype for parameter in engine.module.parameters()} == {DTYPES[low]}
    masters = engine.optimizer.param_groups[0]["params"]
    assert all(torch.equal(master, original) for master, original in zip(masters, before))
    train(engine, 3)
    for master, parameter in zip(masters, engine.module.parameters()):
        assert master.dtype == torch.float32 and engine.optimizer.state[master]["exp_avg"].dtype == torch.float32
        assert torch.equal(parameter, master.to(DTYPES[low]))


def test_a_step_too_small_for_bf16_still_moves_the_masters() -> None:
    engine = make_engine(lr=1e-5, **on("bf16"))
    weights = engine.module[3].weight.detach().clone()
    train(engine, 1)
    moved = engine.optimizer.param_groups[0]["params"][2]
    assert torch.equal(engine.module[3].weight, weights)
    assert not torch.equal(moved, moved.bfloat16().float())


def test_buffers_keep_their_format_unless_the_config_names_one() -> None:
    assert make_engine(**on("bf16")).module[1].running_mean.dtype == torch.float32
    named = make_engine(**on("bf16"), data_types={"buffer_dtype": "bf16"})
    assert named.module[1].running_mean.dtype == torch.bfloat16
    assert named.module[1].num_batches_tracked.dtype == torch.int64


@LOW
def test_batch_norm_keeps_fp32_and_trains(low: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    engine = make_engine(model, **on(low))
    before = model[1].weight.detach().clone()
    train(engine, 3)
    assert model[1].weight.dtype == torch.float32 and model[0].weight.dtype == DTYPES[low]
    assert not torch.equal(model[1].weight, before)


def test_a_client_optimizer_keeps_its_groups_and_its_state() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}], lr=0.01
    )
    model(data()[0]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    engine = initialize(model, {"train_batch_size": 8, **on("bf16")}, optimizer=optimizer, device="cpu")
    assert engine.get_lr() == [0.1, 0.01]
    master = engine.optimizer.param_groups[0]["params"][0]
    assert torch.equal(engine.optimizer.state[master]["exp_avg"], moments)
    train(engine, 1)
    assert float(engine.optimizer.state[master]["step"]) == 2


def test_bf16_master_weights_and_optimizer_states_leave_nothing_in_fp32() -> None:
    engine = make_engine(**on("bf16", bf16_master_weights_and_grads=True, bf16_optimizer_states=True))
    train(engine, 2)
    held = [engine.optimizer.state[parameter]["exp_avg"] for parameter in engine.module.parameters()]
    assert {tensor.dtype for tensor in held} == {torch.bfloat16}
    assert engine.optimizer.param_groups[0]["params"][0] is engine.module[0].weight


def test_bf16_master_weights_alone_round_the_weights_and_keep_fp32_moments() -> None:
    engine = make_engine(lr=1e-5, **on("bf16", bf16_master_weights_and_grads=True))
    train(engine, 2)
    for master in engine.optimizer.param_groups[0]["params"]:
        assert torch.equal(master, master.bfloat16().float())
        assert engine.optimizer.state[master]["exp_avg"].dtype == torch.float32


# -- inputs and computation --------------------------------------------------------------------------------


@LOW
def test_inputs_may_be_fp32_or_low(low: str) -> None:
    x, _ = data()
    outputs = [make_engine(**on(low))(given) for given in (x, x.to(DTYPES[low]))]
    assert outputs[0].dtype == DTYPES[low]
    assert torch.equal(outputs[0], outputs[1])


def test_autocast_computes_low_on_fp32_weights() -> None:
    engine = make_engine(torch_autocast={"enabled": True, "dtype": "bfloat16"})
    assert engine(data()[0]).dtype == torch.bfloat16
    assert engine.module[0].weight.dtype == torch.float32
    assert train(engine, 8) == pytest.approx(train(make_engine(), 8), rel=3e-2)


# -- gradients ---------------------------------------------------------------------------------------------


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    engine = make_engine(gradient_accumulation_steps=3, gradient_clipping=0.0, **on("bf16"))
    separate = []
    for index in range(3):
        other = make_engine(**on("bf16"))
        x, y = data(index)
        (nn.functional.mse_loss(other(x).float(), y) / 3).backward()
        separate.append(other.module[0].weight.grad.float())
    seen = []
    step = engine.optimizer.step
    engine.optimizer.step = lambda: (seen.append(engine.optimizer.param_groups[0]["params"][0].grad.clone()), step())
    train(engine, 3)
    assert torch.equal(seen[0], separate[0] + separate[1] + separate[2])


def test_gradients_add_up_in_bf16_where_the_config_says_so() -> None:
    engine = make_engine(gradient_accumulation_steps=3, data_types={"grad_accum_dtype": "bf16"}, **on("bf16"))
    train(engine, 2)
    assert engine.module[0].weight.grad.dtype == torch.bfloat16
    train(engine, 1, first=2)
    assert engine.module[0].weight.grad is None and engine.global_steps == 1


def test_the_formats_are_said_once_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="redline"):
        make_engine(**on("bf16"))
    table = caplog.messages[-1].splitlines()[1:]
    assert [line.split("  ") and line.split() for line in table][1] == ["bfloat16"] * 2 + ["float32"] * 4


# -- what is not finite ------------------------------------------------------------------------------------


def spoil(engine: Engine, value: float = float("inf")) -> None:
    x, y = data()
    engine.backward(nn.functional.mse_loss(engine(x).float(), y) * value)
    engine.step()


@LOW
def test_an_update_with_an_overflow_is_left_out_whole(low: str, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 10}}
    engine = make_engine(scheduler=scheduler, **on(low))
    train(engine, 4)
    weights, lr = [p.detach().clone() for p in engine.module.parameters()], engine.get_lr()
    spoil(engine)
    assert (engine.global_steps, engine.skipped_steps) == (5, 1)
    assert engine.get_lr() == lr
    assert all(torch.equal(now, then) for now, then in zip(engine.module.parameters(), weights))
    assert "step 4 is skipped" in caplog.text
    train(engine, 1)
    assert engine.get_lr() != lr and engine.skipped_steps == 1


def test_bf16_goes_on_with_what_is_not_finite_where_the_config_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(**on("bf16", check_grad_overflow=False))
    spoil(engine, float("nan"))
    assert engine.skipped_steps == 0
    assert not engine.module[0].weight.isfinite().any()
    assert "step 0: its gradient norm is nan, its loss is nan" in caplog.text


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_weights_that_were_assigned_to_data_are_trained_on(low: str) -> None:
    engine = make_engine(**on(low), lr=1e-4)
    train(engine, 1)
    vector = torch.nn.utils.parameters_to_vector(engine.module.parameters())
    torch.nn.utils.vector_to_parameters(vector * 0.5, engine.module.parameters())
    train(engine, 1)
    trained = torch.nn.utils.parameters_to_vector(engine.module.parameters())
    torch.testing.assert_close(trained, vector * 0.5, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_what_is_clipped_is_the_gradient_without_the_loss_scale(low: str) -> None:
    settings = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0.01}
    engine = make_engine(**settings, **on(low))
    weights = engine.optimizer.param_groups[0]["params"]
    before = [weight.detach().clone() for weight in weights]
    engine.backward(engine(data()[0]).float().square().mean())
    engine.step()
    moved = torch.cat([(old - new.detach()).flatten() for old, new in zip(before, weights)])
    assert engine.get_global_grad_norm() > 0.01
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def a_nan_on_rank_1(place: str, config: dict[str, Any]) -> list[str]:
    messages = listen()
    engine = make_engine(**config)
    for _ in range(engine.gradient_accumulation_steps()):
        output = engine(data()[0])
        if engine.global_rank == 1 and place == "backward":  # its loss is finite
            output.register_hook(lambda grad: grad * float("nan"))
        factor = float("nan") if engine.global_rank == 1 and place == "forward" else 1.0
        engine.backward((output * factor).float().square().mean())
        engine.step()
    return [each for each in messages if "its loss" in each]


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize(
    "config",
    [{}, on("bf16"), *({"zero_optimization": {"stage": n}, "gradient_accumulation_steps": 2} for n in (1, 2, 3))],
    ids=["fp32", "bf16", "stage 1", "stage 2", "stage 3"],
)
def test_the_rank_whose_loss_or_gradients_are_not_finite_is_named(config: dict[str, Any], place: str) -> None:
    first, second = ("".join(each) for each in run_ranks(a_nan_on_rank_1, 2, place, config))
    assert "norm is nan, its loss on rank 0 is" in first
    assert "(a rank whose loss or gradients are not finite logs that itself)" in first
    if place == "forward":
        assert "its loss on rank 1 is nan;" in second
    else:
        assert "and the gradients on rank 1 were not finite before they were reduced" in second


def test_at_the_floor_an_overflow_is_an_error_that_names_the_first_bad_update() -> None:
    engine = make_engine(**on("fp16", initial_scale_power=1, hysteresis=1))
    train(engine, 2)
    spoil(engine)
    assert engine.loss_scale == 1.0
    with pytest.raises(EngineError, match=r"step 3 .* minimum, 1; the first such step in this sequence was 2"):
        spoil(engine)


def test_a_static_scale_skips_and_stays() -> None:
    engine = make_engine(**on("fp16", loss_scale=128))
    spoil(engine)
    train(engine, 1)
    assert (engine.loss_scale, engine.skipped_steps) == (128.0, 1)


def test_the_scale_does_not_show_in_loss_or_norm() -> None:
    small, large = (make_engine(**on("fp16", loss_scale=scale)) for scale in (1, 1024))
    assert train(small, 5) == pytest.approx(train(large, 5), rel=1e-2)
    assert small.get_global_grad_norm() == pytest.approx(large.get_global_grad_norm(), rel=2e-2)


def test_a_half_precision_loss_does_not_overflow_by_its_scale() -> None:
    engine = make_engine(**on("fp16"))
    x, y = data()
    loss = engine.backward(nn.functional.mse_loss(engine(x), y.half()))
    engine.step()
    assert loss.dtype == torch.float16 and engine.loss_scale == 2.0**16
    assert engine.skipped_steps in (0, 1)


@LOW
def test_what_the_device_judges_comes_to_the_same_as_what_the_host_reads(
    low: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(on_device: bool) -> tuple[list[Any], list[Any], Tensor]:
        scheduler = {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 6},
        }
        config = on(low, **({"initial_scale_power": 8, "loss_scale_window": 3} if low == "fp16" else {}))
        engine = make_engine(scheduler=scheduler, gradient_clipping=0.5, **config)
        # On CUDA nothing is read before the next step.
        monkeypatch.setattr("redline.device._READ_AT_ONCE", () if on_device else ("cpu",))
        seen: list[Any] = []
        norms: list[Any] = []
        for index in range(12):
            if index in (0, 3, 4, 9):
                spoil(engine)
            else:
                train(engine, 1, first=index)
            seen.append((engine.get_lr(), engine.get_mom(), engine.skipped_steps, engine.loss_scale))
            if index not in (0, 3, 4, 9):
                norms.append(engine.get_global_grad_norm())
        weights = torch.cat([parameter.detach().flatten().float() for parameter in engine.module.parameters()])
        return seen, norms, weights

    host, device = run(False), run(True)
    assert device[0] == host[0]
    assert device[1] == pytest.approx(host[1], rel=1e-2)
    torch.testing.assert_close(device[2], host[2], rtol=1e-2, atol=1e-3)


# -- the scale by itself -----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_the_scale_of_autocast_is_grad_scalers(overflows: list[bool], window: int) -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=window)
    ours = AmpLossScale(window=window)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for overflow in overflows:
        theirs.scale(torch.ones(1))
        parameter.grad = torch.tensor([float("inf") if overflow else 1.0])
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.value == theirs.get_scale()


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_a_saved_scale_goes_on_where_it_was(overflows: list[bool], cut: int) -> None:
    def make() -> LossScale:
        return LossScale(2.0**30, dynamic=True, window=3, hysteresis=2, minimum=2.0**-60)

    whole, first, second = make(), make(), make()
    for overflow in overflows:
        whole.update(overflow)
    for overflow in overflows[:cut]:
        first.update(overflow)
    second.load_state_dict(first.state_dict())
    for overflow in overflows[cut:]:
        second.update(overflow)
    assert second.state_dict() == whole.state_dict()


# -- with the range test -----------------------------------------------------------------------------------


@LOW
def test_a_range_test_in_low_precision_leaves_no_trace(low: str) -> None:
    batches = [data(index) for index in range(12)]

    def after(test: bool) -> list[Tensor]:
        engine = make_engine(**on(low))
        train(engine, 2)
        if test:
            run_range_test(
                engine,
                batches,
                lambda model, batch: nn.functional.mse_loss(model(batch[0]).float(), batch[1]),
                rates=[50.0],
                steps=10,
                progress=False,
            )
        train(engine, 3)
        state = [engine.optimizer.state[p]["exp_avg"] for p in engine.optimizer.param_groups[0]["params"]]
        return [*engine.optimizer.param_groups[0]["params"], *engine.module.parameters(), *state]

    assert all(torch.equal(tested, plain) for tested, plain in zip(after(True), after(False)))
