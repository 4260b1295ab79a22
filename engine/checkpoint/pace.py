"""A learning rate schedule, from a checkpoint into an engine's; or the engine's own, put at a step of a fresh run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.checkpoint.compare import schedule_changes
from engine.checkpoint.plain import unpack
from engine.checkpoint.state import schedule_of
from engine.errors import EngineError
from engine.log import log
from engine.schedule_state import load_portable
from schedulers.registry import is_built_in

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Pace"]


class Pace:
    """What a checkpoint has for a schedule, found to fit.

    The schedule goes on with its saved state where that fits and the saved settings of the optimizer's groups are
    loaded, too. Else it is put where a fresh run of this engine has it, values in the groups included: at the step
    that was reached, or with `states` false at the first.

    Args:
        engine: whose schedule it is.
        shared: the checkpoint's state.json.
        states: whether the schedule's state is wanted.
        settings: whether the settings of the optimizer's groups are loaded.

    Raises:
        EngineError: the schedule is of another type, or has other parameters, and the config does not override; or it
            cannot be put at the step that was reached.
    """

    def __init__(self, engine: Engine, shared: Mapping[str, Any], *, states: bool, settings: bool) -> None:
        self._schedule: Any = engine.lr_scheduler
        self._engine = engine
        self._saved: dict[str, Any] | None = shared["schedule"]
        self._loads = False
        self._put: Callable[[], None] | None = None
        counters = shared["counters"]
        steps: int = counters["global_steps"] - counters["skipped_steps"]
        if not states:
            if self._schedule is not None or self._saved is not None:
                self._put = self._place(0)
            return
        changes = schedule_changes(self._saved, schedule_of(engine, {}))
        if changes:
            said = f"scheduler: {', '.join(changes)}"
            if not engine.config.redline.checkpoint.override_schedule:
                raise EngineError(
                    f"{said}; give the config the old schedule; or go on with the new one, at the step that was "
                    'reached: "redline": {"checkpoint": {"override_schedule": true}}; or from its beginning: '
                    "load_lr_scheduler_states=False"
                )
            log.warning("load_checkpoint: %s; the new one goes on at step %d", said, steps)
            self._put = self._place(steps)
        elif self._schedule is not None and self._saved is not None:
            if not settings:
                self._put = self._place(self._reached(steps))
            # One of ours or torch's is where its step says. Its saved state would bring the old optimizer's rates.
            self._loads = settings or self._put is None or not is_built_in(self._schedule)

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the schedule where it belongs, after the optimizer's settings are loaded."""
        if self._put is not None:
            self._put()
        if self._loads and self._saved is not None:
            load_portable(self._schedule, unpack(self._saved["state"], tensors))

    def _reached(self, steps: int) -> int:
        """The step of the saved state, where that tells; a script may have stepped the schedule itself."""
        assert self._saved is not None
        start = self._engine._schedule_start
        told = {key: value for key, value in self._saved["state"].items() if type(value) is int}
        reached = None if start is None else start.position(told)
        return steps if reached is None else reached

    def _place(self, steps: int) -> Callable[[], None] | None:
        start = self._engine._schedule_start
        if start is None:
            return None
        if start.schedule is not self._schedule:
            log.warning(
                "load_checkpoint: scheduler: engine.lr_scheduler is not the one that initialize made or was given, so "
                "that it cannot be put at step %d; it goes on from where it is",
                steps,
            )
            return None
        try:
            return start.at(steps)
        except ValueError as error:
            raise EngineError(
                f"scheduler {type(self._schedule).__name__}: it cannot be put at step {steps}, which the checkpoint "
                f"has reached: {error}; make it longer, or begin it again: load_lr_scheduler_states=False"
            ) from error
