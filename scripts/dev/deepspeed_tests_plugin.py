"""The pytest plugin of ``deepspeed_tests.py``: writes each test's outcome, and ends a test that waits for a lost rank.

DeepSpeed's harness runs the ranks of a test in a `multiprocessing.Pool`. Where one rank fails and the others wait for
it in a collective, it waits for its timeout and then for the pool. Here a rank that failed ends its process, so that
the others' collectives fail; a test that hangs all the same fails at the harness's timeout, and the next test runs.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # a second, of every rank of every test if it is not imported before the fork
import torch.distributed.fsdp  # noqa: F401  the same
from unit import common  # type: ignore[import-not-found]  # DeepSpeed's tests are on the path

with contextlib.suppress(ImportError):  # it is not there with DeepSpeed
    import redline.start  # noqa: F401  the same

_run_rank, _end_pool = common.DistributedExec._dist_run, common.DistributedExec._close_pool
_GRACE = 0.5  # seconds for a failed rank's exception to reach the parent process


def _dist_run(self: Any, *args: Any) -> Any:  # its name: methods are pickled by name
    try:
        return _run_rank(self, *args)
    except BaseException as error:
        if not self.non_daemonic_procs:
            leave = threading.Timer(_GRACE, os._exit, (1,))
            leave.daemon = True
            leave.start()
        if isinstance(error, (pytest.fail.Exception, StopIteration)):
            # The pool returns exceptions that are an Exception; to its itertools.starmap a StopIteration is the end.
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        raise


def _close_pool(self: Any, pool: Any, num_procs: int, force: bool = False) -> None:
    if sys.exc_info()[0] is None:
        _end_pool(self, pool, num_procs, force)
        return
    self._pool_cache.pop(num_procs, None)
    # A rank that ended its process may have held the lock of the pool's queue, for which terminate() would wait.
    pool._inqueue._rlock.acquire(timeout=2 * _GRACE)
    pool._inqueue._rlock.release()
    pool.terminate()
    pool.join()


common.DistributedExec._dist_run, common.DistributedExec._close_pool = _dist_run, _close_pool


def pytest_configure() -> None:
    multiprocessing.set_forkserver_preload([__name__])  # ranks fork with torch and deepspeed imported


def _fail_not_exit() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except pytest.exit.Exception as error:
        pytest.fail(str(error), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from _fail_not_exit())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from _fail_not_exit())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what the log has already."""
    log = Path(os.environ["DEEPSPEED_TESTS_LOG"])
    done = {json.loads(line)["test"] for line in log.read_text().splitlines()} if log.exists() else set()
    items[:] = [each for each in items if each.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash else str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    line = {"test": report.nodeid, "outcome": outcome, "why": (why or str(report.longrepr or ""))[:2000]}
    with Path(os.environ["DEEPSPEED_TESTS_LOG"]).open("a") as log:
        log.write(json.dumps(line) + "\n")
