"""The base of every schedule here: a closed form of the step, written to the optimizer's groups.

Owns the step count, the state and the writing. What the values are is each schedule's own file.
The constructor arguments, values and state follow DeepSpeed's `deepspeed/runtime/lr_schedules.py`,
the interface is torch's `LRScheduler`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, overload

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Default", "NoOptimizer", "Rate", "Schedule", "fill", "groups_of", "log"]

log = logging.getLogger("schedulers")

# A rate is a tensor where the user's optimizer holds tensors (torch.compile, CUDA graphs). The
# arithmetic on it is then float32, as DeepSpeed's is.
Rate = float | Tensor


class Schedule(LRScheduler):
    """A learning rate, and for some a momentum, that is a closed form of the number of steps taken.

    After ``k`` calls of :meth:`step` the groups hold the values for update ``k`` (counted from 0), so
    construction sets those of the first update. Torch's ``last_epoch`` is ``k``; DeepSpeed's
    ``last_batch_iteration`` is ``k - 1``.

    Args:
        optimizer: any torch optimizer, or a wrapper that holds one as ``.optimizer``. With None the
            schedule only evaluates (:meth:`lr_at`), and a rate that the optimizer would give counts as
            1.0, so that the values are multiples of it.
        last_batch_iteration: where to go on; -1 starts. With another value the constructor leaves the
            optimizer as it is.
        corrected: see each schedule; False gives DeepSpeed's values bit for bit.
        num_groups: how many groups to evaluate for when there is no optimizer.

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
        # Not LRScheduler.__init__: it patches optimizer.step, adds a key to the groups and steps once.
        # Of the base class we keep the interface.
        self.optimizer = _torch_optimizer(optimizer, num_groups)
        self.base_lrs = [_detached(group["lr"]) for group in self.optimizer.param_groups]
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
        """Move the optimizer to the values of the next update.

        Args:
            batch_iteration: go to this ``last_batch_iteration`` instead of the next one.
        """
        self.last_epoch = k = self.last_epoch + 1 if batch_iteration is None else batch_iteration + 1
        # The groups are read anew each time: optimizer.load_state_dict replaces them.
        for group, lr in zip(self.optimizer.param_groups, self._lrs(k)):
            if type(group["lr"]) is float:  # nearly always; isinstance(lr, Tensor) is slow
                group["lr"] = lr
            else:
                fill(group, lr)

    def get_lr(self) -> list[Rate]:
        """The rate of each group at the step reached; valid at any time."""
        return self._lrs(self.last_epoch)

    def get_last_lr(self) -> list[Rate]:
        """The same as :meth:`get_lr`: before the first step and after loading, too."""
        return self._lrs(self.last_epoch)

    @overload
    def lr_at(self, step: int, group: int = 0) -> float: ...
    @overload
    def lr_at(self, step: Iterable[int], group: int = 0) -> list[float]: ...
    def lr_at(self, step: int | Iterable[int], group: int = 0) -> float | list[float]:
        """The rate of update `step` (from 0), or of each step of a sequence; moves nothing.

        Args:
            step: an index, or any iterable of them (a range, an array, a 1-d tensor).
            group: index of the parameter group.

        Raises:
            ValueError: a negative step.
        """
        if not isinstance(step, Iterable) or getattr(step, "ndim", 1) == 0:
            return float(self._lrs(_index(step))[group])
        return [float(self._lrs(_index(k))[group]) for k in step]

    @overload
    def momentum_at(self, step: int, group: int = 0) -> float | None: ...
    @overload
    def momentum_at(self, step: Iterable[int], group: int = 0) -> list[float] | None: ...
    def momentum_at(self, step: int | Iterable[int], group: int = 0) -> float | list[float] | None:
        """The momentum (or first beta) of update `step`, as :meth:`lr_at`; None where none is cycled."""
        if not isinstance(step, Iterable) or getattr(step, "ndim", 1) == 0:
            momenta = self._momenta(_index(step))
            return None if momenta is None else momenta[group]
        values = [self._momenta(_index(k)) for k in step]
        return None if None in values else [momenta[group] for momenta in values if momenta is not None]

    def state_dict(self) -> dict[str, Any]:
        """The step and nothing else, in DeepSpeed's form: ``{"last_batch_iteration": k - 1}``."""
        return {"last_batch_iteration": self.last_epoch - 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step: ours, DeepSpeed's, or torch's ``{"last_epoch": k}``.

        The rates in the groups are the optimizer's state and stay as they are until the next step, as
        in torch and DeepSpeed; a corrected schedule writes them.

        Raises:
            KeyError: neither key is there.
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
        """The closed form: the rate of each group for update `k`."""
        raise NotImplementedError

    def _momenta(self, k: int) -> list[float] | None:
        return None

    def _own_lrs(self) -> list[Rate]:
        """The optimizer's rates, which the schedule is a share of.

        Raises:
            ValueError: the optimizer has none: it finds its own.
        """
        if any(lr is None for lr in self.base_lrs):
            raise ValueError("it starts from the optimizer's learning rate, which is None; give the optimizer an lr")
        return self.base_lrs

    def _write(self, lrs: Iterable[Rate]) -> None:
        for group, lr in zip(self.optimizer.param_groups, lrs):
            fill(group, lr)

    def _per_group(self, value: Any, name: str) -> list[Any]:
        """One value, or one per parameter group, as a list with one per group.

        Raises:
            ValueError: a list of another length than the groups.
        """
        groups = self.optimizer.param_groups
        if not isinstance(value, (list, tuple)):
            return [value] * len(groups)
        if len(value) != len(groups):
            raise ValueError(f"{name}: got {len(value)} values for {len(groups)} parameter groups; give one each")
        return list(value)


class Default(float):
    """A default that can be told from the same number given by the user."""


class NoOptimizer(Optimizer):
    """Groups without parameters, for a schedule that is only evaluated.

    Args:
        groups: their settings.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.defaults = {key: value for key, value in groups[0].items() if key != "params"}
        self.param_groups = [{**group, "params": []} for group in groups]

    def step(self, closure: Any = None) -> Any:  # torch's schedules wrap it
        """Nothing to do."""


def groups_of(*values: Any) -> int:
    """How many groups a schedule's arguments speak of: the length of the longest list, at least 1."""
    return max((len(value) for value in values if isinstance(value, Sequence)), default=1)


def fill(group: dict[str, Any], lr: Rate) -> None:
    """Set a group's rate; a tensor keeps its identity."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr.squeeze() if isinstance(lr, Tensor) else lr)
    else:
        group["lr"] = lr


def _torch_optimizer(optimizer: Any, num_groups: int) -> Optimizer:
    if optimizer is None:
        return NoOptimizer([{"lr": 1.0, "betas": (0.9, 0.999)}] * num_groups)
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise TypeError(f"optimizer: got {type(optimizer).__name__}; expected a torch.optim.Optimizer")


def _detached(lr: Rate) -> Rate:
    return lr.detach().clone() if isinstance(lr, Tensor) else lr


def _index(step: Any) -> int:
    k = int(step)
    if k < 0:
        raise ValueError(f"step: got {k}; updates are counted from 0")
    return k
