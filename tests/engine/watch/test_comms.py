"""Collectives: counted and measured, with the same training as without."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from engine import Engine, initialize, run_range_test
from engine.watch import log_comms_summary
from engine.watch.comms import CommsLog, MeasuredWorld
from tests.distributed import run_ranks

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(16, 1)
GRADIENT_BYTES = 5 * 4 + 2 * 4  # of a Linear(4, 1), and what the ranks tell each other with them


def make_engine(logger: dict[str, Any] | None, **config: Any) -> Engine:
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, **config}
    if logger is not None:
        config["comms_logger"] = {"enabled": True, **logger}
    return initialize(nn.Linear(4, 1), config, device="cpu")


def train(engine: Engine, micro_steps: int) -> None:
    rows = slice(4 * engine.global_rank, 4 * engine.global_rank + 4)
    for _ in range(micro_steps):
        engine.backward(nn.functional.mse_loss(engine(X[rows]), Y[rows]))
        engine.step()


def log_of(engine: Engine) -> CommsLog:
    return next(observer for observer in engine.observers if isinstance(observer, CommsLog))


def listen() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine").addHandler(handler)
    logging.getLogger("engine").setLevel(logging.INFO)
    return said


def counted(logger: dict[str, Any], **config: Any) -> dict[Any, int]:
    engine = make_engine(logger, **config)
    engine._first_batches.watching = False  # the comparison at the first step is no part of each step
    train(engine, 6)
    totals = log_of(engine)._watch.totals()
    assert all(span.ms > 0 for span in totals.values())
    return {key: span.times for key, span in totals.items()}


def every_way() -> dict[str, Any]:
    """All that the tests below look at on two ranks, in one start of them."""
    return {
        "plain": counted({}),
        "callers": counted({"debug": True}, gradient_accumulation_steps=2, steps_per_print=1),
        "objects only": counted({"prof_all": False, "prof_ops": ["all_gather_object"]}),
        "all_reduce only": counted({"prof_all": False, "prof_ops": ["all_reduce"]}),
        "weights": weights_with_and_without(),
        "after a range test": after_a_range_test(),
        "said": said_while_training(),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(every_way, 2)


def test_gradients_are_counted_once_an_update(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["plain"] == {("all_reduce", GRADIENT_BYTES, ""): 6}


def test_callers_are_told_apart_and_so_are_lines_of_progress(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["callers"] == {
            ("all_reduce", GRADIENT_BYTES, "gradients"): 3,
            ("all_reduce", 4, "engine.watch.progress._print"): 3,
        }


def test_kinds_can_be_chosen(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["objects only"] == {}
        assert rank["all_reduce only"] == {("all_reduce", GRADIENT_BYTES, ""): 6}


def weights_with_and_without() -> list[torch.Tensor]:
    found = []
    for logger in (None, {}):
        engine = make_engine(logger)
        train(engine, 5)
        found.append(torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()]))
    return found


def test_measuring_changes_no_bit_of_the_training_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        without, measured = rank["weights"]
        assert torch.equal(without, measured)
    assert torch.equal(ranks[0]["weights"][1], ranks[1]["weights"][1])


def after_a_range_test() -> int:
    engine = make_engine({})
    run_range_test(engine, (X, Y), nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
    before = sum(span.times for span in log_of(engine)._watch.totals().values())
    train(engine, 3)
    return sum(span.times for span in log_of(engine)._watch.totals().values()) - before


def test_the_ddp_that_a_range_test_leaves_is_measured_too(ranks: list[dict[str, Any]]) -> None:
    assert [rank["after a range test"] for rank in ranks] == [3, 3]


def said_while_training() -> tuple[list[str], list[str]]:
    said = listen()
    engine = make_engine({"verbose": True})
    train(engine, 2)
    verbose = [line for line in said if "all_reduce" in line]
    said.clear()
    log_comms_summary(engine)
    return verbose, "\n".join(said).splitlines()


def test_each_is_printed_after_its_update_and_the_table_when_asked_for(ranks: list[dict[str, Any]]) -> None:
    (verbose, table), other = (rank["said"] for rank in ranks)
    assert [line.partition(" in ")[0] for line in verbose] == [f"step={n}: all_reduce: 28 B" for n in (1, 2)]
    assert table[0] == "collectives of process 0 of 2"
    assert table[1].split() == ["collective", "size", "count", "ms", "ms", "each", "bus", "Gbit/s"]
    assert table[2].split()[:4] == ["all_reduce", "28", "B", "2"]
    assert other == ([], [])


def test_one_process_has_nothing_to_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    engine = make_engine({})
    train(engine, 2)
    assert not isinstance(engine.world, MeasuredWorld)
    log_comms_summary(engine)
    assert caplog.messages[-1] == "collectives of process 0 of 1: none"


def test_without_the_logger_a_summary_says_how_to_switch_it_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    log_comms_summary(make_engine(None))
    assert caplog.messages[-1].startswith('comms_logger: off; "comms_logger": {"enabled": true}')
