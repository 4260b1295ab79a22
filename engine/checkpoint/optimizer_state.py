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

from redline.checkpoint.state import merge_tensors, plain_copy, split_tensors, tensor_keys
from redline.checkpoint.tensors import StoredTensor, is_sharded
from redline.errors import EngineError
from redline.log import log
from redline.run_state import Run
from redline.schedule_state import SCHEDULED, load_portable, portable_state
from redline.schedulers.schedule import is_built_in

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = [
    "UNKNOWN", "OptimizerLoad", "capture_optimizer", "capture_schedule", "listed", "plain_settings", "plan_schedule",
]  # fmt: skip


UNKNOWN = "unknown"  # the type of a schedule that a script made and DeepSpeed saved

_WITHOUT = "or load without the optimizer's state: load_optimizer_states=False"

# Settings of a parameter group that choose among implementations of one optimizer; the engine's own apply.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")

# What torch's schedules count and keep in their state besides their arguments.
_MOVING = (
    "last_epoch", "last_batch_iteration", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "lr_lambdas",
    "verbose",
)  # fmt: skip


def listed(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """The first of many names: ``a, b, c, d, e and 3 more``."""
    names = list(names)
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> list[str]:
    """The settings that differ, with both values; those that only one side has are left out."""

    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
        return bool(one == other)

    return [
        f"{key} was {value!r}, is {now[key]!r}"
        for key, value in saved.items()
        if key in now and key not in ignored and not equal(value, now[key])
    ]


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
    unknown = [key for key in optimizer.state if id(key) not in names]
    if unknown:
        raise EngineError(
            f"optimizer {kind.__name__}: its state has {len(unknown)} entries of no parameter of the model; give its "
            "class a state_dict() of its own to save it"
        )
    states = {name: optimizer.state[weight] for name, weight in weights.items() if weight in optimizer.state}
    # torch keeps the count of steps of some optimizers on the CPU, and looks for it there.
    saved["on_cpu"] = [
        f"optimizer.{name}.{key}"
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.device.type == "cpu" and weights[name].device.type != "cpu"
    ]
    saved["state"] = {
        name: plain_copy(split_tensors(dict(state), f"optimizer.{name}", tensors), f"optimizer.state of {name}")
        for name, state in states.items()
    }
    return saved


class OptimizerLoad:
    """What a checkpoint has for an optimizer, checked against it; nothing is changed before `apply`.

    Args:
        saved: what `capture_optimizer` returned.
        strict: whether the groups have to have the same parameters; else those that both have are loaded.
        scheduled: whether a schedule sets the learning rate, now or when the checkpoint was saved.
    """

    def __init__(
        self, optimizer: Optimizer, weights: Mapping[str, Tensor], saved: dict[str, Any], *, strict: bool,
        scheduled: bool,
    ) -> None:  # fmt: skip
        self._optimizer, self._saved = optimizer, saved
        kind, names = type(optimizer).__name__, {id(weight): name for name, weight in weights.items()}
        if saved["type"] != kind:
            raise EngineError(f"optimizer: was {saved['type']}, is {kind}; give the config the old one, {_WITHOUT}")
        groups = [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
        _check_groups(groups, [group["weights"] for group in saved["groups"]], strict)
        if "whole" in saved and any(map(is_sharded, weights.values())):
            raise EngineError(f"optimizer {kind}: its own state_dict() cannot be sharded; use ZeRO stage 0, {_WITHOUT}")
        ignored = SCHEDULED if scheduled else ()
        if changes := changed_settings(saved["defaults"], plain_settings(optimizer.defaults), ignored):
            log.warning(
                "load_checkpoint: optimizer: %s; the checkpoint's values are in force, as in DeepSpeed; set "
                "engine.optimizer.param_groups after loading, or load with load_optimizer_states=False",
                ", ".join(changes),
            )
        # Whether settings of the parameter groups will be loaded.
        self.has_settings = any(group["settings"] for group in saved["groups"])
        # Those with a state, and their groups; not those that are frozen by now.
        self._params = {
            name: (weights[name], group)
            for group, members in zip(optimizer.param_groups, groups)
            for name in members
            if name in saved.get("state", ())
        }

    def targets(self, entries: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors to read, by key, not yet filled; sharded as the parameters are."""
        targets: dict[str, Tensor] = {}
        for name, (weight, group) in self._params.items():
            model = entries.get(f"model.{name}")
            for key, value in self._saved["state"][name].items():
                for place in tensor_keys(value):
                    on_cpu = place in self._saved["on_cpu"]
                    if key == "step":  # torch's optimizers want it there
                        on_cpu = not (group.get("fused") or group.get("capturable"))
                    device = torch.device("cpu") if on_cpu else weight.device
                    targets[place] = _target(weight, entries[place], None if model is None else model.dtype, device)
        return targets

    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the optimizer the state, the tensors themselves and not copies, and the settings."""
        optimizer, saved = self._optimizer, self._saved
        if "whole" in saved:
            optimizer.load_state_dict(saved["whole"])
            return
        # Not load_state_dict(), which would cast the state to the dtype of the parameters and copy it.
        optimizer.state.clear()
        for name, (weight, _) in self._params.items():
            optimizer.state[weight] = merge_tensors(saved["state"][name], tensors)
        for group, before in zip(optimizer.param_groups, saved["groups"]):
            for key, value in before["settings"].items():
                now = group.get(key)
                if isinstance(now, Tensor):  # keeps its identity
                    now.fill_(float(value))
                else:  # a number stays one
                    group[key] = value.item() if isinstance(value, Tensor) and isinstance(now, float) else value


def _check_groups(groups: list[list[str]], saved: list[list[str]], strict: bool) -> None:
    text = ""
    if len(groups) != len(saved):
        text = f"had {len(saved)} parameter groups, has {len(groups)}"
    elif strict:
        for index, (now, then) in enumerate(zip(map(set, groups), map(set, saved))):
            differences = {"without": then - now, "with": now - then}
            words = " and ".join(f"{word} {listed(sorted(names))}" for word, names in differences.items() if names)
            if words and not text:
                text = f"group {index} of the checkpoint has {len(then)} parameters; the engine's is {words}"
    if text:
        raise EngineError(f"optimizer: {text}; make the same groups, {_WITHOUT}")


def _target(weight: Tensor, entry: StoredTensor, weight_was: torch.dtype | None, device: torch.device) -> Tensor:
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
    return torch.empty(entry.shape, dtype=entry.dtype, device=device)


# -- the schedule ---------------------------------------------------------------------------------------


def capture_schedule(run: Run, config: EngineConfig) -> dict[str, Any] | None:
    """A schedule's type, its parameters where they are known, and its state; None for a fixed learning rate.

    The parameters are the config's, or what the state of one of torch's schedules contains. In the state of a script's
    own class, only that class knows what is a parameter.
    """
    schedule = run.lr_scheduler
    if schedule is None:
        return None
    name, section = type(schedule).__name__, config.scheduler
    state = plain_copy(portable_state(schedule), f"{name}.state_dict()")
    parameters: dict[str, Any] = {}
    by_config = section is not None and section.type == name
    if section is not None and by_config:
        parameters = {**_defaults(type(schedule)), **section.arguments()}
        if hasattr(schedule, "corrected"):
            parameters["redline.schedules"] = config.redline.schedules
    elif is_built_in(schedule):
        parameters = {key: value for key, value in state.items() if not key.startswith("_") and key not in _MOVING}
    return {
        "type": name,
        "told_by": "config" if by_config else "state",  # only parameters from the same source are compared
        "parameters": plain_settings(parameters),
        "state": state,
    }


def _defaults(kind: type) -> dict[str, Any]:
    """The arguments that a class does not need, with the values that they have by default."""
    parameters = inspect.signature(kind).parameters
    return {
        name: float(each.default) if isinstance(each.default, float) else each.default
        for name, each in parameters.items()
        if each.default is not inspect.Parameter.empty and name != "corrected"
    }


def changed_schedule(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """How a schedule differs from the checkpoint's: in its type, else in each parameter."""
    before, after = ("none" if each is None else each["type"] for each in (saved, now))
    if before != after and (before != UNKNOWN or now is None):
        return [f"type was {before}, is {after}"]
    if saved is None or now is None or saved["told_by"] != now["told_by"]:
        return []
    return changed_settings(saved["parameters"], now["parameters"])


def plan_schedule(
    run: Run, config: EngineConfig, saved: Mapping[str, Any], *, states: bool, settings: bool
) -> Callable[[], None]:
    """Check what a checkpoint has for the schedule; what loads it, after the settings of the parameter groups.

    The schedule continues from its saved state where that fits and the saved settings of the parameter groups are
    loaded, too; else it is placed where a fresh run has it.

    Args:
        saved: the checkpoint's shared state.
        states: whether the schedule's state is to be loaded.
        settings: whether settings of the parameter groups are loaded.
    """
    schedule, before, counters = run.lr_scheduler, saved["schedule"], saved["counters"]
    steps: int = counters["global_steps"] - counters["skipped_steps"]
    place: Callable[[], None] | None = None
    loads_state = False
    if not states:
        # Without any schedule, then and now, the learning rate is a setting of the optimizer's groups.
        if schedule is not None or before is not None:
            place = _placed_at(run, 0)
    elif changes := changed_schedule(before, capture_schedule(run, config)):
        if not config.redline.checkpoint.override_schedule:
            raise EngineError(
                f"scheduler: {', '.join(changes)}; give the config the old schedule; or continue with the new one "
                'at the step of the checkpoint: "redline": {"checkpoint": {"override_schedule": true}}; or from '
                "its start: load_lr_scheduler_states=False"
            )
        log.warning("load_checkpoint: scheduler: %s; the new one continues at step %d", ", ".join(changes), steps)
        place = _placed_at(run, steps)
    elif schedule is not None and before is not None:
        if not settings:
            # Where the saved state has a count: a script may have stepped the schedule itself.
            numbers = {key: value for key, value in before["state"].items() if type(value) is int}
            position = None if run.schedule_start is None else run.schedule_start.position(numbers)
            place = _placed_at(run, steps if position is None else position)
        # A built-in schedule is fully placed by its step; its saved state has the old optimizer's learning rates.
        loads_state = settings or place is None or not is_built_in(schedule)

    def apply() -> None:
        if place is not None:
            place()
        if loads_state:
            load_portable(schedule, before["state"])

    return apply


def _placed_at(run: Run, steps: int) -> Callable[[], None] | None:
    start, schedule = run.schedule_start, run.lr_scheduler
    if start is None:
        return None
    if start.schedule is not schedule:
        log.warning(
            "load_checkpoint: scheduler: engine.lr_scheduler is not the one that initialize made or was given, and "
            "cannot be placed at step %d; it continues from where it is",
            steps,
        )
        return None
    try:
        return start.at(steps)
    except ValueError as error:
        raise EngineError(
            f"scheduler {type(schedule).__name__}: it cannot be placed at step {steps}, the checkpoint's: {error}; "
            "make it longer, or start it again: load_lr_scheduler_states=False"
        ) from error
