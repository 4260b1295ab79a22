"""`deepspeed.initialize` of the face: its arguments, its leniency, and its engine's other names."""

from __future__ import annotations

import json
import logging
import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from redline import ConfigError
from tests.face import face

ADAM = {"type": "Adam", "params": {"lr": 0.01}}
CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": ADAM}
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def package() -> Iterator[Any]:
    with face() as deepspeed:
        yield deepspeed


@pytest.fixture
def deepspeed(package: Any) -> Iterator[Any]:
    yield package
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).sign()  # type: ignore[no-any-return]


def make(deepspeed: Any, **config: Any) -> Any:
    return deepspeed.initialize(model=Net(), config={**CONFIG, **config})[0]


def train(engine: Any, steps: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = engine(X).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


# -- arguments and what comes back -----------------------------------------------------------------------


def test_it_returns_four_things(deepspeed: Any) -> None:
    data = [(torch.randn(4), torch.zeros(1)) for _ in range(8)]
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    config = {**CONFIG, "scheduler": scheduler}
    engine, optimizer, loader, schedule = deepspeed.initialize(model=Net(), config=config, training_data=data)
    assert isinstance(engine, deepspeed.DeepSpeedEngine) and isinstance(engine, nn.Module)
    assert optimizer is engine.optimizer and isinstance(optimizer, torch.optim.Optimizer)
    assert loader is engine.training_dataloader and len(loader) == 4
    assert schedule is engine.lr_scheduler and type(schedule).__name__ == "WarmupLR"


def test_the_config_comes_by_any_of_four_ways(deepspeed: Any, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    for given in ({"config": CONFIG}, {"config": str(path)}, {"config_params": CONFIG},
                  {"args": Namespace(deepspeed_config=str(path))}):  # fmt: skip
        engine = deepspeed.initialize(model=Net(), **given)[0]
        assert engine.train_micro_batch_size_per_gpu() == 2 and engine.config["optimizer"] == ADAM


def test_mistakes_are_what_deepspeed_raises(deepspeed: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="requires a model"):
        deepspeed.initialize(config=CONFIG)
    with pytest.raises(AssertionError, match="DeepSpeed requires --deepspeed_config"):
        deepspeed.initialize(model=Net())
    with pytest.raises(AssertionError, match="give one"):
        deepspeed.initialize(args=Namespace(deepspeed_config="ds.json"), model=Net(), config=CONFIG)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**CONFIG, "gradient_clipping": "abc"}))
    with pytest.raises(ConfigError, match=r"ds.json: 1 problem\n  1:.* gradient_clipping: got \"abc\"") as invalid:
        deepspeed.initialize(model=Net(), config=str(path))
    assert isinstance(invalid.value, ValueError) and isinstance(invalid.value, AssertionError)
    assert str(pickle.loads(pickle.dumps(invalid.value))) == str(invalid.value), "pools of workers send it"
    with pytest.raises(NotImplementedError, match="tensor_parallel"):
        make(deepspeed, tensor_parallel={"autotp_size": 2})
    engine = make(deepspeed)
    with pytest.raises(AssertionError, match=r"no backward since the last step"):
        engine.step()
    with pytest.raises(ValueError, match="save_dir: got ''"):
        engine.save_checkpoint(None)
    with engine.no_sync():
        for call, message in ((engine.step, "inside no_sync"), (engine.no_sync, "reentry is unsupported")):
            with pytest.raises(AssertionError, match=message):
                call()
    with pytest.raises(AssertionError, match="incompatible with ZeRO stage 2"):
        make(deepspeed, zero_optimization={"stage": 2}).no_sync()


def test_parameters_may_be_a_generator_or_groups(deepspeed: Any) -> None:
    model = Net()
    trained = (param for name, param in model.named_parameters() if name.startswith("last"))
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=CONFIG)[0]
    before = model.first.weight.detach().clone()
    train(engine)
    assert torch.equal(model.first.weight, before)
    groups = [{"params": model.first.parameters(), "lr": 0.5}, {"params": model.last.parameters()}]
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=CONFIG)[0]
    assert engine.get_lr() == [0.5, 0.01]


def test_an_optimizer_and_a_schedule_of_the_script(deepspeed: Any) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    config = {"train_micro_batch_size_per_gpu": 2}
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, lr_scheduler=schedule)
    train(engine)
    assert engine.get_lr() == [0.25]


def test_a_model_can_be_initialized_again(deepspeed: Any) -> None:
    model = Net()
    first = deepspeed.initialize(model=model, config=CONFIG)[0]
    train(first)
    first.destroy()
    second = deepspeed.initialize(model=model, config={**CONFIG, "bf16": {"enabled": True}})[0]
    assert train(second) and second.module is model


def test_master_weights_start_from_rounded_ones_as_deepspeeds(deepspeed: Any) -> None:
    engine = make(deepspeed, bf16={"enabled": True})
    weight = engine.module.first.weight
    assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(weight), weight.float())
    assert not torch.equal(weight.float(), Net().first.weight)


def test_model_parallelism_of_one_rank_is_accepted(deepspeed: Any) -> None:
    class Mpu:
        def __init__(self, size: int) -> None:
            self.get_model_parallel_world_size = lambda: size

    assert deepspeed.initialize(model=Net(), config=CONFIG, mpu=Mpu(1))[0]
    with pytest.raises(NotImplementedError, match="data-parallel"):
        deepspeed.initialize(model=Net(), config=CONFIG, mpu=Mpu(2))


# -- leniency ----------------------------------------------------------------------------------------------


def test_what_deepspeed_takes_and_redline_refuses_is_warned_of_once(
    deepspeed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"my_own_key": object(), "optimizer": {**ADAM, "adam_w_mode": True},
           "checkpoint": {"partition_activations": True}, "data_types": {"grad_accum_dtype": "bf16"},
           "scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}}  # fmt: skip
    same = {"prescale_gradients": 0, "gradient_allreduce_op": "SUM", "steps_per_print": float("inf")}
    with caplog.at_level(logging.WARNING, "redline"):
        engine = make(deepspeed, **odd, **same, zero_optimization={"stage": 1, "reduce_scatter": False})
    assert sorted(record.getMessage().partition(":")[0] for record in caplog.records) == [
        "checkpoint.partition_activations", "data_types.grad_accum_dtype", "my_own_key", "optimizer.adam_w_mode",
        "scheduler.params.warmup_type",
    ]  # fmt: skip
    assert engine.config.gradient_allreduce_op == "sum" and engine.config.prescale_gradients is False


def test_auto_is_the_scripts_argument(deepspeed: Any) -> None:
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}, "fp16": {"enabled": "auto"},
        "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(
            ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")},
    }  # fmt: skip
    args = Namespace(per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=0.5, weight_decay=0.25,
                     warmup_steps=4, max_steps=20, fp16=False)  # fmt: skip
    engine = deepspeed.initialize(args=args, model=Net(), config=config)[0]
    assert (engine.get_batch_info(), engine.fp16_enabled()) == ((6, 2, 3), False)
    assert engine.optimizer.defaults["lr"] == 0.5 and engine.optimizer.defaults["weight_decay"] == 0.25
    assert engine.config.scheduler.arguments()["total_num_steps"] == 20
    args = Namespace(per_device_train_batch_size=2, max_steps=-1)
    with pytest.raises(ConfigError, match="total_num_steps"):
        deepspeed.initialize(args=args, model=Net(), config=config)


def test_zero_grad_between_micro_batches_does_as_in_deepspeed(deepspeed: Any, caplog: pytest.LogCaptureFixture) -> None:
    norms = {}
    for precision in ("fp32", "bf16"):
        engine = make(deepspeed, gradient_accumulation_steps=2, bf16={"enabled": precision == "bf16"})
        caplog.clear()
        for _ in range(2):
            for _ in range(2):
                engine.zero_grad()
                engine.backward(engine(X).square().mean())
                engine.step()
        assert engine.global_steps == 2
        assert len([each for each in caplog.records if "zero_grad()" in each.getMessage()]) == 1
        norms[precision] = engine.get_global_grad_norm()
    # In fp32 at stage 0 the first half is cleared; in bf16 it stays.
    assert norms["bf16"] == pytest.approx(2 * norms["fp32"], rel=0.05)


@pytest.mark.parametrize(
    ("stage", "hidden", "norm"), [(0, (0, 0), 0.001), (1, (0, 1), 0.2371), (2, (1, 1), 0.4710), (3, (1, 1), 0.4710)]
)
def test_clipping_by_the_script_counts_where_it_does_in_deepspeed(
    stage: int, hidden: tuple[int, int], norm: float, deepspeed: Any
) -> None:
    """A script clips each of two micro-batches to 0.001; from stage 1 on the norms are DeepSpeed 0.19.8's, in bf16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    config = {**CONFIG, "zero_optimization": {"stage": stage}, "bf16": {"enabled": stage > 0},
              "gradient_accumulation_steps": 2}  # fmt: skip
    engine = deepspeed.initialize(model=model, config=config)[0]
    for is_hidden in hidden:
        engine.backward(engine(X).float().square().mean())
        assert all((param.grad is None) is bool(is_hidden) for param in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert deepspeed.utils.safe_get_full_grad(model[0].weight).abs().sum() > 0
        engine.step()
    assert float(engine.get_global_grad_norm()) == pytest.approx(norm, rel=0.02)
    assert isinstance(engine.get_global_grad_norm(), torch.Tensor if stage else float)


# -- the engine's other names ------------------------------------------------------------------------------


def test_unknown_names_are_the_modules(deepspeed: Any) -> None:
    engine = make(deepspeed)
    assert engine.generate(X).abs().eq(1).all()
    with pytest.raises(AttributeError, match="'DeepSpeedEngine' object has no attribute 'nothing'"):
        _ = engine.nothing


def test_the_engine_says_what_it_does(deepspeed: Any) -> None:
    engine = make(deepspeed, fp16={"enabled": True}, zero_optimization={"stage": 2}, gradient_accumulation_steps=3)
    assert (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.zero_optimization_stage()) == (True, False, 2)
    assert engine.get_batch_info() == (6, 2, 3)
    assert engine.optimizer.cur_scale == engine.optimizer.loss_scale == engine.loss_scale == 2**16
    assert not engine.optimizer.overflow and engine.dynamic_loss_scale()
    assert (engine.optimizer_name(), engine.optimizer_params(), engine.scheduler_name()) == ("adam", {"lr": 0.01}, None)
    assert engine.zero_reduce_bucket_size() == 500_000_000 and engine.zero_prefetch_bucket_size() == 50_000_000
    assert not engine.curriculum_learning_enabled() and engine.communication_data_type is torch.float32
    engine.tput_timer.update_epoch_count()
    assert engine.optimizer.clip_grad == 1.0 and engine.optimizer.loss_scaler.cur_scale == 2**16
    for inner in (engine.allreduce_bucket, engine.optimizer.bit16_groups):
        with pytest.raises(NotImplementedError, match="safe_get_full"):
            list(inner)


def test_log_level_is_that_of_the_packages_logger(deepspeed: Any) -> None:
    assert make(deepspeed).log_level() is None
    before = deepspeed.logger.level
    try:
        assert make(deepspeed, log_level="ERROR").log_level() == "ERROR"
        assert deepspeed.logger.level == logging.ERROR
    finally:
        deepspeed.logger.setLevel(before)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_plain_backward_trains_alike(stage: int, deepspeed: Any) -> None:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": stage == 2}}
    ours, plain = make(deepspeed, **config), make(deepspeed, **config)
    train(ours, 2)
    for _ in range(2):
        plain(X).square().mean().backward()
        plain.step()
    assert torch.equal(ours.module.first.weight, plain.module.first.weight)


def test_several_backwards_add_up_under_coalesce_grad_reduction(deepspeed: Any) -> None:
    once, twice = (make(deepspeed, zero_optimization={"stage": 2}) for _ in range(2))
    once.backward(once(X).sum() + once(X).square().sum())
    with twice.coalesce_grad_reduction():
        twice.backward(twice(X).sum())
        twice.backward(twice(X).square().sum())
    for engine in (once, twice):
        engine.step()
    torch.testing.assert_close(twice.get_global_grad_norm(), once.get_global_grad_norm())
    assert twice.global_steps == 1


def test_counters_may_be_set(deepspeed: Any) -> None:
    engine = make(deepspeed, gradient_accumulation_steps=2)
    train(engine)
    engine.micro_steps = 0  # as VideoMAE, BEiT and others do at the start of an epoch
    train(engine)
    assert (engine.micro_steps, engine.global_steps) == (1, 0)
    train(engine)
    engine.global_steps = 7
    train(engine, 2)
    assert (engine.micro_steps, engine.global_steps) == (4, 8)


def test_an_overflow_shows_on_the_optimizer(deepspeed: Any) -> None:
    engine = make(deepspeed, fp16={"enabled": True, "initial_scale_power": 4, "loss_scale_window": 8, "hysteresis": 1})
    scaler = engine.optimizer.loss_scaler
    assert (scaler.cur_scale, scaler.scale_window, scaler.cur_iter) == (16, 8, 0)
    engine.backward(engine(X).sum() * float("inf"))
    engine.step()
    assert engine.optimizer.overflow and not engine.was_step_applied()
    assert (scaler.cur_scale, scaler.cur_iter) == (8, 1)
    train(engine)
    assert not engine.optimizer.overflow and engine.was_step_applied()
    assert (scaler.cur_scale, scaler.cur_iter) == (8, 2)


@pytest.mark.parametrize("watching", [{}, {"wall_clock_breakdown": True}, {"flops_profiler": {"enabled": True}}])
def test_arguments_of_step_are_the_schedules(deepspeed: Any, watching: dict[str, Any]) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    config = {"train_micro_batch_size_per_gpu": 2, **watching}
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, lr_scheduler=schedule)
    engine.backward(engine(X).sum())
    with pytest.warns(UserWarning, match="epoch"):
        engine.step(lr_kwargs={"epoch": 9})
    assert engine.get_lr() == [0.1]


# -- checkpoints -------------------------------------------------------------------------------------------


def test_tags_may_be_integers_and_state_may_be_objects(
    deepspeed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make(deepspeed)
    train(engine)
    state = {"args": Namespace(lr=0.1, nested=Namespace(x=1)), "curve": np.arange(3.0), "epoch": np.int64(4),
             "path": Path("a"), "function": train}  # fmt: skip
    assert engine.save_checkpoint(tmp_path, tag=7, client_state=state)
    assert [record.getMessage() for record in caplog.records if "client_state" in record.getMessage()] == [
        "client_state['function']: a function is no data, and is not saved"
    ]
    after = train(engine, 2)
    other = make(deepspeed)
    path, loaded = other.load_checkpoint(tmp_path, tag=7)
    assert path is not None and Path(path).name == "7"
    assert loaded["args"] == {"lr": 0.1, "nested": {"x": 1}} and loaded["epoch"] == 4 and loaded["path"] == "a"
    assert loaded["curve"].tolist() == [0, 1, 2] and "function" not in loaded
    assert train(other, 2) == after


def test_a_schedule_that_has_changed_continues_at_the_checkpoints_step(
    deepspeed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warm(num_steps: int) -> dict[str, Any]:
        return {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_num_steps": num_steps}}

    engine = make(deepspeed, scheduler=warm(10))
    train(engine, 4)
    engine.save_checkpoint(tmp_path)
    other = make(deepspeed, scheduler=warm(100))
    other.load_checkpoint(tmp_path)
    assert any("the new one continues at step 4" in record.getMessage() for record in caplog.records)
    train(other)
    assert other.get_lr() == [pytest.approx(0.01 * 4 / 100)]


def test_the_weights_of_a_checkpoint_are_read_without_an_engine(deepspeed: Any, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import (  # type: ignore[import-not-found]
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
    )

    engine = make(deepspeed, bf16={"enabled": True}, zero_optimization={"stage": 2})
    train(engine)
    engine.save_checkpoint(tmp_path)
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert list(state) == list(engine.module.state_dict())
    assert all(each.dtype is torch.float32 for each in state.values())
    model = load_state_dict_from_zero_checkpoint(Net(), tmp_path)
    assert torch.equal(model.first.weight, state["first.weight"])
