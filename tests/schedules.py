"""Every kind of schedule, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from redline import schedulers

__all__ = ["KINDS", "Decay", "Inner", "Saw", "make_optimizer", "skip_where_torch_fails", "values_of"]


class Saw(LRScheduler):
    """A script's own schedule that counts in public attributes."""

    def __init__(self, optimizer: Optimizer, period: int = 4) -> None:
        self.period, self.cycle, self.step_in_cycle = period, 0, -1
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.step_in_cycle = (self.step_in_cycle + 1) % self.period
        self.cycle += self.last_epoch > 0 and self.step_in_cycle == 0
        return [lr * 0.5**self.cycle * (1 - self.step_in_cycle / self.period) for lr in self.base_lrs]


class Decay(LRScheduler):
    """A script's own schedule that moves the weight decay as well, each time from the one before, and keeps a list."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.seen: list[float] = []
        self.shape = lambda lr: lr * 0.9
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        for group in self.optimizer.param_groups:
            group["weight_decay"] *= 0.5
        self.seen.append(float(self.optimizer.param_groups[0]["lr"]))
        if self.last_epoch == 0:
            return [group["lr"] for group in self.optimizer.param_groups]
        return [self.shape(group["lr"]) * (1 + len(self.seen) % 2) for group in self.optimizer.param_groups]


class Inner(LRScheduler):
    """A warm-up that holds the schedule which comes after it, as many in public scripts do."""

    def __init__(self, optimizer: Optimizer, steps: int = 3) -> None:
        self.steps = steps
        self.after = lr_scheduler.StepLR(optimizer, 2, 0.5)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [lr * (self.last_epoch + 1) / self.steps for lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 < self.steps:
            super().step()
        else:
            self.last_epoch += 1
            self.after.step()
            self._last_lr = self.after.get_last_lr()


class _Halving:
    """A function with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.5 ** (self.calls // 3)


def _sequential(optimizer: Optimizer) -> LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.StepLR(optimizer, 2, 0.5)], [3])


def _chained(optimizer: Optimizer) -> LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


Make = Callable[[Any], Any]

KINDS: dict[str, Make] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 14),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, [_Halving() for _ in o.param_groups]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 + 0.01 * step),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "LRRangeTest": lambda o: schedulers.LRRangeTest(o, 0.001, 3),
    "OneCycle": lambda o: schedulers.OneCycle(o, 0.01, 0.1, 0.1, 4, decay_step_size=2, decay_mom_rate=0.01),
    "OneCycle, corrected": lambda o: schedulers.OneCycle(o, 0.01, 0.1, 0.1, 4, corrected=True),
    "WarmupLR": lambda o: schedulers.WarmupLR(o, 0.01, None, 6),
    "WarmupDecayLR": lambda o: schedulers.WarmupDecayLR(o, 10, 0.01, 0.1, 4),
    "WarmupCosineLR": lambda o: schedulers.WarmupCosineLR(o, 10, 0.0, 4),
    "own, counting in public": Saw,
    "own, that moves the weight decay": Decay,
    "own, that holds another": Inner,
}


def make_optimizer(*, groups: int = 1, tensor: bool = False, lr: float = 0.08) -> Optimizer:
    """AdamW over parameters of one number; a tensor lr where asked."""
    parameters = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": torch.tensor(lr / (1 + i)) if tensor else lr / (1 + i)}
        for i in range(groups)
    ]
    return torch.optim.AdamW(parameters, lr=torch.tensor(lr) if tensor else lr, weight_decay=0.5)


def skip_where_torch_fails(kind: str, *, tensor: bool) -> None:
    """Skip a schedule that puts another tensor in the place of a tensor lr, as two of torch 2.9's do.

    SequentialLR takes the initial lr itself, and overwrites it.
    """
    if tensor:
        optimizer = make_optimizer(tensor=True)
        lr = optimizer.param_groups[0]["lr"]
        KINDS[kind](optimizer).step()
        if optimizer.param_groups[0]["lr"] is not lr:
            pytest.skip("this torch's schedule replaces a tensor lr")


def values_of(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """What schedules move, group by group."""
    return [(float(group["lr"]), group["betas"], group["weight_decay"]) for group in optimizer.param_groups]
