"""The pool of ranks: what a call gets and returns, that no call sees traces of another, what a hang or death does."""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from redline import initialize
from redline.distributed import failure
from tests.distributed import RanksFailed, ranks, run_ranks

FOUND_AT_IMPORT = os.environ.get("WORLD_SIZE")
_counted = 0
_numbers = itertools.count()
_kept: list[Any] = []


def place() -> dict[str, Any]:
    return {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}


def add(x: float) -> float:
    dist.init_process_group("gloo")
    value = torch.tensor([x * (dist.get_rank() + 1)])
    dist.all_reduce(value)
    return value.item()


def pid() -> int:
    return os.getpid()


@pytest.mark.parametrize("fresh", [False, True])
def test_ranks_have_torchruns_environment_and_meet(fresh: bool) -> None:
    assert run_ranks(place, 3, fresh=fresh) == [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"} for rank in range(3)
    ]
    assert run_ranks(add, 3, 0.5, fresh=fresh) == [3.0, 3.0, 3.0]


def imported_under() -> str | None:
    return FOUND_AT_IMPORT


def test_the_environment_is_there_before_the_functions_module_is_imported() -> None:
    assert run_ranks(imported_under, 2, fresh=True) == ["2", "2"]


def test_the_pool_serves_one_call_after_the_other_and_grows() -> None:
    two, four, again = run_ranks(pid, 2), run_ranks(pid, 4), run_ranks(pid, 2)
    assert two == again == four[:2]
    assert len({os.getpid(), *four}) == 5
    assert not set(run_ranks(pid, 2, fresh=True)) & set(four)


@settings(max_examples=10)
@given(st.integers(1, 4), st.floats(-4, 4, width=32))
def test_a_property_may_call_them_many_times(world_size: int, x: float) -> None:
    with ranks(world_size) as pool:
        expected = sum(torch.tensor(x * (rank + 1)) for rank in range(world_size))
        assert pool.run(add, x) == [pytest.approx(float(expected), abs=1e-5)] * world_size


# -- what a call leaves ----------------------------------------------------------------------------------------------


def leave_all_sorts(folder: str) -> None:
    """All that a test of ours has ever left in a process, and what it may."""
    global _counted
    _counted += 1
    next(_numbers)
    _kept.append("left")
    os.environ["LEFT"] = "1"
    os.chdir(folder)
    sys.argv.append("left")
    sys.path.append("left")
    sys.stderr = io.StringIO()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    logging.getLogger("redline").addHandler(logging.NullHandler())
    logging.getLogger("redline").setLevel(logging.ERROR)
    logging.getLogger().addFilter(lambda record: False)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    random.seed(7), numpy.random.seed(7), torch.manual_seed(7)
    failure._peers = "left"  # type: ignore[assignment]
    failure.name_ranks = None  # type: ignore[assignment]
    dist.init_process_group("gloo")


def all_sorts() -> dict[str, Any]:
    log, root = logging.getLogger("redline"), logging.getLogger()
    return {
        "environment": sorted(set(os.environ) - {"MASTER_PORT"}),
        "folder": os.getcwd(),
        "sys": (sys.argv, sys.path, type(sys.stderr).__name__),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)],
        "warnings": [str(each) for each in warnings.filters],
        "logging": (log.handlers, log.level, log.isEnabledFor(logging.ERROR), len(root.filters)),
        "torch": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            str(torch.empty(()).device),
            torch.get_num_threads(),
        ),
        "random": (random.random(), float(numpy.random.rand()), torch.rand(()).item()),
        "engine": (failure._peers, failure.name_ranks([0])),
        "module": (_counted, next(_numbers), len(_kept)),
        "process group": dist.is_initialized(),
        "threads": [each.name for each in threading.enumerate()],
    }


def test_a_call_finds_what_it_would_find_had_there_been_none_before(tmp_path: Path) -> None:
    before = run_ranks(all_sorts, 2)
    run_ranks(leave_all_sorts, 2, str(tmp_path))
    assert run_ranks(all_sorts, 2) == before
    clean = before[0]
    assert clean["folder"] == os.getcwd()
    assert clean["torch"] == (torch.float32, True, False, "cpu", 1)
    assert clean["engine"] == (None, "rank 0")
    assert (clean["module"], clean["process group"]) == ((0, 0, 0), False)


def leave_exit_functions(folder: str) -> None:
    path = Path(folder, os.environ["RANK"])
    atexit.register(lambda: path.write_text(path.read_text() + " exit function"))
    threading.Thread(target=lambda: (time.sleep(0.1), path.write_text("thread"))).start()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_call_ends_as_a_script_does_threads_first_then_exit_functions(tmp_path: Path, fresh: bool) -> None:
    for _ in range(2):
        run_ranks(leave_exit_functions, 2, str(tmp_path), fresh=fresh)
        assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["thread exit function"] * 2


def train(stage: int, folder: str) -> list[float]:
    """Some training that leaves the engine, its monitor and its process group to the end of the process."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"},
        "redline": {"zero": {"smallest_block": 1}},
    }
    engine = initialize(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), config, device="cpu")
    _kept.append(engine)
    losses = []
    for step in range(3):
        loss = engine(torch.full((4, 4), 1.0 + step + engine.global_rank)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("world_size", [2, 3])
def test_engines_of_every_stage_train_as_in_fresh_processes_whatever_came_before(
    tmp_path: Path, world_size: int
) -> None:
    alone = [run_ranks(train, world_size, stage, str(tmp_path / f"fresh{stage}"), fresh=True) for stage in (0, 3)]
    expected = dict(zip((0, 3), alone))
    for turn, stage in enumerate([3, 0, 3, 3, 0]):
        assert run_ranks(train, world_size, stage, str(tmp_path / str(turn))) == expected[stage]
        written = (tmp_path / str(turn) / "job" / "Train_Samples_train_loss.csv").read_text().splitlines()
        assert len(written) == 1 + 3


def in_buckets() -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()


def alive() -> list[str]:
    return [type(each).__name__ for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]


def test_no_model_of_an_earlier_call_is_left() -> None:
    run_ranks(in_buckets, 2)
    assert run_ranks(alive, 2) == [[], []]


def leak_a_process_group() -> int:
    dist.init_process_group("gloo")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))  # as a cycle through C++ does
    return os.getpid()


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 does not name gloo's threads, which tell")
def test_a_rank_whose_process_group_cannot_be_freed_is_replaced() -> None:
    leaking = run_ranks(leak_a_process_group, 2)
    assert not set(run_ranks(pid, 2)) & set(leaking)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def fail_on(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


@pytest.mark.parametrize("fresh", [False, True])
def test_an_exception_comes_back_with_its_traceback_and_the_pool_serves_on(fresh: bool) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fail_on, 2, 1, fresh=fresh)
    text = str(failed.value)
    assert "rank 1 of 2 raised\nTraceback" in text and "ValueError: planted" in text and "in fail_on" in text
    assert run_ranks(add, 2, 1.0) == [3.0, 3.0]


def die(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        os._exit(9)
    dist.barrier()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_rank_that_dies_is_named_and_replaced(fresh: bool) -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 died with exit code 9 and no answer"):
        run_ranks(die, 2, 1, fresh=fresh)
    assert run_ranks(add, 2, 1.0) == [3.0, 3.0]


def hang_on(rank: int) -> None:
    while int(os.environ["RANK"]) == rank:
        time.sleep(0.1)


@pytest.mark.long
def test_a_rank_that_hangs_tells_where_and_is_replaced() -> None:
    before = run_ranks(pid, 2)
    with pytest.raises(RanksFailed) as failed:
        run_ranks(hang_on, 2, 0, timeout=20.0)
    assert str(failed.value).startswith("rank 0 of 2 gave no answer in time; it is here:\n")
    assert "in hang_on" in str(failed.value)
    assert not set(run_ranks(pid, 2)) & set(before)


def hang_in_a_thread() -> str:
    threading.Thread(target=lambda: time.sleep(600), daemon=False).start()
    return "done"


@pytest.mark.long
def test_a_rank_whose_threads_do_not_end_is_a_failure_too() -> None:
    run_ranks(pid, 1)  # so that starting it takes none of the time below
    with pytest.raises(RanksFailed, match="rank 0 of 1 answered, and did not end in time"):
        run_ranks(hang_in_a_thread, 1, timeout=20.0)


def test_what_cannot_be_pickled_fails_before_any_rank_is_asked() -> None:
    with pytest.raises((AttributeError, TypeError)):
        run_ranks(lambda: None, 2)


def a_result_that_cannot_travel() -> Any:
    return lambda: json


def test_a_result_that_cannot_be_pickled_is_told_by_its_rank() -> None:
    with pytest.raises(RanksFailed, match="rank 0 of 1 raised"):
        run_ranks(a_result_that_cannot_travel, 1)
