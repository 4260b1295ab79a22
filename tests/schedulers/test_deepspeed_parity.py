"""Every schedule against real DeepSpeed, bit for bit.

The expected numbers are in ``tests/golden/schedules.json``; ``scripts/dev/record_deepspeed.py`` records them. One known
difference has its own test: a momentum bound given with an optimizer that has ``momentum`` cycles it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from redline import schedulers
from tests.golden import workload

CASES = json.loads((Path(__file__).parent.parent / "golden" / "schedules.json").read_text(encoding="utf-8"))["cases"]
EXCEPTIONS = {"TypeError": TypeError, "ValueError": ValueError}

accepted = pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in CASES if c["error"] is None])
refused = pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in CASES if c["error"] is not None])


def build_schedule(case: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The case's schedule, constructed and loaded, before its first step."""
    schedule = getattr(schedulers, case["schedule"])(optimizer, **workload.decode(case["args"]))
    if case["load"] is not None:
        schedule.load_state_dict({"last_batch_iteration": case["load"]})
    return schedule


def take(schedule: Any, step: int | None) -> None:
    schedule.step() if step is None else schedule.step(step)


@accepted
def test_rates_and_momenta_in_the_groups_and_get_lr_equal_deepspeeds_at_every_step(case: dict[str, Any]) -> None:
    optimizer = workload.build_optimizer(case)
    schedule = build_schedule(case, optimizer)
    tensors = [group["lr"] for group in optimizer.param_groups]
    trace, rates = [workload.snapshot(optimizer)], [[float(lr) for lr in schedule.get_lr()]]
    stored = torch.float32 if case["tensor_lr"] else torch.float64
    for step in case["steps"]:
        take(schedule, step)
        trace.append(workload.snapshot(optimizer))
        rates.append([float(lr) for lr in schedule.get_lr()])
        last = [torch.tensor(float(lr), dtype=stored).item() for lr in schedule.get_last_lr()]
        assert last == [group["lr"] for group in trace[-1]]
    assert trace == case["trace"]
    assert rates == case["get_lr"]
    if case["tensor_lr"]:
        assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors))
        assert all(tensor.dtype is torch.float32 and tensor.ndim == 0 for tensor in tensors)


@accepted
def test_a_state_saved_after_any_step_goes_on_as_deepspeed_does(case: dict[str, Any]) -> None:
    optimizer = workload.build_optimizer(case)
    schedule = build_schedule(case, optimizer)
    for step, expected in zip(case["steps"], case["trace"][1:]):
        state = schedule.state_dict()
        schedule.load_state_dict({"last_batch_iteration": 10_000})  # far away, and back
        schedule.load_state_dict(state)
        take(schedule, step)
        assert workload.snapshot(optimizer) == expected


@refused
def test_what_deepspeed_refuses_is_refused_alike_and_leaves_the_optimizer_alike(case: dict[str, Any]) -> None:
    optimizer = workload.build_optimizer(case)
    with pytest.raises(EXCEPTIONS[case["error"]]) as caught:
        build_schedule(case, optimizer)
    assert caught.type is EXCEPTIONS[case["error"]]
    assert [workload.snapshot(optimizer)] == case["trace"]


def test_a_momentum_bound_cycles_the_momentum_of_sgd_where_deepspeed_drops_it() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = schedulers.OneCycle(optimizer, 0.01, 0.1, cycle_first_step_size=2, cycle_min_mom=0.75, cycle_max_mom=1.0)
    momenta = [optimizer.param_groups[0]["momentum"]]
    for _ in range(6):
        schedule.step()
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert momenta == [0.75, 0.875, 0.75, 0.875, 1.0, 1.0, 1.0]
    assert "betas" not in optimizer.param_groups[0]


def test_the_recording_holds_every_schedule_accepted_and_refused() -> None:
    for error in (False, True):
        seen = {case["schedule"] for case in CASES if (case["error"] is not None) is error}
        assert seen == {"LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"}
