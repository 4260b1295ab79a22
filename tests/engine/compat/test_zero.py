"""The face on two ranks: parameters in full, master weights, gradients and optimizer state at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import run_ranks
from tests.face import with_face

STEPS = 3


def build(deepspeed: Any, stage: int, precision: str = "fp32") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        precision: {"enabled": True},
    }
    config.pop("fp32", None)
    return deepspeed.initialize(model=model, config=config)[0]


def backward(engine: Any) -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(engine.global_rank + engine.global_steps))
    engine.backward(engine(x).float().square().mean())


@with_face
def gather(deepspeed: Any) -> list[Any]:
    engine = build(deepspeed, 3)
    weight = engine.module[0].weight
    status = deepspeed.zero.ZeroParamStatus
    found: list[Any] = [tuple(weight.ds_shape), weight.ds_status is status.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(weight):
        found += [tuple(weight.shape), weight.ds_status is status.AVAILABLE, isinstance(weight, nn.Parameter)]
        weight.data.fill_(7.0)  # not kept: nobody is its modifier
    with deepspeed.zero.GatheredParameters(engine.module.parameters(), modifier_rank=1):
        found.append(weight.eq(7.0).any().item())
        with torch.no_grad():
            found.append(tuple(engine(torch.ones(2, 4)).shape) == (2, 1))  # as generate calls it
        if engine.global_rank == 1:
            engine.module.load_state_dict({**engine.module.state_dict(), "0.weight": torch.full((6, 4), 2.0)})
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=None):
        found.append(weight.eq(2.0).all().item())
    backward(engine)
    engine.step()
    with deepspeed.zero.GatheredParameters([weight]):
        found.append(weight.sub(2.0).abs().max().item() < 0.11)  # it trains on from there
    with deepspeed.zero.GatheredParameters([weight], enabled=False):
        found.append(weight.ds_status is status.NOT_AVAILABLE)
    return found


def test_parameters_are_in_full_within_a_block_and_one_ranks_writes_are_kept() -> None:
    expected = [(6, 4), True, (6, 4), True, True, False, True, True, True, True]
    assert run_ranks(gather, 2) == [expected, expected]


@with_face
def access(deepspeed: Any, stage: int, precision: str) -> list[Any]:
    """Full gradients, weights and state after some steps; then the effect of writing each of them."""
    engine, utils = build(deepspeed, stage, precision), deepspeed.utils
    params = dict(engine.module.named_parameters())
    found = []
    for _ in range(STEPS):
        backward(engine)
        grads = {name: utils.safe_get_full_grad(param) for name, param in params.items()}
        engine.step()
    found.append(grads)
    found.append({name: utils.safe_get_full_fp32_param(param) for name, param in params.items()})
    found.append({name: utils.safe_get_full_optimizer_state(param, "exp_avg_sq") for name, param in params.items()})
    weight = params["0.weight"]
    utils.safe_set_full_fp32_param(weight, torch.full((6, 4), 0.5))
    utils.safe_set_full_optimizer_state(weight, torch.zeros(6, 4), "exp_avg")
    utils.safe_set_full_optimizer_state(weight, torch.ones(6, 4), "exp_avg_sq")
    backward(engine)
    utils.safe_update_full_grad_vectorized([weight], lambda grad, param: torch.zeros_like(grad))
    found.append(bool(utils.safe_get_full_grad(weight).eq(0).all()))
    engine.step()
    found.append(utils.safe_get_full_fp32_param(weight).sub(0.5).abs().max().item())
    local = utils.safe_get_local_fp32_param(weight)
    utils.safe_set_local_fp32_param(weight, torch.zeros_like(local))
    found.append(bool(utils.safe_get_full_fp32_param(weight).eq(0).all()))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_values_by_parameter_are_the_same_at_every_stage_and_can_be_written(ranks: int, precision: str) -> None:
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 2e-2, "atol": 1e-2}
    first = run_ranks(access, ranks, 0, precision)[0]
    for stage in (0, 1, 2, 3):
        for grads, weights, state, cleared, moved, local in run_ranks(access, ranks, stage, precision):
            for one, other in zip((grads, weights, state), first):
                for name, value in one.items():
                    assert value.dtype is torch.float32
                    torch.testing.assert_close(value, other[name], **close)
            assert cleared and moved == 0.0, "no gradient, no momentum: the written weights stay"
            assert local


@with_face
def frozen(deepspeed: Any, stage: int) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Linear(6, 1))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam"}, "bf16": {"enabled": True},
              "zero_optimization": {"stage": stage}}  # fmt: skip
    engine, utils = deepspeed.initialize(model=model, config=config)[0], deepspeed.utils
    weight, trained = engine.module[0].weight, engine.module[1].weight
    backward(engine)
    found = [
        utils.safe_get_full_fp32_param(weight),
        utils.safe_get_full_grad(weight),
        utils.safe_get_local_grad(weight),
    ]
    engine.step()
    found.append(utils.safe_get_full_optimizer_state(weight, "exp_avg"))
    return [*found, utils.safe_get_full_optimizer_state(trained, "exp_avg") is not None]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_parameter_has_none_of_them(stage: int) -> None:
    assert run_ranks(frozen, 2, stage) == [[None, None, None, None, True]] * 2


@with_face
def clipped(deepspeed: Any) -> list[float]:
    norms = []
    for precision in ("fp32", "bf16"):
        engine = build(deepspeed, 0, precision)
        for _ in range(2):
            backward(engine)
            nn.utils.clip_grad_norm_(engine.parameters(), 1e-3)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def test_clipping_by_the_script_between_reduction_and_step_is_no_error() -> None:
    """In fp32 it counts; in bf16 the master params have the gradients by then."""
    for fp32, bf16 in run_ranks(clipped, 2):
        assert fp32 < 0.002 < bf16


@with_face
def consolidated(deepspeed: Any) -> Any:
    engine = build(deepspeed, 3, "bf16")
    state = engine._zero3_consolidated_16bit_state_dict()
    return None if state is None else {name: (value.dtype, value.shape) for name, value in state.items()}


def test_the_full_model_of_stage_3_comes_on_rank_0() -> None:
    first, second = run_ranks(consolidated, 2)
    assert second is None
    assert first["0.weight"] == (torch.bfloat16, (6, 4)) and len(first) == 4


class Saved(nn.Sequential):
    def save_pretrained(self, state_dict: dict[str, torch.Tensor]) -> int:
        return len(state_dict)


@with_face
def saved_by_rank_0(deepspeed: Any) -> int | None:
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}
    engine = deepspeed.initialize(model=Saved(nn.Linear(4, 6), nn.Linear(6, 1)), config=config)[0]
    state = engine._zero3_consolidated_16bit_state_dict()
    return None if state is None else engine.module.save_pretrained(state_dict=state)


def test_rank_0_alone_saves_the_full_model_by_a_method_of_the_model() -> None:
    assert run_ranks(saved_by_rank_0, 2) == [4, None]


@with_face
def save(deepspeed: Any, folder: str) -> str:
    engine = build(deepspeed, 2)
    backward(engine)
    engine.step()
    engine.save_checkpoint(f"{folder}/{engine.global_rank}")
    return str(engine.load_checkpoint(f"{folder}/0")[0])


def test_ranks_that_name_different_folders_save_into_rank_0s(tmp_path: Any) -> None:
    assert run_ranks(save, 2, str(tmp_path)) == [f"{tmp_path}/0/global_step1"] * 2
    assert not (tmp_path / "1").exists()
