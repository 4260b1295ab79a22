"""The metrics of every optimizer step: kept on the device, averaged over the ranks, handed to rank 0's writers."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from redline.callbacks import Callback
from redline.distributed.process_group import World
from redline.engine import Engine
from redline.log import log
from redline.monitoring.writers import CurveReport, Scalar, Writer

__all__ = ["MetricsLogger"]

FLUSH_EVERY = 50  # steps: the device is waited for that rarely, and a chart lags by that many
LAST_LOSSES_TIMEOUT = timedelta(seconds=5)  # for the other ranks' last losses

_Steps = list[tuple[int, dict[str, Any]]]  # samples so far, and values by name, on the device
_count = itertools.count()  # of the loggers of this process, for their keys in the store


class MetricsLogger(Callback):
    """Keeps every step's metrics on the device, and hands them to rank 0's writers in batches.

    A batch is written every so many steps, with each progress line, and at the end, after an exception as well.

    Args:
        world: the ranks whose losses are averaged, once a batch; each has a logger.
        writers: on rank 0; none elsewhere.
        counts_all: whether to write skipped steps and samples per second, too, as for `redline report`.
    """

    def __init__(self, world: World, writers: list[Writer], *, counts_all: bool = False) -> None:
        self._world, self._writers, self._counts_all = world, writers, counts_all
        self._skipped = 0
        self._since: tuple[float, int] | None = None  # time and samples of the last flush
        self._steps: _Steps = []
        self._resumed_at: int | None = None  # samples; until the writers are told
        # Kept here, to be used when the process group is gone.
        self._store = None if world.size == 1 else dist.distributed_c10d._get_default_store()
        self._key = f"redline/metrics/{next(_count)}"

    def on_step(self, engine: Engine) -> None:
        assert engine.optimizer is not None
        values = {"train_loss": engine.loss, "lr": engine.optimizer.param_groups[0]["lr"],
                  "grad_norm": engine.grad_norm, "loss_scale": engine.loss_scale}  # fmt: skip
        # Clones, since the optimizer and the next step write into these tensors.
        kept = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}
        self._steps.append((engine.global_samples, kept))
        every = engine.steps_per_print
        if len(self._steps) >= FLUSH_EVERY or (every and engine.global_steps % every == 0):
            self.flush()

    def on_skip(self, engine: Engine, step: int) -> None:
        self._skipped += 1
        if self._counts_all:
            self.log_scalars({"skipped_steps": float(self._skipped)}, engine.global_samples)

    def on_save(self, engine: Engine) -> None:
        self.flush()

    def on_resume(self, engine: Engine) -> None:
        self._steps = [each for each in self._steps if each[0] <= engine.global_samples]
        self._skipped, self._since = engine.skipped_steps, None
        self._resumed_at = engine.global_samples

    def flush(self) -> None:
        """Write what has been kept; a collective, which waits for the device."""
        if self._steps:
            losses = self._world.mean(_stack(self._steps, "train_loss")).tolist()
            steps, self._steps = self._steps, []  # after the wait, so that Ctrl-C during it loses nothing
            self._write_steps(steps, losses)
            if self._counts_all:
                self._write_throughput(steps[-1][0])

    def log_scalars(self, values: dict[str, float], samples: int) -> None:
        """Write numbers of the training that rank 0 has on the host, by name."""
        self._write([Scalar(f"Train/Samples/{name}", value, samples) for name, value in values.items()])

    def log_report(self, report: CurveReport) -> None:
        """Write curves that are not the training's own; on rank 0, which has writers."""
        self._for_each_writer(lambda writer: writer.write_report(report))

    def close(self, timeout: timedelta = LAST_LOSSES_TIMEOUT) -> None:
        """Write what has been kept, and close the writers; no collective, which a failed rank would never join."""
        atexit.unregister(self.close)
        steps, self._steps = self._steps, []
        try:
            if steps:
                self._write_steps(steps, self._mean_of_last(_stack(steps, "train_loss").tolist(), timeout))
        except Exception as error:  # the process is ending, perhaps for an error: that is the one to be seen
            log.warning("monitors: the last %d steps could not be read: %s", len(steps), error)
        self._for_each_writer(lambda writer: writer.close())
        self._writers = []

    def _write_steps(self, steps: _Steps, losses: list[float]) -> None:
        if not self._writers:
            return
        norms = _stack(steps, "grad_norm").tolist()  # in one transfer
        self._write([
            Scalar(f"Train/Samples/{name}", float(value), samples)
            for (samples, values), loss, norm in zip(steps, losses, norms)
            for name, value in {**values, "train_loss": loss, "grad_norm": norm}.items()
            if values[name] is not None
        ])  # fmt: skip

    def _write_throughput(self, samples: int) -> None:
        """Samples per second since the last flush, the script's own time included."""
        now = time.perf_counter()
        if self._since is not None and now > self._since[0]:
            self.log_scalars({"samples_per_second": (samples - self._since[1]) / (now - self._since[0])}, samples)
        self._since = now, samples

    def _write(self, scalars: list[Scalar]) -> None:
        resumed_at, self._resumed_at = self._resumed_at, None
        if resumed_at is not None:  # only now: a script that loads and does not train leaves the charts alone
            self._for_each_writer(lambda writer: writer.replace_after(resumed_at))
        self._for_each_writer(lambda writer: writer.write(scalars))

    def _for_each_writer(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:  # a full disk, or a service that is gone, should not end a training run
                log.warning("%s: %s; nothing more is written there", writer.name, error)
                self._writers.remove(writer)

    def _mean_of_last(self, losses: list[float], timeout: timedelta) -> list[float]:
        """The means over all ranks, on rank 0, of the steps whose losses all ranks send in time; then its own."""
        if self._store is None:
            return losses
        if self._world.rank != 0:
            self._store.set(f"{self._key}/{self._world.rank}", json.dumps(losses))
            return losses
        keys = [f"{self._key}/{rank}" for rank in range(1, self._world.size)]
        means: list[float] = []
        with contextlib.suppress(RuntimeError):  # a rank that is gone
            self._store.wait(keys, timeout)
            by_rank = [losses, *(json.loads(self._store.get(key)) for key in keys)]
            means = [sum(each) / self._world.size for each in zip(*by_rank)]
        if missing := len(losses) - len(means):
            log.warning("monitors: the loss of the last %d steps is rank 0's own, not the mean over the ranks", missing)
        return means + losses[len(means) :]


def _stack(steps: _Steps, name: str) -> Tensor:
    """One value of each step, nan where it has none; shape (steps,), on the device."""
    found = [values["train_loss"] * math.nan if values[name] is None else values[name] for _, values in steps]
    return torch.stack([torch.as_tensor(value).reshape(()).float() for value in found])
