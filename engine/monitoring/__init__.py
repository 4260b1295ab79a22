"""Monitoring: what a training run prints, times, profiles and charts, each a callback of the engine.

A part is imported when a config asks for it, so that a plain training run loads the progress line alone.
"""

from __future__ import annotations

import atexit
import weakref
from datetime import timedelta

from redline.console import shows_bars
from redline.engine import Engine
from redline.log import log
from redline.monitoring.progress import ProgressLine, TrainingBar, log_config, memory_line

__all__ = ["attach_monitoring", "log_comms_summary"]

PRINT_EVERY = 10  # steps, where a breakdown is wanted and steps_per_print is null


def attach_monitoring(engine: Engine) -> None:
    """Append to the engine's callbacks what its config asks for; every rank calls this.

    Raises:
        EngineError: a package that the config needs is not installed, or a folder cannot be written to.
    """
    config, is_first = engine.config, engine.global_rank == 0
    throughput = None if config.timers is None else config.timers.throughput
    line = ProgressLine(throughput=throughput is None or throughput.enabled)
    if config.dump_state:
        log_config(config)
    # First, so that it counts the other parts' collectives.
    if config.comms_logger is not None and config.comms_logger.enabled:
        from redline.monitoring.comms import CommsLogger

        logger = CommsLogger(engine, config.comms_logger)
        engine.callbacks.append(logger)
        if engine.world_size > 1 and is_first:
            weakref.finalize(engine, logger.print_summary)  # at the end of the process, too
    charts = None
    sections = (config.tensorboard, config.wandb, config.csv_monitor, config.comet)
    log_dir = config.redline.log_dir
    if log_dir is not None or any(section is not None and section.enabled for section in sections):
        from redline.monitoring.metrics import MetricsLogger
        from redline.monitoring.writers import build_writers

        # On every rank: losses are averaged over all of them.
        writers = build_writers(config, rank=engine.global_rank)
        charts = MetricsLogger(engine.world, writers, counts_all=log_dir is not None)
        engine.callbacks.append(charts)
        atexit.register(charts.close)
        # An engine that is deleted takes its charts with it. Ranks do so in their own time: none waits for another.
        weakref.finalize(engine, charts.close, timedelta(0)).atexit = False
    if config.wall_clock_breakdown:
        from redline.monitoring.timing import WallClockBreakdown

        breakdown = WallClockBreakdown(engine, charts)
        engine.callbacks.append(breakdown)
        line.below.append(breakdown.line)
    # On rank 0 alone: it communicates nothing, and the ranks do the same work.
    if config.flops_profiler is not None and config.flops_profiler.enabled and is_first:
        from redline.monitoring.flops import FlopsProfiler

        engine.callbacks.append(FlopsProfiler(engine, config.flops_profiler))
    if config.memory_breakdown:
        log.info("the model is built; %s", memory_line(engine.device))
        line.below.append(lambda engine, steps, seconds: memory_line(engine.device))
    if line.below and engine.steps_per_print is None:
        engine.steps_per_print = PRINT_EVERY
        log.info("steps_per_print: null; breakdowns are printed every %d steps", PRINT_EVERY)
    wants_bar = shows_bars() if config.redline.progress is None else config.redline.progress
    if wants_bar and is_first:
        engine.callbacks.append(TrainingBar(engine))
    engine.callbacks.append(line)  # always there, since steps_per_print may be set at any time


def log_comms_summary(engine: Engine) -> None:
    """Print the table of all collectives so far, on rank 0; DeepSpeed has `deepspeed.comm.log_summary`.

    Args:
        engine: with ``"comms_logger": {"enabled": true}`` in its config; else a line says that it is off.
    """
    from redline.monitoring.comms import CommsLogger

    loggers = [callback for callback in engine.callbacks if isinstance(callback, CommsLogger)]
    if not loggers:
        log.info('comms_logger: off; "comms_logger": {"enabled": true} in the config logs collectives')
    for each in loggers:
        each.print_summary()
