"""The step loop in one process: counters, accumulation, clipping, and what is said when it is used wrongly."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, EngineError, initialize

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 1, generator=torch.Generator().manual_seed(2))
SGD = {"type": "SGD", "params": {"lr": 0.1}}
mse = nn.functional.mse_loss


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_engine(model: nn.Module | None = None, **config: Any) -> Engine:
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": SGD, "gradient_clipping": 0, **config}
    return initialize(model or make_model(), config, device="cpu")


def train(engine: Engine, micro_steps: int, size: int = 4) -> list[Tensor]:
    """So many micro-steps over X and Y in order; their losses as differentiated."""
    losses = []
    for index in range(micro_steps):
        rows = slice(index * size % 16, index * size % 16 + size)
        losses.append(engine.backward(mse(engine(X[rows]).float(), Y[rows])).detach())
        engine.step()
    return losses


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# -- counters ------------------------------------------------------------------------------------------------


def test_counters_count_and_the_weights_move_at_the_boundary_only() -> None:
    engine = make_engine(gradient_accumulation_steps=3)
    seen = []
    for _ in range(7):
        boundary, before = engine.is_gradient_accumulation_boundary(), weights(engine)
        train(engine, 1)
        assert boundary is not torch.equal(weights(engine), before)
        assert not boundary or all(parameter.grad is None for parameter in engine.parameters())
        seen.append((boundary, engine.micro_steps, engine.global_steps))
    assert seen == [
        (False, 1, 0), (False, 2, 0), (True, 3, 1), (False, 4, 1), (False, 5, 1), (True, 6, 2), (False, 7, 2)
    ]  # fmt: skip
    assert engine.skipped_steps == 0


def test_an_engine_tells_its_batch_sizes_and_its_place() -> None:
    engine = make_engine(gradient_accumulation_steps=3, gradient_clipping=0.5)
    sizes = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    assert sizes == (12, 4, 3)
    assert engine.gradient_clipping() == 0.5
    assert (engine.global_rank, engine.local_rank, engine.world_size) == (0, 0, 1)
    assert engine.device == torch.device("cpu")


def test_another_batch_size_is_reached_by_accumulation() -> None:
    model = make_model()
    engine, whole = make_engine(copy.deepcopy(model)), make_engine(model, train_micro_batch_size_per_gpu=16)
    engine.set_train_batch_size(16)
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (16, 4)
    assert engine.train_micro_batch_size_per_gpu() == 4
    train(engine, 4)
    train(whole, 1, size=16)
    assert (engine.global_steps, engine.global_samples) == (1, 16)
    torch.testing.assert_close(weights(engine), weights(whole))
    engine.set_train_batch_size(4)
    train(engine, 3)
    assert (engine.global_steps, engine.global_samples, engine.train_batch_size()) == (4, 28, 4)


@pytest.mark.parametrize(
    ("size", "nearest"), [(10, "8 and 12"), (3, "4"), (0, "4"), (-4, "4"), (8.0, "8 and 12")], ids=str
)
def test_a_batch_size_that_micro_batches_do_not_make_up_is_refused(size: Any, nearest: str) -> None:
    engine = make_engine(gradient_accumulation_steps=2)
    with pytest.raises(EngineError, match=f"got {size}; expected a multiple of 4, .* on 1 rank; nearest: {nearest}$"):
        engine.set_train_batch_size(size)
    assert engine.train_batch_size() == 8


def test_a_batch_size_stays_while_an_update_is_under_way() -> None:
    engine = make_engine(gradient_accumulation_steps=2)
    train(engine, 1)
    with pytest.raises(EngineError, match="called within an accumulation"):
        engine.set_train_batch_size(4)
    engine.flush()
    engine.set_train_batch_size(4)
    train(engine, 1)
    assert engine.global_steps == 2


def test_rate_and_momentum_move_once_per_update() -> None:
    schedule = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3, "cycle_first_step_size": 2}}
    engine = make_engine(gradient_accumulation_steps=2, optimizer={"type": "Adam"}, scheduler=schedule)
    seen = []
    for _ in range(6):
        seen.append((engine.get_lr()[0], engine.get_mom()[0][0]))
        train(engine, 1)
    assert [lr for lr, _ in seen] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert [mom for _, mom in seen] == pytest.approx([0.8, 0.8, 0.85, 0.85, 0.8, 0.8])


# -- gradients -----------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_give_the_gradient_of_one_big_batch() -> None:
    many, one = make_engine(gradient_accumulation_steps=4), make_engine(train_micro_batch_size_per_gpu=16)
    train(many, 3)
    rows = slice(12, 16)
    many.backward(mse(many(X[rows]), Y[rows]))
    one.backward(mse(one(X), Y))
    for ours, whole in zip(many.parameters(), one.parameters()):
        torch.testing.assert_close(ours.grad, whole.grad)
    many.step()
    one.step()
    torch.testing.assert_close(weights(many), weights(one))


def test_an_engine_trains_as_a_loop_by_hand_does() -> None:
    engine, model = make_engine(gradient_clipping=0.1), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    train(engine, 8)
    for index in range(8):
        rows = slice(index * 4 % 16, index * 4 % 16 + 4)
        mse(model(X[rows]), Y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(engine), weights(model))


@pytest.mark.parametrize("in_no_sync", [False, True])
def test_several_losses_of_one_micro_batch_add_up(in_no_sync: bool) -> None:
    apart, together = make_engine(), make_engine()
    with apart.no_sync() if in_no_sync else nullcontext():
        apart.backward(mse(apart(X[:4]), Y[:4]))
    apart.backward(mse(apart(X[4:8]), Y[4:8]))
    apart.step()
    together.backward(mse(together(X[:4]), Y[:4]) + mse(together(X[4:8]), Y[4:8]))
    together.step()
    torch.testing.assert_close(weights(apart), weights(together))
    assert float(apart.loss) == pytest.approx(float(together.loss))


def test_the_loss_is_divided_by_the_accumulation_unless_told_otherwise() -> None:
    engine = make_engine(gradient_accumulation_steps=4)
    loss = mse(engine(X), Y)
    assert engine.backward(loss, retain_graph=True).item() == pytest.approx(loss.item() / 4)
    assert engine.backward(loss, scale_wrt_gas=False).item() == loss.item()


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_known_without_clipping_too() -> None:
    free, clipped = make_engine(), make_engine(gradient_clipping=0.01)
    assert clipped.get_global_grad_norm() is None
    before = weights(free)
    train(free, 1)
    train(clipped, 1)
    norm = float((weights(free) - before).norm()) / 0.1
    assert norm > 0.01
    assert free.get_global_grad_norm() == clipped.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)
    assert float((weights(clipped) - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_clipping_is_one_where_the_config_does_not_say() -> None:
    assert initialize(make_model(), {"train_batch_size": 4, "optimizer": SGD}, device="cpu").gradient_clipping() == 1.0


def test_the_loss_of_an_update_is_the_mean_over_its_micro_batches_and_stays_a_tensor() -> None:
    engine = make_engine(gradient_accumulation_steps=4)
    assert engine.loss is None
    losses = train(engine, 4)
    assert isinstance(engine.loss, Tensor)
    assert not engine.loss.requires_grad
    assert float(engine.loss) == pytest.approx(float(sum(losses)))


# -- models of every kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, config", [(torch.float32, {}), (torch.bfloat16, {"bf16": {"enabled": True}})])
def test_a_tied_parameter_is_one_and_a_frozen_one_stays(dtype: torch.dtype, config: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    engine = make_engine(model, gradient_clipping=1.0, **config)
    tied, frozen = model[0].weight.clone(), model[2].weight.clone()
    assert len(engine.optimizer.param_groups[0]["params"]) == 3  # a weight and two biases
    train(engine, 2)
    assert model[0].weight is model[1].weight and model[0].weight.dtype == dtype
    assert not torch.equal(model[0].weight, tied)
    assert torch.equal(model[2].weight, frozen) and model[2].weight.grad is None


def test_a_parameter_that_the_forward_leaves_out_stays_as_it_is() -> None:
    model = make_model()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    before = model.unused.weight.clone()
    train(make_engine(model, gradient_clipping=1.0), 2)
    assert torch.equal(model.unused.weight, before)


def test_buffers_move_with_training_and_not_with_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    engine = make_engine(model)
    train(engine, 2)
    assert int(model[1].num_batches_tracked) == 2
    engine.eval()
    engine(X)
    assert int(model[1].num_batches_tracked) == 2


def test_an_engine_is_a_module_around_the_model_it_was_given() -> None:
    model = make_model()
    engine = make_engine(model)
    assert isinstance(engine, nn.Module)
    assert engine.module is model
    assert [name for name, _ in engine.named_children()] == ["module"]
    assert [id(parameter) for parameter in engine.parameters()] == [id(parameter) for parameter in model.parameters()]
    engine.eval()
    assert not model.training
    engine.train()
    assert model.training


def test_an_engines_state_dict_is_the_models() -> None:
    engine, other = make_engine(), make_engine()
    train(engine, 3)
    state = engine.state_dict()
    assert set(state) == {f"module.{name}" for name in engine.module.state_dict()}
    other.load_state_dict(state)
    assert torch.equal(weights(other), weights(engine))


def test_forward_passes_everything_on() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, a: int, *, b: int) -> dict[str, Any]:
            return {"sum": self.weight * (a + b)}

    assert make_engine(Odd())(1, b=2)["sum"].item() == 3.0


def test_without_an_optimizer_an_engine_evaluates() -> None:
    engine = initialize(make_model(), {"train_batch_size": 4}, device="cpu")
    with torch.no_grad():
        assert engine(X).shape == (16, 1)
    assert engine(X).requires_grad
    assert (engine.get_lr(), engine.get_mom(), engine.optimizer) == ([], [], None)


# -- used wrongly --------------------------------------------------------------------------------------------


def test_backward_without_an_optimizer_says_where_to_get_one() -> None:
    engine = initialize(make_model(), {"train_batch_size": 4}, device="cpu")
    with pytest.raises(EngineError, match='there is no optimizer; give the config an "optimizer" section'):
        engine.backward(mse(engine(X), Y))


@pytest.mark.parametrize(
    ("loss", "given"),
    [(torch.ones(4, 1), r"a tensor of shape \(4, 1\)"), (0.5, "float"), (None, "NoneType"), ({"loss": 1}, "dict")],
)
def test_backward_wants_a_scalar_and_says_what_it_got(loss: Any, given: str) -> None:
    with pytest.raises(EngineError, match=rf"backward: got {given}; expected a scalar tensor, such as loss.mean\(\)"):
        make_engine().backward(loss)


def test_a_loss_of_one_element_is_scalar_enough() -> None:
    engine = make_engine()
    engine.backward(mse(engine(X), Y).reshape(1))
    engine.step()
    assert engine.global_steps == 1


def test_step_without_a_backward_before_it_is_an_error_that_says_what_to_call() -> None:
    engine = make_engine()

    def refused() -> None:
        with pytest.raises(
            EngineError,
            match=r"no backward since the last step; call engine\.backward\(loss\) first, not loss\.backward",
        ):
            engine.step()

    refused()
    mse(engine(X), Y).backward()
    refused()
    engine.zero_grad()
    train(engine, 1)
    refused()
    assert (engine.global_steps, engine.micro_steps) == (1, 1)
    with engine.no_sync():
        engine.backward(mse(engine(X), Y))
        with pytest.raises(EngineError, match=r"step: called inside no_sync\(\)"):
            engine.step()
    refused()


def test_no_sync_ends_when_its_block_does_even_by_an_exception() -> None:
    engine = make_engine()
    with pytest.raises(ZeroDivisionError), engine.no_sync():
        _ = 1 / 0
    train(engine, 1)
    assert engine.global_steps == 1


def test_a_backward_that_fails_leaves_no_loss_behind() -> None:
    engine = make_engine()
    with pytest.raises(EngineError, match="does not require gradients"):
        engine.backward(torch.tensor(1e9))
    (loss,) = train(engine, 1)
    assert float(engine.loss) == float(loss)


# -- the compiler --------------------------------------------------------------------------------------------


class CountingBackend:
    """A compiler that runs graphs as they are, and counts those it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def test_compile_makes_the_compiler_run_the_model_once_and_changes_no_number() -> None:
    torch.compiler.reset()
    plain, compiled, backend, second = make_engine(), make_engine(), CountingBackend(), CountingBackend()
    module, keys = compiled.module, list(compiled.state_dict())
    assert not compiled.is_compiled
    compiled.compile(backend=backend)
    compiled.compile(backend=second)
    assert compiled.is_compiled
    assert (compiled.module, list(compiled.state_dict())) == (module, keys)
    torch.testing.assert_close(train(compiled, 6), train(plain, 6))
    assert (backend.graphs, second.graphs) == (1, 0)
    assert torch.equal(weights(compiled.module), weights(plain.module))


def test_compile_hands_its_arguments_on() -> None:
    torch.compiler.reset()

    class Breaking(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    engine = make_engine(Breaking(nn.Linear(4, 1)))
    engine.compile(backend="eager", compile_kwargs={"fullgraph": True})
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train(engine, 1)


def test_compile_wants_its_backend_named_once() -> None:
    with pytest.raises(EngineError, match=r"compile\(backend=...\)"):
        make_engine().compile(compile_kwargs={"backend": "eager"})
