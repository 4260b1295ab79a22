"""Ranks that were given different configs: found at initialize, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from redline import ConfigError, initialize
from tests.distributed import run_ranks


def start(configs: list[Any]) -> str:
    import os

    try:
        initialize(torch.nn.Linear(2, 2), configs[int(os.environ["RANK"])], device="cpu")
    except ConfigError as error:
        return str(error)
    return "started"


BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}


def test_a_config_that_differs_between_ranks_is_named_on_every_rank() -> None:
    other = {**BASE, "gradient_clipping": 0.5, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    texts = run_ranks(start, 2, [BASE, other])
    assert texts[0] == texts[1]
    assert texts[0].startswith("config: ")
    assert '  optimizer.type: got "Adam" on rank 0; "SGD" on rank 1; expected one config on all ranks' in texts[0]
    assert "  gradient_clipping: got 1.0 on rank 0; 0.5 on rank 1; expected one config on all ranks" in texts[0]
    assert "optimizer.params.lr" not in texts[0]
    assert "  optimizer.params.momentum: got nothing on rank 0; 0.0 on rank 1" in texts[0]


def test_configs_that_say_the_same_agree() -> None:
    same = {**BASE, "gradient_clipping": 1, "_note": "rank 1", "vocabulary_size": 9}
    assert run_ranks(start, 2, [BASE, same]) == ["started", "started"]


def test_a_schedule_without_an_optimizer_is_found_before_any_process_group() -> None:
    config = {"train_batch_size": 8, "scheduler": {"type": "WarmupLR"}}
    with pytest.raises(ConfigError) as caught:
        initialize(torch.nn.Linear(2, 2), config, device="cpu")
    assert str(caught.value) == (
        "config: 1 problem\n  scheduler: there is no optimizer to schedule; "
        'give the config an "optimizer" section, or initialize an optimizer'
    )
    assert not torch.distributed.is_initialized()
