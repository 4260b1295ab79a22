"""A config and the user's objects, made into the parts of an engine.

All that can be wrong is found here, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

import schedulers
from engine.compiled import plain_names
from engine.data import CollateFn, build_loader
from engine.distributed import World, join_alone
from engine.errors import EngineError
from engine.gradients import Reduction
from engine.log import log
from engine.optimizers import build_optimizer
from engine.parallel import Alone, Parallel, Replicas
from engine.parts import Parts, Schedule
from engine.precision import Formats, set_precision, to_dtype
from engine.range_test.passive import PassiveRecorder
from engine.recompute import recompute
from engine.zero.blank import fill
from engine.zero.blocks import find_blocks
from engine.zero.carry import carry_optimizer_over, carry_over

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.zero.shards import Shards

__all__ = ["build_parts", "build_schedule"]

OptimizerLike = Optimizer | Callable[[Iterable[Any]], Optimizer]
ScheduleLike = Schedule | Callable[[Optimizer], Schedule]


def build_parts(
    config: EngineConfig,
    world: World,
    module: nn.Module,
    *,
    optimizer: OptimizerLike | None,
    model_parameters: Iterable[Any] | None,
    training_data: Dataset[Any] | None,
    lr_scheduler: ScheduleLike | None,
    collate_fn: CollateFn | None,
) -> Parts:
    """All parts of an engine, on `world.device`; arguments as :func:`engine.initialize`."""
    reduction = Reduction.of(config, world.size, to_dtype(config.communication_data_type or "fp32"))
    shards, moved = _place(config, world, module, reduction)
    if isinstance(optimizer, Optimizer):
        carry_optimizer_over(optimizer, moved) if shards is None else shards.carry_optimizer_over(optimizer)
    if model_parameters is not None:
        model_parameters = carry_over(model_parameters, moved)
    chosen = _choose_optimizer(config, module, optimizer, model_parameters)
    if chosen is not None:
        _check_parameters(chosen, module)
        for group in chosen.param_groups:
            if "param_names" in group:  # it was given named parameters, perhaps of a compiled module
                group["param_names"] = plain_names(group["param_names"])
    schedule = _choose_schedule(config, chosen, lr_scheduler)
    recorder = None
    if isinstance(schedule, schedulers.LRRangeTest):
        recorder = PassiveRecorder(
            world,
            config.redline.range_test.output_dir,
            schedule,
            {
                "config": config.document(),
                "train_batch_size": config.train_batch_size,
                "world_size": world.size,
                "optimizer": type(chosen).__name__,
                "group_ratios": tuple(float(lr / schedule.min_lrs[0]) for lr in schedule.min_lrs),
            },
        )
    loader = None
    if training_data is not None:
        loader = build_loader(
            training_data,
            world,
            micro_batch=config.train_micro_batch_size_per_gpu,
            collate_fn=collate_fn,
            drop_last=config.dataloader_drop_last,
            survives_sigterm=config.redline.checkpoint.save_on_sigterm is not None,
            **config.redline.data.arguments(),
        )
    precision = set_precision(config, module, chosen, shared=shards is not None)
    parallel: Parallel
    if shards is not None:
        parallel = shards
    elif world.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        parallel = Alone(module, reduction)
    else:
        unused = config.redline.find_unused_parameters
        parallel = Replicas(module, world, reduction, precision.masters, find_unused_parameters=unused)
    return Parts(config, world, module, precision, parallel, chosen, schedule, loader, recorder)


def _place(
    config: EngineConfig, world: World, module: nn.Module, reduction: Reduction
) -> tuple[Shards | None, dict[Tensor, Tensor]]:
    """Bring the model to the device, in place: whole, or shared out as the config's ZeRO stage says.

    Returns:
        What shares it out, None where it is whole; and the new parameters in the place of those that had to go.
    """
    own = config.redline
    blocks = find_blocks(module, own.zero.blocks, own.zero.smallest_block)
    if own.activation_checkpointing:
        if not blocks:
            log.warning(
                "redline.activation_checkpointing: the model has no blocks to compute again, that is, no repeated "
                "modules of redline.zero.smallest_block elements; name some in redline.zero.blocks"
            )
        for block in blocks.values():
            recompute(block)
    if not _shares_out(config, world):
        moved = fill(module, module.named_modules(), world.device)
        module.to(world.device)
        return None, moved
    from engine.zero.shards import shard_model  # see engine/zero/__init__.py

    if world.size == 1:
        join_alone(world)

    shards = shard_model(module, world, config, blocks, Formats.of(config), reduction)
    return shards, shards.moved


def _shares_out(config: EngineConfig, world: World) -> bool:
    zero = config.zero_optimization
    if zero is None or zero.stage == 0:
        return False
    offloads = zero.offloads and world.device.type == "cuda"
    if zero.offloads and not offloads:
        log.info("zero_optimization: weights and optimizer are in the CPU's memory as it is; offloading does nothing")
    if world.size == 1 and not offloads:
        log.info("zero_optimization.stage %d: one process has all there is; nothing is shared out", zero.stage)
        return False
    return True


def _choose_optimizer(
    config: EngineConfig, module: nn.Module, given: OptimizerLike | None, parameters: Iterable[Any] | None
) -> Optimizer | None:
    """The script's optimizer if it gave one, else the config's."""
    if parameters is None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if given is not None:
        if config.optimizer is not None:
            log.warning("optimizer: the script's own is used; the config's %s is not", config.optimizer.type)
        optimizer = given if isinstance(given, Optimizer) else given(parameters)
        if not isinstance(optimizer, Optimizer):
            raise EngineError(f"optimizer: got {type(optimizer).__name__}; expected a torch optimizer or a function")
        return optimizer
    if config.optimizer is None:
        return None
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(config.optimizer.type, config.optimizer.arguments(), parameters, names=names)
    if any(getattr(each, "sparse", False) for each in module.modules() if isinstance(each, _EMBEDDINGS)):
        for settings in (optimizer.defaults, *optimizer.param_groups):  # the fused kernels take no sparse gradients
            if settings.get("fused"):
                settings["fused"] = None
    return optimizer


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _check_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    """Refuse parameters that the engine would neither clear nor clip nor share between processes."""
    own = {id(parameter) for parameter in module.parameters()}
    strange = sum(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"])
    if strange:
        raise EngineError(
            f"optimizer: {strange} of its parameters are not the model's; make them part of the model, for example of "
            "a module that holds the network and the weights of the loss"
        )


def _choose_schedule(config: EngineConfig, optimizer: Optimizer | None, given: ScheduleLike | None) -> Schedule | None:
    """The script's schedule if it gave one, else the config's."""
    if given is not None:
        if config.scheduler is not None:
            log.warning("lr_scheduler: the script's own is used; the config's %s is not", config.scheduler.type)
        if hasattr(given, "step") and not isinstance(given, type):
            scheduled = getattr(given, "optimizer", None)
            if isinstance(scheduled, Optimizer) and scheduled is not optimizer:
                raise EngineError(
                    "lr_scheduler: it moves another optimizer than the engine's; give initialize that optimizer, too, "
                    "or a function of the optimizer that makes the schedule"
                )
            return given  # type: ignore[return-value]
        if optimizer is None:
            raise EngineError("lr_scheduler: a function of the optimizer was given, but there is no optimizer")
        return given(optimizer)
    if config.scheduler is not None and optimizer is None:
        raise EngineError(
            f'scheduler {config.scheduler.type}: there is no optimizer to schedule; give the config an "optimizer" '
            "section, or initialize one"
        )
    schedule = None if optimizer is None else build_schedule(config, optimizer)
    if isinstance(schedule, schedulers.Schedule):
        _say_what_surprises(schedule)
    return schedule


def build_schedule(config: EngineConfig, optimizer: Optimizer) -> Schedule | None:
    """The config's schedule on an optimizer; None for a fixed learning rate.

    Raises:
        EngineError: the schedule refuses its arguments.
    """
    if config.scheduler is None:
        return None
    name, arguments = config.scheduler.type, config.scheduler.arguments()
    cls: Any = schedulers.resolve(name)
    if issubclass(cls, ReduceLROnPlateau):
        raise EngineError(f"scheduler {name}: it wants a metric at each step, which a config cannot give; use another")
    if issubclass(cls, schedulers.Schedule) and config.redline.schedules == "corrected":
        arguments["corrected"] = True
    if issubclass(cls, schedulers.LRRangeTest) and config.redline.range_test.growth != "linear":
        arguments["growth"] = config.redline.range_test.growth
    try:
        schedule: Schedule = cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise EngineError(f"scheduler {name}: {error}") from error
    return schedule


def _say_what_surprises(schedule: schedulers.Schedule) -> None:
    """One line for each thing that DeepSpeed's schedules do and their users do not expect."""
    name = type(schedule).__name__
    for quirk in schedule.quirks:
        log.info('%s: %s, as in DeepSpeed; "redline": {"schedules": "corrected"} does otherwise', name, quirk)
    bounds = [*getattr(schedule, "min_lrs", ()), *getattr(schedule, "max_lrs", ())]
    unused = [float(lr) for lr in schedule.base_lrs if bounds and lr not in bounds]
    if unused:
        log.info("%s sets the learning rate; the optimizer's own %g is not used", name, unused[0])
