"""Activation checkpointing: the same training with fewer activations kept, and nothing that a second forward leaves."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from redline import initialize
from redline.activation_checkpointing import recompute
from tests.distributed import run_ranks

WIDTH, ROWS = 8, 16
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
FAMILIES = ("gpt2", "mixtral", "t5", "whisper")


class Block(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        Block.calls += 1
        out: Tensor = self.dropout(torch.tanh(self.linear(x))) * scale
        return out


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class Spectral(nn.Module):
    """Power iterations: each forward moves the vectors that the next one starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.new(torch.tanh(self.old(x))))


class Counting(nn.Module):
    """A forward that changes all that its module can hold, and whose result depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.seen, self.last = 0, [0.0], torch.zeros(())
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("large", torch.zeros(2**18 + 1))
        self.register_buffer("through_data", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.seen[-1] + 1.0)
        self.written += 1
        self.large += 1
        self.through_data.data.add_(1)
        self.replaced = self.replaced + 1
        state = self.calls + self.seen[-1] + self.written + self.replaced + self.large[0] + self.through_data
        out: Tensor = torch.tanh(self.linear(x)) * (1 + state.clone() / 100)
        self.last = out.detach()
        return out


class Cache:
    """What a decoder's layers get as an argument and append to; the second append of a layer would double its keys."""

    def __init__(self) -> None:
        self.keys: list[list[Tensor]] = []
        self.filled: dict[int, bool] = {}


class Cached(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        key = self.linear(x)
        if cache is not None:
            while len(cache.keys) <= self.index:
                cache.keys.append([])
            assert not cache.filled.get(self.index)
            cache.filled[self.index] = True
            cache.keys[self.index].append(key)
            key = torch.stack(cache.keys[self.index]).sum(0) + len(cache.filled)
        return torch.tanh(key)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Cached(i) for i in range(3)])
        self.cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.cache = Cache()
        for block in self.blocks:
            x = block(x, cache=self.cache)
        return x


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block, **given: Any) -> None:
        super().__init__()
        self.blocks, self.given = nn.ModuleList([make() for _ in range(3)]), given

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **self.given)
        return x


def config(recomputes: bool, **settings: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "redline": {"activation_checkpointing": recomputes, "zero": {"smallest_block": 0}},
        **settings,
    }


def batch(index: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))


def train(model: nn.Module, recomputes: bool, *, compiled: bool = False, **settings: Any) -> Any:
    """An engine after three optimizer steps, and the loss of each micro-batch."""
    engine = initialize(model, config(recomputes, **settings), device="cpu")
    if compiled:
        engine.compile(backend="aot_eager")
    losses = []
    for index in range(3 * engine.gradient_accumulation_steps()):
        x = batch(index)
        loss = (engine(x) - x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return engine, losses


def by_hand(model: nn.Module) -> list[float]:
    """The losses of `train` in fp32, from a loop in plain torch."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for index in range(3):
        x = batch(index)
        loss = (model(x) - x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def seeded(make: Callable[..., nn.Module], *args: Any, **given: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*args, **given)


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# -- what is computed, and what is kept --------------------------------------------------------------------------------


def test_training_is_the_same_bit_for_bit_with_dropout_and_keeps_less() -> None:
    def run(recomputes: bool) -> tuple[list[float], int, int]:
        Block.calls, kept = 0, 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, losses = train(seeded(Stack, scale=0.9), recomputes)
        return losses, Block.calls, kept

    plain, again = run(False), run(True)
    assert again[0] == plain[0]
    assert (plain[1], again[1]) == (9, 18)
    assert again[2] < 0.6 * plain[2]


def test_a_block_stays_what_it_was_but_for_what_it_keeps() -> None:
    model = Stack()
    names = [list(model.state_dict()), [name for name, _ in model.named_parameters()], [*dict(model.named_modules())]]
    shown, calls = repr(model), []
    for block in model.blocks:
        recompute(block)
        recompute(block)  # once is enough
    assert [list(model.state_dict()), [*dict(model.named_parameters())], [*dict(model.named_modules())]] == names
    assert repr(model) == shown
    assert all(isinstance(block, Block) for block in model.blocks)
    model.load_state_dict(Stack().state_dict())
    Block.calls = 0
    with torch.no_grad():
        model(torch.zeros(1, WIDTH))
    assert Block.calls == 3  # evaluation computes once
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
        block.register_forward_pre_hook(lambda *_: calls.append(2))
    model(batch(0)).sum().backward()
    assert Block.calls == 9  # and training twice, within the hooks
    assert calls == [2, 1] * 3


def test_a_class_that_registers_its_subclasses_and_a_forward_with_keywords_of_checkpoints_work() -> None:
    class Registered(nn.Linear):
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, name: str) -> None:
            cls.names.append(name)

        def forward(self, x: Tensor, debug: bool = False, early_stop: float = 0.0) -> Tensor:  # type: ignore[override]
            return super().forward(x) * early_stop if debug else x

    block = Registered(WIDTH, WIDTH)
    expected = nn.functional.linear(batch(0), block.weight, block.bias) * 2
    recompute(block)
    assert Registered.names == []
    assert torch.equal(block(batch(0), debug=True, early_stop=2.0), expected)


def test_a_forward_that_was_replaced_on_the_block_is_recomputed() -> None:
    calls = []
    block = nn.Linear(WIDTH, WIDTH)

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.tanh(nn.functional.linear(x, block.weight))

    block.forward = forward  # type: ignore[method-assign]
    recompute(block)
    block(batch(0)).sum().backward()
    assert len(calls) == 2


def test_forwards_whose_backward_comes_later_each_find_their_own_state() -> None:
    plain, again = seeded(Stack, Counting), seeded(Stack, Counting)
    for block in again.blocks:  # type: ignore[union-attr]
        recompute(block)
    for model in (plain, again):
        losses = [model(batch(index)).square().sum() for index in range(3)]
        retained = [torch.autograd.grad(losses[0], list(model.parameters()), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*retained))
        model.eval()
        sum(losses).backward()  # type: ignore[union-attr]
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    assert not any(module.training for module in again.modules())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_a_model_may_checkpoint_by_itself(use_reentrant: bool, around: bool) -> None:
    class Own(Block):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x + checkpoint(super().forward, x, use_reentrant=use_reentrant)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList([Own() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if around else block(x)
            return x

    expected = seeded(Around)
    losses = by_hand(expected)
    engine, again = train(seeded(Around), True)
    assert again == losses
    assert_equal_states(engine.module, expected)


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": lambda model: AveragedModel(model).module,
    "pickle": pickled,
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_has_weights_of_its_own_and_recomputes(how: str, precision: str) -> None:
    engine, _ = train(seeded(Stack), True, **PRECISIONS[precision])
    copied = COPIES[how](engine.module)
    copied.eval()
    x = batch(0).to(next(copied.parameters()).dtype)
    before = copied(x)
    engine.backward((engine(batch(1)) - 1).square().mean())
    engine.step()
    assert torch.equal(copied(x), before)  # the original trains, the copy does not
    Block.calls = 0
    copied(x).sum().backward()
    assert Block.calls == 6
    assert all(parameter.grad is not None for parameter in copied.parameters())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(x).any()
    assert engine.module(x).any()


def test_a_shallow_copy_of_a_block_computes_with_what_it_is_given() -> None:
    block = Block().eval()
    recompute(block)
    other = copy.copy(block)
    other._modules = {**block._modules, "linear": nn.Linear(WIDTH, WIDTH)}
    assert torch.equal(other(batch(0)), torch.tanh(other.linear(batch(0))))


# -- side effects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_norm_counts_each_micro_batch_once(precision: str) -> None:
    accumulation = 2
    settings = {"gradient_accumulation_steps": accumulation, **PRECISIONS[precision]}
    plain, losses = train(seeded(Stack, Normed), False, **settings)
    engine, again = train(seeded(Stack, Normed), True, **settings)
    assert again == losses
    assert_equal_states(engine.module, plain.module)
    assert [int(block.norm.num_batches_tracked) for block in engine.module.blocks] == [3 * accumulation] * 3


@pytest.mark.parametrize("make", [Normed, Spectral, Counting])
def test_what_a_forward_changes_in_its_block_it_changes_once(make: type[nn.Module]) -> None:
    expected = seeded(Stack, make)
    losses = by_hand(expected)
    engine, again = train(seeded(Stack, make), True)
    assert again == losses
    assert_equal_states(engine.module, expected)
    if make is Counting:
        for block in engine.module.blocks:
            assert (block.calls, block.seen) == (3, [0.0, 1.0, 2.0, 3.0])


def test_a_cache_among_the_arguments_grows_once() -> None:
    expected = seeded(Decoder)
    losses = by_hand(expected)
    engine, again = train(seeded(Decoder), True)
    assert again == losses
    assert_equal_states(engine.module, expected)
    assert [len(keys) for keys in engine.module.cache.keys] == [1, 1, 1]


def test_an_output_that_a_block_keeps_does_not_keep_those_before() -> None:
    outputs = []

    class Keeps(Block):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            self.last = super().forward(x)  # with its graph
            if len(outputs) < 9 and not any(self.last is each() for each in outputs):
                outputs.append(weakref.ref(self.last))
            return self.last

    engine, _ = train(seeded(Stack, Keeps), True)
    gc.collect()
    alive = [each() for each in outputs if each() is not None]
    assert len(outputs) == 9
    assert len(alive) <= len(engine.module.blocks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's, where it leaves a block to eager
@pytest.mark.parametrize("make", [Block, *(pytest.param(each, marks=pytest.mark.long) for each in (Normed, Spectral))])
def test_compiled_training_is_the_same(make: type[nn.Module]) -> None:
    expected = seeded(Stack, make)
    losses = by_hand(expected)
    engine, again = train(seeded(Stack, make), True, compiled=True)
    torch._dynamo.reset()
    assert again == pytest.approx(losses, rel=1e-6)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(engine.module.state_dict()[name], value)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def hugging_face(family: str) -> nn.Module:
    """Small decoders and encoder-decoders as they come: with `use_cache`."""
    import transformers as hf

    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, **ends))
    if family == "t5":
        sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    if family == "whisper":
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 16, "max_source_positions": 8}
        heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        heads |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
        unused: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None, "decoder_start_token_id": 1}
        return hf.WhisperForConditionalGeneration(hf.WhisperConfig(vocab_size=64, **sizes, **heads, **unused, **ends))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_local_experts": 3, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=64, **sizes, **ends))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_trains_a_model_of_hugging_face_and_fills_its_cache_once(family: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers, which no part of the engine does")
    tokens = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if family == "whisper":
        inputs = {"input_features": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))}

    def run(recomputes: bool) -> list[Any]:
        engine = initialize(seeded(hugging_face, family), config(recomputes), device="cpu")
        engine.train()
        torch.manual_seed(1)  # of dropout
        out = engine(**inputs, labels=tokens)
        engine.backward(out.loss)
        engine.step()
        return [float(out.loss.detach()), engine.get_global_grad_norm(), out.past_key_values.get_seq_length()]

    plain = run(False)
    assert plain[2] == 6
    assert run(True) == plain


# -- several ranks -----------------------------------------------------------------------------------------------------


def on_ranks() -> dict[tuple[int, str], Any]:
    """By stage and precision: with and without, the losses, the batch norms' counts and a step's all-gathers."""
    from torch.distributed.tensor.debug import CommDebugMode

    results: dict[tuple[int, str], Any] = {}
    for stage, precision in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (3, "bf16")]:
        results[stage, precision] = []
        for recomputes in (False, True):
            settings = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
            engine, losses = train(seeded(Stack, Normed), recomputes, **settings)
            with CommDebugMode() as communication:
                engine.backward((engine(batch(7)) - 1).square().mean())
            counts = {str(op): n for op, n in communication.get_comm_counts().items() if "gather" in str(op)}
            engine.step()
            tracked = [int(block.norm.num_batches_tracked) for block in engine.module.blocks]
            results[stage, precision].append((losses, tracked, counts))
    return results


def test_on_two_ranks_every_stage_trains_the_same_and_unshards_a_block_once_for_its_backward() -> None:
    for results in run_ranks(on_ranks, 2):
        for (stage, precision), (plain, again) in results.items():
            assert again == plain, (stage, precision)
            assert again[1] == [4, 4, 4]
        assert results[3, "fp32"][1][2]  # and there are all-gathers to count


def test_a_model_without_blocks_says_that_there_is_nothing_to_compute_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        initialize(
            nn.Linear(1, 1),
            {"train_micro_batch_size_per_gpu": 1, "redline": {"activation_checkpointing": True}},
            device="cpu",
        )
    assert "activation_checkpointing: the model has no blocks" in caplog.text
