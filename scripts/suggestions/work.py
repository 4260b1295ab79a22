"""Who does the bench's jobs, and what is kept of them: worker processes, and a JSON file for each task."""

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
from tqdm import tqdm

__all__ = ["Cache", "Crew"]

SAVE_EVERY = 20.0  # seconds
Job = tuple[str, Callable[..., Any], tuple[Any, ...]]  # what it is kept under, a function of a module, its arguments


class Cache:
    """Results of one task by name, in a file that is begun anew where its key has changed.

    Args:
        folder: of all tasks' files; None keeps nothing.
        name: the task's.
        key: what results depend on beside their own names: versions, the task's data and numbers.
    """

    def __init__(self, folder: Path | None, name: str, key: dict[str, Any]) -> None:
        self._path = None if folder is None else folder / (re.sub(r"\W+", "-", name) + ".json")
        self._key = key
        self.found: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            kept = json.loads(self._path.read_text())
            if kept["key"] == key:
                self.found = kept["found"]
            else:
                print(f"quality: {self._path} is of other versions or another task, and begun anew", file=sys.stderr)

    def save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside = self._path.with_suffix(".new")
            beside.write_text(json.dumps({"key": self._key, "found": self.found}))
            beside.replace(self._path)


class Crew:
    """Processes of one thread each, or this one alone, and a progress bar over their jobs.

    Ctrl-C leaves a cache with all that was done.
    """

    def __init__(self, processes: int) -> None:
        torch.set_num_threads(1)
        self._pool, self._saved = None, time.monotonic()
        if processes > 1:
            self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin)
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(total=0, unit=" runs", mininterval=interval, maxinterval=interval, dynamic_ncols=True)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()  # terminate would wait for the update that an engine is in
            self._pool.shutdown(wait=True, cancel_futures=True)

    def do(self, title: str, jobs: Iterable[Job], cache: Cache) -> None:
        """Do those jobs that the cache does not have, and keep their results there."""
        missing = {name: (function, given) for name, function, given in jobs if name not in cache.found}
        self._bar.total += len(missing)
        self._bar.set_description(title)
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
        self._bar.update()
        if time.monotonic() > self._saved + SAVE_EVERY:
            cache.save()
            self._saved = time.monotonic()


def _begin() -> None:
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
