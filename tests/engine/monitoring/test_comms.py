"""Collectives: counted and timed, with the same training as without."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from redline import Engine, run_range_test
from redline.monitoring import log_comms_summary
from redline.monitoring.comms import CommsLogger, LoggedWorld
from tests.callbacks import find
from tests.distributed import run_ranks
from tests.tiny import X, Y, listen, make_engine, train

GRADIENT_BYTES = 5 * 4 + 2 * 4  # of a Linear(4, 1), and the status that the ranks send with them


def logged(logger: dict[str, Any], **config: Any) -> Engine:
    return make_engine(comms_logger={"enabled": True, **logger}, **config)


def times_of(engine: Engine) -> dict[Any, int]:
    totals = find(engine, CommsLogger)._stopwatch.totals()
    assert all(span.ms > 0 for span in totals.values())
    return {key: span.times for key, span in totals.items()}


def counted(logger: dict[str, Any], **config: Any) -> dict[Any, int]:
    engine = logged(logger, **config)
    engine._first_batches.watching = False  # the comparison at the first step is not part of each step
    train(engine, 6)
    return times_of(engine)


def weights_with_and_without() -> list[torch.Tensor]:
    engines = [make_engine(), logged({})]
    for engine in engines:
        train(engine, 5)
    return [torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()]) for engine in engines]


def after_a_range_test() -> int:
    engine = logged({})
    run_range_test(engine, (X, Y), nn.functional.mse_loss, steps=20, rates=[5.0], progress=False)
    before = sum(times_of(engine).values())
    train(engine, 3)
    return sum(times_of(engine).values()) - before


def printed() -> tuple[list[str], list[str]]:
    messages = listen()
    engine = logged({"verbose": True})
    train(engine, 2)
    verbose = [line for line in messages if "all_reduce" in line]
    messages.clear()
    log_comms_summary(engine)
    return verbose, "\n".join(messages).splitlines()


def every_way(folder: str) -> dict[str, Any]:
    """All that the tests below look at on two ranks, in one call."""
    charts = {"enabled": True, "output_path": folder}
    return {
        "plain": counted({}),
        "callers": counted({"debug": True}, gradient_accumulation_steps=2, steps_per_print=1, csv_monitor=charts),
        "objects only": counted({"prof_all": False, "prof_ops": ["all_gather_object"]}),
        "all_reduce only": counted({"prof_all": False, "prof_ops": ["all_reduce"]}),
        "weights": weights_with_and_without(),
        "after a range test": after_a_range_test(),
        "printed": printed(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(every_way, 2, str(tmp_path_factory.mktemp("charts")))


def test_gradients_are_counted_once_a_step_and_kinds_can_be_chosen(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["plain"] == rank["all_reduce only"] == {("all_reduce", GRADIENT_BYTES, ""): 6}
        assert rank["objects only"] == {}


def test_callers_are_distinguished(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["callers"] == {
            ("all_reduce", GRADIENT_BYTES, "gradients"): 3,
            ("all_reduce", 4, "redline.monitoring.progress._print"): 3,
            ("all_reduce", 4, "redline.monitoring.metrics.flush"): 3,
        }


def test_logging_changes_no_bit_of_the_training_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        without, with_logger = rank["weights"]
        assert torch.equal(without, with_logger)
    assert torch.equal(ranks[0]["weights"][1], ranks[1]["weights"][1])


def test_what_a_range_test_leaves_is_counted_too(ranks: list[dict[str, Any]]) -> None:
    assert [rank["after a range test"] for rank in ranks] == [3, 3]


def test_each_is_printed_after_its_step_and_the_table_when_asked_for(ranks: list[dict[str, Any]]) -> None:
    (verbose, table), other = (rank["printed"] for rank in ranks)
    assert [line.partition(" in ")[0] for line in verbose] == [f"step={n}: all_reduce: 28 B" for n in (1, 2)]
    assert table[0] == "collectives of rank 0 of 2"
    assert table[1].split() == ["collective", "size", "count", "ms", "ms", "each", "bus", "Gbit/s"]
    assert ["all_reduce", "28", "B", "2"] in [line.split()[:4] for line in table[2:]]  # the slowest come first
    assert other == ([], [])


def test_one_rank_has_nothing_to_log_and_without_the_logger_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="redline")
    engine = logged({})
    train(engine, 2)
    assert not isinstance(engine.world, LoggedWorld)
    log_comms_summary(engine)
    assert caplog.messages[-1] == "collectives of rank 0 of 1: none"
    log_comms_summary(make_engine())
    assert caplog.messages[-1].startswith('comms_logger: off; "comms_logger": {"enabled": true}')
