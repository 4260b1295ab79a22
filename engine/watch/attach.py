"""Gives an engine the observers that its config asks for, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.engine import Engine
from engine.log import log
from engine.watch.bar import Bar, wants_bar
from engine.watch.comms import CommsLog
from engine.watch.flops import FlopsProfiler
from engine.watch.memory import Memory
from engine.watch.monitor import Monitor
from engine.watch.progress import Gauge, Progress
from engine.watch.state import dump_state
from engine.watch.timings import Timings
from engine.watch.writers import build_writers, check_packages, wants_writers

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["attach"]

PRINT_EVERY = 10  # updates, where a breakdown is wanted and steps_per_print is null


def attach(engine: Engine) -> None:
    """Let the engine be watched as its config says; on every process alike.

    Raises:
        EngineError: a package that the config needs is not installed.
    """
    config = engine.config
    check_packages(config)
    if config.dump_state:
        dump_state(config)
    if config.comms_logger is not None and config.comms_logger.enabled:
        engine.observers.append(CommsLog(engine, config.comms_logger))
    monitor = None
    if wants_writers(config):
        monitor = Monitor(engine.world, build_writers(config) if engine.global_rank == 0 else [])
        engine.observers.append(monitor)
    gauges: list[Gauge] = []
    if config.wall_clock_breakdown:
        timings = Timings(engine, monitor)
        engine.observers.append(timings)
        gauges.append(timings)
    if config.flops_profiler is not None and config.flops_profiler.enabled and engine.global_rank == 0:
        engine.observers.append(FlopsProfiler(engine, config.flops_profiler))
    if config.memory_breakdown:
        memory = Memory(engine.device)
        log.info("the model is built; %s", memory.line())
        gauges.append(memory)
    if wants_bar(engine):
        engine.observers.append(Bar(engine))
    _print_at_intervals(engine, config, gauges)


def _print_at_intervals(engine: Engine, config: EngineConfig, gauges: list[Gauge]) -> None:
    if gauges and engine.steps_per_print is None:
        engine.steps_per_print = PRINT_EVERY
        log.info("steps_per_print: null; breakdowns are printed every %d updates", PRINT_EVERY)
    throughput = None if config.timers is None else config.timers.throughput
    # Always there, since steps_per_print may be set at any time; and last, so that what is printed is complete.
    engine.observers.append(Progress(gauges, throughput=throughput is None or throughput.enabled))
