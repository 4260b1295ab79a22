"""`comms_logger`: how often processes talk to each other, how much they say, and how long it takes.

Counted are the gradients' reductions, bucket by bucket; the gathering of parameters and the sums of a
model that is shared out, block by block; and the engine's own numbers (losses for the lines and monitors). A
collective's time runs from its start on this process to its end, and so includes the wait for a slower process, and for
those that were started before it.
"""

from __future__ import annotations

import atexit
import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from engine.distributed import World
from engine.engine import Engine
from engine.gradients import Reduction
from engine.log import log
from engine.watch.stopwatch import Span, Stopwatch, stamp
from engine.watch.table import table

if TYPE_CHECKING:
    from engine.config.sections.records import CommsLoggerConfig

__all__ = ["CommsLog", "MeasuredReduction", "MeasuredWorld", "log_comms_summary"]

T = TypeVar("T")


class CommsLog:
    """Notes every collective that it is shown; speaks at the end of the process, and when asked to.

    Args:
        engine: with several processes; its gradients and its own numbers are noted from here on.
        config: which collectives to note (`prof_all`, else those in `prof_ops`: "all_reduce", "all_gather",
            "reduce_scatter", "all_gather_object"), whether to print each after its update, which waits for the device
            (`verbose`), and whether to tell the callers apart (`debug`).
    """

    def __init__(self, engine: Engine, config: CommsLoggerConfig) -> None:
        self._ops = None if config.prof_all else frozenset(config.prof_ops)
        self._verbose, self._debug = config.verbose, config.debug
        self._rank, self._size = engine.global_rank, engine.world_size
        self._device = engine.device
        self._watch = Stopwatch()
        self._told: dict[Any, Span] = {}
        if engine.world_size == 1:
            return
        world = {field.name: getattr(engine.world, field.name) for field in dataclasses.fields(engine.world)}
        engine.world = MeasuredWorld(**world, log=self)
        if self.notes("all_reduce"):
            reduction = engine._parallel.reduction
            fields = {field.name: getattr(reduction, field.name) for field in dataclasses.fields(reduction)}
            engine._parallel.reduction = MeasuredReduction(**fields, log=self)
        engine._parallel.show_collectives(self._noted)
        if self._rank == 0:
            atexit.register(self.say)

    def _noted(self, op: str, size: int, run: Callable[[], Any]) -> Any:
        """Run a collective of a model that is shared out, and note it."""
        if not self.notes(op):
            return run()
        begin = stamp(self._device)
        result = run()
        self.note(op, "zero", size, begin, stamp(self._device))
        return result

    def notes(self, op: str) -> bool:
        """Whether this kind of collective is noted."""
        return self._ops is None or op in self._ops

    def note(self, op: str, caller: str, size: int, begin: Any, end: Any) -> None:
        """Note one collective.

        Args:
            op: its name, as in `torch.distributed`.
            caller: who wanted it.
            size: bytes that this process gave.
            begin: a stamp of when it started.
            end: a stamp of when it ended.
        """
        self._watch.add((op, size, caller if self._debug else ""), begin, end)

    def updated(self, engine: Engine) -> None:
        if self._verbose:
            totals = self._watch.totals()
            for line in self._lines({key: _minus(span, self._told.get(key)) for key, span in totals.items()}):
                log.info("step=%d: %s", engine.global_steps, line)
            self._told = totals

    def summary(self) -> str:
        """A table of all collectives so far, as this process saw them; waits for the device."""
        head = f"collectives of process {self._rank} of {self._size}"
        totals = self._watch.totals()
        if not totals:
            return f"{head}: none"
        rows = []
        for (op, size, caller), span in sorted(totals.items(), key=lambda item: -item[1].ms):
            name = f"{op} ({caller})" if caller else op
            rate = self._gbps(op, size, span)
            rows.append((name, _bytes(size), str(span.times), f"{span.ms:.1f}", f"{span.ms / span.times:.3f}", rate))
        return "\n".join([head, *table(("collective", "size", "count", "ms", "ms each", "bus Gbit/s"), rows)])

    def say(self) -> None:
        """Print the summary, on rank zero."""
        try:
            log.info("%s", self.summary())
        except RuntimeError as error:  # a device that has failed
            log.warning("comms_logger: the collectives' times could not be read: %s", error)

    def _lines(self, spans: dict[Any, Span]) -> Iterator[str]:
        for (op, size, caller), span in spans.items():
            if span.times:
                by = f" ({caller})" if caller else ""
                times = f"{span.times} x " if span.times > 1 else ""
                rate = self._gbps(op, size, span)
                yield f"{op}{by}: {times}{_bytes(size)} in {span.ms:.3f} ms" + (f", {rate} Gbit/s" if rate else "")

    def _gbps(self, op: str, size: int, span: Span) -> str:
        """What the slowest link carries: as NCCL's tests count it, 2 (n - 1) / n of the size in an all-reduce."""
        if op != "all_reduce" or not span.ms:
            return ""
        return f"{size * 8 * span.times * 2 * (self._size - 1) / self._size / (span.ms * 1e6):.2f}"


@dataclasses.dataclass(frozen=True, slots=True)
class MeasuredWorld(World):
    """A world whose collectives are noted."""

    log: CommsLog

    def sum(self, value: Tensor) -> Tensor:
        if not self.log.notes("all_reduce"):
            return World.sum(self, value)
        begin = stamp(value.device)
        total = World.sum(self, value)
        self.log.note("all_reduce", _caller(), value.nbytes, begin, stamp(value.device))
        return total

    def gather(self, value: T) -> list[T]:
        if not self.log.notes("all_gather_object"):
            return World.gather(self, value)
        cpu = torch.device("cpu")
        begin = stamp(cpu)
        values = World.gather(self, value)
        self.log.note("all_gather_object", _caller(), len(pickle.dumps(value)), begin, stamp(cpu))
        return values


@dataclasses.dataclass(frozen=True, slots=True)
class MeasuredReduction(Reduction):
    """A reduction of gradients whose buckets are noted."""

    log: CommsLog | None = None

    def start(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        log, size, device = self.log, buffer.nbytes, buffer.device
        assert log is not None
        begin = stamp(device)

        def arrived(future: torch.futures.Future[Tensor]) -> Tensor:
            # On CUDA this runs on a stream that waits for the collective, and the stamp does, too.
            log.note("all_reduce", "gradients", size, begin, stamp(device))
            return future.value()

        return Reduction.start(self, buffer).then(arrived)


def log_comms_summary(engine: Engine) -> None:
    """Print the table of all collectives so far, on rank zero; DeepSpeed has `deepspeed.comm.log_summary`.

    Args:
        engine: with ``"comms_logger": {"enabled": true}`` in its config; else the line says that it is off.
    """
    logs = [observer for observer in engine.observers if isinstance(observer, CommsLog)]
    if not logs:
        log.info('comms_logger: off; "comms_logger": {"enabled": true} in the config notes collectives')
    for each in logs:
        each.say()


def _caller() -> str:
    """The function that wanted a collective, outside of this file and of the world's own."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, World.__module__):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"


def _minus(span: Span, before: Span | None) -> Span:
    return span if before is None else Span(span.times - before.times, span.ms - before.ms)


def _bytes(size: int) -> str:
    """A size in the largest unit that leaves at least one."""
    value, units = float(size), ("B", "KiB", "MiB", "GiB")
    index = 0
    while value >= 1024 and index < len(units) - 1:
        value, index = value / 1024, index + 1
    return f"{value:.4g} {units[index]}"
