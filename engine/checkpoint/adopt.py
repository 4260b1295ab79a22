"""A checkpoint that DeepSpeed wrote, into an engine of any stage on any number of processes.

Weights in fp32 where it holds them, buffers, moments, settings of parameter groups, schedule, loss scale, counters, and
the script's own. DeepSpeed saves neither random numbers nor the position in the data: these stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.checkpoint.compare import listed, match_names
from engine.checkpoint.deepspeed import DeepSpeedCheckpoint
from engine.checkpoint.deepspeed_moments import Moments, read_moments
from engine.checkpoint.pace import Pace
from engine.checkpoint.plain import pack
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.restore import Wanted
from engine.checkpoint.shares import is_sharded, local_of, sharded_like, share_of
from engine.checkpoint.state import aliases_of, model_tensors, set_setting, weights_of
from engine.checkpoint.stored import Stored, read_whole
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["adopt"]

_DOING = "load_checkpoint"

# Settings of a group that choose among implementations of one optimizer; the engine's own count.
_CHOICES = ("fused", "foreach", "capturable", "differentiable")

# What DeepSpeed puts beside the script's own things.
_DEEPSPEEDS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "num_experts", "ds_autoep_layers", "universal_checkpoint_info", "sparse_tensor_module_names",
}  # fmt: skip


@dataclass
class _Plan:
    """What will be put into the engine, read and checked.

    Attributes:
        parts: what this process has of each weight and buffer.
        moments: of the optimizer; None where they are not wanted.
        pace: of the schedule; None where it is not wanted.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    moments: Moments | None = None
    pace: Pace | None = None


def adopt(engine: Engine, ranks: Ranks, folder: Path, wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """Load a folder that DeepSpeed wrote; every process calls this.

    Returns:
        The folder, and what the script had saved as `client_state`.

    Raises:
        EngineError: on all processes, if it does not go with the engine on one; the engine is as it was.
    """
    made: list[tuple[DeepSpeedCheckpoint, _Plan]] = []

    def read() -> None:
        checkpoint = DeepSpeedCheckpoint(folder)
        made.append((checkpoint, _read(engine, checkpoint, wanted)))

    ranks.agree(_DOING, read)
    checkpoint, plan = made[0]
    _install(engine, checkpoint, plan, wanted)
    processes = "1 process" if checkpoint.processes == 1 else f"{checkpoint.processes} processes"
    rest = "" if wanted.module_only else "; the place in the data and random numbers stay: DeepSpeed saves neither"
    log.info("load_checkpoint: %s is DeepSpeed's, of ZeRO stage %d on %s%s", folder, checkpoint.stage, processes, rest)
    # Copies: tensors in it are mapped from the file.
    client_state = copy.deepcopy({key: value for key, value in checkpoint.state.items() if key not in _DEEPSPEEDS})
    checkpoint.release()
    return str(folder), client_state


# -- reading -------------------------------------------------------------------------------------------


def _read(engine: Engine, checkpoint: DeepSpeedCheckpoint, wanted: Wanted) -> _Plan:
    plan = _Plan()
    engine.put_away()
    weights = weights_of(engine)
    stored = _named(engine, checkpoint, wanted)
    optimizer = None if wanted.module_only or not wanted.optimizer else engine.optimizer
    if optimizer is not None:
        plan.moments = read_moments(optimizer, checkpoint, weights, stored)
        stored |= plan.moments.weights
    if not wanted.module_only:
        counters = {name: int(checkpoint.state[name]) for name in ("global_steps", "skipped_steps")}
        told = {"schedule": _schedule_of(engine, checkpoint), "counters": counters}
        # An elastic checkpoint has no settings.
        settings = plan.moments is not None and any(plan.moments.settings)
        plan.pace = Pace(engine, told, states=wanted.schedule, settings=settings)
    if wanted.custom_load is None:
        targets = model_tensors(engine)
        plan.parts |= {name: share_of(read_whole(each), targets[name]) for name, each in stored.items()}
    elif any(map(is_sharded, weights.values())):
        raise EngineError(
            "custom_load_fn: parameters are sharded over the processes; leave it out, or use ZeRO stage 0"
        )
    return plan


def _named(engine: Engine, checkpoint: DeepSpeedCheckpoint, wanted: Wanted) -> dict[str, Stored]:
    """The checkpoint's tensors by the engine's names.

    Raises:
        EngineError: names or shapes do not fit.
    """
    found = checkpoint.tensors()
    targets = model_tensors(engine)
    names = match_names(targets, found, aliases_of(engine.module), checkpoint.aliases)
    if wanted.strict and wanted.custom_load is None and (names.missing or names.unexpected):
        said = [f"it lacks {listed(names.missing)}, which the model has"] * bool(names.missing)
        said += [f"it has {listed(names.unexpected)}, which the model lacks"] * bool(names.unexpected)
        raise EngineError(
            f"{checkpoint.folder}: {'; '.join(said)}; build the model that was saved, or load what both have: "
            "load_module_strict=False"
        )
    stored = {name: found[source] for name, source in names.sources.items()}
    wrong = [
        f"{name} is {list(each.shape)} in the checkpoint, {list(targets[name].shape)} in the model"
        for name, each in stored.items()
        if each.shape != targets[name].shape
    ]
    if wrong:
        raise EngineError(f"{checkpoint.folder}: {listed(wrong)}; build the model that was saved")
    return stored


def _schedule_of(engine: Engine, checkpoint: DeepSpeedCheckpoint) -> dict[str, Any] | None:
    """The schedule as a checkpoint of our own would tell it: its type and parameters are in DeepSpeed's config."""
    state = checkpoint.state.get("lr_scheduler")
    if state is None:
        return None
    told: dict[str, Any] = {"type": type(engine.lr_scheduler).__name__, "told_by": "nothing", "parameters": {}}
    config = checkpoint.state.get("ds_config")
    section = config.get("scheduler") if isinstance(config, Mapping) else None
    if isinstance(section, Mapping) and section.get("type"):  # else the script made it
        told = {"type": section["type"], "told_by": "config", "parameters": _parameters_of(section)}
        if hasattr(engine.lr_scheduler, "corrected"):
            told["parameters"]["redline.schedules"] = "deepspeed"
    return {**told, "state": pack(dict(state), "lr_scheduler", {})}


def _parameters_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's parameters as this engine reads them; as they are where it would refuse them."""
    from engine.config.scheduler import SchedulerConfig  # here: pydantic takes long to import

    try:
        parameters = SchedulerConfig.model_validate(section).arguments()
    except ValueError:
        parameters = dict(section.get("params") or {})
    packed: dict[str, Any] = pack(parameters, "scheduler.params", {})
    return packed


# -- installing ----------------------------------------------------------------------------------------


@torch.no_grad()
def _install(engine: Engine, checkpoint: DeepSpeedCheckpoint, plan: _Plan, wanted: Wanted) -> None:
    engine.drop_update()
    weights = weights_of(engine)
    if wanted.custom_load is None:
        for name, target in model_tensors(engine).items():
            if name in plan.parts:
                local_of(target).copy_(plan.parts.pop(name))
    else:
        _load_by(wanted.custom_load, engine, checkpoint)
    if engine._precision.publish is not None:
        engine._precision.publish()
    if wanted.module_only:
        return
    if plan.moments is not None and engine.optimizer is not None:
        _install_optimizer(engine.optimizer, weights, plan.moments)
    state = checkpoint.state
    if plan.pace is not None:
        plan.pace.install({})
    _install_scale(engine, checkpoint.loss_scaler)
    engine.global_steps = int(state["global_steps"])
    engine.global_samples = int(state.get("global_samples", engine.global_steps * engine.train_batch_size()))
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine._skipped = int(state["skipped_steps"])
    engine._last_loss = engine._optimizer_step.grad_norm = None


def _load_by(custom_load: Callable[..., Any], engine: Engine, checkpoint: DeepSpeedCheckpoint) -> None:
    """Let the script put the model's state dict where it belongs."""
    tensors = {name: read_whole(stored) for name, stored in checkpoint.tensors().items()}
    tensors |= {alias: tensors[name] for alias, name in checkpoint.aliases.items() if name in tensors}
    custom_load(src=tensors, dst=engine.module)
    if engine._masters is not None:
        engine._masters.copy_from_model()


def _install_optimizer(optimizer: Optimizer, weights: Mapping[str, Tensor], moments: Moments) -> None:
    optimizer.state.clear()
    for name, state in moments.states.items():
        weight = weights[name]
        optimizer.state[weight] = {
            key: sharded_like(value, weight) if key != "step" else value for key, value in state.items()
        }
    for group, settings in zip(optimizer.param_groups, moments.settings):
        for key, value in settings.items():
            if key in ("params", "step", *_CHOICES) or key not in group:
                continue
            set_setting(group, key, tuple(value) if isinstance(value, list) else value)


def _install_scale(engine: Engine, saved: Mapping[str, Any]) -> None:
    """What moves of DeepSpeed's loss scaler; its rules are the config's."""
    scaler = engine.scaler
    if scaler is None or not scaler.dynamic or "cur_iter" not in saved:
        return
    moving = {
        "value": saved.get("cur_scale"),
        "_patience": saved.get("cur_hysteresis"),
        "_updates": saved.get("cur_iter"),
        "_last_overflow": saved.get("last_overflow_iter"),
    }
    scaler.load_state_dict(
        {**scaler.state_dict(), **{key: value for key, value in moving.items() if value is not None}}
    )
