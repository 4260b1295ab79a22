"""The callbacks of an engine: those that its config asks for, and nothing else."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from redline import Engine, initialize
from redline.monitoring.metrics import MetricsLogger
from tests.callbacks import find
from tests.tiny import make_engine, train

ROOT = Path(__file__).parents[3]
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


def attached(**config: Any) -> tuple[list[str], list[str]]:
    """Callbacks, and methods of the engine that are wrapped."""
    engine = make_engine(**config)
    wrapped = [name for name in ("forward", "backward", "step") if name in vars(engine)]
    return [type(callback).__name__ for callback in engine.callbacks], wrapped


@pytest.mark.parametrize("config", [{}, OFF], ids=["left out", "off"])
def test_what_is_off_is_not_there(config: dict[str, Any]) -> None:
    assert attached(**config) == (["ProgressLine"], [])


def test_a_run_loads_only_the_parts_that_it_asks_for() -> None:
    script = """
import sys
from torch import nn
from redline import initialize
config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, "csv_monitor": {"enabled": False}}
initialize(nn.Linear(4, 1), config, device="cpu")
print(*(name.rpartition(".")[2] for name in sorted(sys.modules) if name.startswith("redline.monitoring.")))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["progress"]


def test_a_breakdown_wraps_the_step_and_the_progress_line_comes_last() -> None:
    wrapped = ["forward", "backward", "step"]
    assert attached(wall_clock_breakdown=True) == (["WallClockBreakdown", "ProgressLine"], wrapped)
    assert attached(flops_profiler={"enabled": True}) == (["FlopsProfiler", "ProgressLine"], wrapped)


def test_an_engine_that_only_evaluates_can_be_monitored() -> None:
    config = {"train_batch_size": 4, "wall_clock_breakdown": True, "flops_profiler": {"enabled": True}}
    engine = initialize(nn.Linear(4, 1), config, device="cpu")
    assert isinstance(engine, Engine)
    assert engine.get_lr() == []


def test_an_engine_that_is_deleted_writes_its_last_points_and_takes_its_charts_with_it(tmp_path: Path) -> None:
    files = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(csv_monitor=files, wall_clock_breakdown=True)
    train(engine, 2)
    alive = [weakref.ref(engine), weakref.ref(find(engine, MetricsLogger))]
    del engine
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert len((tmp_path / "job" / "Train_Samples_lr.csv").read_text().splitlines()) == 3
