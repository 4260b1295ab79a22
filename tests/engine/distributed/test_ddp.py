"""What one process needs of the others; what happens between them is in test_distributed and zero/test_shards."""

from __future__ import annotations

from torch import nn

from redline import initialize
from redline.distributed.ddp import DDPStrategy

CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def test_one_process_needs_no_wrapping() -> None:
    engine = initialize(nn.Linear(1, 1), CONFIG, device="cpu")
    assert type(engine._strategy) is DDPStrategy
    assert engine._strategy.prepare_forward(is_last=True, no_sync=False) is engine.module


def test_a_stage_on_one_process_is_stage_0() -> None:
    engine = initialize(nn.Linear(1, 1), {**CONFIG, "zero_optimization": {"stage": 3}}, device="cpu")
    assert type(engine._strategy) is DDPStrategy
