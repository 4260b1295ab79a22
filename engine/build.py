"""Build an engine from a config and the user's objects; mistakes are reported here, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.utils.data import Dataset

from redline import schedulers
from redline.activation_checkpointing import recompute
from redline.compiled import plain_names
from redline.data import CollateFn, Loader, build_loader
from redline.distributed.blocks import MetaModel, find_blocks
from redline.distributed.ddp import DDPStrategy
from redline.distributed.process_group import World, join_alone
from redline.distributed.sharding import Sharding, make_mesh
from redline.distributed.strategy import Strategy
from redline.engine import Engine
from redline.errors import EngineError
from redline.gradients import Reduction
from redline.log import log
from redline.master_params import MasterParams, TrainedParams, broadcast_from_rank_0, is_expanded
from redline.optimizers import build_optimizer, guard_steps, unfuse_on_shards
from redline.optimizers.state import carry_over, replace_params
from redline.precision import Precision, build_loss_scale
from redline.schedulers.schedule import find_violation

if TYPE_CHECKING:
    from redline.config import EngineConfig
    from redline.distributed.fsdp import FSDPStrategy

__all__ = ["OptimizerLike", "Schedule", "ScheduleLike", "build_engine", "build_schedule"]


class Schedule(Protocol):
    """What the engine needs of a learning rate schedule; torch's and ours are such."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


OptimizerLike = Optimizer | Callable[[Iterable[Any]], Optimizer]
ScheduleLike = Schedule | Callable[[Optimizer], Schedule]


def build_engine(
    config: EngineConfig,
    world: World,
    module: nn.Module,
    *,
    optimizer: OptimizerLike | None,
    model_parameters: Iterable[Any] | None,
    training_data: Dataset[Any] | None,
    lr_scheduler: ScheduleLike | None,
    collate_fn: CollateFn | None,
) -> Engine:
    """An engine on `world.device`; arguments as :func:`redline.initialize`."""
    stage = _effective_stage(config, world)
    precision = Precision.of(config, stage)
    if world.device.type == "mps" and torch.float16 in (precision.compute, precision.autocast):
        raise EngineError(
            "fp16: its loss scale has not been built for Apple's GPU (mps); train in bf16 or fp32, or compute on the "
            'CPU with initialize(..., device="cpu")'
        )
    reduction = Reduction.of(config, world.size, precision.reduce)
    if optimizer is not None or config.optimizer is not None:
        _refuse_expanded(module, optimizer if isinstance(optimizer, Optimizer) else None)
    if stage and world.size == 1:
        join_alone(world)  # torch's sharding needs a process group

    # The model first: sharding and materializing it replaces parameters that the script has given to its optimizer.
    shards, moved = _place(config, world, module, stage, precision, reduction)
    sharding = _sharding(config, world) if stage in (1, 2) else None
    if isinstance(optimizer, Optimizer):
        replace_params(optimizer, moved) if shards is None else shards.carry_optimizer_over(optimizer)
    if model_parameters is not None:
        model_parameters = carry_over(model_parameters, moved)
    chosen = _choose_optimizer(config, module, optimizer, model_parameters)
    if isinstance(chosen, SparseAdam) and sharding is not None:
        raise EngineError(
            "optimizer SparseAdam: it takes sparse gradients only, and ZeRO stages 1 and 2 make them dense to shard "
            "them; use zero_optimization.stage 0 or 3, or an optimizer such as Adam"
        )
    if chosen is not None and stage:
        unfuse_on_shards(chosen)
    schedule = _choose_schedule(config, chosen, lr_scheduler)
    loader = None if training_data is None else _training_loader(config, world, training_data, collate_fn)

    # The master params get the model's values before these are cast.
    masters = MasterParams(precision.stored, sharding, rounded=precision.rounded) if precision.has_masters else None
    round_to = precision.compute if precision.rounded else None
    params = TrainedParams(module, chosen, masters, world_size=world.size, round_to=round_to)
    precision.cast(module, params=shards is None)
    if chosen is not None:
        params.copy_to_model()
    if shards is not None:
        shards.train(params)
    asked = config.zero_optimization
    strategy: Strategy = shards or DDPStrategy(
        module,
        reduction,
        params,
        accumulate=precision.accumulate if masters and precision.accumulate is not precision.compute else None,
        # DeepSpeed's stage 0 clips without fp16 or bf16 over all that has a gradient.
        counts_all=precision.compute is torch.float32 and (asked is None or asked.stage == 0),
        always_reduces=sharding is not None and config.redline.zero.accumulate == "shared",
        keeps_sparse=isinstance(chosen, SparseAdam),
    )
    return Engine(config, world, module, precision, strategy, chosen, schedule, build_loss_scale(config), loader)


# -- the model -----------------------------------------------------------------------------------------


def _effective_stage(config: EngineConfig, world: World) -> int:
    """The stage of ZeRO; 0 where there is nothing to shard."""
    zero = config.zero_optimization
    if zero is None or zero.stage == 0:
        return 0
    offloads = zero.offloads and world.device.type == "cuda"
    if zero.offloads and not offloads:
        log.info("zero_optimization: everything is in the CPU's memory already; offloading has no effect")
    if world.size == 1 and not offloads:
        log.info("zero_optimization.stage %d: with one rank nothing is sharded", zero.stage)
        return 0
    return zero.stage


def _place(
    config: EngineConfig, world: World, module: nn.Module, stage: int, precision: Precision, reduction: Reduction
) -> tuple[FSDPStrategy | None, dict[Tensor, Tensor]]:
    """Move the model to the device, in place, with rank 0's values: full, or sharded at ZeRO stage 3.

    Returns:
        The strategy of stage 3; the new parameter for each replaced one.
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
    if stage == 3:
        from redline.distributed.fsdp import shard_model  # here: FSDP2 takes longer to import than all the rest

        shards = shard_model(module, world, config, blocks, precision, reduction)
        return shards, shards.moved
    moved = MetaModel(module, world.device).fill(module.named_modules())
    module.to(world.device)
    # Buffers start as rank 0's and then stay each rank's own, as in DeepSpeed.
    broadcast_from_rank_0([*module.parameters(), *module.buffers()], world.size)
    return None, moved


def _sharding(config: EngineConfig, world: World) -> Sharding:
    """How stages 1 and 2 divide master params and optimizer state."""
    zero = config.zero_optimization
    assert zero is not None
    offloads = zero.offloads and world.device.type == "cuda"
    device = torch.device("cpu") if offloads else world.device
    log.info("zero stage %d: %d ranks share master params, gradients and optimizer state", zero.stage, world.size)
    return Sharding(make_mesh(world.device, world.size, zero.mics_shard_size), device, pinned=zero.pins_memory)


def _training_loader(config: EngineConfig, world: World, data: Dataset[Any], collate_fn: CollateFn | None) -> Loader:
    return build_loader(
        data,
        world,
        micro_batch=config.train_micro_batch_size_per_gpu,
        collate_fn=collate_fn,
        drop_last=config.dataloader_drop_last,
        survives_sigterm=config.redline.checkpoint.save_on_sigterm is not None,
        **config.redline.data.arguments(),
    )


# -- the optimizer -------------------------------------------------------------------------------------


def _choose_optimizer(
    config: EngineConfig, module: nn.Module, given: OptimizerLike | None, parameters: Iterable[Any] | None
) -> Optimizer | None:
    """The script's optimizer if it gave one, else the config's; both may get their parameters here."""
    if given is None and config.optimizer is None:
        return None
    optimizer: object = given
    if not isinstance(given, Optimizer):
        if parameters is None:
            parameters = (param for param in module.parameters() if param.requires_grad)
        parameters = list(parameters)
        if not parameters:
            raise _nothing_to_train(module)
        optimizer = _configs_optimizer(config, module, parameters) if given is None else given(parameters)
    if not isinstance(optimizer, Optimizer):
        raise EngineError(f"optimizer: got {type(optimizer).__name__}; expected a torch optimizer or a function")
    if given is not None:
        optimizer = guard_steps(optimizer)
        if config.optimizer is not None:
            log.warning("optimizer: the script's own is used; the config's %s is not", config.optimizer.type)

    updated: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
    if not any(param.requires_grad for param in updated):
        raise _nothing_to_train(module)
    own = {id(param) for param in module.parameters()}
    # The engine would neither clear, clip nor reduce the gradients of others.
    if foreign := sum(id(param) not in own for param in updated):
        raise EngineError(
            f"optimizer: {foreign} of its parameters are not the model's; make them part of the model, for example of "
            "a module that holds the network and the weights of the loss"
        )
    for group in optimizer.param_groups:
        group.setdefault("lr", None)  # of one around other optimizers, which have their own
        if "param_names" in group:  # it was given named parameters, perhaps of a compiled module
            group["param_names"] = plain_names(group["param_names"])
    return optimizer


def _configs_optimizer(config: EngineConfig, module: nn.Module, parameters: list[Any]) -> Optimizer:
    assert config.optimizer is not None
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(config.optimizer.type, config.optimizer.arguments(), parameters, names=names)
    if any(isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and each.sparse for each in module.modules()):
        for settings in (optimizer.defaults, *optimizer.param_groups):  # the fused kernels take no sparse gradients
            if settings.get("fused"):
                settings["fused"] = None
    return optimizer


def _nothing_to_train(module: nn.Module) -> EngineError:
    own = list(module.parameters())
    return EngineError(
        f"optimizer: there is nothing to train: of the {len(own)} parameters of the model, {type(module).__name__}, "
        f"{sum(param.requires_grad for param in own)} require grad, and the optimizer got none of these; call "
        "requires_grad_(True) on those to train before initialize, and give it those, for example [p for p in "
        "model.parameters() if p.requires_grad]; to evaluate only, leave the optimizer out"
    )


def _refuse_expanded(module: nn.Module, optimizer: Optimizer | None) -> None:
    """Refuse parameters that torch cannot write to; sharding and casts would turn their one number into many."""
    trained = None
    if optimizer is not None:
        trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, param in module.named_parameters():
        if param.requires_grad and is_expanded(param) and (trained is None or id(param) in trained):
            raise EngineError(
                f"model: parameter {name} of shape {tuple(param.shape)} is an expanded tensor, whose elements share "
                "memory; torch cannot train it; make it nn.Parameter(tensor.clone()), or expand it in forward"
            )


# -- the schedule --------------------------------------------------------------------------------------


def _choose_schedule(config: EngineConfig, optimizer: Optimizer | None, given: Any) -> Schedule | None:
    """The script's schedule, or what its function makes of the optimizer, if it gave one; else the config's."""
    if given is None:
        schedule = None if optimizer is None else build_schedule(config, optimizer)
        if isinstance(schedule, schedulers.Schedule):
            _log_quirks(schedule)
    else:
        schedule = given
        if isinstance(given, type) or not hasattr(given, "step"):
            if optimizer is None:
                raise EngineError("lr_scheduler: a function of the optimizer was given, but there is no optimizer")
            schedule = given(optimizer)
        scheduled = getattr(schedule, "optimizer", None)
        if isinstance(scheduled, Optimizer) and scheduled is not optimizer:
            raise EngineError(
                "lr_scheduler: it moves another optimizer than the engine's; give initialize that optimizer, too, "
                "or a function of the optimizer that makes the schedule"
            )
        _check_step("lr_scheduler", schedule)
        if config.scheduler is not None:
            log.warning("lr_scheduler: the script's own is used; the config's %s is not", config.scheduler.type)
    if schedule is not None and (violation := find_violation(schedule)) is not None:
        log.warning("scheduler %s: %s", type(schedule).__name__, violation)
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
    if issubclass(cls, schedulers.Schedule) and config.redline.schedules == "corrected":
        arguments["corrected"] = True
    if issubclass(cls, schedulers.LRRangeTest) and config.redline.range_test.growth != "linear":
        arguments["growth"] = config.redline.range_test.growth
    no_lr = f"scheduler {name}: it starts from the optimizer's learning rate, which is None; give the optimizer an lr"
    finds_own = any(group["lr"] is None for group in optimizer.param_groups)
    try:
        schedule: Schedule = cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        missing = finds_own and isinstance(error, TypeError)
        raise EngineError(no_lr if missing else f"scheduler {name}: {error}") from error
    if finds_own:
        if any(group["lr"] is None for group in optimizer.param_groups):
            raise EngineError(no_lr)
        log.warning(
            "optimizer %s: its lr was None, that is, it finds its own learning rate; what scheduler %s sets may have "
            "no effect on it",
            type(optimizer).__name__, name,
        )  # fmt: skip
    _check_step("scheduler", schedule)
    return schedule


def _check_step(where: str, schedule: Any) -> None:
    """Refuse a schedule that `engine.step()` cannot step, such as ReduceLROnPlateau, which wants a metric."""
    name = type(schedule).__name__
    if not callable(getattr(schedule, "step", None)):
        raise EngineError(f"{where}: got {name}; expected a schedule with step(), or a function that makes one")
    try:
        inspect.signature(schedule.step).bind()
    except ValueError:  # of a builtin, which has no signature
        return
    except TypeError as error:
        raise EngineError(
            f"{where} {name}: engine.step() calls its step() without arguments, and that is not enough: {error}; a "
            "metric or an epoch only the script has: leave the schedule out of initialize, make it of "
            "engine.optimizer, and step it in your script, for example after each evaluation"
        ) from None


def _log_quirks(schedule: schedulers.Schedule) -> None:
    """Log what DeepSpeed's schedules do and their users may not expect."""
    name = type(schedule).__name__
    for quirk in schedule.quirks:
        log.info('%s: %s, as in DeepSpeed; "redline": {"schedules": "corrected"} does otherwise', name, quirk)
    bounds = [*getattr(schedule, "min_lrs", ()), *getattr(schedule, "max_lrs", ())]
    unused = [float(lr) for lr in schedule.base_lrs if bounds and lr is not None and lr not in bounds]
    if unused:
        log.info("%s sets the learning rate; the optimizer's own %g is not used", name, unused[0])
