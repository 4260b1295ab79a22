"""Whole training runs against real DeepSpeed: the same config, model and data give its rates, losses and norms.

The expected numbers are in ``tests/golden/training.json``; ``scripts/record_deepspeed.py`` records them. Rates and
momenta are compared exactly, losses and gradient norms within float32 rounding: DeepSpeed's Adam is a fused kernel
that orders its sums otherwise than torch does.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from tests.distributed import run_ranks
from tests.golden import workload

RELATIVE = 2e-4
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "training.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
DEFAULT_CLIPPING = 1.0  # where the config has no gradient_clipping

Record = dict[str, list[Any]]


def train(case: dict[str, Any]) -> Record:
    """The case through our engine, in this process; per optimizer step what DeepSpeed was asked for, too."""
    from engine import initialize

    engine = initialize(workload.build_model(), copy.deepcopy(case["config"]), device="cpu")
    dataset = workload.build_dataset()
    record: Record = {"loss": [], "lr": [], "momentum": [], "grad_norm": []}
    for step in range(workload.NUM_STEPS):
        losses = []
        for index in range(step * case["accumulation"], (step + 1) * case["accumulation"]):
            x, y = workload.micro_batch(dataset, index, engine.global_rank, engine.world_size)
            loss = workload.loss_fn(engine(x), y)
            engine.backward(loss)
            losses.append(loss.detach().double())
            if engine.is_gradient_accumulation_boundary():
                record["lr"].append([float(lr) for lr in engine.get_lr()])
                record["momentum"].append([_momentum(group) for group in engine.optimizer.param_groups])
            engine.step()
        record["grad_norm"].append(engine.get_global_grad_norm())
        record["loss"].append(_mean_over_ranks(torch.stack(losses).mean()))
    assert engine.global_steps == workload.NUM_STEPS
    return record


def train_all(cases: list[dict[str, Any]]) -> dict[str, Record]:
    """Several cases one after the other, in a process that `run_ranks` started."""
    return {case["name"]: train(case) for case in cases}


def _momentum(group: dict[str, Any]) -> Any:
    return list(group["betas"]) if "betas" in group else group["momentum"]


def _mean_over_ranks(value: torch.Tensor) -> float:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return float(value)


def names(processes: int) -> list[str]:
    return [name for name, case in CASES.items() if case["processes"] == processes]


@pytest.fixture(scope="module", params=names(1))
def one_process(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Record]:
    """A recorded case of one process, and ours, trained here."""
    case = CASES[request.param]
    return case, train(case)


@pytest.fixture(scope="module")
def records_of_two_processes() -> list[dict[str, Record]]:
    """Every case of two processes, by rank and name, trained in one pair of gloo processes."""
    return run_ranks(train_all, 2, [CASES[name] for name in names(2)])


@pytest.fixture(
    params=[(name, rank) for name in names(2) for rank in (0, 1)], ids=lambda given: f"{given[0]}-rank{given[1]}"
)
def two_processes(
    request: pytest.FixtureRequest, records_of_two_processes: list[dict[str, Record]]
) -> tuple[dict[str, Any], Record]:
    """A recorded case of two processes, and ours as one of its ranks saw it."""
    name, rank = request.param
    return CASES[name], records_of_two_processes[rank][name]


def assert_the_record_is_deepspeeds(case: dict[str, Any], record: Record) -> None:
    assert record["lr"] == case["lr"]
    assert record["momentum"] == case["momentum"]
    assert record["loss"] == pytest.approx(case["loss"], rel=RELATIVE, abs=0)
    if case["config"].get("gradient_clipping", DEFAULT_CLIPPING) > 0:
        assert record["grad_norm"] == pytest.approx(case["grad_norm"], rel=RELATIVE, abs=0)


def test_the_workload_is_the_one_deepspeed_trained_on() -> None:
    assert workload.fingerprint() == pytest.approx(GOLDEN["workload"]["fingerprint"], rel=1e-6)


def test_one_process_trains_as_deepspeed_does(one_process: tuple[dict[str, Any], Record]) -> None:
    assert_the_record_is_deepspeeds(*one_process)


def test_two_processes_train_as_deepspeed_does(two_processes: tuple[dict[str, Any], Record]) -> None:
    assert_the_record_is_deepspeeds(*two_processes)
