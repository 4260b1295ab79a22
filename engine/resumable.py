"""A step loop whose state can be read, replaced and restored: what checkpoints and range tests use.

Together with the attributes of `redline.step_loop.StepLoop` this is the protocol `redline.run_state.Run`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from redline.distributed.sharding import RunCollective
from redline.gradients import Reduction
from redline.master_params import MasterParams
from redline.step_loop import StepLoop

__all__ = ["ResumableLoop"]


class ResumableLoop(StepLoop):
    """The step loop of an :class:`redline.engine.Engine`, seen by what saves and restores it."""

    @property
    def master_params(self) -> MasterParams | None:
        """The copies that the optimizer updates in place of the model's parameters; None where there are none."""
        return self._masters

    @property
    def accumulated_micro_batches(self) -> int:
        """Micro-batches whose gradients wait for the next optimizer step."""
        return self._state.accumulated

    @property
    def resume_position(self) -> tuple[int, int, bool] | None:
        """Within an accumulation: the position in the data after the last optimizer step; else None."""
        return self._counters.data_position if self._state.backwards else None

    def copy_master_to_model(self) -> None:
        """Copy the master params to the model, where there are some."""
        self._strategy.params.copy_to_model()

    def counters(self) -> dict[str, int]:
        """The counters after the last optimizer step; micro-batches since then are not counted."""
        self.resolve_pending_step()
        counters = self._counters
        return {
            "global_steps": counters.global_steps,
            "global_samples": counters.global_samples,
            "micro_steps": counters.micro_steps - self._state.micro_batches,
            "skipped_steps": counters.skipped_steps,
        }

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Continue from these counters and from where the training data are."""
        loader = self.training_dataloader
        for name, value in counters.items():
            setattr(self._counters, name, value)
        self._counters.data_position = None if loader is None else loader.position
        self._optimizer_step.loss = self._optimizer_step.grad_norm = None

    @property
    def reduction(self) -> Reduction:
        """How the gradients of all ranks become one; may be replaced by one that does the same, and logs it."""
        return self._strategy.reduction

    @reduction.setter
    def reduction(self, reduction: Reduction) -> None:
        self._strategy.reduction = reduction

    def observe_collectives(self, run_collective: RunCollective) -> None:
        """Let `run_collective` run the collectives of parameters and gradients that are not the reduction's."""
        self._strategy.observe_collectives(run_collective)

    def loop_state(self) -> dict[str, Any]:
        """Everything else that the step loop changes, or a range test replaces."""
        state, last = self._state, self._optimizer_step
        return {
            "counters": copy.copy(self._counters),
            "pending_step": last.pending,
            "callbacks": self.callbacks,
            "reports_not_finite": self._finite_check.enabled,
            "last": (last.loss, last.grad_norm),
            "accumulation": (state.boundary, state.steps),
        }

    def load_loop_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `loop_state` returned."""
        self._counters = copy.copy(state["counters"])
        self.callbacks, self._finite_check.enabled = state["callbacks"], state["reports_not_finite"]
        last = self._optimizer_step
        last.pending, (last.loss, last.grad_norm) = state["pending_step"], state["last"]
        self._state.boundary, self._state.steps = state["accumulation"]

    def allow_divergence(self) -> None:
        """For a range test: do not report non-finite losses, and count micro-batches again."""
        self._finite_check.enabled = False
        self._state.boundary = None

    @property
    def shards_parameters(self) -> bool:
        """Whether each rank has shards of the parameters only (ZeRO stage 3), so that every forward is a collective."""
        return self._strategy.reduces_in_backward

    def reshard(self) -> None:
        """Copy writes into the model to the master params; free unsharded copies of parameters."""
        self._strategy.reshard()
        if self._masters is not None:
            self._masters.compare_values()
            self._masters.adopt_writes()
