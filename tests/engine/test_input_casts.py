"""fp32 inputs of models in bf16 and fp16: layers cast what they need to, and nothing else is rounded.

Expected values come from the same model in plain torch: in fp32, or in the low precision with casts written by hand.
"""

from __future__ import annotations

import copy
import io
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from redline import EngineError, initialize
from redline.engine import Engine
from tests.distributed import run_ranks

LOW = pytest.mark.parametrize("low", ["bf16", "fp16"])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = torch.tensor([999.0, 1000.0, 1001.0, 1002.0])  # bf16 has 1000 for all four


def engine_of(model: nn.Module, precision: str, **config: Any) -> Engine:
    section = {} if precision == "fp32" else {precision: {"enabled": True}}
    if precision == "fp16":
        section["fp16"]["initial_scale_power"] = 0
    settings = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 1e-3}}, **section}
    return initialize(model, {**settings, **config}, device="cpu")


def train(engine: Engine, *args: Any, steps: int = 5, **kwargs: Any) -> list[float]:
    """Losses of more steps than are watched."""
    losses = []
    for _ in range(steps):
        loss = engine(*args, **kwargs)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


# -- what is not rounded ---------------------------------------------------------------------------------------


class Head(nn.Module):
    """A loss within the model, in fp32, and all that an input may be in its way; keeps what it was given."""

    def __init__(self, *, owns: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        if owns:
            self.mix = nn.Parameter(torch.eye(4))
        self.seen: Any = None

    def forward(self, x: Tensor, labels: Any = None, **targets: Any) -> Tensor:
        self.seen = (labels, targets)
        x = x @ self.mix if hasattr(self, "mix") else x
        labels = labels if labels is not None else targets["targets"][0]["boxes"]
        out: Tensor = (self.layer(x).float() - labels[:, None]).square().mean()
        return out


@pytest.mark.parametrize("owns", [False, True], ids=["layers-only", "own-parameter"])
@pytest.mark.parametrize("precision", DTYPES)
def test_labels_and_boxes_arrive_as_they_were_given_and_layers_cast_as_by_hand(precision: str, owns: bool) -> None:
    model, x = Head(owns=owns), torch.randn(4, 4)
    plain = copy.deepcopy(model).to(DTYPES[precision])
    engine = engine_of(model, precision)
    assert train(engine, x, labels=STEPS)[0] == float(plain(x.to(DTYPES[precision]), STEPS).detach())
    assert engine.module.seen[0] is STEPS
    train(engine, x, targets=[{"boxes": STEPS, "labels": torch.ones(4, dtype=torch.int64)}])
    assert engine.module.seen[1]["targets"][0]["boxes"] is STEPS


class Fourier(nn.Module):
    """Learned features of a time step: fp32 times a parameter is fp32 in torch, and nothing has to be cast."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 4.0]))

    def forward(self, time: Tensor) -> Tensor:
        return torch.sin(time[:, None] * self.frequencies)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4))
        self.time, self.layer = Fourier(), nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.features = self.time(time)
        out: Tensor = self.layer(x + self.position + self.features).float().square().mean()
        return out


@LOW
def test_time_steps_next_to_each_other_stay_apart(low: str) -> None:
    engine = engine_of(Denoiser(), low)
    train(engine, torch.randn(4, 4), STEPS, steps=1)
    expected = torch.sin(STEPS[:, None] * torch.tensor([0.5, 1.0, 2.0, 4.0]))
    torch.testing.assert_close(engine.module.features, expected)


@LOW
@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.huber_loss, F.smooth_l1_loss])
def test_losses_of_low_predictions_and_fp32_targets_are_computed_in_fp32(low: str, loss_fn: Any) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            out: Tensor = loss_fn(self.layer(x).squeeze(1), target)
            return out

    torch.manual_seed(0)
    model, x, target = Inside(), torch.randn(4, 4), torch.rand(4)
    plain = copy.deepcopy(model.layer).to(DTYPES[low])
    expected = float(loss_fn(plain(x.to(DTYPES[low])).squeeze(1).float(), target).detach())
    assert train(engine_of(model, low), x, target)[0] == expected


def test_class_weights_in_a_buffer_widen_the_loss() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3), "loss": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))})
    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    plain = copy.deepcopy(model)
    plain["layer"].bfloat16()
    expected = float(plain["loss"](plain["layer"](x.bfloat16()).float(), labels).detach())
    model.forward = lambda x, labels: model["loss"](model["layer"](x), labels)
    assert train(engine_of(model, "bf16"), x, labels)[0] == expected


# -- what is cast, wherever it comes from ----------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor


class Moves:
    """Has a method `to`, as the batches of many libraries."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, *args: Any) -> Moves:
        return Moves(self.x.to(*args))


class Nested(nn.Module):
    def __init__(self, find: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.find = nn.Linear(4, 1), find

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.layer(self.find(batch)).float().mean()
        return out


NESTED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "list": (lambda x: [1, {"x": (x,)}], lambda batch: batch[1]["x"][0]),
    "dataclass": (Batch, lambda batch: batch.x),
    "user dict": (lambda x: UserDict(x=x), lambda batch: batch["x"]),
    "namespace": (lambda x: SimpleNamespace(x=x), lambda batch: batch.x),
    "deque": (lambda x: deque([x]), lambda batch: batch[0]),
    "object": (Moves, lambda batch: batch.x),
    "made inside": (lambda x: len(x), lambda batch: torch.ones(batch, 4)),
    "fp64": (lambda x: x.double(), lambda batch: batch),
}


@LOW
@pytest.mark.parametrize("name", NESTED)
def test_a_layer_takes_fp32_from_any_container(low: str, name: str) -> None:
    wrap, find = NESTED[name]
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    model = Nested(find)
    plain, given = copy.deepcopy(model.layer).to(DTYPES[low]), wrap(x)
    losses = train(engine_of(model, low), given)
    assert losses[0] == float(plain(find(given).to(DTYPES[low])).float().mean().detach())
    assert losses[-1] < losses[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, len(x), 4)
        packed = pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
        return self.layer(x, (state, state))[0].float().mean() + self.layer(packed)[0].data.float().mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, value=x, attn_mask=torch.zeros(3, 3))[0].float().mean()


class Functional(nn.Module):
    """Scores in fp32, by a mask, and values in the low precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.layer(x).chunk(3, -1)
        scores = query @ key.transpose(1, 2) + torch.zeros(3, 3)
        return (scores.softmax(-1) @ value).float().mean()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean()


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": Recurrent,
    "attention": Attention,
    "functional attention": Functional,
    "encoder": lambda: nn.Sequential(encoder(), Mean()),
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 2, 1), Mean()),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(1, 3), nn.PReLU(), nn.RMSNorm(4), Mean()),
    "subclass": lambda: nn.Sequential(Doubled(4, 4), Mean()),
}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


@LOW
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_all_kinds_take_fp32_in_training_and_evaluation(low: str, name: str) -> None:
    torch.manual_seed(0)
    model, x = LAYERS[name](), torch.randn(2, 3, 4)
    plain = float(copy.deepcopy(model)(x).detach())
    engine = engine_of(model, low)
    assert train(engine, x)[0] == pytest.approx(plain, rel=0.05, abs=0.01)
    norms = [each for each in engine.module.modules() if isinstance(each, nn.BatchNorm1d)]
    assert all(each.weight.dtype is torch.float32 and not each._forward_pre_hooks for each in norms)
    engine.eval()
    with torch.no_grad():
        expected = float(copy.deepcopy(model).float()(x))
        for _ in range(5):
            assert float(engine(x)) == pytest.approx(expected, rel=0.05, abs=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_and_fp32_have_no_casts_of_the_engines(dtype: str) -> None:
    for extra in ({}, {"torch_autocast": {"enabled": True, "dtype": dtype}}):
        engine = engine_of(Head(owns=True), "fp32", **extra)
        assert not any(each._forward_pre_hooks for each in engine.module.modules())
        train(engine, torch.randn(4, 4), STEPS)


# -- what stays of the hooks -----------------------------------------------------------------------------------


def hooked(engine: Engine) -> list[str]:
    return [name for name, each in engine.module.named_modules() if each._forward_pre_hooks]


def test_only_layers_that_had_to_cast_keep_their_hooks() -> None:
    engine = engine_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1), Mean()), "bf16")
    assert hooked(engine) == ["0", "1", "2"]
    train(engine, torch.randn(4, 4).bfloat16())
    assert hooked(engine) == []
    train(engine, torch.randn(4, 4))
    assert hooked(engine) == ["0"]


def test_after_an_unforeseen_dtype_the_next_forward_casts() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.widens = nn.Linear(4, 4), nn.Linear(4, 1), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            out: Tensor = self.second(x.float() if self.widens else x).float().mean()
            return out

    engine = engine_of(Switch(), "bf16")
    train(engine, torch.randn(4, 4))
    engine.module.widens = True  # nothing that the engine sees
    with pytest.raises(EngineError, match="bf16 parameters met a tensor of another dtype"):
        engine(torch.randn(4, 4))
    train(engine, torch.randn(4, 4))


@pytest.mark.parametrize("name", ["encoder", "functional attention", "attention"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_the_module_cast_for_themselves(how: str, name: str) -> None:
    x = torch.randn(2, 3, 4)
    engine = engine_of(LAYERS[name](), "bf16")
    train(engine, x)
    expected = engine.module(x).detach()
    if how == "deepcopy":
        other = copy.deepcopy(engine.module)
    else:
        file = io.BytesIO()
        torch.save(engine.module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    train(engine, x)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_cast_as_they_did_in_the_forward(reentrant: bool) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.float() @ self.weight

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), Product()
            self.saves = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            out = checkpoint(self.block, x, use_reentrant=reentrant) if self.saves else self.block(x)
            return out.float().mean()

    losses = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = Blocks()
        model.saves = saves
        losses.append(train(engine_of(model, "bf16"), torch.ones(4, 4)))
    assert losses[0] == losses[1]


def test_an_interrupted_forward_leaves_no_mode_behind() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.stops = nn.Parameter(torch.eye(4)), False

        def forward(self, x: Tensor) -> Tensor:
            if self.stops:
                raise KeyboardInterrupt
            return (x @ self.weight).float().mean()

    engine = engine_of(Interrupted(), "bf16")
    train(engine, torch.ones(4, 4))
    engine.module.stops = True
    with pytest.raises(KeyboardInterrupt):
        engine(torch.ones(4, 4))
    assert torch.overrides._get_current_function_mode_stack() == []
    engine.module.stops = False
    train(engine, torch.ones(4, 4))


def test_compiled_models_cast_within_one_graph() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = Head(owns=True)
    plain, x = copy.deepcopy(model), torch.randn(4, 4)
    torch.compiler.reset()
    engine = engine_of(model, "bf16")
    engine.compile(backend=backend, compile_kwargs={"fullgraph": True})
    assert train(engine, x, STEPS) == pytest.approx(train(engine_of(plain, "bf16"), x, STEPS), rel=1e-5)
    assert len(graphs) == 1


# -- errors ----------------------------------------------------------------------------------------------------


@LOW
@pytest.mark.parametrize("wrap", [spectral_norm, orthogonal], ids=["spectral_norm", "orthogonal"])
def test_fp32_buffers_of_parametrizations_are_an_error_that_names_the_key(low: str, wrap: Any) -> None:
    engine = engine_of(nn.Sequential(wrap(nn.Linear(4, 4)), Mean()), low)
    with pytest.raises(EngineError, match=r"buffers of the model are not .*parametrizations.*buffer_dtype") as caught:
        engine(torch.randn(4, 4))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_spectral_norm_trains_with_the_key_that_its_error_names() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(spectral_norm(nn.Linear(4, 4)), Mean()), torch.randn(4, 4)
    plain = copy.deepcopy(model)
    losses = train(engine_of(model, "bf16", data_types={"buffer_dtype": "bf16"}), x)
    assert losses == pytest.approx(train(engine_of(plain, "fp32"), x), rel=0.02, abs=2e-3)


def test_an_error_of_the_scripts_own_stays_what_it_is() -> None:
    engine = engine_of(nn.Sequential(nn.Linear(4, 1)), "bf16")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        engine(torch.randn(4, 5))


# -- on several ranks ------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """As ViT's: casts its input to the dtype of a weight, which is the shards' while the weight is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(x.to(self.projection.weight.dtype))
        return out


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = Embedding(), Head(owns=True)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = x + layer(x.float())
        out: Tensor = self.head(x.float(), labels)
        assert self.head.seen[0] is labels
        return out


def sharded_losses() -> dict[tuple[str, int, bool], list[float]]:
    losses = {}
    for precision in DTYPES:
        for stage in (0, 2, 3):
            for recomputes in (False, True):
                own = {"activation_checkpointing": recomputes, "zero": {"smallest_block": 1}}
                torch.manual_seed(0)
                engine = engine_of(Embedded(), precision, zero_optimization={"stage": stage}, redline=own)
                losses[precision, stage, recomputes] = train(engine, torch.ones(4, 4), STEPS / 1000)
    return losses


def test_every_stage_casts_alike_with_recomputation_or_without() -> None:
    losses = run_ranks(sharded_losses, 2)[0]
    for (precision, *_), values in losses.items():
        assert values == pytest.approx(losses[precision, 0, False], rel=1e-3)
        assert values == pytest.approx(losses["fp32", 0, False], rel=0.02)


# -- Hugging Face ----------------------------------------------------------------------------------------------


SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16
}  # fmt: skip


def vit() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=20, num_labels=1, problem_type="regression", hidden_dropout_prob=0.0, **SIZES)
    tokens, mask = torch.randint(0, 20, (2, 4)), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    return BertForSequenceClassification(config), {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": STEPS[:3:2],
    }


def t5() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    tokens = torch.randint(1, 20, (2, 4))
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes))
    return model, {"input_ids": tokens, "labels": tokens}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES))
    return model, {"inputs_embeds": torch.randn(2, 4, 16), "labels": torch.randint(0, 20, (2, 4))}


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


@pytest.mark.parametrize("make", [vit, bert, t5, llama])
def test_models_of_hugging_face_train_in_low_precision(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    pytest.importorskip("transformers", reason="needs transformers, which no part of the engine does")
    losses = {}
    for precision in DTYPES:
        torch.manual_seed(0)
        model, batch = make()
        losses[precision] = train(engine_of(Loss(model), precision), **batch)
    for low in ("bf16", "fp16"):
        assert losses[low] == pytest.approx(losses["fp32"], rel=0.02)
