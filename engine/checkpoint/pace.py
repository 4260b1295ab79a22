"""A learning rate schedule, from a checkpoint into an engine's; or, where it has changed, its place only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.checkpoint.compare import schedule_changes
from engine.checkpoint.plain import unpack
from engine.checkpoint.state import schedule_of, set_setting
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Pace"]


class Pace:
    """What a checkpoint has for a schedule, found to fit.

    Raises:
        EngineError: the schedule is of another type, or has other parameters, and the config does not override.
    """

    def __init__(self, engine: Engine, shared: Mapping[str, Any]) -> None:
        self._schedule: Any = engine.lr_scheduler
        self._optimizer = engine.optimizer
        self._saved: dict[str, Any] | None = shared["schedule"]
        counters = shared["counters"]
        self._updates: int = counters["global_steps"] - counters["skipped_steps"]
        changes = schedule_changes(self._saved, schedule_of(engine, {}))
        self.changed = bool(changes)
        if not changes:
            return
        said = f"scheduler: {', '.join(changes)}"
        if not engine.config.redline.checkpoint.override_schedule:
            raise EngineError(
                f"{said}; give the config the old schedule; or go on with the new one, at the step that was reached: "
                '"redline": {"checkpoint": {"override_schedule": true}}; or from its beginning: '
                "load_lr_scheduler_states=False"
            )
        log.warning("load_checkpoint: %s; the new one goes on at step %d", said, self._updates)

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the schedule where it was, after the optimizer's settings are."""
        if self._schedule is None:
            return
        if self._saved is not None and not self.changed:
            self._schedule.load_state_dict(unpack(self._saved["state"], tensors))
        elif self.changed:
            self._go_to(self._updates)

    def _go_to(self, updates: int) -> None:
        """Put another schedule than the saved one at a step, and its values into the optimizer."""
        state = self._schedule.state_dict()
        if "last_batch_iteration" in state:  # ours
            self._schedule.load_state_dict({"last_batch_iteration": updates - 1})
            self._schedule.step(updates - 1)
            return
        if "last_epoch" not in state:
            log.warning("load_checkpoint: scheduler: its state has no last_epoch to go to a step; it begins anew")
            return
        self._schedule.load_state_dict({**state, "last_epoch": updates, "_step_count": updates + 1})
        closed = getattr(self._schedule, "_get_closed_form_lr", None)
        if closed is not None and self._optimizer is not None:  # else torch goes on from the rate that was saved
            for group, lr in zip(self._optimizer.param_groups, closed()):
                set_setting(group, "lr", lr)
