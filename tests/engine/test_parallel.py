"""The wrapping of a model; what it does between processes is in test_distributed."""

from __future__ import annotations

import torch
from torch import nn

from engine.distributed import World
from engine.gradients import Reduction
from engine.parallel import wrap_model

CPU = torch.device("cpu")


def test_one_process_needs_no_wrapping() -> None:
    assert wrap_model(nn.Linear(1, 1), World(0, 0, 1, CPU), Reduction(1), None, find_unused_parameters=False) is None


def test_a_model_without_trainable_parameters_needs_no_wrapping() -> None:
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert wrap_model(frozen, World(0, 0, 2, CPU), Reduction(2), None, find_unused_parameters=False) is None
