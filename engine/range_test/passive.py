"""The passive range test: a training run whose config says LRRangeTest, recorded without a word in the script.

Rank zero writes the record every so often and once more when the process ends, with the picture and
the suggested config.
"""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.distributed import World
from engine.log import log
from engine.range_test.recorder import Recorder, name_test
from engine.range_test.report import write_report
from engine.range_test.result import RangeTestResult
from schedulers import LRRangeTest

__all__ = ["PassiveRecorder"]

SAVE_EVERY = 500  # updates between two savings of the record, or half of it once that is more: the whole is written


class PassiveRecorder(Recorder):
    """A recorder that keeps its notes on disk.

    Args:
        world: the processes whose losses are averaged.
        directory: where the record goes.
        schedule: the config's.
        context: what `RangeTestResult` says of the run beside its curves; the planned training is taken to be
            ten times as long as the test.
    """

    def __init__(self, world: World, directory: str | Path, schedule: LRRangeTest, context: dict[str, Any]) -> None:
        super().__init__(world)
        self.directory = Path(directory)
        self._rate, self._growth = schedule.step_rate, schedule.growth
        self._context = context
        self._saved = 0  # updates in the last saving
        if world.rank == 0:
            atexit.register(self.close)

    def record(self, step: int, lr: float | Tensor, loss: Tensor) -> None:
        super().record(step, lr, loss)
        if len(self) % SAVE_EVERY:
            return
        self._read()  # on every rank: notes that nobody reads would pile up on the device
        if self._world.rank == 0 and len(self) - self._saved >= self._saved / 2:
            self._saved = len(self)
            try:
                self.result().save(self.directory)
            except OSError as error:  # no reason to end a training
                self._warn(error)

    def result(self) -> RangeTestResult:
        """The run so far as a range test of one curve; waits for the device."""
        curve = self.curve(name_test(self._rate, self._growth), self._rate, kind=self._growth)
        return RangeTestResult(curves=(curve,), train_steps=10 * len(self), **self._context)

    def close(self) -> None:
        """Write the whole report, once."""
        atexit.unregister(self.close)
        if len(self) == 0:
            return
        try:
            log.info("%s", write_report(self.result(), self.directory))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        log.warning("range test: the record could not be written to %s: %s", self.directory, error.strerror or error)
