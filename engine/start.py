"""The way in: a model and a config become an engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from engine.agreement import check_agreement
from engine.build import OptimizerLike, ScheduleLike, build_parts
from engine.compiled import unwrap_compiled
from engine.data import CollateFn, Loader
from engine.distributed import World, join_world
from engine.engine import Engine
from engine.errors import ConfigError
from engine.log import configure, log
from engine.needs import count_model, tell_needs
from engine.parts import Parts
from engine.peers import explains_losses, follow
from engine.precision import dtype_table
from engine.sigterm import save_on_sigterm
from engine.watch import attach

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["initialize"]


@explains_losses
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
    from engine.config import load_config  # here, not above: pydantic takes longer to import than all the rest

    configure()
    # The config is read before any process group is joined: a mistake in it costs nothing.
    loaded = load_config(config)
    if loaded.scheduler is not None and loaded.optimizer is None and optimizer is None and lr_scheduler is None:
        raise _unscheduled(loaded)
    model = unwrap_compiled(model)
    world = join_world(device, timeout=loaded.redline.distributed_timeout)
    loaded = load_config(loaded, world_size=world.size)
    check_agreement(loaded, world, model, training_data)
    elements = count_model(model, loaded, world)  # before it is shared out
    parts = build_parts(
        loaded,
        world,
        model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
    )
    told = [_summary(parts), dtype_table(parts.precision, parts.optimizer), *tell_needs(parts, elements)]
    log.info("%s", "\n".join(told))
    _compare_batch(loaded)
    if parts.training_dataloader is not None:
        log.info("%s", _epoch_summary(parts.training_dataloader, parts.config, parts.world))
    engine = Engine(parts)
    follow(engine)
    attach(engine)
    save_on_sigterm(engine)
    return engine


def _unscheduled(config: EngineConfig) -> ConfigError:
    """A schedule that has nothing to move."""
    document = config.as_written()
    message = 'there is no optimizer to schedule; give the config an "optimizer" section, or initialize an optimizer'
    return ConfigError([document.problem(("scheduler",), message)], document.source)


def _compare_batch(config: EngineConfig) -> None:
    """Warn where a range test's answer is applied to another batch size than it was found at."""
    found = config.document().get("_range_test")
    measured = found.get("train_batch_size") if isinstance(found, dict) else None
    if isinstance(measured, int) and measured != config.train_batch_size:
        log.warning(
            "_range_test: this config's learning rates were found at batch size %d, and train_batch_size is %d; they "
            "hold for the first only. Test again at %d (redline tune --batch-sizes %d,%d), or train at %d",
            *(measured, config.train_batch_size, config.train_batch_size, measured, config.train_batch_size, measured),
        )


def _epoch_summary(loader: Loader, config: EngineConfig, world: World) -> str:
    """What an epoch is, in one line."""
    try:
        samples, micro_batches = len(loader.dataset), len(loader)
    except TypeError:
        return "data: an iterable dataset; its length is not known"
    accumulation = config.gradient_accumulation_steps
    whole, left = divmod(micro_batches, accumulation)
    share = "" if world.size == 1 else " per process"
    own = " per rank" if loader.split_by_rank else ""
    epoch = f"data: {samples} samples{own}; an epoch is {micro_batches} micro-batches{share} and "
    if not left:
        return f"{epoch}{whole} updates"
    return (
        f"{epoch}{micro_batches / accumulation:.3g} updates; {accumulation} accumulated do not divide it, so that an "
        "update spans the end of an epoch; engine.flush() makes the last one"
    )


def _summary(parts: Parts) -> str:
    """What will run, in one line."""
    config, world = parts.config, parts.world
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    optimizer = "no optimizer"
    if parts.optimizer is not None:
        fused = " (fused)" if parts.optimizer.defaults.get("fused") else ""
        optimizer = f"{type(parts.optimizer).__name__}{fused}"
    schedule = "fixed learning rate" if parts.lr_scheduler is None else type(parts.lr_scheduler).__name__
    clip = f"clipped at {config.gradient_clipping:g}" if config.gradient_clipping else "not clipped"
    return (
        f"redline: {processes} on {world.device.type}; batch {config.train_batch_size} = "
        f"{config.train_micro_batch_size_per_gpu} x {config.gradient_accumulation_steps} accumulated x {world.size}; "
        f"{optimizer}, {schedule}, gradients {clip}"
    )
