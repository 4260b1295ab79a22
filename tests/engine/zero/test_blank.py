"""Models on the meta device: filled part by part, or refused where nothing gives them values."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Engine, EngineError, initialize
from engine.zero.blank import fill, is_blank
from tests.distributed import run_ranks

CPU = torch.device("cpu")


class Layer(nn.Module):
    """One with a parameter of its own that it knows how to begin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.gain = nn.Parameter(torch.empty(64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.linear(x)) * self.gain
        return out


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


def blank() -> Model:
    with torch.device("meta"):
        return Model()


CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "redline": {"zero": {"smallest_block": 1000}},
}


def test_a_filled_model_has_its_modules_own_beginnings() -> None:
    model = blank()
    assert is_blank(model)
    made = fill(model, model.named_modules(), CPU)
    assert not is_blank(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.layers[2].gain, torch.full((64,), 2.0))
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(model.norm.running_var, torch.ones(64)) and int(model.norm.num_batches_tracked) == 0
    assert len([new for new in made.values() if isinstance(new, nn.Parameter)]) == len(list(model.parameters()))


def test_a_tensor_that_nothing_begins_is_named() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": Layer()})
        model.offset = nn.Parameter(torch.zeros(3))
        model.register_buffer("table", torch.arange(5.0))
    with pytest.raises(EngineError, match=r"meta device, and nothing gives offset, table a value; .*reset_parameters"):
        fill(model, model.named_modules(), CPU)


def test_a_model_of_hugging_face_begins_with_its_own_rule() -> None:
    class Pretrained(Model):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.25)

    with torch.device("meta"):
        model = Pretrained()
    fill(model, model.named_modules(), CPU)
    assert torch.equal(model.layers[0].linear.weight, torch.full((64, 64), 0.25))


def train(engine: Engine) -> list[float]:
    """The losses of three updates, over all processes."""
    tokens = torch.arange(4)
    losses = []
    for _ in range(3):
        engine.backward(nn.functional.cross_entropy(engine(tokens), tokens))
        engine.step()
        losses.append(float(engine.world.mean(engine.loss)))
    return losses


def test_one_process_trains_a_model_from_the_meta_device() -> None:
    torch.manual_seed(7)
    model = blank()
    given = [{"params": list(model.layers.parameters()), "lr": 0.02}, {"params": model.embedding.weight}]
    engine = initialize(model, CONFIG, model_parameters=given, device="cpu")
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(each) in own for group in engine.optimizer.param_groups for each in group["params"])
    assert engine.get_lr() == [0.02, 0.1]
    losses = train(engine)
    assert losses[2] < losses[0]


def work(stage: int) -> tuple[list[float], int, int]:
    """Losses; the largest number of elements alive on this process while the model was shared out; its size."""
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 7)
    model = blank()
    size = sum(parameter.numel() for parameter in model.parameters())
    alive = [0]
    original = torch.full_like

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        value = original(*args, **kwargs)
        held = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() // 4
            for each in gc.get_objects()
            if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" and each.dtype is torch.float32
        }
        alive[0] = max(alive[0], sum(held.values()))
        return value

    torch.full_like = watch  # type: ignore[assignment]
    try:
        engine = initialize(model, {**CONFIG, "zero_optimization": {"stage": stage}}, device="cpu")
    finally:
        torch.full_like = original
    return train(engine), alive[0], size


def test_a_model_that_is_shared_out_is_never_whole_anywhere() -> None:
    for losses, alive, size in run_ranks(work, 4, 3):
        assert losses[2] < losses[0]
        assert alive < 0.6 * size  # a quarter of it, and a block


def test_all_processes_begin_with_rank_zeros_weights() -> None:
    answers = run_ranks(work, 2, 0), run_ranks(work, 2, 1)
    for first, second in answers:
        assert first[0] == second[0]
