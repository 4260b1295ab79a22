"""A language model of a few thousand weights, its data, and what all training runs of this folder have in common.

The runs know the frameworks and the package `deepspeed`, whichever that is: ``scripts/dev/record_peers.py`` runs them
with DeepSpeed, the tests of this folder with Redline under that name.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["LENGTH", "VOCABULARY", "Case", "batches", "gpt", "mean", "sentences", "start_over"]

Case = dict[str, Any]  # run, stage, precision, ranks

VOCABULARY, LENGTH = 32, 8


def gpt() -> nn.Module:
    """A GPT-2 without dropout; the same weights each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=2 * LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def sentences(number: int, seed: int = 0, uneven: bool = False) -> list[dict[str, list[int]]]:
    """Token ids that count upwards from a random start, and the labels that are the same.

    Args:
        uneven: whether lengths differ, between 2 and `LENGTH`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(number):
        length = 2 + index % (LENGTH - 1) if uneven else LENGTH
        first = int(torch.randint(VOCABULARY, (1,), generator=generator))
        tokens = [3 + (first + step) % (VOCABULARY - 3) for step in range(length)]
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def batches(number: int, size: int, rank: int) -> list[Tensor]:
    """Token ids of a rank's micro-batches."""
    tokens = torch.tensor([each["input_ids"] for each in sentences(number * size, seed=1 + rank)])
    return list(tokens.split(size))


def mean(value: float | Tensor) -> float:
    """The mean over the ranks."""
    total = torch.as_tensor(value).detach().double().reshape(1).clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def start_over() -> None:
    """Let the frameworks forget the last run in this process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()
