"""What a config's schedule will do to its optimizer, as far as it leaves what optimizers accept."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from engine.config.optimizer import OptimizerConfig
from engine.config.scheduler import OneCycleParams, SchedulerConfig

if TYPE_CHECKING:
    from engine.config.root import EngineConfig

__all__ = ["foresee"]


def foresee(config: EngineConfig) -> str | None:
    """The first step at which the schedule leaves what optimizers accept, in words; None if there is none.

    Of DeepSpeed's five schedules only OneCycle's momentum can; so most configs are judged without torch. A registered
    class is not looked at, and a schedule that refuses its arguments says so in `initialize`.
    """
    scheduler = config.scheduler
    if scheduler is None or not _may_leave(scheduler):
        return None
    from schedulers import Schedule, resolve  # here, not above: they import torch
    from schedulers.forecast import find_violation, remedy_for
    from schedulers.schedule import NoOptimizer

    arguments = scheduler.arguments()
    num_groups = max((len(value) for value in arguments.values() if isinstance(value, (list, tuple))), default=1)
    optimizer = NoOptimizer([_group(config.optimizer)] * num_groups)
    cls: Any = resolve(scheduler.type)
    if issubclass(cls, Schedule):
        arguments["corrected"] = config.redline.schedules == "corrected"
    try:
        schedule = cls(optimizer, **arguments)
    except (TypeError, ValueError):
        return None
    violation = find_violation(schedule)
    return None if violation is None else f"{violation}{remedy_for(schedule, violation)}"


def _may_leave(scheduler: SchedulerConfig) -> bool:
    params = scheduler.params
    if scheduler.type in SchedulerConfig.models:
        return isinstance(params, OneCycleParams) and params.cycle_momentum and params.decay_mom_rate > 0
    return True


def _group(optimizer: OptimizerConfig | None) -> dict[str, Any]:
    """What a schedule reads of a parameter group: learning rate and momentum; Adam's without an optimizer."""
    if optimizer is None:
        return {"lr": 1e-3, "betas": (0.9, 0.999)}
    values = {name: _setting(optimizer, name) for name in ("lr", "betas", "momentum") if optimizer.takes(name)}
    if not isinstance(values.get("lr"), (float, int)):
        values["lr"] = 1e-3
    return values


def _setting(optimizer: OptimizerConfig, name: str) -> Any:
    given = optimizer.arguments()
    if name in given:
        return given[name]
    fields = type(optimizer.params).model_fields
    if name in fields:
        return fields[name].default
    return inspect.signature(optimizer.classes()[optimizer.type]).parameters[name].default
