"""All of a run that a range test moves, to be put back bit for bit.

Model (parameters, buffers, training flags, what modules keep in plain attributes), optimizer (state, and groups with
tensor rates in place), schedule, loss scale, batch size, the engine's counters, the random numbers of Python, NumPy,
torch and CUDA, and order and position of the data.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.data import Loader
from engine.engine import Engine
from engine.randomness import random_state, set_random_state
from engine.range_test.kept import keep_generators, keep_module
from engine.range_test.sources import numbers_in, parts_of

__all__ = ["Snapshot"]


class Snapshot:
    """The state of an engine and its data at one moment, held in memory beside the original.

    Args:
        engine: at the beginning of an update.
        data: what the test will read from: loaders, their samplers and generators.
        loss: what the test will call; of a module its state is kept, too.
    """

    def __init__(self, engine: Engine, *data: Any, loss: Any = None) -> None:
        assert engine.optimizer is not None
        self._engine = engine
        engine.settle()
        engine.put_away()
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in _tensors_of(engine)]
        modules = [*engine.module.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
        self._modules = [keep_module(module) for module in dict.fromkeys(modules)]
        self._training = [(module, module.training) for module in dict.fromkeys([engine, *modules])]
        self._optimizer = _OptimizerState(engine.optimizer)
        self._schedule = engine.lr_scheduler
        self._schedule_state = None if engine.lr_scheduler is None else copy.deepcopy(engine.lr_scheduler.state_dict())
        self._scale = None if engine.scaler is None else engine.scaler.state_dict()
        self._counters = {name: engine.__dict__[name] for name in _COUNTERS}
        self._boundary = engine._accumulation.boundary
        self._grad_norm = engine.grad_norm
        self._batch_size = engine.train_batch_size()
        parts = parts_of(*data)
        self._randoms = [keep_generators(part) for part in parts]
        self._numbers = {name: numbers_in(parts, name) for name in ("seed", "epoch")}
        self._loaders = [(part, copy.deepcopy(part.state_dict())) for part in data if hasattr(part, "load_state_dict")]
        self._positions = [(part, part.position) for part in data if isinstance(part, Loader)]
        self._random = random_state()

    def restore(self) -> None:
        """Put everything back, in place; may be called any number of times."""
        self._engine.put_away()
        with torch.no_grad():
            for tensor, saved in self._tensors:
                tensor.copy_(saved)
        self._engine.drop_update()
        for put_back in (*self._modules, *self._randoms):
            put_back()
        for module, training in self._training:
            module.training = training
        self._optimizer.restore()
        self._engine.lr_scheduler = self._schedule
        if self._schedule is not None:
            self._schedule.load_state_dict(copy.deepcopy(self._schedule_state or {}))
            self._optimizer.restore_groups()  # a schedule may write its rates on loading
        self._engine.__dict__.update(self._counters)
        self._engine._accumulation.set_boundary(self._boundary)
        self._engine._optimizer_step.grad_norm = self._grad_norm
        self._engine.set_train_batch_size(self._batch_size)
        if self._engine.scaler is not None and self._scale is not None:
            self._engine.scaler.load_state_dict(self._scale)
        for name, numbers in self._numbers.items():
            for part, number in numbers:
                setattr(part, name, number)
        for part, state in self._loaders:
            part.load_state_dict(copy.deepcopy(state))
        for loader, position in self._positions:
            loader.position = position  # a loaded state would go on with a pass that was broken off
        set_random_state(self._random)


# What the step loop moves, and the test's own recording and printing switch off.
_COUNTERS = (
    "global_steps",
    "global_samples",
    "micro_steps",
    "_skipped",
    "_settled_position",
    "_doubt",
    "recorder",
    "observers",
    "after_update",
    "_finite",
    "_last_loss",
)


class _OptimizerState:
    """An optimizer's state and groups; not its state_dict, whose loading gives tensor rates a new identity."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {parameter: _copied(state) for parameter, state in optimizer.state.items()}
        self._groups = [_copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]

    def restore(self) -> None:
        self._optimizer.state.clear()
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = _copied(state)
        self.restore_groups()

    def restore_groups(self) -> None:
        for group, saved in zip(self._optimizer.param_groups, self._groups):
            for key in group.keys() - saved.keys() - {"params"}:
                del group[key]
            for key, value in saved.items():
                if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                    with torch.no_grad():
                        group[key].copy_(value)
                else:
                    group[key] = copy.deepcopy(value)


def _copied(state: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}


def _tensors_of(engine: Engine) -> list[Tensor]:
    # The optimizer has the master weights.
    assert engine.optimizer is not None
    weights = (parameter for group in engine.optimizer.param_groups for parameter in group["params"])
    return list(dict.fromkeys([*engine.parameters(), *weights]))
