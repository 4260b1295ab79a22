"""The profile of one update: exact counts, on one process and on several, printed or written once."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from redline import Engine, initialize, run_range_test
from redline.monitoring.flops import FlopsProfiler
from tests.callbacks import find
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[3]

# 8 samples; a matrix product of n x k and k x m is 2 n k m operations. The first layer's input needs no gradient.
FIRST, SECOND = 2 * 8 * 4 * 16, 2 * 8 * 16 * 2
FORWARD, BACKWARD = FIRST + SECOND, FIRST + 2 * SECOND


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        self.head = nn.Linear(16, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def make_engine(accumulation: int = 1, **profiler: Any) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD"},
        "flops_profiler": {"enabled": True, **profiler},
    }
    return initialize(Net(), config, device="cpu")


def train(engine: Engine, updates: int) -> None:
    for _ in range(updates * engine.gradient_accumulation_steps()):
        x = torch.randn(engine.train_micro_batch_size_per_gpu(), 4)
        engine.backward(engine(x).square().mean())
        engine.step()


def profile_of(engine: Engine) -> tuple[int, int, dict[str, int]]:
    profiler = find(engine, FlopsProfiler)
    return profiler.flops["fwd"], profiler.flops["bwd"], profiler.modules()


MODULES_OF_NET = {"": FORWARD + BACKWARD, "body": 2 * FIRST, "body.0": 2 * FIRST, "body.1": 0, "head": 3 * SECOND}
EXPECTED = FORWARD, BACKWARD, MODULES_OF_NET


@pytest.mark.parametrize("accumulation", [1, 4])
def test_operations_are_counted_forward_and_backward_and_by_module(accumulation: int) -> None:
    engine = make_engine(accumulation)
    train(engine, 3)
    assert profile_of(engine) == EXPECTED


def counted_on_a_rank() -> Any:
    engine = make_engine(2)
    train(engine, 3)
    return None if find(engine, FlopsProfiler) is None else profile_of(engine)


def test_under_ddp_they_are_the_same_and_rank_0_alone_counts() -> None:
    assert run_ranks(counted_on_a_rank, 2) == [EXPECTED, None]


# -- the report ----------------------------------------------------------------------------------------------


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The first lines of the reports so far."""
    caplog.set_level(logging.INFO, logger="redline")
    return lambda: [message.splitlines()[0] for message in caplog.messages if message.startswith("FLOPs of")]


def test_it_comes_once_after_the_step_that_is_timed(reports: Callable[[], list[str]]) -> None:
    engine = make_engine(profile_step=2)
    found = []
    for _ in range(6):
        train(engine, 1)
        found.append(len(reports()))
    assert found == [0, 0, 0, 1, 1, 1]
    assert reports() == ["FLOPs of step 3 on rank 0: 1 x 8 samples"]


def test_it_goes_to_a_file_if_one_is_named(
    tmp_path: Path, reports: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deep" / "flops.txt"
    train(make_engine(output_file=str(path)), 3)
    assert path.read_text().startswith("FLOPs of step 2 on rank 0: 1 x 8 samples\n")
    assert f"flops_profiler: written to {path}" in caplog.messages
    assert reports() == []
    engine = make_engine(output_file=str(tmp_path))  # a folder: training goes on
    train(engine, 4)
    assert engine.global_steps == 4 and "could not write" in caplog.text


def test_the_weights_move_as_without_a_profiler() -> None:
    def trained(**profiler: Any) -> torch.Tensor:
        torch.manual_seed(0)
        engine = make_engine(**profiler)
        train(engine, 4)
        return torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()])

    assert torch.equal(trained(enabled=False), trained())


def test_a_range_test_before_training_is_not_profiled(reports: Callable[[], list[str]]) -> None:
    engine = make_engine(profile_step=0)
    data = torch.randn(32, 4), torch.zeros(32, 2)
    run_range_test(engine, data, nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
    assert reports() == []
    train(engine, 2)
    assert len(reports()) == 1


def test_a_run_that_ends_with_the_counted_update_reports_it_without_times(tmp_path: Path) -> None:
    script = (
        "import torch; from torch import nn; from redline import initialize\n"
        "engine = initialize(nn.Linear(4, 1), {'train_batch_size': 8, 'optimizer': {'type': 'SGD'},\n"
        "    'flops_profiler': {'enabled': True}}, device='cpu')\n"
        "for _ in range(2): engine.backward(engine(torch.randn(8, 4)).mean()); engine.step()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  forward +64 +- +-$", done.stderr, re.MULTILINE)


def table(caplog: pytest.LogCaptureFixture, **profiler: Any) -> list[list[str]]:
    """The report's lines after the first, as words, but without what depends on the machine's speed."""
    caplog.set_level(logging.INFO, logger="redline")
    caplog.clear()
    train(make_engine(**profiler), 3)
    (report,) = (message for message in caplog.messages if message.startswith("FLOPs of"))
    return [line.split() for line in report.splitlines()[1:]]


def test_a_report_has_the_sums_the_largest_modules_and_the_tree(caplog: pytest.LogCaptureFixture) -> None:
    heads, forward, backward, step, total, *rest = table(caplog)
    assert heads == ["FLOPs", "ms", "FLOPS/s"]
    assert forward[:3] == ["forward", "1.536", "k"] and backward[:3] == ["backward", "2.048", "k"]
    assert step[0] == "step" and float(step[1]) > 0
    assert total[:3] == ["total", "3.584", "k"] and len(total) == len(forward)
    assert [" ".join(line) for line in rest] == [
        "most at depth 1: body (Sequential) 57.1 %",
        "most at depth 2: body.0 (Linear) 57.1 %",
        "module parameters FLOPs share",
        "model (Net) 112 3.584 k 100.0 %",
        "body (Sequential) 80 2.048 k 57.1 %",
        "0 (Linear) 80 2.048 k 57.1 %",
        "1 (Tanh) 0 0 0.0 %",
        "head (Linear) 32 1.536 k 42.9 %",
    ]


def test_depth_number_of_modules_the_tree_and_recomputed_forwards_can_be_chosen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    *_, recomputed, last = table(caplog, module_depth=1, top_modules=2, detailed=False, recompute_fwd_factor=0.5)
    assert " ".join(last) == "most at depth 1: body (Sequential) 57.1 %, head (Linear) 42.9 %"
    assert recomputed[:5] == ["without", "recomputed", "forwards", "2.816", "k"]
    assert not any(line[0] in ("0", "1") for line in table(caplog, module_depth=1))
