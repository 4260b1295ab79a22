"""Worker processes for trainings, and a cache of their results: a JSON file for each task."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from redline.console import ProgressBar

__all__ = ["Cache", "Workers"]

SAVE_EVERY = 20.0  # seconds
Job = tuple[str, Callable[..., Any], tuple[Any, ...]]  # what it is kept under, a function of a module, its arguments


class Cache:
    """Results of one task by name, in a file that is begun anew where its key has changed.

    Runs at the same time may share it: what is saved is added to what the file has.

    Args:
        folder: of all tasks' files; None keeps nothing.
        name: the task's.
        key: what results depend on besides their names: versions, the task's data and numbers.
    """

    def __init__(self, folder: Path | None, name: str, key: dict[str, Any]) -> None:
        self._path = None if folder is None else folder / (re.sub(r"\W+", "-", name) + ".json")
        self._key = key
        self.found: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        kept = json.loads(self._path.read_text())
        if kept["key"] == self._key:
            return kept["found"]
        print(f"quality: {self._path} is from other versions or another task, and starts anew", file=sys.stderr)
        return {}

    def forget(self, prefix: str) -> None:
        """Drop the results whose names begin so."""
        self.found = {name: result for name, result in self._read().items() if not name.startswith(prefix)}
        self._write()

    def save(self) -> None:
        self.found = self._read() | self.found
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"key": self._key, "found": self.found}))
            partial.replace(self._path)


class Workers:
    """Processes of one thread each, or this one alone, and a progress bar over their jobs.

    Ctrl-C leaves a cache with all that was done.
    """

    def __init__(self, processes: int) -> None:
        torch.set_num_threads(1)
        self._pool, self._saved = None, time.monotonic()
        if processes > 1:
            self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin)
        self._bar, self._title = ProgressBar(0, unit="runs"), ""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()  # terminate would wait for the step that an engine is in
            self._pool.shutdown(wait=True, cancel_futures=True)

    def do(self, title: str, jobs: Iterable[Job], cache: Cache) -> None:
        """Do those jobs that the cache does not have, and keep their results there."""
        missing = {name: (function, given) for name, function, given in jobs if name not in cache.found}
        self._bar.total = (self._bar.total or 0) + len(missing)
        self._title = title
        try:
            if self._pool is None:
                for name, (function, given) in missing.items():
                    self._keep(cache, name, function(*given))
                return
            futures: dict[Future[Any], str] = {
                self._pool.submit(function, *given): name for name, (function, given) in missing.items()
            }
            for future in as_completed(futures):
                self._keep(cache, futures[future], future.result())
        finally:
            cache.save()

    def _keep(self, cache: Cache, name: str, result: Any) -> None:
        cache.found[name] = result
        self._bar.advance(1, self._title, lambda: f"{self._bar.done} of {self._bar.total}")
        if time.monotonic() > self._saved + SAVE_EVERY:
            cache.save()
            self._saved = time.monotonic()


def _begin() -> None:
    """The first call in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
