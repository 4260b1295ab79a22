"""The base of every schedule here: a closed form of the step, written to the optimizer's parameter groups.

Owns the step count, the state and the writing; each schedule's values are in its own file. The constructor arguments,
values and state are those of DeepSpeed's `deepspeed/runtime/lr_schedules.py`, the interface is torch's `LRScheduler`.
`find_violation` looks ahead, in any schedule of ours or of torch's.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, overload

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "Default", "NoOptimizer", "Rate", "Schedule", "Violation", "fill", "find_violation", "groups_of", "is_built_in",
    "length_of", "log",
]  # fmt: skip

log = logging.getLogger("redline.schedulers")

# A tensor if the user's optimizer holds tensors (torch.compile, CUDA graphs). Arithmetic on it is then float32, as
# DeepSpeed's is.
Rate = float | Tensor
T = TypeVar("T")


class Schedule(LRScheduler):
    """A learning rate, and for some a momentum, that is a closed form of the number of steps taken.

    After ``k`` calls of :meth:`step` the groups hold the values of optimizer step ``k``, counted from 0; construction
    sets those of the first one. Torch's ``last_epoch`` is ``k``, DeepSpeed's ``last_batch_iteration`` is ``k - 1``.

    Args:
        optimizer: Any torch optimizer, or a wrapper that holds one as ``.optimizer``. With None the schedule can only
            be evaluated (:meth:`lr_at`), and a learning rate that the optimizer would give is 1.0.
        last_batch_iteration: Where to resume; -1 starts. Any other value leaves the optimizer unchanged.
        corrected: See each schedule; False gives DeepSpeed's values bit for bit.
        num_groups: Number of groups to evaluate without an optimizer.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        last_batch_iteration: int = -1,
        *,
        corrected: bool = False,
        num_groups: int = 1,
    ) -> None:
        # Not LRScheduler.__init__, which patches optimizer.step, adds a key to the groups and steps once. Only the
        # interface of the base class is used.
        self.optimizer = _torch_optimizer(optimizer, num_groups)
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.base_lrs = [lr.detach().clone() if isinstance(lr, Tensor) else lr for lr in lrs]
        self.last_epoch = last_batch_iteration + 1
        self.corrected = corrected

    @property
    def last_batch_iteration(self) -> int:
        """DeepSpeed's counter: -1 before the first step, then the index of the last one."""
        return self.last_epoch - 1

    @last_batch_iteration.setter
    def last_batch_iteration(self, value: int) -> None:
        self.last_epoch = value + 1

    @property
    def quirks(self) -> tuple[str, ...]:
        """What DeepSpeed's values do here that a user would not expect, a sentence each."""
        return ()

    def step(self, batch_iteration: int | None = None) -> None:
        """Set the values of the next optimizer step.

        Args:
            batch_iteration: Go to this ``last_batch_iteration`` instead.
        """
        self.last_epoch = k = self.last_epoch + 1 if batch_iteration is None else batch_iteration + 1
        self._write(self._lrs(k))

    def get_lr(self) -> list[Rate]:
        """The learning rate of each group at the current step; also before the first step and after loading."""
        return self._lrs(self.last_epoch)

    get_last_lr = get_lr

    @overload
    def lr_at(self, step: int, group: int = 0) -> float: ...
    @overload
    def lr_at(self, step: Iterable[int], group: int = 0) -> list[float]: ...
    def lr_at(self, step: int | Iterable[int], group: int = 0) -> float | list[float]:
        """The learning rate of a group at a step, counted from 0, or at each of several; changes nothing.

        Raises:
            ValueError: A step is negative.
        """
        return _evaluate(lambda k: float(self._lrs(k)[group]), step)

    @overload
    def momentum_at(self, step: int, group: int = 0) -> float | None: ...
    @overload
    def momentum_at(self, step: Iterable[int], group: int = 0) -> list[float] | None: ...
    def momentum_at(self, step: int | Iterable[int], group: int = 0) -> float | list[float] | None:
        """The momentum, or first beta, as :meth:`lr_at`; None if it is not cycled."""
        return None if self._momenta(0) is None else _evaluate(lambda k: (self._momenta(k) or [])[group], step)

    def state_dict(self) -> dict[str, Any]:
        """The step and nothing else, in DeepSpeed's form: ``{"last_batch_iteration": k - 1}``."""
        return {"last_batch_iteration": self.last_epoch - 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved step: ours, DeepSpeed's, or torch's ``{"last_epoch": k}``.

        As in torch and DeepSpeed the learning rates in the groups are the optimizer's state, and change at the next
        step only; a corrected schedule sets them.

        Raises:
            KeyError: It has neither key.
        """
        if "last_batch_iteration" in state_dict:
            self.last_epoch = int(state_dict["last_batch_iteration"]) + 1
        elif "last_epoch" in state_dict:
            self.last_epoch = int(state_dict["last_epoch"])
        else:
            raise KeyError(f"expected last_batch_iteration or last_epoch, got {sorted(state_dict)}")
        if self.corrected:
            self.step(self.last_batch_iteration)

    def _lrs(self, k: int) -> list[Rate]:
        """The closed form: the learning rate of each group at step `k`."""
        raise NotImplementedError

    def _momenta(self, k: int) -> list[float] | None:
        """The momentum of each group at step `k`; None where none is cycled."""
        return None

    def _optimizer_lrs(self) -> list[Rate]:
        """The optimizer's own learning rates, for a schedule that multiplies them."""
        if any(lr is None for lr in self.base_lrs):
            raise ValueError("it starts from the optimizer's learning rate, which is None; give the optimizer an lr")
        return self.base_lrs

    def _write(self, lrs: Iterable[Rate]) -> None:
        # The groups are read each time, because optimizer.load_state_dict replaces them.
        for group, lr in zip(self.optimizer.param_groups, lrs):
            if type(group["lr"]) is float:  # nearly always; isinstance(lr, Tensor) is slow
                group["lr"] = lr
            else:
                fill(group, lr)

    def _per_group(self, value: Any, name: str) -> list[Any]:
        """A list with one value per parameter group, from one value or such a list."""
        count = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"{name}: got {len(value)} values for {count} parameter groups; give one each")
        return list(value)


class Default(float):
    """A default that can be told from the same number given by the user."""


class NoOptimizer(Optimizer):
    """Parameter groups without parameters, for a schedule that is only evaluated."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.defaults = {key: value for key, value in groups[0].items() if key != "params"}
        self.param_groups = [{**group, "params": []} for group in groups]

    def step(self, closure: Any = None) -> Any:
        """Does nothing; torch's schedules wrap it."""


def groups_of(*values: Any) -> int:
    """The number of groups that a schedule's arguments are for."""
    return max((len(value) for value in values if isinstance(value, Sequence)), default=1)


def fill(group: dict[str, Any], lr: Rate) -> None:
    """Set a group's learning rate; a tensor is filled in place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr.squeeze() if isinstance(lr, Tensor) else lr)
    else:
        group["lr"] = lr


def is_built_in(schedule: object) -> bool:
    """Whether a schedule is one of ours or torch's, whose values follow from arguments and step alone."""
    module = type(schedule).__module__
    return module == lr_scheduler.__name__ or module.startswith("redline.schedulers.")


def _torch_optimizer(optimizer: Any, num_groups: int) -> Optimizer:
    if optimizer is None:
        return NoOptimizer([{"lr": 1.0, "betas": (0.9, 0.999)}] * num_groups)
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise TypeError(f"optimizer: got {type(optimizer).__name__}; expected a torch.optim.Optimizer")


def _evaluate(value_at: Callable[[int], T], step: Any) -> T | list[T]:
    # A 0-d array or tensor is iterable by its type, but holds one step.
    if isinstance(step, Iterable) and getattr(step, "ndim", 1) > 0:
        return [value_at(k) for k in map(_index, step)]
    return value_at(_index(step))


def _index(step: Any) -> int:
    if (k := int(step)) < 0:
        raise ValueError(f"step: got {k}; steps are counted from 0")
    return k


# -- looking ahead --------------------------------------------------------------------------------------

_LEAST, _MOST = 1_000, 10_000  # steps that are run
_NEVER = 2**62
_END = "end the training before that step, or change the schedule's arguments"
_FALL = (
    'decay_mom_rate makes the momentum grow, as in DeepSpeed; "redline": {"schedules": "corrected"} lets it fall '
    "instead, and decay_mom_rate 0 keeps it"
)


class Violation(NamedTuple):
    """A value that no optimizer accepts."""

    step: int  # the first optimizer step with it, counted from 0
    group: int  # index of the parameter group
    name: str  # "learning rate", "momentum" or "beta1"
    value: float  # at that step
    remedy: str

    def __str__(self) -> str:
        allowed = "a finite number >= 0" if self.name == "learning rate" else f"0 <= {self.name} < 1"
        return (
            f"the {self.name} of parameter group {self.group} leaves what optimizers accept at optimizer step "
            f"{self.step}, counted from 0: it is {self.value:.6g} there; expected {allowed}; {self.remedy}"
        )


def find_violation(schedule: Any) -> Violation | None:
    """The first learning rate, momentum or beta1 that optimizers refuse.

    A learning rate must be finite and not negative, a momentum or beta1 that the schedule changes at least 0 and below
    1. A copy of the schedule is run for twice its own length, at least 1,000 and at most 10,000 steps, without touching
    an optimizer; the momentum of `OneCycle` is known for all steps.

    Args:
        schedule: One of `schedulers` or of torch. Others, and those that call functions of the user, are not run.
    """
    if not _can_be_run(schedule):
        return None
    stand_in = NoOptimizer(copy.deepcopy([{**group, "params": []} for group in schedule.optimizer.param_groups]))
    stand_in.defaults = dict(schedule.optimizer.defaults)
    start = getattr(schedule, "last_epoch", 0)
    steps = range(start, start + min(_MOST, max(_LEAST, _horizon(schedule))))
    found = next(_violations(copy.deepcopy(schedule, {id(schedule.optimizer): stand_in}), stand_in, steps), None)
    if found is not None or not getattr(schedule, "cycle_momentum", False) or not isinstance(schedule, Schedule):
        return found
    # Beyond these steps its momentum can only reach 1 by growing without end.
    name, late = _momentum(stand_in.param_groups[0])[0], []
    for group in range(len(stand_in.param_groups)):
        step = bisect_left(range(_NEVER), True, steps.stop, key=lambda k: (schedule.momentum_at(k, group) or 0.0) >= 1)
        if step < _NEVER:
            late.append(Violation(step, group, name, schedule.momentum_at(step, group) or 0.0, _FALL))
    return min(late, default=None)


def length_of(schedule: Any) -> int | None:
    """The steps after which a schedule only repeats its last values; None if it is unknown."""
    names = ("total_num_steps", "total_size", "total_steps", "warmup_num_steps", "total_iters", "T_max")
    length = next((getattr(schedule, name) for name in names if hasattr(schedule, name)), None)
    if length is None and hasattr(schedule, "step_size"):
        length = 10 * schedule.step_size
    return None if not length else round(length)


def _can_be_run(schedule: Any) -> bool:
    metric_or_function = (lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR, lr_scheduler.ReduceLROnPlateau)
    if not is_built_in(schedule) or isinstance(schedule, metric_or_function):
        return False
    if getattr(schedule, "_scale_fn_custom", None) is not None:  # CyclicLR's
        return False
    return all(map(_can_be_run, getattr(schedule, "_schedulers", ())))


def _horizon(schedule: Any) -> int:
    """Twice the length of a schedule, or of the last of several chained ones after its milestone."""
    milestones: Any = getattr(schedule, "milestones", None) or getattr(schedule, "_milestones", None) or [0]
    last = max(map(_horizon, getattr(schedule, "_schedulers", ())), default=1)
    return max(2 * (length_of(schedule) or 0), int(max(milestones)) + last)


def _violations(schedule: Any, optimizer: NoOptimizer, steps: range) -> Iterator[Violation]:
    first = [_momentum(group)[1] for group in optimizer.param_groups]
    cycles = getattr(schedule, "cycle_momentum", False)
    remedy = _FALL if getattr(schedule, "decay_mom_rate", 0) > 0 else _END
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about an optimizer that is not stepped
        for step in steps:
            for index, group in enumerate(optimizer.param_groups):
                lr, (name, momentum) = group["lr"], _momentum(group)
                if lr is not None and not (math.isfinite(lr) and lr >= 0):
                    yield Violation(step, index, "learning rate", float(lr), _END)
                if momentum is not None and (cycles or momentum != first[index]) and not 0 <= momentum < 1:
                    yield Violation(step, index, name, float(momentum), remedy)
            try:
                schedule.step()
            except (ValueError, OverflowError):  # torch's OneCycleLR ends with an error
                return


def _momentum(group: dict[str, Any]) -> tuple[str, Any]:
    betas = group.get("betas")
    return ("beta1", betas[0]) if isinstance(betas, (tuple, list)) and betas else ("momentum", group.get("momentum"))
