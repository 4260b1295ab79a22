"""Where the runs of a tuning are made: on one live engine, or on one built anew for each seed."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from engine.engine import Engine
from engine.log import log
from engine.range_test.rig import Rig
from engine.range_test.task import LossFn, Task

__all__ = ["FreshEngines", "OneEngine", "Stand"]


class Stand(Protocol):
    """Has a rig for each seed, one at a time."""

    validates: bool

    def rig(self, seed: int) -> Rig: ...
    def close(self) -> Engine | None: ...


class OneEngine:
    """A live engine for all seeds: they change the order of the data and dropout, not the initial weights.

    Args:
        engine, data, loss, validation: as for :class:`Rig`.
    """

    def __init__(self, engine: Engine, data: Any, loss: LossFn, validation: Any) -> None:
        self._engine, self._rig = engine, Rig(engine, data, loss, validation=validation)
        self._rig.__enter__()
        self.validates = validation is not None

    def rig(self, seed: int) -> Rig:
        return self._rig

    def close(self) -> Engine:
        """The engine is as it was before, its monitors, too."""
        self._rig.__exit__(None, None, None)
        return self._engine


class FreshEngines:
    """An engine for each seed, from a task that is built anew: the initial weights differ, too.

    Args:
        task: builds model, data and loss; called after torch has its seed.
        engine: makes an engine of the model.
        first_seed: torch's seed of the tests' seed 0; the others follow.
    """

    def __init__(self, task: Callable[[], Task], engine: Callable[[Task], Engine], first_seed: int) -> None:
        self._make_task, self._make_engine, self._first_seed = task, engine, first_seed
        self._seed: int | None = None
        self._rig: Rig | None = None
        self._built = False
        self._scale: dict[str, Any] | None = None  # where the last rig's runs have settled
        self.validates = False

    def rig(self, seed: int) -> Rig:
        if self._rig is None or seed != self._seed:
            self.close()
            gc.collect()  # engines and DDP refer to themselves
            self._rig, self._seed = self._build(seed), seed
        return self._rig

    def close(self) -> Engine | None:
        """Let the engine go: one at a time is in memory. Who wants its monitors for a last word gets it."""
        if self._rig is None:
            return None
        engine, self._scale = self._rig.engine, self._rig.scale
        self._rig.__exit__(None, None, None)
        self._rig = None
        return engine

    def _build(self, seed: int) -> Rig:
        level = log.level
        if self._built:
            log.setLevel(logging.WARNING)  # the first has introduced itself
        try:
            torch.manual_seed(self._first_seed + seed)
            task = self._make_task()
            engine = self._make_engine(task)
        finally:
            if self._built:
                log.setLevel(level)
        self._built = True
        self.validates = task.validation is not None
        rig = Rig(engine, task.data, task.loss, validation=task.validation)
        rig.scale = self._scale
        return rig.__enter__()
