"""What an engine carries: that which its config asks for, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from engine import Engine, initialize

OFF: dict[str, Any] = {
    "wall_clock_breakdown": False,
    "memory_breakdown": None,
    "dump_state": False,
    "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False},
    "csv_monitor": {"enabled": False},
    "tensorboard": None,
    "redline": {"progress": False},
}


def carried(**config: Any) -> tuple[list[str], list[str]]:
    """Observers, and methods of the engine that something stands around."""
    engine = initialize(nn.Linear(4, 1), {"train_batch_size": 4, "optimizer": {"type": "SGD"}, **config}, device="cpu")
    around = [name for name in ("forward", "backward", "step", "_wrap_again") if name in vars(engine)]
    return [type(observer).__name__ for observer in engine.observers], around


@pytest.mark.parametrize("config", [{}, OFF], ids=["left out", "off"])
def test_what_is_off_is_not_there(config: dict[str, Any]) -> None:
    assert carried(**config) == (["Progress"], [])


def test_a_breakdown_stands_around_the_step_and_progress_speaks_last() -> None:
    assert carried(wall_clock_breakdown=True) == (["Timings", "Progress"], ["forward", "backward", "step"])
    assert carried(flops_profiler={"enabled": True})[0] == ["FlopsProfiler", "Progress"]


def test_an_engine_that_only_evaluates_can_be_watched() -> None:
    config = {"train_batch_size": 4, "wall_clock_breakdown": True, "flops_profiler": {"enabled": True}}
    engine = initialize(nn.Linear(4, 1), config, device="cpu")
    assert isinstance(engine, Engine)
    assert engine.get_lr() == []
