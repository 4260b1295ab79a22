"""A config and the user's objects, made into the parts of an engine.

All that can be wrong is found here, before the first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

import schedulers
from engine.compiled import plain_names
from engine.data import CollateFn, build_loader
from engine.distributed import World, join_alone
from engine.errors import EngineError
from engine.gradients import Reduction
from engine.log import log
from engine.master_params import broadcast_from_rank_0
from engine.optimizers import build_optimizer, guard_steps
from engine.parallel import DataParallel, Parallel
from engine.parts import Parts, Schedule
from engine.precision import Formats, set_precision, to_dtype
from engine.range_test.passive import PassiveRecorder
from engine.recompute import recompute
from engine.schedule_state import ScheduleStart
from engine.sharding import Sharding, make_mesh, unfuse_on_shards
from engine.zero.blank import fill
from engine.zero.blocks import find_blocks
from engine.zero.carry import carry_optimizer_over, carry_over
from schedulers.forecast import find_violation, remedy_for

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.zero.shards import FullyShard

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
    if optimizer is not None or config.optimizer is not None:
        _refuse_overlapping(module, optimizer if isinstance(optimizer, Optimizer) else None)
    reduction = Reduction.of(config, world.size, to_dtype(config.communication_data_type or "fp32"))
    shards, sharding, moved = _place(config, world, module, reduction)
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
    if chosen is not None and sharding is not None:
        unfuse_on_shards(chosen)
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
    precision = set_precision(
        config, module, chosen, fully_sharded=shards is not None, sharding=sharding, world_size=world.size
    )
    parallel: Parallel
    if shards is not None:
        shards.train(precision.params)
        parallel = shards
    else:
        apart = precision.master_params is not None and precision.accumulate is not precision.compute
        parallel = DataParallel(
            module,
            reduction,
            precision.params,
            accumulate=precision.accumulate if apart else None,
            counts_all=_counts_all(config),
            always_reduces=sharding is not None and config.redline.zero.accumulate == "shared",
            keeps_sparse=isinstance(chosen, SparseAdam),
        )
    start = None if chosen is None else ScheduleStart(schedule, chosen)
    return Parts(config, world, module, precision, parallel, chosen, schedule, start, loader, recorder)


def _counts_all(config: EngineConfig) -> bool:
    """Whether clipping is that of DeepSpeed's stage 0 without fp16 or bf16: over all that has a gradient."""
    zero, low = config.zero_optimization, Formats.of(config).compute is not torch.float32
    return not low and (zero is None or zero.stage == 0)


def _place(
    config: EngineConfig, world: World, module: nn.Module, reduction: Reduction
) -> tuple[FullyShard | None, Sharding | None, dict[Tensor, Tensor]]:
    """Bring the model to the device, in place, with rank 0's weights: full, or sharded as ZeRO stage 3 says.

    Returns:
        What shards it at stage 3; how stages 1 and 2 shard the rest; the new parameters in the place of those that had
        to go.
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
    stage = _sharded_stage(config, world)
    if stage < 3:
        moved = fill(module, module.named_modules(), world.device)
        module.to(world.device)
        # Buffers start as rank 0's and then stay each rank's own, as in DeepSpeed.
        broadcast_from_rank_0([*module.parameters(), *module.buffers()], world.size)
        return None, _sharding(config, world) if stage else None, moved
    from engine.zero.shards import shard_model  # see engine/zero/__init__.py

    if world.size == 1:
        join_alone(world)

    shards = shard_model(module, world, config, blocks, Formats.of(config), reduction)
    return shards, None, shards.moved


def _sharding(config: EngineConfig, world: World) -> Sharding:
    """How stages 1 and 2 divide master params and optimizer state."""
    zero = config.zero_optimization
    assert zero is not None
    if world.size == 1:
        join_alone(world)
    offloads = zero.offloads and world.device.type == "cuda"
    device = torch.device("cpu") if offloads else world.device
    log.info("zero stage %d: %d ranks share master params, gradients and optimizer state", zero.stage, world.size)
    return Sharding(make_mesh(world.device, world.size, zero.mics_shard_size), device, pinned=zero.pins_memory)


def _sharded_stage(config: EngineConfig, world: World) -> int:
    """The stage of ZeRO in force; 0 where there is nothing to shard."""
    zero = config.zero_optimization
    if zero is None or zero.stage == 0:
        return 0
    offloads = zero.offloads and world.device.type == "cuda"
    if zero.offloads and not offloads:
        log.info("zero_optimization: weights and optimizer are in the CPU's memory already; offloading does nothing")
    if world.size == 1 and not offloads:
        log.info("zero_optimization.stage %d: there is one rank, which has everything; nothing is sharded", zero.stage)
        return 0
    return zero.stage


def _choose_optimizer(
    config: EngineConfig, module: nn.Module, given: OptimizerLike | None, parameters: Iterable[Any] | None
) -> Optimizer | None:
    """The script's optimizer if it gave one, else the config's."""
    if parameters is None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    parameters = list(parameters)
    if given is not None:
        if config.optimizer is not None:
            log.warning("optimizer: the script's own is used; the config's %s is not", config.optimizer.type)
        if not isinstance(given, Optimizer):
            _check_trains(parameters, module)
        optimizer = given if isinstance(given, Optimizer) else given(parameters)
        if not isinstance(optimizer, Optimizer):
            raise EngineError(f"optimizer: got {type(optimizer).__name__}; expected a torch optimizer or a function")
        _check_trains(optimizer.param_groups, module)
        return guard_steps(optimizer)
    if config.optimizer is None:
        return None
    _check_trains(parameters, module)
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(config.optimizer.type, config.optimizer.arguments(), parameters, names=names)
    if any(getattr(each, "sparse", False) for each in module.modules() if isinstance(each, _EMBEDDINGS)):
        for settings in (optimizer.defaults, *optimizer.param_groups):  # the fused kernels take no sparse gradients
            if settings.get("fused"):
                settings["fused"] = None
    return optimizer


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _check_trains(parameters: list[Any], module: nn.Module) -> None:
    """Refuse an optimizer without a parameter that requires grad.

    Args:
        parameters: what the optimizer gets: tensors, pairs of name and tensor, or groups of either.
        module: the model.
    """
    for each in parameters:
        inner = each["params"] if isinstance(each, dict) else each
        for item in [inner] if isinstance(inner, Tensor) or not isinstance(inner, Iterable) else inner:
            if any(getattr(part, "requires_grad", False) for part in (item if isinstance(item, tuple) else (item,))):
                return
            if not isinstance(item, (Tensor, tuple, str)):  # torch says what is wrong with it
                return
    own = list(module.parameters())
    if not own:
        raise EngineError(
            f"optimizer: the model, {type(module).__name__}, has no parameters to train; to evaluate only, leave the "
            "optimizer out"
        )
    if not any(parameter.requires_grad for parameter in own):
        raise EngineError(
            f"optimizer: the model has {len(own)} parameters, and all of them are frozen (requires_grad is False), so "
            "that there is nothing to train; call requires_grad_(True) on those to train before initialize; to "
            "evaluate only, leave the optimizer out"
        )
    raise EngineError(
        "optimizer: none of the parameters that it got requires grad, so that there is nothing to train; give it those "
        "of the model that do, for example [p for p in model.parameters() if p.requires_grad]"
    )


def _check_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    """Refuse parameters that the engine would neither clear nor clip nor share between processes."""
    own = {id(parameter) for parameter in module.parameters()}
    strange = sum(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"])
    if strange:
        raise EngineError(
            f"optimizer: {strange} of its parameters are not the model's; make them part of the model, for example of "
            "a module that holds the network and the weights of the loss"
        )


def _refuse_overlapping(module: nn.Module, optimizer: Optimizer | None) -> None:
    """Refuse parameters that torch cannot write to; sharding and casts would turn their one number into many."""
    groups = None if optimizer is None else optimizer.param_groups
    trained = None if groups is None else {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or parameter.layout is not torch.strided or parameter.numel() == 0:
            continue
        expanded = any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape))
        if expanded and (trained is None or id(parameter) in trained):
            raise EngineError(
                f"model: parameter {name} of shape {tuple(parameter.shape)} is an expanded tensor, whose elements "
                "share memory; torch cannot train it; make it nn.Parameter(tensor.clone()), or expand it in forward"
            )


def _choose_schedule(config: EngineConfig, optimizer: Optimizer | None, given: ScheduleLike | None) -> Schedule | None:
    """The script's schedule if it gave one, else the config's."""
    schedule: Schedule | None
    if given is not None:
        if config.scheduler is not None:
            log.warning("lr_scheduler: the script's own is used; the config's %s is not", config.scheduler.type)
        schedule = _given_schedule(optimizer, given)
    elif config.scheduler is None:
        return None
    elif optimizer is None:
        raise EngineError(
            f'scheduler {config.scheduler.type}: there is no optimizer to schedule; give the config an "optimizer" '
            "section, or initialize one"
        )
    else:
        finds_own = any(group["lr"] is None for group in optimizer.param_groups)
        schedule = build_schedule(config, optimizer)
        if finds_own:
            log.warning(
                "optimizer %s: its lr was None, that is, it finds its own learning rate; what scheduler %s sets may "
                "have no effect on it",
                type(optimizer).__name__,
                config.scheduler.type,
            )
    if schedule is not None:
        _say_what_surprises(schedule, by_config=given is None)
    return schedule


def _given_schedule(optimizer: Optimizer | None, given: ScheduleLike) -> Schedule:
    schedule: Any = given
    if isinstance(given, type) or not hasattr(given, "step"):
        if optimizer is None:
            raise EngineError("lr_scheduler: a function of the optimizer was given, but there is no optimizer")
        if isinstance(given, type) and issubclass(given, ReduceLROnPlateau):
            raise EngineError(f"lr_scheduler {given.__name__}: {_WANTS_METRIC}")
        schedule = schedule(optimizer)
    scheduled = getattr(schedule, "optimizer", None)
    if isinstance(scheduled, Optimizer) and scheduled is not optimizer:
        raise EngineError(
            "lr_scheduler: it moves another optimizer than the engine's; give initialize that optimizer, too, "
            "or a function of the optimizer that makes the schedule"
        )
    name = type(schedule).__name__
    if isinstance(schedule, ReduceLROnPlateau):
        raise EngineError(f"lr_scheduler {name}: {_WANTS_METRIC}")
    if not callable(getattr(schedule, "step", None)):
        raise EngineError(f"lr_scheduler: got {name}; expected a schedule with step(), or a function that makes one")
    try:
        inspect.signature(schedule.step).bind()
    except TypeError as error:
        raise EngineError(
            f"lr_scheduler {name}: engine.step() calls its step() without arguments, and that is not enough: {error}; "
            "such as a metric or an epoch only the script has: leave lr_scheduler out, and step it in your script"
        ) from None
    except ValueError:  # it does not tell
        pass
    return schedule  # type: ignore[no-any-return]


_WANTS_METRIC = (
    "its step() wants a metric, which engine.step() does not have; leave it out of initialize, make it of "
    "engine.optimizer, and call its step(metric) in your script after each evaluation"
)


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
        raise EngineError(f"scheduler {name}: {_WANTS_METRIC}")
    if issubclass(cls, schedulers.Schedule) and config.redline.schedules == "corrected":
        arguments["corrected"] = True
    if issubclass(cls, schedulers.LRRangeTest) and config.redline.range_test.growth != "linear":
        arguments["growth"] = config.redline.range_test.growth
    finds_own = any(group["lr"] is None for group in optimizer.param_groups)
    try:
        schedule: Schedule = cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        if finds_own and isinstance(error, TypeError):
            raise EngineError(f"scheduler {name}: {_NO_LR}") from error
        raise EngineError(f"scheduler {name}: {error}") from error
    if finds_own and any(group["lr"] is None for group in optimizer.param_groups):
        raise EngineError(f"scheduler {name}: {_NO_LR}")
    return schedule


_NO_LR = "it starts from the optimizer's learning rate, which is None; give the optimizer an lr, or leave it out"


def _say_what_surprises(schedule: Schedule, *, by_config: bool) -> None:
    """One line for each thing that DeepSpeed's schedules do and their users do not expect."""
    name = type(schedule).__name__
    if (violation := find_violation(schedule)) is not None:
        log.warning("scheduler %s: %s%s", name, violation, remedy_for(schedule, violation))
    if not by_config or not isinstance(schedule, schedulers.Schedule):
        return
    for quirk in schedule.quirks:
        log.info('%s: %s, as in DeepSpeed; "redline": {"schedules": "corrected"} does otherwise', name, quirk)
    bounds = [*getattr(schedule, "min_lrs", ()), *getattr(schedule, "max_lrs", ())]
    unused = [float(lr) for lr in schedule.base_lrs if bounds and lr is not None and lr not in bounds]
    if unused:
        log.info("%s sets the learning rate; the optimizer's own %g is not used", name, unused[0])
