"""Recording a run: LR and loss of every optimizer step, with validation losses along the way.

Recording a step costs microseconds and never waits for the device. On several ranks the losses are averaged as they
come, by an asynchronous all-reduce of one number, so that reading the record later concerns rank 0 alone.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from redline.callbacks import Callback, Validation
from redline.distributed.process_group import World
from redline.engine import Engine
from redline.log import log
from redline.range_test.curve import Curve, Kind
from redline.range_test.result import RECORDS, RangeTestResult
from redline.schedulers import LRRangeTest

__all__ = ["PassiveRecorder", "Recorder", "name_test"]

SAVE_EVERY = 500  # steps between two saves of a passive test, or half of its length once that is more


class Recorder(Callback):
    """The record of one run, kept on the device until it is read."""

    def __init__(self, world: World, start: int = 0) -> None:
        self._world = world  # whose losses are averaged
        self._start = start  # index of the first step, which the record counts as 0
        self._steps: list[int] = []
        self._lrs: list[Any] = []
        self._losses: list[float] = []  # read from the device so far
        self._unread: list[Tensor] = []
        self._validation: list[tuple[int, Tensor]] = []
        self._pending: list[Any] = []  # all-reduces under way
        self._skipped: list[int] = []

    def __len__(self) -> int:
        return len(self._steps)

    def on_step(self, engine: Any) -> None:
        lr = engine.optimizer.param_groups[0]["lr"]
        self._steps.append(engine.global_steps - 1 - self._start)
        self._lrs.append(lr.detach().clone() if isinstance(lr, Tensor) else lr)
        self._unread.append(self._sum_over_ranks(engine.loss))

    def on_skip(self, engine: Any, step: int) -> None:
        self._skipped.append(step - 1 - self._start)

    def on_validation(self, engine: Any, loss: Validation) -> None:
        if isinstance(loss, Mapping):
            loss = loss.get("loss", next(iter(loss.values())))
        value = torch.as_tensor(loss, dtype=torch.float32, device=self._world.device).detach()
        self._validation.append((engine.global_steps - self._start, self._sum_over_ranks(value)))

    def count_last(self) -> None:
        """Count the last step although it was skipped: it shows that the run had diverged."""
        if self._skipped and self._skipped[-1] == self._steps[-1]:
            self._skipped.pop()

    def last_loss(self) -> float:
        """The loss of the newest step over all ranks; waits for the device."""
        self._read()
        return self._losses[-1]

    def curve(self, name: str, rate: float | None, *, kind: Kind = "linear") -> Curve:
        """The record so far; waits for the device. Arguments as in `Curve`."""
        self._read()
        lrs, losses = tuple(map(float, self._lrs)), tuple(self._losses)
        validation = tuple((step, float(loss) / self._world.size) for step, loss in self._validation)
        return Curve(name, rate, tuple(self._steps), lrs, losses, validation, kind, skipped=tuple(self._skipped))

    def _sum_over_ranks(self, loss: Tensor) -> Tensor:
        """The sum, once the all-reduce is done."""
        if self._world.size == 1:
            return loss
        total = loss.float().clone()
        self._pending.append(dist.all_reduce(total, async_op=True))
        return total

    def _read(self) -> None:
        while self._pending:
            self._pending.pop().wait()
        if self._unread:
            sums = torch.stack([loss.reshape(()) for loss in self._unread]).float() / self._world.size
            self._losses.extend(sums.tolist())
            self._unread.clear()


class PassiveRecorder(Recorder):
    """The passive range test: a training run whose config says LRRangeTest, recorded without a change to the script.

    Rank 0 saves the record every so often, and writes the report when the process ends. The planned training is assumed
    to be ten times as long as the test. `report` writes the report of a result and returns its summary.
    """

    def __init__(self, engine: Engine, report: Callable[[RangeTestResult, Path], str]) -> None:
        super().__init__(engine.world)
        schedule = engine.lr_scheduler
        assert isinstance(schedule, LRRangeTest)
        self.directory = Path(engine.config.redline.range_test.output_dir)
        self._rate, self._growth = schedule.step_rate, schedule.growth
        ratios = [float(lr / schedule.min_lrs[0]) for lr in schedule.min_lrs]
        self._empty = RangeTestResult.of(engine, [], train_steps=0, group_ratios=ratios)
        self._report = report
        self._saved = 0  # steps in the last save
        if self._world.rank == 0:
            atexit.register(self.close)

    def on_step(self, engine: Any) -> None:
        super().on_step(engine)
        if len(self) == 1 and self._world.rank == 0 and any((self.directory / name).exists() for name in RECORDS):
            log.warning("range test: %s holds earlier results, which this run replaces", self.directory)
        if len(self) % SAVE_EVERY:
            return
        self._read()  # on every rank: losses that are never read would pile up on the device
        # Each save writes the entire record; the growing interval keeps the total linear in the length of the run.
        if self._world.rank == 0 and len(self) - self._saved >= self._saved / 2:
            self._saved = len(self)
            self._write(lambda: self.result().save(self.directory))

    def result(self) -> RangeTestResult:
        """The run so far as a range test of one curve; waits for the device."""
        curve = self.curve(name_test(self._rate, self._growth), self._rate, kind=self._growth)
        return replace(self._empty, curves=(curve,), train_steps=10 * len(self))

    def close(self) -> None:
        """Write the report, once."""
        atexit.unregister(self.close)
        if len(self):
            self._write(lambda: log.info("%s", self._report(self.result(), self.directory)))

    def _write(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:  # not a reason to end a training
            reason = error.strerror or error
            log.warning("range test: the record could not be written to %s: %s", self.directory, reason)


def name_test(rate: float, growth: Kind) -> str:
    """The name of a range test: ``rate 5``, or ``rate 5, exponential``."""
    return f"rate {rate:g}" if growth == "linear" else f"rate {rate:g}, {growth}"
