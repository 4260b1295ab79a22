"""Which parts of a model are unsharded together, and models on the meta device: filled, or refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, EngineError, initialize
from redline.distributed.blocks import MetaModel, find_blocks, unsharded_params
from tests.distributed import run_ranks

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(4, 7)


def shares() -> nn.Module:
    model = Stack()
    model.blocks[1].first.weight = model.blocks[0].first.weight
    return model


def split_by_name() -> nn.Module:
    model = Stack()
    model._no_split_modules = ["Embedding"]
    return model


SEQUENCE = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
NESTED = (nn.Sequential(Block(), Block()), nn.ReLU(), nn.Sequential(Block(), Block(), nn.ReLU()))
SHARED = Block()


@pytest.mark.parametrize(
    ("model", "found"),
    [
        pytest.param(Stack(), ["blocks.0", "blocks.1", "blocks.2"], id="members of a list"),
        pytest.param(Stack(blocks=1), [], id="what is there once is none"),
        pytest.param(nn.Sequential(*NESTED), ["0.0", "0.1", "2.0", "2.1"], id="lists of lists are looked through"),
        pytest.param(
            nn.Sequential(*(copy.deepcopy(SEQUENCE) for _ in range(3)), nn.Linear(4, 2)),
            ["0", "1", "2"],
            id="sequences that repeat nothing themselves",
        ),
        pytest.param(nn.ModuleList([Stack(), Stack()]), ["0", "1"], id="one within a block belongs to it"),
        pytest.param(shares(), ["blocks.2"], id="not those that share a parameter with the rest"),
        pytest.param(nn.ModuleList([SHARED, Block(), SHARED]), ["0", "1"], id="a module that is there twice is one"),
        pytest.param(split_by_name(), ["embedding"], id="hugging face's word counts"),
    ],
)
def test_blocks_are_what_a_model_repeats(model: nn.Module, found: list[str]) -> None:
    assert list(find_blocks(model)) == found


def test_small_blocks_are_left_to_the_model() -> None:
    assert list(find_blocks(nn.ModuleList([Block(4), Block(4), Block(40)]), smallest=1000)) == ["2"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["Block"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.[01]", "head"], ["blocks.0", "blocks.1", "head"]),
        (["blocks.*.first"], ["blocks.0.first", "blocks.1.first", "blocks.2.first"]),
        (["Block", "Linear"], ["blocks.0", "blocks.1", "blocks.2", "head"]),
        ([], []),
    ],
)
def test_names_are_classes_or_places(names: list[str], found: list[str]) -> None:
    assert list(find_blocks(Stack(), names, smallest=10**9)) == found


def test_a_name_that_nothing_has_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(EngineError, match=r"redline\.zero\.blocks: 'Blok' is neither .* Embedding, ModuleList, Block"):
        find_blocks(Stack(), ["Block", "Blok"])


def test_scalars_integers_and_sparse_embeddings_stay_whole() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.codes = nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
    model.table = nn.Embedding(5, 2, sparse=True)
    model.linear, model.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    assert unsharded_params(model, low=False) == {model.scale, model.codes, model.table.weight}
    assert unsharded_params(model, low=True) == {model.scale, model.codes, model.table.weight, *model.norm.parameters()}


# -- the meta device ---------------------------------------------------------------------------------------------------


def fill(model: nn.Module) -> dict[Tensor, Tensor]:
    return MetaModel(model, CPU).fill(model.named_modules())


def has_meta_tensors(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


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
    assert has_meta_tensors(model)
    made = fill(model)
    assert not has_meta_tensors(model)
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
        fill(model)


class Constants(nn.Module):
    """Buffers that its constructor computes, as many models have them."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("position_ids", torch.arange(4, device=device), persistent=False)
        self.register_buffer("mask", torch.ones(3, 3, device=device).tril().bool())
        self.register_buffer("phase", torch.full((2,), 1j, device=device))
        self.register_buffer("nothing", torch.zeros(0, dtype=torch.int32, device=device))


def on_meta(make: Any) -> Any:
    with torch.device("meta"):
        return make()


def test_integers_and_booleans_that_nothing_gives_are_named_and_no_zeros() -> None:
    model = on_meta(Constants)
    with pytest.raises(EngineError, match=r'nothing gives position_ids, mask, phase a value; .*device="cpu"'):
        fill(model)


def test_what_the_constructor_made_on_the_cpu_stays_as_it_is() -> None:
    model = on_meta(lambda: Constants("cpu"))
    fill(model)
    assert model.position_ids.tolist() == [0, 1, 2, 3] and int(model.mask.sum()) == 6 and not has_meta_tensors(model)


@pytest.mark.parametrize("name", ["reset_parameters", "_reset_parameters", "reset_buffers", "_init_weights"])
@pytest.mark.parametrize("way", ["in place", "through .data", "anew"])
def test_a_modules_own_code_computes_its_constants_again(name: str, way: str) -> None:
    def reset(self: Constants) -> None:
        for key, value in Constants().named_buffers():
            if way == "anew":
                setattr(self, key, value)
            else:
                buffer = getattr(self, key)
                (buffer if way == "in place" else buffer.data).copy_(value)

    model = on_meta(type("Own", (Constants,), {name: reset}))
    made = fill(model)
    for (key, value), (_, wanted) in zip(model.named_buffers(), Constants().named_buffers()):
        assert torch.equal(value, wanted), key
    assert {id(each) for each in made.values()} == {id(each) for each in (*model.parameters(), *model.buffers())}


def test_batch_norm_counts_from_zero_and_integers_shared_by_two_modules_are_named_once() -> None:
    model = on_meta(lambda: nn.Sequential(nn.BatchNorm1d(3), Constants("cpu"), nn.Module(), nn.Module()))
    with torch.device("meta"):
        model[2].register_buffer("ids", torch.arange(2))
        model[3].register_buffer("ids", model[2].ids)
    with pytest.raises(EngineError, match=r"nothing gives 2\.ids a value"):
        fill(model)
    assert int(model[0].num_batches_tracked) == 0


def test_what_a_module_says_of_those_within_it_counts() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.constant_(self.inner[0].weight, 3.0)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    model = on_meta(lambda: nn.Sequential(Scaled(), nn.Linear(3, 3)))
    fill(model)
    assert torch.equal(model[0].inner[0].weight, torch.full((3, 3), 3.0))
    assert float(model[1].weight.detach().abs().max()) < 1
    mixed = on_meta(lambda: nn.Sequential(Scaled()))
    mixed[0].inner[0] = nn.Linear(3, 3)  # has been trained before, say
    before = mixed[0].inner[0].weight.detach().clone()
    fill(mixed)
    assert torch.equal(mixed[0].inner[0].weight, before)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.LSTM(3, 3, batch_first=True), torch.ones(2, 3, 3)),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2), torch.ones(2, 3, 8)),
    ],
    ids=["LSTM", "TransformerEncoder"],
)
def test_modules_of_torch_that_reset_in_ways_of_their_own_train(make: Any, x: Tensor) -> None:
    engine = initialize(on_meta(make), {**CONFIG, "train_micro_batch_size_per_gpu": 2}, device="cpu")
    out = engine(x)
    engine.backward((out[0] if isinstance(out, tuple) else out).square().mean())
    engine.step()
    assert engine.grad_norm > 0


@pytest.mark.parametrize("family", ["Llama", "Bert", "GPT2", "T5", "Whisper"])
def test_models_of_transformers_have_the_constants_and_scales_of_their_constructor(family: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers")
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "n_embd": 32,
            "n_layer": 2, "n_head": 4, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "encoder_layers": 2,
            "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "intermediate_size": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**tiny)
    kind = getattr(transformers, f"{family}Model")
    wanted, model = kind(config), on_meta(lambda: kind(config))
    fill(model)
    for (name, value), (_, other) in zip(model.named_buffers(), wanted.named_buffers()):
        assert torch.equal(value, other), name
    for (name, value), (_, other) in zip(model.named_parameters(), wanted.named_parameters()):
        if value.numel() >= 1024:  # so that chance moves a deviation by a few percent
            assert float(value.detach().std()) == pytest.approx(float(other.detach().std()), rel=0.2), name


def test_a_model_of_hugging_face_begins_with_its_own_rule() -> None:
    class Pretrained(Model):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.25)

    with torch.device("meta"):
        model = Pretrained()
    fill(model)
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


def is_on_cpu(tensor: Tensor) -> bool:
    try:
        return tensor.device.type == "cpu"
    except RuntimeError:  # the garbage collector also finds tensors that torch has not finished, without a device
        return False


def work(stage: int) -> tuple[list[float], int, int]:
    """Losses; the largest number of elements alive on this process while the model was shared out; its size."""
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 7)
    model = blank()
    size = sum(parameter.numel() for parameter in model.parameters())
    alive = [0]
    original = torch.full_like

    def held() -> dict[int, Tensor]:
        """The float32 tensors of this process, one for each storage."""
        return {
            each.untyped_storage().data_ptr(): each
            for each in gc.get_objects()
            if type(each) in (Tensor, nn.Parameter) and is_on_cpu(each) and each.dtype is torch.float32
        }

    earlier = held()  # what tests before this one left in the process; held on to, so that no address is used again

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        value = original(*args, **kwargs)
        sizes = (t.untyped_storage().nbytes() // 4 for address, t in held().items() if address not in earlier)
        alive[0] = max(alive[0], sum(sizes))
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
        assert alive < 0.65 * size  # a quarter of it, a block, and what is not collected yet


class Around(nn.Module):
    """A model that gives blocks within it their weights."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.constant = constant
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=3.0)
        if self.constant:
            with torch.no_grad():
                self.layers[0].bias.copy_(torch.arange(64.0))


def weights_of_blocks(constant: bool) -> list[Tensor] | str:
    torch.manual_seed(7)  # one seed, as scripts have it
    model = on_meta(lambda: Around(constant))
    try:
        initialize(model, {**CONFIG, "zero_optimization": {"stage": 3}}, device="cpu")
    except EngineError as error:
        return str(error)
    return [layer.weight.full_tensor().detach() for layer in model.layers]


def test_a_model_around_sharded_blocks_draws_other_numbers_for_each_shard() -> None:
    first, second = run_ranks(weights_of_blocks, 2, False)
    for weight, other in zip(first, second):
        assert torch.equal(weight, other)
        assert float(weight.std()) == pytest.approx(3.0, rel=0.1)
        assert not torch.equal(weight[:32], weight[32:])
    for answer in run_ranks(weights_of_blocks, 2, True):
        assert "Around gives blocks within it their weights, which are sharded already (aten.copy_" in answer


def test_all_processes_begin_with_rank_zeros_weights() -> None:
    answers = run_ranks(work, 2, 0), run_ranks(work, 2, 1)
    for first, second in answers:
        assert first[0] == second[0]
