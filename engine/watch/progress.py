"""The line of `steps_per_print`: where the training is, how it goes, how fast; and the lines that go with it.

The only place in a training run that waits for the device to show something.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from engine.engine import Engine
from engine.log import log

__all__ = ["Gauge", "Progress", "shown"]


class Gauge(Protocol):
    """What has a line of its own below the line of progress."""

    def line(self, updates: int, seconds: float) -> str | None:
        """What to print of so many updates and seconds: those since the last line, or since the first update."""


class Progress:
    """Prints one line every ``engine.steps_per_print`` updates, on rank zero.

    The loss is that of the update which the line counts, the mean over its micro-batches and all processes; rate,
    momentum and norm are those it ran with. ``samples/s`` is over all processes, since the last line by the clock on
    the wall: what the script did in between counts, the time before the first update does not.

    Args:
        gauges: what else is printed at each line.
        throughput: whether to show samples/s.
    """

    def __init__(self, gauges: Sequence[Gauge] = (), *, throughput: bool = True) -> None:
        self._gauges = gauges
        self._throughput = throughput
        self._since: float | None = None  # the last line, or the first update
        self._updates = 0  # since then; the engine's own counter jumps when a checkpoint is loaded

    def updated(self, engine: Engine) -> None:
        self._updates += 1
        every = engine.steps_per_print
        if every and engine.global_steps % every == 0:
            self._print(engine)
        elif self._since is not None:
            return
        self._since, self._updates = time.perf_counter(), 0

    def _print(self, engine: Engine) -> None:
        assert engine.loss is not None
        values = {
            "step": engine.global_steps,
            "skipped": engine.skipped_steps,
            "loss": shown(float(engine.world.mean(engine.loss))),  # on every rank: it is a collective
            "lr": shown(engine.get_lr()),
            "mom": shown(engine.get_mom()),
        }
        if engine.grad_norm is not None:
            values["norm"] = shown(engine.grad_norm)
        if engine.loss_scale is not None:
            values["loss_scale"] = shown(engine.loss_scale)
        updates, seconds = 0, 0.0
        if self._since is not None:
            updates, seconds = self._updates, time.perf_counter() - self._since
        if self._throughput and updates:
            values["samples/s"] = f"{updates * engine.train_batch_size() / seconds:.0f}"
        log.info("%s", ", ".join(f"{name}={value}" for name, value in values.items()))
        for gauge in self._gauges:
            line = gauge.line(updates, seconds)
            if line is not None:
                log.info("  %s", line)


def shown(value: Any) -> str:
    """A number to six digits; lists of them, one for each parameter group, likewise."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return "None" if value is None else f"{float(value):.6g}"
