"""Records of a run: what is kept, and that nothing waits for it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from redline.distributed.process_group import World, join_world
from redline.range_test.recorder import Recorder
from tests.distributed import run_ranks

ALONE = World(0, 0, 1, torch.device("cpu"))


def at(step: int, loss: float, lr: float | Tensor = 0.1) -> Any:
    """An engine that has just made this step."""
    optimizer = SimpleNamespace(param_groups=[{"lr": lr}])
    return SimpleNamespace(global_steps=step + 1, optimizer=optimizer, loss=torch.tensor(loss))


def test_a_record_is_a_curve_of_every_step_and_may_be_read_at_any_time() -> None:
    recorder = Recorder(ALONE)
    recorder.on_step(at(0, 3.0, lr=0.0))
    assert recorder.last_loss() == 3.0
    assert recorder.curve("", None).losses == (3.0,)
    recorder.on_step(at(1, 2.0))
    recorder.on_step(at(2, math.nan, lr=0.2))
    curve = recorder.curve("rate 5", 5.0)
    assert (curve.name, curve.rate, curve.steps, curve.lrs) == ("rate 5", 5.0, (0, 1, 2), (0.0, 0.1, 0.2))
    assert curve.losses[:2] == (3.0, 2.0) and math.isnan(curve.losses[2])
    assert len(recorder) == 3


def test_validation_losses_may_be_numbers_or_tensors() -> None:
    recorder = Recorder(ALONE)
    recorder.on_validation(at(-1, 0.0), 1.5)
    recorder.on_step(at(0, 3.0))
    recorder.on_validation(at(0, 0.0), torch.tensor(0.25, dtype=torch.float64))
    assert recorder.curve("", None).validation == ((0, 1.5), (1, 0.25))


def test_a_learning_rate_in_a_tensor_is_recorded_as_it_is_now() -> None:
    recorder, lr = Recorder(ALONE), torch.tensor(0.5)
    recorder.on_step(at(0, 1.0, lr))
    lr.fill_(9.0)
    recorder.on_step(at(1, 1.0, lr))
    assert recorder.curve("", None).lrs == (0.5, 9.0)


def two_records() -> dict[str, object]:
    world = join_world("cpu")
    recorder = Recorder(world)
    for step in range(3):
        recorder.on_step(at(step, float(step + 10 * world.rank)))
    recorder.on_validation(at(2, 0.0), torch.tensor(float(world.rank)))
    curve = recorder.curve("", None)
    recorder.on_step(at(3, math.nan if world.rank else 1.0))
    return {"losses": curve.losses, "validation": curve.validation, "last": recorder.last_loss()}


def test_ranks_record_their_mean() -> None:
    for answers in run_ranks(two_records, 2):
        assert answers["losses"] == (5.0, 6.0, 7.0)
        assert answers["validation"] == ((3, 0.5),)
        assert math.isnan(answers["last"])
