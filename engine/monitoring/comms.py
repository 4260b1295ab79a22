"""`comms_logger`: how often ranks communicate, how many bytes, and how long it takes.

It counts the gradients' reductions bucket by bucket, the parameters that ZeRO gathers block by block, and the engine's
own numbers, such as losses for lines and metrics. A collective's time runs from its start on this rank to its end; it
includes the wait for slower ranks, and for collectives that were started before it.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from redline.callbacks import Callback
from redline.console import rows_as_text
from redline.distributed.process_group import World
from redline.engine import Engine
from redline.gradients import Reduction
from redline.log import log
from redline.monitoring.timing import Span, Stopwatch, timestamp

if TYPE_CHECKING:
    from redline.config.sections import CommsLoggerConfig

__all__ = ["CommsLogger", "LoggedReduction", "LoggedWorld"]

T = TypeVar("T")
Key = tuple[str, int, str]  # the collective as in `torch.distributed`, bytes that this rank gave, who asked for it


class CommsLogger(Callback):
    """Adds up the collectives of an engine on several ranks, from here on."""

    def __init__(self, engine: Engine, config: CommsLoggerConfig) -> None:
        self._config, self._device = config, engine.device
        self._rank, self._size = engine.global_rank, engine.world_size
        self._stopwatch = Stopwatch(engine.device)
        self._since_step = Stopwatch(engine.device)  # for `verbose`
        if engine.world_size == 1:
            return
        # In the place of the engine's own, so that an engine without a logger pays nothing.
        engine.world = LoggedWorld(**_fields(engine.world), log=self)
        if self._logs("all_reduce"):
            engine.reduction = LoggedReduction(**_fields(engine.reduction), log=self)
        engine.observe_collectives(lambda op, size, run: self.run(op, "zero", size, self._device, run))

    def _logs(self, op: str) -> bool:
        return self._config.prof_all or op in self._config.prof_ops

    def add(self, op: str, caller: str, size: int, begin: Any, end: Any) -> None:
        """Add one collective by the timestamps of its start and end."""
        key = op, size, caller if self._config.debug else ""
        self._stopwatch.add(key, begin, end)
        if self._config.verbose:
            self._since_step.add(key, begin, end)

    def run(self, op: str, caller: str, size: int, device: torch.device, call: Callable[[], T]) -> T:
        """Run a collective that does not return before it is queued, and add it."""
        if not self._logs(op):
            return call()
        # On CUDA both timestamps are events of the stream that the collective is queued in.
        begin = timestamp(device)
        result = call()
        self.add(op, caller, size, begin, timestamp(device))
        return result

    def on_step(self, engine: Engine) -> None:
        for key, span in self._since_step.take().items():
            name, size, *_, bandwidth = self._cells(key, span)
            many, speed = f"{span.times} x " if span.times > 1 else "", f", {bandwidth} Gbit/s" if bandwidth else ""
            log.info("step=%d: %s: %s%s in %.3f ms%s", engine.global_steps, name, many, size, span.ms, speed)

    def summary(self) -> str:
        """A table of all collectives so far on this rank; waits for the device."""
        title = f"collectives of rank {self._rank} of {self._size}"
        rows = [self._cells(*each) for each in sorted(self._stopwatch.totals().items(), key=lambda item: -item[1].ms)]
        if not rows:
            return f"{title}: none"
        heads = ("collective", "size", "count", "ms", "ms each", "bus Gbit/s")
        return "\n".join([title, *rows_as_text(rows, heads, numbers=True)])

    def print_summary(self) -> None:
        """Print the summary on rank 0."""
        try:
            log.info("%s", self.summary())
        except RuntimeError as error:  # a device that has failed
            log.warning("comms_logger: the collectives' times could not be read: %s", error)

    def _cells(self, key: Key, span: Span) -> tuple[str, ...]:
        op, size, caller = key
        # Of the slowest link, comparable to its own speed at any world size: 2 (n - 1) / n of the size in an all-reduce
        # (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Of the others only this rank's bytes
        # are known.
        bits = size * 8 * span.times * 2 * (self._size - 1) / self._size
        bandwidth = f"{bits / (span.ms * 1e6):.2f}" if op == "all_reduce" and span.ms else ""
        name = f"{op} ({caller})" if caller else op
        return name, _with_unit(size), f"{span.times}", f"{span.ms:.1f}", f"{span.ms / span.times:.3f}", bandwidth


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedWorld(World):
    """A world whose collectives are logged."""

    log: CommsLogger

    def sum(self, value: Tensor) -> Tensor:
        return self.log.run("all_reduce", _caller(), value.nbytes, value.device, lambda: World.sum(self, value))

    def gather(self, value: T) -> list[T]:
        # torch pickles it as well; these objects are small, and gathered rarely.
        size = len(pickle.dumps(value))
        return self.log.run(
            "all_gather_object", _caller(), size, torch.device("cpu"), lambda: World.gather(self, value)
        )


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedReduction(Reduction):
    """A reduction of gradients whose buckets are logged."""

    log: CommsLogger | None = None

    def start(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        log, size, device = self.log, buffer.nbytes, buffer.device
        assert log is not None
        begin = timestamp(device)

        def finish(future: torch.futures.Future[Tensor]) -> Tensor:
            # On CUDA this runs on a stream that waits for the collective, and so does the timestamp.
            log.add("all_reduce", "gradients", size, begin, timestamp(device))
            return future.value()

        return Reduction.start(self, buffer).then(finish)


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields, to make one of a subclass with them."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _caller() -> str:
    """The function that asked for a collective, outside of this module and of World's."""
    # The stack, not an argument: World is called from all over the engine, which need not know of the logger.
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, World.__module__):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"


def _with_unit(size: float) -> str:
    """A size in the largest unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
