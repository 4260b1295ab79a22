"""`initialize`: make an engine from a model and a config."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from redline.build import OptimizerLike, ScheduleLike, build_engine
from redline.compiled import unwrap_compiled
from redline.data import CollateFn, Loader
from redline.distributed.consistency import check_agreement
from redline.distributed.failure import explains_failures, follow_steps
from redline.distributed.memory_estimate import Elements, count_model, describe_memory
from redline.distributed.process_group import join_world, launched_ranks
from redline.engine import Engine
from redline.errors import ConfigError
from redline.log import configure, log
from redline.monitoring import attach_monitoring
from redline.schedulers import LRRangeTest
from redline.signals import save_on_sigterm

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["initialize"]


@explains_failures
def initialize(
    model: nn.Module,
    config: str | Path | dict[str, Any] | EngineConfig,
    *,
    optimizer: OptimizerLike | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: ScheduleLike | None = None,
    collate_fn: CollateFn | None = None,
    device: torch.device | str | None = None,
) -> Engine:
    """Make an engine that trains `model` as `config` says.

    One rank under plain ``python``; under torchrun every rank calls this, and all start with rank 0's weights.

    Args:
        model: any module; it is moved to the engine's device. One that `torch.compile` has wrapped, or that has such
            modules in it, runs compiled; the module without its wrapper is the engine's, so that names stay plain.
        config: DeepSpeed's JSON: a path, a dict, JSON text, or what `load_config` returned.
        optimizer: takes the place of the config's: an optimizer, or a function of the parameters.
        model_parameters: what the config's optimizer gets: parameters, or groups with settings of their own; default
            all that require grad now. Those of them that require grad at a step are what that step trains.
        training_data: a dataset, map-style or iterable, such as a list of samples; neither a DataLoader nor a
            generator. ``engine.training_dataloader`` deals it out in micro-batches.
        lr_scheduler: takes the place of the config's: a schedule, or a function of the optimizer.
        collate_fn: samples to batch, for `training_data`.
        device: where to compute; default the local rank's GPU where there is one, else the CPU.

    Returns:
        The engine, ready for its first step.

    Raises:
        ConfigError: the config cannot be obeyed; it lists every problem.
        EngineError: the parts do not go together, or a package is missing that the config needs.
    """
    from redline.config import load_config  # here, not above: pydantic takes longer to import than all the rest

    configure()
    # The config is read before any process group is joined: a mistake in it costs nothing.
    try:
        num_samples = len(training_data)  # type: ignore[arg-type]
    except TypeError:  # a stream, or none
        num_samples = None
    loaded = load_config(config, world_size=launched_ranks(), num_samples=num_samples)
    if loaded.scheduler is not None and loaded.optimizer is None and optimizer is None and lr_scheduler is None:
        document = loaded.as_written()
        reason = 'there is no optimizer to schedule; give the config an "optimizer" section, or initialize an optimizer'
        raise ConfigError([document.problem(("scheduler",), reason)], document.source)
    model = unwrap_compiled(model)
    world = join_world(device, timeout=loaded.redline.distributed_timeout)
    loaded = load_config(loaded, world_size=world.size, num_samples=num_samples)
    check_agreement(loaded, world, model, training_data)
    elements = count_model(model, loaded, world)  # before it is sharded
    engine = build_engine(
        loaded,
        world,
        model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
    )
    if loaded.compile is not None and loaded.compile.compiles:
        engine.compile(loaded.compile.backend, loaded.compile.kwargs)
    _log_summary(engine, elements)
    follow_steps(engine)
    if isinstance(engine.lr_scheduler, LRRangeTest):
        # Other training runs load neither range tests nor reports.
        from redline.range_test.recorder import PassiveRecorder
        from redline.reports import write_report

        engine.callbacks.append(PassiveRecorder(engine, write_report))
    attach_monitoring(engine)
    save_on_sigterm(engine)
    return engine


def _log_summary(engine: Engine, elements: Elements | None) -> None:
    """Log what will run: a line, a table of dtypes, the memory that it takes, the length of an epoch."""
    config, optimizer = engine.config, engine.optimizer
    batch, ranks = config.train_batch_size, engine.world_size
    name = "no optimizer" if optimizer is None else type(optimizer).__name__
    is_adams = name == "AdamW" and config.optimizer is not None and config.optimizer.type.lower() == "adam"
    how = ["Adam with adam_w_mode"] if is_adams else []
    how += ["fused"] if optimizer is not None and optimizer.defaults.get("fused") else []
    name += f" ({', '.join(how)})" if how else ""
    schedule = "fixed learning rate" if engine.lr_scheduler is None else type(engine.lr_scheduler).__name__
    clip = f"clipped at {config.gradient_clipping:g}" if config.gradient_clipping else "not clipped"
    summary = (
        f"redline: {ranks} rank{'s' if ranks > 1 else ''} on {engine.device.type}; batch {batch} = "
        f"{config.train_micro_batch_size_per_gpu} x {config.gradient_accumulation_steps} accumulated x {ranks}; "
        f"{name}, {schedule}, gradients {clip}"
    )
    table = engine.precision.table(has_optimizer=optimizer is not None)
    memory = describe_memory(config, engine.world, engine.module, optimizer, elements)
    log.info("%s", "\n".join([summary, *([table] if table else []), *memory]))

    found = config.document().get("_range_test")
    measured = found.get("train_batch_size") if isinstance(found, dict) else None
    if isinstance(measured, int) and measured != batch:
        log.warning(
            f"_range_test: this config's learning rates were found at batch size {measured}, and train_batch_size is "
            f"{batch}; they hold for the first only. Test again at {batch} (redline tune --batch-sizes "
            f"{measured},{batch}), or train at {measured}"
        )
    if engine.training_dataloader is not None:
        log.info("%s", _epoch_summary(engine, engine.training_dataloader))


def _epoch_summary(engine: Engine, loader: Loader) -> str:
    """What an epoch is, in one line."""
    try:
        samples, micro_batches = len(loader.dataset), len(loader)
    except TypeError:
        return "data: an iterable dataset; its length is not known"
    accumulation = engine.config.gradient_accumulation_steps
    per_rank = "" if engine.world_size == 1 else " per rank"
    own = " per rank" if loader.split_by_rank else ""
    epoch = f"data: {samples} samples{own}; an epoch is {micro_batches} micro-batches{per_rank} and "
    if micro_batches % accumulation == 0:
        return f"{epoch}{micro_batches // accumulation} optimizer steps"
    return (
        f"{epoch}{micro_batches / accumulation:.3g} optimizer steps; {accumulation} accumulated do not divide it, so "
        "that a step spans the end of an epoch; engine.flush() makes the last one"
    )
