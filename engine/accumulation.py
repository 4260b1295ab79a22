"""Gradient accumulation: the micro-batches since the last optimizer step, and their gradients."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from redline.device import reads_cost_nothing
from redline.distributed.process_group import World, can_reduce_on_host
from redline.distributed.strategy import Strategy
from redline.errors import EngineError
from redline.gradients import scale_by
from redline.log import log
from redline.optimizer_step import OptimizerStep

__all__ = ["Accumulation", "AccumulationState", "warn_unfinished"]


class AccumulationState:
    """Counts the micro-batches since the last optimizer step.

    Args:
        steps: micro-batches of one optimizer step.
        managed: whether they are counted; otherwise every call of step() is an optimizer step.
    """

    def __init__(self, steps: int, *, managed: bool) -> None:
        self.steps, self.managed = steps, managed
        self.in_no_sync = False  # inside the context of the same name
        self.boundary: bool | None = None  # whether micro-batches end their step; None where they are counted
        self.reset()

    def reset(self) -> None:
        """Begin a new accumulation."""
        self.micro_batches = 0  # ended by a step()
        self.backwards = 0
        self.pending = False  # whether there was a backward whose step() has not come yet
        self.reached = False  # whether a gradient was reduced, of whatever rank
        self.no_graph = False  # whether a loss on this rank had no graph, which is reported when the ranks reduce
        self.shown_exception: object = None  # the last exception that Python had shown at the last backward
        self.loss: Tensor | None = None  # the sum of the backwards' losses, on the device, in fp32 or wider
        self.divided = 0  # backwards whose loss was divided by `steps`

    def is_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of its optimizer step; see `Engine`."""
        if not self.managed:
            return False
        return self.micro_batches + 1 >= self.steps if self.boundary is None else self.boundary

    def add_backward(self, loss: Tensor, *, divided: bool) -> None:
        """Count a backward of this (detached) loss; `divided`: it was divided by `steps`."""
        if loss.element_size() < 4:  # sums and means of it should not be rounded again
            loss = loss.float()
        self.loss = loss if self.loss is None else self.loss + loss
        self.backwards += 1
        self.divided += divided
        self.pending = not self.in_no_sync

    def end_micro_batch(self) -> bool:
        """Count a step(); returns whether it is an optimizer step."""
        ends = not self.managed or self.is_boundary()
        self.pending = False
        self.micro_batches += 1
        return ends

    @property
    def accumulated(self) -> int:
        """The micro-batches whose gradients have been accumulated, including one without its step()."""
        if not self.managed or not self.backwards:
            return self.backwards
        return max(self.micro_batches + self.pending, 1)


class Accumulation:
    """The gradients of one optimizer step: from the backward of each micro-batch to the gradients of all ranks.

    Its methods take the name of the engine's method that errors are to name.
    """

    def __init__(
        self, strategy: Strategy, state: AccumulationState, world: World, optimizer_step: OptimizerStep
    ) -> None:
        self.state = state
        self._strategy, self._world, self._optimizer_step = strategy, world, optimizer_step
        # At stage 3 a backward runs collectives, which a rank whose loss has no graph would skip.
        self._agrees_before_backward = world.size > 1 and strategy.reduces_in_backward and can_reduce_on_host()
        self._reduces_at_boundary = world.size > 1 and not strategy.reduces_in_backward
        # Where reading what was reduced would wait for the device, hosts tell each other what all have to know.
        waits = not reads_cost_nothing(world.device)
        self._agrees_on_host = self._reduces_at_boundary and waits and can_reduce_on_host()

    def check(self, method: str) -> None:
        """Refuse gradients and optimizer steps that did not come from the engine."""
        if self._optimizer_step.called_elsewhere():
            self._optimizer_step.recover()
            self.reset()
            raise EngineError(
                f"{method}: the optimizer's own step() was called since the last engine.step(), without clipping, "
                "loss scale, gradient accumulation and learning rate schedule; call only engine.step() after "
                "engine.backward(loss)"
            )
        if self._strategy.gradients_unchanged():
            return
        raise EngineError((_CHANGED_GRADIENTS if self.state.backwards else _FOREIGN_GRADIENTS).format(method))

    def refresh_params(self, method: str) -> None:
        """Follow changes of which parameters train.

        Raises:
            EngineError: a parameter that starts to train has a gradient already.
        """
        params = self._strategy.params
        earlier = params.model, params.others  # refresh() makes new lists
        if not params.refresh():
            return
        self._strategy.refresh_params()
        known = {id(param) for each in earlier for param in each}
        if any(param.grad is not None and id(param) not in known for param in params.model):
            if self.state.backwards:  # it can no longer be told from the engine's gradients
                self.reset()
            raise EngineError(_FOREIGN_GRADIENTS.format(method))

    def backward(self, loss: Tensor, scaled: Tensor, *, retain_graph: bool, divided: bool) -> None:
        """Accumulate the gradients of a micro-batch; at the boundary reduce them over the ranks.

        Args:
            loss: scalar, which counts in the mean loss.
            scaled: the same times the loss scale, which is differentiated.
            retain_graph: as in `torch.autograd.backward`.
            divided: whether the loss was divided by the accumulation steps.
        """
        state = self.state
        self._strategy.prepare_backward()
        if self._agrees_before_backward and self._world.sum(torch.tensor(float(not loss.requires_grad))):
            raise EngineError(f"on another rank, {_NO_GRAPH}" if loss.requires_grad else _NO_GRAPH)
        if loss.requires_grad:
            scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        elif self._reduces_at_boundary:
            state.no_graph = True  # reported on all ranks when they reduce
        else:
            raise EngineError(_NO_GRAPH)
        self._strategy.collect_gradients()
        state.add_backward(loss.detach(), divided=divided)
        state.shown_exception = _shown_exception()
        ends = self._reduces_at_boundary and (self._strategy.always_reduces or state.is_boundary())
        if ends and not state.in_no_sync:
            # As DDP and DeepSpeed do: between backward() and step() gradients are those of all ranks.
            self._reduce()

    def reduce(self) -> list[Tensor]:
        """The gradients of all ranks, for an optimizer step.

        Raises:
            EngineError: on all ranks: a loss had no graph, or none has reached a parameter.
        """
        gradients = self._reduce()
        if self.state.reached and gradients:
            return gradients
        self.reset()
        if not self._strategy.params.model:
            raise EngineError(
                "step: none of the optimizer's parameters requires gradients now, so that there is nothing to train; "
                "thaw some with requires_grad_(True)"
            )
        raise EngineError(
            f"step: no loss has reached any of the {len(self._strategy.params.model)} parameters that train, on any "
            "rank; compute the loss from the model's output, without detach() or torch.no_grad(), or give the "
            "optimizer the parameters that it depends on"
        )

    def _reduce(self) -> list[Tensor]:
        state = self.state
        reached, no_graph = self._strategy.has_gradients(), state.no_graph
        gradients, status = self._strategy.reduce_gradients((reached, no_graph))
        state.reached = state.reached or reached
        if status is not None and self._agrees_on_host:
            status = self._world.sum(torch.tensor((float(reached), float(no_graph))))
        # Without that, and while all is well, what this rank knows is enough.
        told = self._agrees_on_host or no_graph or not reached
        if status is not None and (told or reads_cost_nothing(status.device)):
            ranks_reached, ranks_without_graph = status.tolist()
            state.reached = state.reached or ranks_reached > 0.5
            if ranks_without_graph > 0.5:
                self.reset()
                raise EngineError(_NO_GRAPH if no_graph else f"on another rank, {_NO_GRAPH}")
        return gradients

    def reduce_early(self) -> list[Tensor] | None:
        """The gradients of the micro-batches so far, as their mean over all ranks; None where there were none.

        Raises:
            EngineError: on all ranks: some losses were scaled by the engine and others by the script.
        """
        state = self.state
        counts = [state.accumulated, state.divided, state.backwards - state.divided]
        if self._world.size > 1:
            counts = self._world.sum(torch.tensor(counts, device=self._world.device)).tolist()
        total, divided_by_engine, left_to_script = counts
        if total == 0:
            return None
        if divided_by_engine and left_to_script:
            raise EngineError(
                "flush: some losses of this accumulation were divided by gradient_accumulation_steps and others were "
                "not (scale_wrt_gas=False), so that their mean is not known; scale all of them in one way"
            )
        self.refresh_params("flush")
        gradients = self.reduce()
        if divided_by_engine:
            scale_by(gradients, state.steps * self._world.size / total)
            if state.loss is not None:
                state.loss = state.loss * (state.steps / state.accumulated)
        return gradients

    def reset(self) -> None:
        """Forget the micro-batches since the last optimizer step, and their gradients."""
        self._strategy.clear_gradients()
        self._strategy.reduction.own.take()
        self.state.reset()

    def drop(self, why: str) -> None:
        """The same, with a warning."""
        count = self.state.accumulated
        self.reset()
        if count:
            log.warning(
                "backward: %s; the gradients of %d micro-batch%s are dropped, and the next one begins a new "
                "accumulation",
                why, count, "es" if count > 1 else "",
            )  # fmt: skip

    def drop_interrupted(self) -> None:
        """Drop a micro-batch whose step() was prevented by an exception, if Python has shown that to the user."""
        if self.state.pending and _shown_exception() is not self.state.shown_exception:
            self.drop("an exception came between its backward() and its step()")


_CHANGED_GRADIENTS = (
    "{}: gradients of the current accumulation were changed since the last engine.backward(): cleared by zero_grad(), "
    "added to by a plain loss.backward(), or written into; call engine.backward(loss) for every loss and leave "
    "clearing to engine.step(), or begin the accumulation anew with engine.drop_update()"
)
_FOREIGN_GRADIENTS = (
    "{}: the parameters have gradients that did not come from engine.backward(), such as those of a plain "
    "loss.backward() or, at ZeRO stage 3, of torch.autograd.grad(); call engine.backward(loss) for every loss, or "
    "clear them with engine.zero_grad()"
)
_NO_GRAPH = (
    "backward: the loss does not require gradients, so that it can't train anything; compute it from the model's "
    "output, outside of torch.no_grad() and torch.inference_mode(), and without detach() or item()"
)


def _shown_exception() -> object:
    """The last exception that Python has shown to the user: in a notebook, of a cell that was stopped."""
    return getattr(sys, "last_value", None)


def warn_unfinished(state: AccumulationState) -> None:
    """Warn at the end of training of micro-batches that are in no optimizer step."""
    if state.micro_batches:
        log.warning(
            "training ended within an accumulation: its last %d of %d micro-batches are in no optimizer step; call "
            "engine.flush() after the last one, or give a number of micro-batches that divides",
            state.micro_batches, state.steps,
        )  # fmt: skip
