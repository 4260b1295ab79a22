"""A checkpoint that DeepSpeed wrote, into an engine of any stage on any number of processes.

Weights in fp32 where it holds them, buffers, moments, settings of parameter groups, schedule, loss scale, counters, and
the script's own. DeepSpeed saves neither random numbers nor the position in the data: these stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.checkpoint.deepspeed import DeepSpeedCheckpoint
from engine.checkpoint.moments import Moments, read_moments
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.restore import Wanted
from engine.checkpoint.shares import is_sharded, local_of, sharded_like, share_of
from engine.checkpoint.state import CHOICES, aliases_of, buffers_of, weights_of
from engine.checkpoint.stored import Stored, read_whole
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["adopt"]

_DOING = "load_checkpoint"

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
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    moments: Moments | None = None


def adopt(engine: Engine, ranks: Ranks, folder: Path, wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """Load a folder that DeepSpeed wrote; every process calls this.

    Returns:
        The folder, and what the script had saved as `client_state`.

    Raises:
        EngineError: on all processes, if it does not go with the engine on one; the engine is as it was.
    """
    checkpoint: DeepSpeedCheckpoint | None = None

    def read() -> _Plan:
        nonlocal checkpoint
        checkpoint = DeepSpeedCheckpoint(folder)
        return _read(engine, checkpoint, wanted)

    plan = ranks.agree_own(_DOING, read)
    assert checkpoint is not None
    _install(engine, checkpoint, plan, wanted)
    processes = "1 process" if checkpoint.processes == 1 else f"{checkpoint.processes} processes"
    rest = "" if wanted.module_only else "; the data and the random numbers begin anew, as DeepSpeed does not save them"
    log.info("load_checkpoint: %s is DeepSpeed's, of ZeRO stage %d on %s%s", folder, checkpoint.stage, processes, rest)
    client_state = {key: value for key, value in checkpoint.state.items() if key not in _DEEPSPEEDS}
    checkpoint.release()
    return str(folder), client_state


# -- reading -------------------------------------------------------------------------------------------


def _read(engine: Engine, checkpoint: DeepSpeedCheckpoint, wanted: Wanted) -> _Plan:
    plan = _Plan()
    weights = weights_of(engine)
    stored = _named(engine, checkpoint, wanted)
    optimizer = None if wanted.module_only or not wanted.optimizer else engine.optimizer
    if not wanted.module_only and wanted.schedule:
        _check_schedule(engine, checkpoint)
    if optimizer is not None:
        plan.moments = read_moments(optimizer, checkpoint, weights, stored)
        stored |= plan.moments.weights
    if wanted.custom_load is None:
        targets = {**weights, **buffers_of(engine.module)}
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
    known_as: dict[str, list[str]] = {}
    for alias, name in (*aliases_of(engine.module).items(), *checkpoint.aliases.items()):
        known_as.setdefault(name, []).append(alias)
        known_as.setdefault(alias, []).append(name)
    targets = {**weights_of(engine), **buffers_of(engine.module)}
    stored: dict[str, Stored] = {}
    taken, missing = set(), []
    for name, target in targets.items():
        spelled = next((each for each in (name, *known_as.get(name, ())) if each in found), None)
        if spelled is None:
            missing.append(name)
            continue
        taken.add(spelled)
        if found[spelled].shape != target.shape:
            raise EngineError(
                f"{checkpoint.folder}: {name} has shape {tuple(found[spelled].shape)}, this model's "
                f"{tuple(target.shape)}"
            )
        stored[name] = found[spelled]
    strange = [name for name in found if name not in taken]
    if wanted.strict and wanted.custom_load is None and (missing or strange):
        lists = [f"without {_some(missing)}"] * bool(missing) + [f"with {_some(strange)} more"] * bool(strange)
        raise EngineError(
            f"{checkpoint.folder}: it is of another model, {' and '.join(lists)}; load_module_strict=False loads what "
            "both have"
        )
    return stored


def _some(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} others" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _check_schedule(engine: Engine, checkpoint: DeepSpeedCheckpoint) -> None:
    """Name a schedule that is not the one of the checkpoint's config.

    Raises:
        EngineError: it has changed, and the config does not say that it may.
    """
    config = checkpoint.state.get("ds_config")
    theirs = config.get("scheduler") if isinstance(config, Mapping) else None
    ours = engine.config.scheduler
    if not isinstance(theirs, Mapping) or ours is None or engine.config.redline.checkpoint.override_schedule:
        return  # a schedule that a script made is in no config
    changes = []
    if theirs.get("type") != ours.type:
        changes.append(f"type: {theirs.get('type')} there, {ours.type} here")
    else:
        mine = ours.params.model_dump()
        for key, value in _filled(theirs).items():
            if value != "auto" and key in mine and mine[key] != value:
                changes.append(f"{key}: {value} there, {mine[key]} here")
    if changes:
        raise EngineError(
            f"{checkpoint.folder}: the schedule has changed: {'; '.join(changes)}; give the config the one that it was "
            'saved with, load with load_lr_scheduler_states=False, or say "redline": {"checkpoint": '
            '{"override_schedule": true}}'
        )


def _filled(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's parameters with their defaults; as they are where this engine would refuse them."""
    from engine.config.scheduler import SchedulerConfig  # here: pydantic takes long to import

    try:
        return SchedulerConfig.model_validate(scheduler).params.model_dump()
    except ValueError:
        return dict(scheduler.get("params") or {})


# -- installing ----------------------------------------------------------------------------------------


@torch.no_grad()
def _install(engine: Engine, checkpoint: DeepSpeedCheckpoint, plan: _Plan, wanted: Wanted) -> None:
    engine.drop_update()
    weights = weights_of(engine)
    if wanted.custom_load is None:
        for name, target in {**weights, **buffers_of(engine.module)}.items():
            if name in plan.parts:
                local_of(target).copy_(plan.parts.pop(name))
        if engine._masters is not None:
            engine._masters.publish()
    else:
        _load_by(wanted.custom_load, engine, checkpoint)
    if wanted.module_only:
        return
    if plan.moments is not None and engine.optimizer is not None:
        _install_optimizer(engine.optimizer, weights, plan.moments)
    state = checkpoint.state
    if wanted.schedule and engine.lr_scheduler is not None and state.get("lr_scheduler") is not None:
        _install_schedule(engine, state["lr_scheduler"], rates_known=plan.moments is None or any(plan.moments.settings))
    _install_scale(engine, checkpoint.loss_scaler)
    engine.global_steps = int(state["global_steps"])
    engine.global_samples = int(state.get("global_samples", engine.global_steps * engine.train_batch_size()))
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine._skipped = int(state["skipped_steps"])


def _load_by(custom_load: Callable[..., Any], engine: Engine, checkpoint: DeepSpeedCheckpoint) -> None:
    """Let the script put the model's state dict where it belongs."""
    tensors = {name: read_whole(stored) for name, stored in checkpoint.tensors().items()}
    tensors |= {alias: tensors[name] for alias, name in checkpoint.aliases.items() if name in tensors}
    custom_load(src=tensors, dst=engine.module)
    if engine._masters is not None:
        torch._foreach_copy_(engine._masters.weights, engine._masters.model)


def _install_optimizer(optimizer: Optimizer, weights: Mapping[str, Tensor], moments: Moments) -> None:
    optimizer.state.clear()
    for name, state in moments.states.items():
        weight = weights[name]
        optimizer.state[weight] = {
            key: sharded_like(value, weight) if key != "step" else value for key, value in state.items()
        }
    for group, settings in zip(optimizer.param_groups, moments.settings):
        for key, value in settings.items():
            if key in ("params", "step", *CHOICES) or key not in group:
                continue
            if isinstance(group[key], Tensor):  # a rate that keeps its identity
                group[key].fill_(float(value))
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _install_schedule(engine: Engine, state: dict[str, Any], *, rates_known: bool) -> None:
    schedule: Any = engine.lr_scheduler
    schedule.load_state_dict(dict(state))
    if not rates_known and hasattr(schedule, "last_batch_iteration"):
        schedule.step(schedule.last_batch_iteration)  # an elastic checkpoint has no rates: write those of this step


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
