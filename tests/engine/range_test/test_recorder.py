"""Notes of a run: what is kept, and that nothing waits for it."""

from __future__ import annotations

import math

import torch

from engine.distributed import World
from engine.range_test.recorder import Recorder
from tests.distributed import run_ranks

ALONE = World(0, 0, 1, torch.device("cpu"))


def test_a_record_is_a_curve_of_every_update() -> None:
    recorder = Recorder(ALONE)
    for step, loss in enumerate((3.0, 2.0, math.nan)):
        recorder.record(step, 0.1 * step, torch.tensor(loss))
    curve = recorder.curve("rate 5", 5.0)
    assert (curve.name, curve.rate, curve.steps, curve.lrs) == ("rate 5", 5.0, (0, 1, 2), (0.0, 0.1, 0.2))
    assert curve.losses[:2] == (3.0, 2.0)
    assert math.isnan(curve.losses[2])
    assert len(recorder) == 3


def test_a_record_can_be_read_at_any_time_and_goes_on() -> None:
    recorder = Recorder(ALONE)
    recorder.record(0, 0.1, torch.tensor(3.0))
    assert recorder.last_loss() == 3.0
    assert recorder.curve("", None).losses == (3.0,)
    recorder.record(1, 0.1, torch.tensor(2.0))
    assert recorder.last_loss() == 2.0
    assert recorder.curve("", None).losses == recorder.curve("", None).losses == (3.0, 2.0)


def test_validation_losses_are_kept_beside_and_may_be_numbers() -> None:
    recorder = Recorder(ALONE)
    recorder.record_validation(0, 1.5)
    recorder.record(0, 0.1, torch.tensor(3.0))
    recorder.record_validation(1, torch.tensor(0.25, dtype=torch.float64))
    assert recorder.curve("", None).validation == ((0, 1.5), (1, 0.25))


def test_a_rate_in_a_tensor_is_noted_as_it_is_now() -> None:
    recorder, lr = Recorder(ALONE), torch.tensor(0.5)
    recorder.record(0, lr, torch.tensor(1.0))
    lr.fill_(9.0)
    recorder.record(1, lr, torch.tensor(1.0))
    assert recorder.curve("", None).lrs == (0.5, 9.0)


def test_losses_of_any_type_and_of_one_element_are_taken() -> None:
    recorder = Recorder(ALONE)
    recorder.record(0, 0.1, torch.tensor([2.5], dtype=torch.float64, requires_grad=True))
    recorder.record(1, 0.1, torch.tensor(1.5, dtype=torch.bfloat16))
    assert recorder.curve("", None).losses == (2.5, 1.5)


def test_an_empty_record_is_an_empty_curve() -> None:
    assert Recorder(ALONE).curve("", 1.0).losses == ()


def two_records() -> dict[str, object]:
    from engine.distributed import join_world

    world = join_world("cpu")
    recorder = Recorder(world)
    for step in range(3):
        recorder.record(step, 0.1, torch.tensor(float(step + 10 * world.rank)))
    recorder.record_validation(3, torch.tensor(float(world.rank)))
    curve = recorder.curve("", None)
    recorder.record(3, 0.1, torch.tensor(math.nan if world.rank else 1.0))
    return {"losses": curve.losses, "validation": curve.validation, "last": recorder.last_loss()}


def test_processes_record_their_mean() -> None:
    for answers in run_ranks(two_records, 2):
        assert answers["losses"] == (5.0, 6.0, 7.0)
        assert answers["validation"] == ((3, 0.5),)
        assert math.isnan(answers["last"])
