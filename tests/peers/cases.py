"""Which runs there are, at which stages, precisions and numbers of ranks; how a rank makes one of them."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.peers.tiny import Case, start_over

__all__ = ["FRAMEWORKS", "cases", "run"]

FRAMEWORKS = ("hugging_face", "accelerate_loop", "lightning_fit")

# Run: stages, precisions, numbers of ranks.
_RUNS: dict[str, tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]] = {
    "hugging_face.train": ((0, 1, 2, 3), ("fp32", "bf16"), (1, 2)),
    "hugging_face.client_optimizer": ((0, 1, 2, 3), ("fp32",), (1, 2)),
    "hugging_face.options": ((0, 2, 3), ("fp32",), (1, 2)),
    "hugging_face.smaller_batch": ((0, 2), ("fp32",), (1, 2)),
    "hugging_face.resume": ((0, 2, 3), ("fp32",), (1, 2)),
    "hugging_face.from_pretrained": ((0, 2, 3), ("fp32", "bf16"), (1, 2)),
    "hugging_face.lora": ((0, 2, 3), ("fp32", "bf16"), (1, 2)),
    "hugging_face.save": ((0, 3), ("bf16",), (2,)),
    "hugging_face.sft": ((0, 2, 3), ("fp32", "bf16"), (1, 2)),
    "hugging_face.dpo": ((0, 2, 3), ("fp32",), (1, 2)),
    "accelerate_loop.train": ((0, 1, 2, 3), ("fp32", "bf16"), (1, 2)),
    "accelerate_loop.resume": ((0, 2, 3), ("fp32",), (1, 2)),
    "accelerate_loop.config_file": ((0, 2, 3), ("fp32", "bf16"), (1, 2)),
    "accelerate_loop.evaluate": ((0, 3), ("fp32",), (1, 2)),
    "lightning_fit.train": ((1, 2, 3), ("fp32", "bf16", "mixed"), (1, 2)),
    "lightning_fit.resume": ((2, 3), ("fp32",), (1, 2)),
}


def cases() -> list[Case]:
    """All of them, those of the same numbers of ranks together."""
    return [
        {"run": name, "precision": precision, "ranks": count, "stage": stage}
        for count, (name, (stages, precisions, counts)) in itertools.product((1, 2), _RUNS.items())
        if count in counts
        for precision in precisions
        for stage in stages
    ]


def run(case: Case, folder: Path) -> Any:
    """Runs in every rank, in a process group; the folder is the same on all ranks, and exists."""
    module, _, name = case["run"].partition(".")
    start_over()
    found = getattr(importlib.import_module(f"tests.peers.{module}"), name)(case, folder)
    start_over()
    dist.barrier()
    return found
