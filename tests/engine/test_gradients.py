"""Gradients of several processes made one, measured and clipped; real gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from redline import EngineError, initialize
from redline.engine import Engine
from redline.gradients import clip, norm_of
from tests import tiny
from tests.distributed import run_ranks

SGD = {"type": "SGD", "params": {"lr": 1.0}}


def make_engine(model: nn.Module | None = None, /, **config: Any) -> Engine:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    base = {"train_micro_batch_size_per_gpu": 2, "optimizer": SGD, "gradient_clipping": 0.0}
    return initialize(model, {**base, **config}, device="cpu")


def data(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(2, 3, generator=generator), torch.randn(2, 1, generator=generator)


def loss_of(engine: Engine, index: int) -> Tensor:
    x, y = data(index)
    return nn.functional.mse_loss(engine(x).float(), y)


def train(engine: Engine, micro_batches: int, first: int = 0) -> None:
    """Each process its own micro-batches."""
    for index in range(first, first + micro_batches):
        engine.backward(loss_of(engine, index * engine.world_size + engine.global_rank))
        engine.step()


def weights(engine: Engine) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in engine.module.parameters()])


def update(engine: Engine) -> Tensor:
    """What one update of SGD with a rate of 1 has taken off the weights: its gradient."""
    before = weights(engine)
    train(engine, engine.gradient_accumulation_steps())
    return before - weights(engine)


# -- on one process ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0.01, 10), st.integers(0, 100))
def test_norm_and_clipping_are_torchs_bit_for_bit(sizes: list[int], limit: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = [nn.Parameter(torch.zeros(size)) for size in sizes]
    theirs = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for one, other in zip(ours, theirs):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    expected = nn.utils.clip_grad_norm_(theirs, limit, foreach=True)
    gradients = [parameter.grad for parameter in ours if parameter.grad is not None]
    norm = norm_of(gradients)
    clip(gradients, norm, limit)
    assert torch.equal(norm, expected)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs))


def test_sparse_gradients_are_measured_and_clipped_as_dense_ones() -> None:
    def run(sparse: bool) -> tuple[float | None, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 3, sparse=sparse), nn.Linear(3, 1))
        engine = make_engine(model, gradient_clipping=0.1)
        engine.backward(engine(torch.tensor([1, 4, 4])).square().mean())
        engine.step()
        return engine.get_global_grad_norm(), weights(engine)

    (norm, sparse), (expected, dense) = run(True), run(False)
    assert norm == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("others", [[], [torch.ones(3)], [torch.ones(3, dtype=torch.float64)], [torch.ones(2) * 1j]])
def test_norms_of_low_precision_are_computed_in_fp32(low: torch.dtype, others: list[Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = [(torch.randn(16, 16, generator=draw) * 3e3).to(low) for _ in range(40)] + [torch.zeros(0, dtype=low)]
    exact = torch.cat([each.to(torch.complex128).flatten() for each in (*gradients, *others)]).norm().item()
    for order in ([*gradients, *others], [*others, *gradients]):
        assert norm_of(order).item() == pytest.approx(exact, rel=1e-5)


def test_no_gradients_have_the_norm_zero() -> None:
    assert norm_of([]).item() == 0


def test_a_weight_without_a_gradient_gets_zeros_as_in_deepspeed() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    engine = make_engine(model, optimizer={"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}})
    before = model["unused"].weight.detach().clone()
    train(engine, 1)
    torch.testing.assert_close(model["unused"].weight, before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("done", [1, 2, 3])
def test_flush_updates_with_the_mean_of_the_micro_batches_there_are(done: int) -> None:
    short, whole = make_engine(gradient_accumulation_steps=4), make_engine(gradient_accumulation_steps=done)
    train(short, done)
    assert short.flush() and short.global_steps == 1
    train(whole, done)
    torch.testing.assert_close(weights(short), weights(whole))
    assert float(short.loss) == pytest.approx(float(whole.loss))
    assert short.global_samples == 2 * done
    assert not short.flush()
    train(short, 4, first=done)
    assert short.global_steps == 2


def test_micro_batches_that_are_left_over_are_not_dropped_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(gradient_accumulation_steps=4)
    train(engine, 6)
    del engine
    assert "its last 2 of 4 micro-batches are in no optimizer step" in caplog.text


def test_without_managed_accumulation_every_step_updates() -> None:
    engine = make_engine(managed_gradient_accumulation=False, gradient_accumulation_steps=2)
    reference = make_engine(gradient_accumulation_steps=2)
    for index in range(2):
        assert not engine.is_gradient_accumulation_boundary()
        engine.backward(loss_of(engine, index))
    engine.step()
    train(reference, 2)
    torch.testing.assert_close(weights(engine), weights(reference))
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 1, 4)
    with pytest.raises(EngineError, match="managed_gradient_accumulation is false"):
        engine.set_gradient_accumulation_boundary(True)


def test_the_script_may_say_where_an_update_ends() -> None:
    engine, reference = make_engine(gradient_accumulation_steps=2), make_engine(gradient_accumulation_steps=2)
    engine.set_gradient_accumulation_boundary(False)
    train(engine, 1)
    assert not engine.is_gradient_accumulation_boundary()
    engine.set_gradient_accumulation_boundary(True)
    train(engine, 1, first=1)
    train(reference, 2)
    torch.testing.assert_close(weights(engine), weights(reference))


# -- on several --------------------------------------------------------------------------------------------

BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"gradient_allreduce_op": "sum"},
    "prescale": {"prescale_gradients": True},
    "predivide": {"gradient_predivide_factor": 4.0},
    "fp16 on the wire": {"communication_data_type": "fp16"},
    "bf16": BF16,
    "bf16 on the wire": {**BF16, "communication_data_type": "bf16"},
    "bf16, accumulated": {**BF16, "gradient_accumulation_steps": 3},
    "bf16, accumulated in bf16": {
        **BF16,
        "gradient_accumulation_steps": 3,
        "data_types": {"grad_accum_dtype": "bf16"},
    },
    "accumulated": {"gradient_accumulation_steps": 3},
    "static fp16": {"fp16": {"enabled": True, "loss_scale": 64}},
}


def updates_of_one_process() -> dict[str, Tensor]:
    return {name: update(make_engine(**config)) for name, config in CASES.items()}


def on_every_rank() -> dict[str, Any]:
    found: dict[str, Any] = {"updates": updates_of_one_process()}

    short = make_engine(gradient_accumulation_steps=4)
    train(short, 2)
    short.flush()
    found["flush"] = weights(short)
    whole = make_engine(gradient_accumulation_steps=2)
    train(whole, 2)
    found["no flush"] = weights(whole)

    own = make_engine(managed_gradient_accumulation=False)
    own.backward(loss_of(own, own.global_rank), scale_wrt_gas=False)
    found["before step"] = own.module[0].weight.grad.clone()
    own.backward(loss_of(own, 2 + own.global_rank), scale_wrt_gas=False)
    own.step()
    found["own"] = weights(own)

    forced = make_engine(gradient_accumulation_steps=4)
    forced.set_gradient_accumulation_boundary(False)
    forced.backward(loss_of(forced, forced.global_rank))
    forced.backward(loss_of(forced, 2 + forced.global_rank))
    forced.set_gradient_accumulation_boundary(True)
    forced.step()
    found["forced"] = weights(forced)

    uneven = make_engine(bf16={"enabled": True})
    loss = loss_of(uneven, 0) * (float("nan") if uneven.global_rank == 1 else 1.0)
    uneven.backward(loss)
    uneven.step()
    found["skipped"] = (uneven.skipped_steps, weights(uneven))

    torch.manual_seed(0)
    embedding = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1))
    sparse = make_engine(embedding, gradient_clipping=0.1)
    sparse.backward(sparse(torch.tensor([1 + sparse.global_rank, 4])).square().mean())
    sparse.step()
    found["sparse"] = weights(sparse)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_every_rank, 2)


def global_gradient(config: dict[str, Any]) -> Tensor:
    """What the two processes together should have: one process over both processes' micro-batches."""
    micro_batches = config.get("gradient_accumulation_steps", 1)
    engine = make_engine(gradient_accumulation_steps=2 * micro_batches)
    gradient = update(engine)
    return gradient * 2 if config.get("gradient_allreduce_op") == "sum" else gradient


@pytest.mark.parametrize("name", CASES)
def test_two_processes_update_as_one_with_both_their_data(name: str, ranks: list[dict[str, Any]]) -> None:
    ours, theirs = (found["updates"][name] for found in ranks)
    assert torch.equal(ours, theirs)
    low = "16" in name
    torch.testing.assert_close(
        ours, global_gradient(CASES[name]), rtol=3e-2 if low else 1e-5, atol=5e-3 if low else 1e-6
    )


def test_the_wire_alone_rounds_the_sum(ranks: list[dict[str, Any]]) -> None:
    exact, rounded = (ranks[0]["updates"][name] for name in ("mean", "fp16 on the wire"))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("way", ["flush", "own", "forced", "sparse"])
def test_ranks_share_gradients_whatever_ends_the_accumulation(way: str, ranks: list[dict[str, Any]]) -> None:
    """A flush; a step() of unmanaged accumulation; a boundary that the script sets after backward; sparse ones."""
    first, second = ranks
    assert torch.equal(first[way], second[way])
    torch.testing.assert_close(first["flush"], first["no flush"])
    assert not torch.equal(first["before step"], second["before step"])  # of unmanaged accumulation


def test_one_bad_process_makes_all_skip(ranks: list[dict[str, Any]]) -> None:
    (one, ours), (other, theirs) = (found["skipped"] for found in ranks)
    assert one == other == 1
    assert torch.equal(ours, theirs)


def gradients_so_far(precision: str) -> list[list[float]]:
    """The weight's gradient after each backward of an accumulation, then the one that the optimizer got."""
    got: list[Any] = []
    engine = tiny.make_engine(gradient_accumulation_steps=3, gradient_clipping=0.0, **{precision: {"enabled": True}})
    assert engine.optimizer is not None
    updated = engine.optimizer.param_groups[0]["params"][0]
    engine.optimizer.register_step_pre_hook(lambda *_: got.append(updated.grad.clone()))
    found = []
    for _ in range(3):
        train_backward(engine)
        gradient = engine.gradient_of(engine.module.weight)
        assert gradient is not None
        found.append(gradient.float().flatten().tolist())
        engine.step()
    return [*found, got[0].float().flatten().tolist()]


def train_backward(engine: Engine) -> None:
    output = engine(tiny.X[4 * engine.global_rank : 4 * engine.global_rank + 4]).float()
    engine.backward(nn.functional.mse_loss(output, tiny.Y[:4]))


@pytest.mark.parametrize("precision", ["torch_autocast", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_parameters_gradient_can_be_read_between_backward_and_step(ranks: int, precision: str) -> None:
    for first, second, third, stepped in run_ranks(gradients_so_far, ranks, precision):
        assert second == pytest.approx([2 * value for value in first], rel=0.02)
        assert third == pytest.approx(stepped, rel=0.01)
