"""Whole training runs against real DeepSpeed: the same config, model and data give its rates, losses and norms.

The expected numbers are in ``tests/golden/training.json`` (fp32) and ``precision.json`` (bf16, fp16, autocast);
``scripts/dev/record_deepspeed.py`` records them. Rates, momenta, loss scales and skipped steps are compared exactly,
losses and gradient norms within the format's rounding: DeepSpeed's Adam is a fused kernel that orders its sums
otherwise than torch does, and it reduces bf16 and fp16 gradients in those formats. A run whose config has a key that
is not built yet is skipped until the key is no longer refused.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from redline.config import load_config
from redline.config.explain import catalog
from redline.errors import ConfigError, EngineError
from tests.callbacks import drop_recorder
from tests.distributed import run_ranks
from tests.golden import workload

FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in ("training", "precision")}
CASES = {case["name"]: case for golden in GOLDEN.values() for case in golden["cases"]}
DEFAULT_CLIPPING = 1.0  # where the config has no gradient_clipping

Record = dict[str, Any]


def train(case: dict[str, Any]) -> Record:
    """The case through our engine, in this process; per optimizer step what DeepSpeed was asked for, too."""
    from redline import initialize

    model = workload.build_model_of(case)
    parameters = workload.parameters_of(case, model)
    engine = initialize(model, copy.deepcopy(case["config"]), model_parameters=parameters, device="cpu")
    started_at = _weights(engine.module)
    dataset = workload.build_dataset()
    record: Record = {name: [] for name in ("loss", "lr", "momentum", "grad_norm", "skipped_steps", "loss_scale")}
    record["error_at"] = None
    for step in range(workload.NUM_STEPS):
        losses = []
        indices = workload.micro_steps(case, step)
        for index in indices:
            loss = workload.loss_of(case, engine, dataset, step, index, engine.global_rank, engine.world_size)
            engine.backward(loss)
            losses.append(loss.detach().double())
            if index == indices[-1]:
                record["lr"].append([float(lr) for lr in engine.get_lr()])
                record["momentum"].append([_momentum(group) for group in engine.optimizer.param_groups])
            if index == indices[-1] or "backwards" not in case:
                try:
                    engine.step()
                except EngineError:
                    if case.get("error_at") is None:
                        raise
                    record["error_at"] = step
        record["loss"].append(_mean_over_ranks(torch.stack(losses).mean()))
        if record["error_at"] is not None:
            break
        record["grad_norm"].append(engine.get_global_grad_norm())
        record["skipped_steps"].append(engine.skipped_steps)
        record["loss_scale"].append(engine.loss_scale)
    assert engine.global_steps == workload.NUM_STEPS or record["error_at"] is not None
    drop_recorder(engine)
    record["distance"] = float((_weights(engine.module) - started_at).norm())
    return record


def train_all(cases: list[dict[str, Any]]) -> dict[str, Record]:
    """Several cases one after the other, in a process that `run_ranks` started."""
    return {case["name"]: train(case) for case in cases}


def _weights(model: torch.nn.Module) -> torch.Tensor:
    whole = [whole_of(parameter.detach()) for parameter in model.parameters()]
    return torch.cat([parameter.flatten().double() for parameter in whole])


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be shared out, put together; all processes at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _momentum(group: dict[str, Any]) -> Any:
    return list(group["betas"]) if "betas" in group else group.get("momentum", 0.0)


def _or_nan(norm: float | None) -> float:
    return norm if norm is not None and math.isfinite(norm) else math.nan


def _mean_over_ranks(value: torch.Tensor) -> float:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return float(value)


def why_not(case: dict[str, Any]) -> str | None:
    """What of the case's config is not built yet; None where all of it is.

    Raises:
        ConfigError: something else is wrong with it.
    """
    try:
        load_config(copy.deepcopy(case["config"]))
    except ConfigError as error:
        if any(catalog()[problem.path].status != "refused" for problem in error.problems):
            raise
        return str(error)
    return None


def names(processes: int) -> list[str]:
    return [name for name, case in CASES.items() if case["processes"] == processes]


@pytest.fixture(scope="module", params=names(1))
def one_process(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Record]:
    """A recorded case of one process, and ours, trained here."""
    case = CASES[request.param]
    if (reason := why_not(case)) is not None:
        pytest.skip(reason)
    return case, train(case)


@pytest.fixture(scope="module")
def records_of_two_processes() -> list[dict[str, Record]]:
    """Every case of two processes, by rank and name, trained in one pair of gloo processes."""
    return run_ranks(train_all, 2, [CASES[name] for name in names(2) if why_not(CASES[name]) is None])


@pytest.fixture(
    params=[(name, rank) for name in names(2) for rank in (0, 1)], ids=lambda given: f"{given[0]}-rank{given[1]}"
)
def two_processes(
    request: pytest.FixtureRequest, records_of_two_processes: list[dict[str, Record]]
) -> tuple[dict[str, Any], Record]:
    """A recorded case of two processes, and ours as one of its ranks saw it."""
    name, rank = request.param
    if (reason := why_not(CASES[name])) is not None:
        pytest.skip(reason)
    return CASES[name], records_of_two_processes[rank][name]


def tolerance(case: dict[str, Any]) -> float:
    """How far losses and norms may be apart, relatively."""
    config = case["config"]
    if "fp16" in config or config.get("torch_autocast", {}).get("dtype") == "float16":
        return 5e-3
    return 3e-2 if "bf16" in config or "torch_autocast" in config else 2e-4


def assert_the_record_is_deepspeeds(case: dict[str, Any], record: Record) -> None:
    rel = tolerance(case)
    assert record["lr"] == case["lr"]
    assert record["momentum"] == case["momentum"]
    assert record["loss"] == pytest.approx(case["loss"], rel=rel, abs=0)
    if case["config"].get("gradient_clipping", DEFAULT_CLIPPING) > 0 or record["grad_norm"][0] is not None:
        norms, expected = (list(map(_or_nan, given["grad_norm"])) for given in (record, case))
        assert norms == pytest.approx(expected, rel=rel, abs=0, nan_ok=True)  # of a skipped update there is none
    for name in ("skipped_steps", "loss_scale", "error_at"):
        if case.get(name) is not None:
            assert record[name] == case[name], name
    if "distance" in case:
        assert record["distance"] == pytest.approx(case["distance"], rel=rel)


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_the_workload_is_the_one_deepspeed_trained_on(golden: dict[str, Any]) -> None:
    assert workload.fingerprint() == pytest.approx(golden["workload"]["fingerprint"], rel=1e-6)


def test_one_process_trains_as_deepspeed_does(one_process: tuple[dict[str, Any], Record]) -> None:
    assert_the_record_is_deepspeeds(*one_process)


def test_two_processes_train_as_deepspeed_does(two_processes: tuple[dict[str, Any], Record]) -> None:
    assert_the_record_is_deepspeeds(*two_processes)
