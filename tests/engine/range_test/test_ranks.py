"""A range test on several processes: all stop at the same update, for whatever reason, and have the same result."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, EngineError, RangeTestError, RangeTestResult
from redline.range_test import Suggestion
from tests import range_tests
from tests.distributed import run_ranks
from tests.range_tests import loss_of

PLAIN = {"rates": [5, 50, 500], "steps": 40}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}

make_data = partial(range_tests.make_data, noise=0.0)
make_engine = partial(range_tests.make_engine, micro_batch=4)


def run(engine: Engine, loss: Any, data: Any = None, **arguments: Any) -> RangeTestResult:
    return range_tests.run(engine, make_data() if data is None else data, loss, **{"steps": 30, **arguments})


class On:
    """A loss that one rank alone spoils from its so-manieth call on; counts the calls."""

    def __init__(self, spoils: bool, call: int, spoil: Callable[[Tensor], Tensor]) -> None:
        self.calls, self._spoils, self._call, self._spoil = 0, spoils, call, spoil

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        value = loss_of(model, batch)
        return self._spoil(value) if self._spoils and self.calls >= self._call else value


def interrupt(value: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return value


def leave(value: Tensor) -> Tensor:
    raise ZeroDivisionError


def on_each_rank() -> dict[str, Any]:
    engine = make_engine()
    rank = engine.global_rank
    found: dict[str, Any] = {}

    def of_its_own(model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch) * (1 + 9 * rank)

    everything: dict[str, Any] = {"seeds": 2, "batch_sizes": [16]}
    shared = FP16 | {"zero_optimization": {"stage": 3}}
    x, y = make_data()
    found["plain"] = run(make_engine(), nn.MSELoss(), **PLAIN, validation=make_data(11))
    found["uneven"] = run(make_engine(), nn.MSELoss(), data=[(x[:4], y[:4])] * (3 + rank), steps=20)
    found["few"] = run(make_engine(), nn.MSELoss(), validation=make_data(1), steps=20)
    for name, config, more in (("fp32", {}, everything), ("fp16, stage 3", shared, {})):
        each = make_engine(**config)
        found[f"own losses, {name}"] = run(each, of_its_own, rates=[5, 5000], **more)
        found[f"nan, {name}"] = run(each, On(rank == 1, 14, lambda value: value * math.nan), steps=20)
    with pytest.raises(RangeTestError) as refusal:
        run(engine, loss_of, batch_sizes=[12])
    found["refusal"] = str(refusal.value)

    interrupted = On(rank == 1, 5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(engine, interrupted)
    found["interrupted"] = interrupted.calls
    found["after it"] = run(engine, loss_of, steps=5)

    # Last: rank 1 leaves for good, and rank 0 is not to wait for ever.
    begin, weights = time.monotonic(), torch.cat([part.flatten() for part in engine.parameters()]).tolist()
    with pytest.raises(ZeroDivisionError if rank == 1 else EngineError) as end:
        run(engine, On(rank == 1, 5, leave))
    if rank == 0:
        found["alone"] = (str(end.value), time.monotonic() - begin)
        found["put back"] = torch.cat([part.flatten() for part in engine.parameters()]).tolist() == weights
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, 2)


def text(result: RangeTestResult) -> str:
    return str(result.to_json())  # nan is no equal of itself


@pytest.mark.parametrize("precision", ["fp32", "fp16, stage 3"])
@pytest.mark.parametrize("what", ["own losses", "nan"])
def test_all_processes_have_the_same_result(ranks: list[dict[str, Any]], what: str, precision: str) -> None:
    first, second = (text(rank[f"{what}, {precision}"]) for rank in ranks)
    assert first == second


@pytest.mark.parametrize("precision", ["fp32", "fp16, stage 3"])
def test_processes_whose_losses_differ_stop_together_in_every_run(ranks: list[dict[str, Any]], precision: str) -> None:
    lengths = {curve.name: len(curve.steps) for curve in ranks[0][f"own losses, {precision}"].curves}
    assert len(lengths) == (8 if precision == "fp32" else 2)
    assert all(10 <= length < 30 for name, length in lengths.items() if "5000" in name)


def test_a_loss_that_is_not_a_number_on_one_process_ends_the_test_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (curve,) = rank["nan, fp32"].curves
        assert (len(curve.steps), curve.skipped) == (14, ())
        assert math.isnan(curve.losses[-1])


def test_in_fp16_it_is_skipped_on_all_and_ends_the_test_on_all_if_it_stays(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (curve,) = rank["nan, fp16, stage 3"].curves
        assert (len(curve.steps), curve.skipped) == (18, (13, 14, 15, 16))
        assert math.isnan(curve.losses[-1])


def test_ctrl_c_on_one_process_ends_the_test_on_all_at_the_same_update(ranks: list[dict[str, Any]]) -> None:
    assert [rank["interrupted"] for rank in ranks] == [5, 5]
    assert text(ranks[0]["after it"]) == text(ranks[1]["after it"])


def test_a_batch_size_that_the_processes_cannot_make_up_is_refused_on_all(ranks: list[dict[str, Any]]) -> None:
    assert {rank["refusal"] for rank in ranks} == {
        "range test: set_train_batch_size: got 12; expected a multiple of 8, the micro-batch of 4 on 2 ranks; "
        "nearest: 8 and 16"
    }


def test_a_process_that_leaves_is_named_by_the_other_which_is_as_it_was(ranks: list[dict[str, Any]]) -> None:
    message, seconds = ranks[0]["alone"]
    assert "rank 1 ended its script" in message
    assert seconds < 20
    assert ranks[0]["put back"]


def test_two_ranks_measure_what_one_does_with_their_batch(ranks: list[dict[str, Any]]) -> None:
    # DistributedSampler deals out samples in turn, so two micro-batches of 4 are one of 8.
    alone = run(make_engine(train_micro_batch_size_per_gpu=8), nn.MSELoss(), **PLAIN, validation=make_data(11))
    together, other = (rank["plain"] for rank in ranks)
    assert text(together) == text(other) and isinstance(together.suggestion, Suggestion)
    assert together.world_size == 2
    for ours, expected in zip(together.curves, alone.curves):
        assert ours.lrs == expected.lrs
        assert ours.losses == pytest.approx(expected.losses, rel=1e-4, abs=1e-6)
        assert [at for _, at in ours.validation] == pytest.approx(
            [at for _, at in expected.validation], rel=1e-4, abs=1e-6
        )


def test_loaders_of_different_lengths_and_little_validation_data_are_enough(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["uneven"].curves[0].steps) == 20
    x, y = make_data(1)
    with torch.no_grad():
        expected = nn.functional.mse_loss(make_engine()(x), y).item()
    assert ranks[0]["few"].curves[0].validation[0][1] == pytest.approx(expected, rel=1e-5)


def validate_unevenly(size: int) -> list[float]:
    """Validation losses at stage 3, where every forward is a collective, with fewer batches on one rank."""
    engine = make_engine(zero_optimization={"stage": 3}, train_micro_batch_size_per_gpu=1)
    result = run(engine, loss_of, steps=4, validation=make_data(size), validations=2)
    return [loss for _, loss in result.curves[0].validation]


@pytest.mark.parametrize("size", [1, 17])
def test_ranks_with_unequal_numbers_of_validation_batches_do_not_wait_for_each_other(size: int) -> None:
    first, second = run_ranks(validate_unevenly, 2, size)
    assert first == second and len(first) == 3
    x, y = make_data(size)
    with torch.no_grad():
        expected = nn.functional.mse_loss(make_engine().module(x), y).item()
    assert first[0] == pytest.approx(expected, rel=1e-5)
