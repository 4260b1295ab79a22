"""Models of Hugging Face, small and built from their configs: each trains alike at every ZeRO stage, saves and resumes.

On two gloo processes. Llama once with an embedding that is also its head; T5 has one weight for its encoder, its
decoder and its head, and dropout, so that a resumed run has to draw on as the other did.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import run_ranks

pytest.importorskip("transformers", reason="needs transformers, which no part of the engine does")

STAGES = (0, 1, 2, 3)
NAMES = ("llama", "llama-tied", "t5")
UPDATES, SAVED_AFTER, ACCUMULATION = 4, 2, 2
ROWS, LENGTH, VOCABULARY = 2, 8, 64

Outcome = dict[str, Any]


def build_model(name: str) -> nn.Module:
    """A model with weights of its own each time."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
        config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
        return T5ForConditionalGeneration(config)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tied = name == "llama-tied"
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config)


def build_engine(name: str, stage: int, seed: int) -> Any:
    from engine import initialize

    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.005, "warmup_max_lr": 0.02}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "redline": {"zero": {"smallest_block": 0}},
    }
    return initialize(build_model(name).train(), config, device="cpu")


def tokens(engine: Any, index: int) -> torch.Tensor:
    """Of one micro-batch of this process; the same in each update, so that the loss falls."""
    generator = torch.Generator().manual_seed(100 * index + engine.global_rank)
    return torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)


def update(engine: Any) -> float:
    """One update; the loss, as all processes have it."""
    for index in range(ACCUMULATION):
        batch = tokens(engine, index)
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    return float(engine.world.mean(engine.loss))


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """This process's share of each, or all of it."""
    local = {name: getattr(value, "_local_tensor", value) for name, value in engine.module.named_parameters()}
    return {name: value.detach().clone() for name, value in local.items()}


def train_save_resume(name: str, stage: int, folder: str) -> Outcome:
    engine = build_engine(name, stage, seed=0)
    torch.manual_seed(engine.global_rank)  # of dropout
    losses = []
    for step in range(UPDATES):
        if step == SAVED_AFTER:
            engine.save_checkpoint(folder)
        losses.append(update(engine))
    other = build_engine(name, stage, seed=1)
    path, _ = other.load_checkpoint(folder)
    resumed = [update(other) for _ in range(SAVED_AFTER, UPDATES)]
    ours, theirs = weights(engine), weights(other)
    elements = sum(value.numel() for value in ours.values())
    different = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    return {"losses": losses, "resumed": resumed, "different": different, "elements": elements, "path": path}


def train_all(folder: str) -> dict[tuple[str, int], Outcome | str]:
    """Every model at every stage, in a process that `run_ranks` started; of one that fails its traceback."""
    outcomes: dict[tuple[str, int], Outcome | str] = {}
    for name in NAMES:
        for stage in STAGES:
            try:
                outcomes[name, stage] = train_save_resume(name, stage, f"{folder}/{name}-{stage}")
            except Exception:
                outcomes[name, stage] = traceback.format_exc()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Outcome | str]]:
    return run_ranks(train_all, 2, str(tmp_path_factory.mktemp("checkpoints")))


def outcome_of(outcomes: list[dict[tuple[str, int], Outcome | str]], name: str, stage: int) -> list[Outcome]:
    both = [of_rank[name, stage] for of_rank in outcomes]
    for outcome in both:
        if isinstance(outcome, str):
            pytest.fail(outcome)
    return both  # type: ignore[return-value]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_at_every_stage_as_at_stage_0(name: str, stage: int, outcomes: Any) -> None:
    for ours, whole in zip(outcome_of(outcomes, name, stage), outcome_of(outcomes, name, 0)):
        assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        assert ours["losses"][-1] < ours["losses"][0]
        assert ours["elements"] == pytest.approx(whole["elements"] / (2 if stage == 3 else 1), rel=0.01)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(name: str, stage: int, outcomes: Any) -> None:
    for outcome in outcome_of(outcomes, name, stage):
        assert Path(outcome["path"]).name == f"global_step{SAVED_AFTER}"
        assert outcome["resumed"] == outcome["losses"][SAVED_AFTER:]
        assert outcome["different"] == []
