"""The profile of one update: exact counts, on one process and on several, printed or written once."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Engine, initialize, run_range_test
from engine.config.sections.records import FlopsProfilerConfig
from engine.watch.flops import FlopsProfiler, ModuleFlops, Profile, report
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
        loss = nn.functional.mse_loss(engine(torch.randn(engine.train_micro_batch_size_per_gpu(), 4)), torch.zeros(2))
        engine.backward(loss)
        engine.step()


def profile_of(engine: Engine) -> Profile:
    (profiler,) = [observer for observer in engine.observers if isinstance(observer, FlopsProfiler)]
    return profiler._profile()


def counts(accumulation: int) -> tuple[int, int, dict[str, int]]:
    engine = make_engine(accumulation)
    train(engine, 3)
    profile = profile_of(engine)
    return profile.forward, profile.backward, {each.name: each.flops for each in profile.modules}


EXPECTED = (
    FORWARD,
    BACKWARD,
    {
        "": FORWARD + BACKWARD,
        "body": 2 * FIRST,
        "body.0": 2 * FIRST,
        "body.1": 0,
        "head": 3 * SECOND,
    },
)


@pytest.mark.filterwarnings("ignore:mse_loss:UserWarning", "ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_operations_are_counted_forward_and_backward_and_by_module(accumulation: int) -> None:
    assert counts(accumulation) == EXPECTED


def test_under_ddp_they_are_the_same_and_rank_zero_alone_counts() -> None:
    first, second = run_ranks(rank_counts, 2)
    assert first == EXPECTED
    assert second == "no profiler"


def rank_counts() -> Any:
    engine = make_engine(2)
    train(engine, 3)
    if not any(isinstance(observer, FlopsProfiler) for observer in engine.observers):
        return "no profiler"
    profile = profile_of(engine)
    return profile.forward, profile.backward, {each.name: each.flops for each in profile.modules}


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
class TestTheReport:
    def test_comes_once_after_the_update_that_is_timed(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="engine")
        engine = make_engine(profile_step=2)
        told = []
        for _ in range(6):
            train(engine, 1)
            told.append(sum("FLOPs of update 3" in message for message in caplog.messages))
        assert told == [0, 0, 0, 1, 1, 1]
        assert set(profile_of(engine).ms) == {"fwd", "bwd", "step"}

    def test_goes_to_a_file_if_one_is_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="engine")
        path = tmp_path / "deep" / "flops.txt"
        train(make_engine(output_file=str(path)), 3)
        assert path.read_text().startswith("FLOPs of update 2 on process 0: 1 x 8 samples\n")
        assert f"flops_profiler: written to {path}" in caplog.messages
        assert not any("FLOPs of" in message for message in caplog.messages)

    def test_a_file_that_cannot_be_written_ends_no_training(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = make_engine(output_file=str(tmp_path))
        train(engine, 4)
        assert engine.global_steps == 4
        assert "could not write" in caplog.text

    def test_the_weights_move_as_without_a_profiler(self) -> None:
        def trained(**profiler: Any) -> torch.Tensor:
            torch.manual_seed(0)
            engine = make_engine(**profiler)
            train(engine, 4)
            return torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()])

        assert torch.equal(trained(enabled=False), trained())

    def test_a_range_test_before_training_is_not_profiled(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="engine")
        engine = make_engine(profile_step=0)
        data = torch.randn(32, 4), torch.zeros(32, 2)
        run_range_test(engine, data, nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
        assert not any("FLOPs of" in message for message in caplog.messages)
        train(engine, 2)
        assert any("FLOPs of update 1" in message for message in caplog.messages)


def test_a_run_that_ends_with_the_counted_update_reports_it_without_times(tmp_path: Path) -> None:
    script = (
        "import torch; from torch import nn; from engine import initialize\n"
        "engine = initialize(nn.Linear(4, 1), {'train_batch_size': 8, 'optimizer': {'type': 'SGD'},\n"
        "    'flops_profiler': {'enabled': True}}, device='cpu')\n"
        "for _ in range(2): engine.backward(engine(torch.randn(8, 4)).mean()); engine.step()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  forward +64 +- +-$", done.stderr, re.MULTILINE)


MODULES = [
    ModuleFlops("", "Net", 3000, 4_000_000),
    ModuleFlops("a", "Block", 2000, 3_000_000),
    ModuleFlops("a.0", "Linear", 2000, 3_000_000),
    ModuleFlops("b", "Linear", 1000, 1_000_000),
]
PROFILE = Profile(1, 16, 2, 1_500_000, 2_500_000, {"fwd": 0.5, "bwd": 1.0, "step": 0.25}, MODULES)


def test_a_report_has_the_sums_the_largest_modules_and_the_tree() -> None:
    assert report(PROFILE, FlopsProfilerConfig()).splitlines() == [
        "FLOPs of update 2 on process 0: 2 x 16 samples",
        "            FLOPs    ms  FLOPS/s",
        "  forward   1.5 M  0.50      3 G",
        "  backward  2.5 M  1.00    2.5 G",
        "  step             0.25",
        "  update      4 M  1.75  2.286 G",
        "  most at depth 1: a (Block) 75.0 %",
        "  most at depth 2: a.0 (Linear) 75.0 %",
        "  module          parameters  FLOPs    share",
        "  model (Net)            3 k    4 M  100.0 %",
        "    a (Block)            2 k    3 M   75.0 %",
        "      0 (Linear)         2 k    3 M   75.0 %",
        "    b (Linear)           1 k    1 M   25.0 %",
    ]


def test_depth_number_of_modules_and_the_tree_can_be_chosen() -> None:
    text = report(PROFILE, FlopsProfilerConfig(module_depth=1, top_modules=2, detailed=False))
    assert text.splitlines()[-1] == "  most at depth 1: a (Block) 75.0 %, b (Linear) 25.0 %"
    assert "a.0" not in report(PROFILE, FlopsProfilerConfig(module_depth=1))


def test_forwards_that_the_backward_repeats_are_told_apart() -> None:
    lines = report(PROFILE, FlopsProfilerConfig(recompute_fwd_factor=1.0)).splitlines()
    assert [line.split()[-5:] for line in lines if "without repeated" in line] == [["2.5", "M", "1.75", "1.429", "G"]]
