"""An optimizer and its learning rate schedule: captured for a checkpoint, and loaded from one.

A parameter is known by its name in the model. Tensors of the optimizer's state are saved as tensors, sharded as their
parameters are, so that any number of ranks at any ZeRO stage can load them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from redline.checkpoint.state import listed, merge_tensors, plain_copy, split_tensors, tensor_keys
from redline.checkpoint.tensors import StoredTensor, is_sharded
from redline.errors import EngineError
from redline.log import log
from redline.run_state import Run
from redline.schedule_state import SCHEDULED, load_portable, portable_state
from redline.schedulers.schedule import is_built_in

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["UNKNOWN", "capture_optimizer", "capture_schedule", "plain_settings", "plan_optimizer", "plan_schedule"]

UNKNOWN = "unknown"  # the type of a schedule that a script made and DeepSpeed saved

_WITHOUT = "or load without the optimizer's state: load_optimizer_states=False"

# Settings of a parameter group that choose among implementations of one optimizer; the engine's own apply.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")

# What torch's schedules count and keep in their state besides their arguments.
_MOVING = (
    "last_epoch", "last_batch_iteration", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "lr_lambdas",
    "verbose",
)  # fmt: skip


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can be saved; the script gives the others, such as functions, again."""
    plain = {}
    for name, value in settings.items():
        if name != "params" and name not in _IMPLEMENTATION:
            try:
                plain[name] = plain_copy(value, name)
            except EngineError:
                continue
    return plain


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> str:
    """The settings that differ, with both values; those that only one side has are left out."""
    return ", ".join(
        f"{key} was {value!r}, is {now[key]!r}"
        for key, value in saved.items()
        if key in now and key not in ignored and not _equal(value, now[key])
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


# -- the optimizer --------------------------------------------------------------------------------------


def capture_optimizer(optimizer: Optimizer, weights: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> Any:
    """What a checkpoint saves of an optimizer; `tensors` takes those of its state, not copied."""
    kind = type(optimizer)
    names = {id(weight): name for name, weight in weights.items()}
    saved: dict[str, Any] = {
        "type": kind.__name__,
        "defaults": plain_settings(optimizer.defaults),
        "groups": [
            {"weights": [names[id(weight)] for weight in group["params"]], "settings": plain_settings(group)}
            for group in optimizer.param_groups
        ],
    }
    if kind.state_dict is not Optimizer.state_dict:  # more than a state per parameter, which only it understands
        return {**saved, "whole": plain_copy(optimizer.state_dict(), f"the state of {kind.__name__}")}
    if unknown := [key for key in optimizer.state if id(key) not in names]:
        raise EngineError(
            f"optimizer {kind.__name__}: its state has {len(unknown)} entries of no parameter of the model; give its "
            "class a state_dict() of its own to save it"
        )
    saved["state"], saved["on_cpu"] = {}, []
    for name, weight in weights.items():
        if weight in optimizer.state:
            state = dict(optimizer.state[weight])
            split = split_tensors(state, f"optimizer.{name}", tensors)
            saved["state"][name] = plain_copy(split, f"optimizer.state of {name}")
            # torch keeps the count of steps of some optimizers on the CPU, and looks for it there.
            saved["on_cpu"] += [
                f"optimizer.{name}.{key}"
                for key, value in state.items()
                if isinstance(value, Tensor) and value.device.type == "cpu" and weight.device.type != "cpu"
            ]
    return saved


def plan_optimizer(
    optimizer: Optimizer,
    weights: Mapping[str, Tensor],
    saved: dict[str, Any],
    entries: Mapping[str, StoredTensor],
    *,
    strict: bool,
    scheduled: bool,
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Check what `capture_optimizer` has saved against an optimizer.

    Args:
        strict: whether the groups have to have the same parameters; else those that both have are loaded.
        scheduled: whether a schedule sets the learning rate, now or when the checkpoint was saved.

    Returns:
        The tensors to read, by key, not yet filled and sharded as the parameters are; and what gives them to the
        optimizer, with all else that was saved.
    """
    kind, names = type(optimizer).__name__, {id(weight): name for name, weight in weights.items()}
    if saved["type"] != kind:
        raise EngineError(f"optimizer: was {saved['type']}, is {kind}; give the config the old one, {_WITHOUT}")
    groups = [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
    _check_groups(groups, [group["weights"] for group in saved["groups"]], strict)
    if changes := _changed(saved["defaults"], plain_settings(optimizer.defaults), SCHEDULED if scheduled else ()):
        log.warning(
            "load_checkpoint: optimizer: %s; the checkpoint's values are in force, as in DeepSpeed; set "
            "engine.optimizer.param_groups after loading, or load with load_optimizer_states=False", changes,
        )  # fmt: skip
    if "whole" in saved:
        if any(map(is_sharded, weights.values())):
            raise EngineError(f"optimizer {kind}: its own state_dict() cannot be sharded; use ZeRO stage 0, {_WITHOUT}")
        return {}, lambda: optimizer.load_state_dict(saved["whole"])
    states: dict[str, Any] = {}  # not of those that are frozen by now
    targets: dict[str, Tensor] = {}
    for group, members in zip(optimizer.param_groups, groups):
        on_device = bool(group.get("fused") or group.get("capturable"))
        for name in members:
            if name in saved["state"]:
                states[name] = saved["state"][name]
                was = entries[f"model.{name}"].dtype if f"model.{name}" in entries else None
                for key, value in states[name].items():
                    for place in tensor_keys(value):
                        # torch's optimizers count steps on the CPU, except for kernels that read the count.
                        on_cpu = not on_device if key == "step" else place in saved["on_cpu"]
                        targets[place] = _target(weights[name], entries[place], was, on_cpu)

    def apply() -> None:
        # Not load_state_dict(), which would cast the state to the dtype of the parameters and copy it.
        optimizer.state.clear()
        for name, state in states.items():
            optimizer.state[weights[name]] = merge_tensors(state, targets)
        for group, before in zip(optimizer.param_groups, saved["groups"]):
            for key, value in before["settings"].items():
                now = group.get(key)
                if isinstance(now, Tensor):  # keeps its identity
                    now.fill_(float(value))
                else:  # a number stays one
                    group[key] = value.item() if isinstance(value, Tensor) and isinstance(now, float) else value

    return targets, apply


def _check_groups(groups: list[list[str]], saved: list[list[str]], strict: bool) -> None:
    if len(groups) != len(saved):
        text = f"had {len(saved)} parameter groups, has {len(groups)}"
        raise EngineError(f"optimizer: {text}; make the same groups, {_WITHOUT}")
    for index, (now, then) in enumerate(zip(map(set, groups), map(set, saved))):
        if strict and now != then:
            differences = {"without": then - now, "with": now - then}
            text = " and ".join(f"{word} {listed(sorted(names))}" for word, names in differences.items() if names)
            raise EngineError(
                f"optimizer: group {index} of the checkpoint has {len(then)} parameters; the engine's is {text}; make "
                f"the same groups, {_WITHOUT}"
            )


def _target(weight: Tensor, entry: StoredTensor, weight_was: torch.dtype | None, on_cpu: bool) -> Tensor:
    """An empty tensor for a tensor of a parameter's state."""
    if entry.shape == weight.shape and weight.dim():
        # State in the parameter's dtype stays in the parameter's dtype, whichever that is now.
        follows = entry.dtype is weight_was and weight.is_floating_point()
        return torch.empty_like(weight.detach(), dtype=weight.dtype if follows else entry.dtype)
    if is_sharded(weight) and len(entry.shape):
        # torch's optimizers keep state of another shape than the parameter's in full on every rank.
        from torch.distributed.tensor import Replicate, empty  # imported with FSDP2 or by ZeRO stages 1 and 2

        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]  # it is a DTensor
        return empty(entry.shape, dtype=entry.dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return torch.empty(entry.shape, dtype=entry.dtype, device="cpu" if on_cpu else weight.device)


# -- the schedule ---------------------------------------------------------------------------------------


def capture_schedule(run: Run, config: EngineConfig) -> dict[str, Any] | None:
    """A schedule's type, its parameters where they are known, and its state; None for a fixed learning rate.

    The parameters are the config's, or what the state of one of torch's schedules contains. In the state of a script's
    own class, only that class knows what is a parameter.
    """
    schedule, section = run.lr_scheduler, config.scheduler
    if schedule is None:
        return None
    name, told_by = type(schedule).__name__, "state"
    state = plain_copy(portable_state(schedule), f"{name}.state_dict()")
    parameters: dict[str, Any] = {}
    if section is not None and section.type == name:
        told_by = "config"
        parameters = {**_defaults(type(schedule)), **section.arguments()}
        if parameters.pop("corrected", None) is not None:
            parameters["redline.schedules"] = config.redline.schedules
    elif is_built_in(schedule):
        parameters = {key: value for key, value in state.items() if not key.startswith("_") and key not in _MOVING}
    return {
        "type": name,
        "told_by": told_by,  # only parameters from the same source are compared
        "parameters": plain_settings(parameters),
        "state": state,
    }


def _defaults(kind: type) -> dict[str, Any]:
    """The arguments that a class does not need, with the values that they have by default, as plain numbers."""
    defaults = {key: each.default for key, each in inspect.signature(kind).parameters.items()}
    return {
        key: float(default) if isinstance(default, float) else default
        for key, default in defaults.items()
        if default is not inspect.Parameter.empty
    }


def _schedule_changes(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """How a schedule differs from the checkpoint's: in its type, else in each parameter."""
    before, after = ("none" if each is None else each["type"] for each in (saved, now))
    if before != after and (before != UNKNOWN or now is None):
        return f"type was {before}, is {after}"
    if saved is None or now is None or saved["told_by"] != now["told_by"]:
        return ""
    return _changed(saved["parameters"], now["parameters"])


def plan_schedule(
    run: Run, config: EngineConfig, saved: Mapping[str, Any], *, states: bool, settings: bool
) -> list[Callable[[], None]]:
    """Check what a checkpoint has for the schedule.

    The schedule continues from its saved state where that fits and the saved settings of the parameter groups are
    loaded, too; else it is placed where a fresh run has it.

    Args:
        saved: the checkpoint's shared state.
        states: whether the schedule's state is to be loaded.
        settings: whether settings of the parameter groups are loaded.

    Returns:
        What to call to load it, in this order, after the settings of the parameter groups.
    """
    schedule, before, counters = run.lr_scheduler, saved["schedule"], saved["counters"]
    steps: int = counters["global_steps"] - counters["skipped_steps"]
    if not states:
        # Without any schedule, then and now, the learning rate is a setting of the optimizer's groups.
        return [] if schedule is None and before is None else _placed_at(run, 0)
    if changes := _schedule_changes(before, capture_schedule(run, config)):
        if not config.redline.checkpoint.override_schedule:
            raise EngineError(
                f"scheduler: {changes}; give the config the old schedule; or continue with the new one at the step of "
                'the checkpoint: "redline": {"checkpoint": {"override_schedule": true}}; or from its start: '
                "load_lr_scheduler_states=False"
            )
        log.warning("load_checkpoint: scheduler: %s; the new one continues at step %d", changes, steps)
        return _placed_at(run, steps)
    if schedule is None or before is None:
        return []
    place = []
    if not settings:
        # Where the saved state has a count: a script may have stepped the schedule itself.
        numbers = {key: value for key, value in before["state"].items() if type(value) is int}
        position = None if run.schedule_start is None else run.schedule_start.position(numbers)
        place = _placed_at(run, steps if position is None else position)
        if place and is_built_in(schedule):  # its saved state has the old optimizer's learning rates
            return place
    return [*place, lambda: load_portable(schedule, before["state"])]


def _placed_at(run: Run, steps: int) -> list[Callable[[], None]]:
    """What places the schedule at a step, if anything can."""
    start, schedule = run.schedule_start, run.lr_scheduler
    if start is None:
        return []
    if start.schedule is not schedule:
        log.warning(
            "load_checkpoint: scheduler: engine.lr_scheduler is not the one that initialize made or was given, and "
            "cannot be placed at step %d; it continues from where it is", steps,
        )  # fmt: skip
        return []
    try:
        return [start.at(steps)]
    except ValueError as error:
        raise EngineError(
            f"scheduler {type(schedule).__name__}: it cannot be placed at step {steps}, the checkpoint's: {error}; "
            "make it longer, or start it again: load_lr_scheduler_states=False"
        ) from error
