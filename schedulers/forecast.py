"""What a schedule is going to do, found without moving it: the first step that leaves what optimizers accept."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch.optim import lr_scheduler

from schedulers.one_cycle import OneCycle
from schedulers.registry import is_built_in
from schedulers.schedule import NoOptimizer, Schedule

__all__ = ["Violation", "find_violation", "length_of", "remedy_for"]

_LEAST, _MOST = 1_000, 10_000  # steps that are looked at


@dataclass(frozen=True, slots=True)
class Violation:
    """A value that no optimizer accepts.

    Attributes:
        step: the first optimizer step that would run with it, counted from 0.
        group: index of the parameter group.
        name: "learning rate", "momentum" or "beta1".
        value: at that step.
    """

    step: int
    group: int
    name: str
    value: float

    def __str__(self) -> str:
        allowed = "a finite number >= 0" if self.name == "learning rate" else f"0 <= {self.name} < 1"
        return (
            f"the {self.name} of parameter group {self.group} leaves what optimizers accept at optimizer step "
            f"{self.step}, counted from 0: it is {self.value:.6g} there; expected {allowed}"
        )


def find_violation(schedule: Any) -> Violation | None:
    """The first value of a learning rate, momentum or beta1 that optimizers refuse.

    A learning rate has to be finite and not negative, a momentum or beta1 that the schedule moves from 0 to below 1.
    The schedule is run on a copy that moves no optimizer, for its own length or 1,000 steps, at most 10,000; the
    momentum of `OneCycle` is known for all steps.

    Args:
        schedule: one of `schedulers` or of torch. Others, and those that call functions of the user, are not looked at.
    """
    if not _can_be_run(schedule):
        return None
    stand_in = NoOptimizer([{**group, "params": []} for group in schedule.optimizer.param_groups])
    stand_in.defaults = dict(schedule.optimizer.defaults)
    stand_in.param_groups = copy.deepcopy(stand_in.param_groups)
    twin = copy.deepcopy(schedule, {id(schedule.optimizer): stand_in})
    found = _run(twin, stand_in)
    decay = _find_momentum(schedule) if isinstance(schedule, OneCycle) else None
    return min((each for each in (found, decay) if each), key=lambda each: each.step, default=None)


def remedy_for(schedule: Any, violation: Violation) -> str:
    """What to do about a violation, to stand behind it; empty where the arguments say enough."""
    if isinstance(schedule, OneCycle) and violation.name != "learning rate" and schedule.decay_mom_rate > 0:
        return (
            '; decay_mom_rate makes the momentum grow, as in DeepSpeed; "redline": {"schedules": "corrected"} lets it '
            "fall instead, and decay_mom_rate 0 keeps it"
        )
    return "; end the training before that step, or change the schedule's arguments"


def length_of(schedule: Any) -> int | None:
    """The steps after which a schedule only repeats its last values; None if it does not tell."""
    names = ("total_num_steps", "total_size", "total_steps", "warmup_num_steps", "total_iters", "T_max")
    length = next((getattr(schedule, name) for name in names if hasattr(schedule, name)), None)
    if length is None and hasattr(schedule, "step_size"):
        length = 10 * schedule.step_size
    return None if not length else round(length)


def _can_be_run(schedule: Any) -> bool:
    if not is_built_in(schedule) or isinstance(
        schedule, (lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR, lr_scheduler.ReduceLROnPlateau)
    ):
        return False
    if getattr(schedule, "_scale_fn_custom", None) is not None:
        return False
    return all(_can_be_run(each) for each in getattr(schedule, "_schedulers", ()))


def _run(schedule: Any, optimizer: NoOptimizer) -> Violation | None:
    start = schedule.last_epoch if hasattr(schedule, "last_epoch") else 0
    first = [_momentum(group)[1] for group in optimizer.param_groups]
    cycles = getattr(schedule, "cycle_momentum", False)
    steps = min(_MOST, max(_LEAST, 2 * (length_of(schedule) or 0), *_milestones(schedule)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about an optimizer that is not stepped
        for step in range(start, start + steps):
            for index, (group, begun) in enumerate(zip(optimizer.param_groups, first)):
                lr, (name, momentum) = group["lr"], _momentum(group)
                if lr is not None and not (math.isfinite(lr) and lr >= 0):
                    return Violation(step, index, "learning rate", float(lr))
                if momentum is not None and (cycles or momentum != begun) and not 0 <= momentum < 1:
                    return Violation(step, index, name, float(momentum))
            try:
                schedule.step()
            except (ValueError, OverflowError):  # torch's OneCycleLR ends with an error
                return None
    return None


def _milestones(schedule: Any) -> list[int]:
    inner = [each for part in getattr(schedule, "_schedulers", ()) for each in _milestones(part)]
    own = getattr(schedule, "milestones", None) or getattr(schedule, "_milestones", None)
    last = max(own or (), default=0)
    return [last + 1, *(last + each for each in inner), *(last + 2 * (length_of(part) or 0)
            for part in getattr(schedule, "_schedulers", ()))]  # fmt: skip


def _momentum(group: dict[str, Any]) -> tuple[str, Any]:
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and betas:
        return "beta1", betas[0]
    return "momentum", group.get("momentum")


def _find_momentum(schedule: OneCycle) -> Violation | None:
    """Where the momentum, which grows in equal amounts after the cycle, reaches 1."""
    if not schedule.cycle_momentum or schedule.corrected or schedule.decay_mom_rate <= 0:
        return None
    name = "beta1" if "betas" in schedule.optimizer.param_groups[0] else "momentum"
    groups = range(len(schedule.max_moms))
    found = []
    for group in (index for index in groups if schedule.max_moms[index] > 0):
        below, above = math.floor(schedule.total_size), math.ceil(schedule.total_size) + 1
        while _mom(schedule, above, group) < 1:
            below, above = above, 2 * above
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if _mom(schedule, middle, group) < 1 else (below, middle)
        found.append(Violation(above, group, name, _mom(schedule, above, group)))
    return min(found, key=lambda each: each.step, default=None)


def _mom(schedule: Schedule, step: int, group: int) -> float:
    value = schedule.momentum_at(step, group)
    assert value is not None
    return value
