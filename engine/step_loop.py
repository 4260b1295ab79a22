"""The step loop: forward, backward, step.

    for x, y in loader:
        loss = loss_fn(engine(x), y)
        engine.backward(loss)
        engine.step()

Gradients add up on each rank and are reduced in the backward() that ends an accumulation, or in step() where only that
ends it; see `redline.accumulation` and `redline.distributed.strategy`. The optimizer step is in
`redline.optimizer_step`. Nothing here waits for the device: losses and norms stay tensors until they are asked for.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.accumulation import Accumulation, AccumulationState, warn_unfinished
from redline.callbacks import Callback
from redline.checkpoint import Checkpointer
from redline.data import Loader, LoaderWrapper
from redline.device import HostCopy
from redline.distributed.call_order import EVALUATES, TRAINS
from redline.distributed.failure import explain_failure
from redline.distributed.process_group import World
from redline.distributed.strategy import Strategy
from redline.errors import EngineError
from redline.first_batches import FirstBatches
from redline.input_casts import InputCasts, explain_error
from redline.optimizer_step import FiniteCheck, OptimizerStep, PendingStep
from redline.precision import LossScale, Precision, call_in_autocast
from redline.schedule_state import ScheduleStart, step_undoably

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["StepLoop"]


@dataclass(slots=True)
class Counters:
    """How far a run has come."""

    global_steps: int = 0  # optimizer steps done, skipped ones included
    global_samples: int = 0  # samples of these steps, over all ranks
    micro_steps: int = 0  # micro-batches done
    skipped_steps: int = 0  # optimizer steps that were skipped for a gradient that was not finite
    data_position: Any = None  # of the engine's own loader after the last optimizer step; None without one


class StepLoop(nn.Module):
    """Forward, backward and step of an :class:`redline.engine.Engine`, which lists its attributes."""

    _module: nn.Module

    def __init__(
        self,
        config: EngineConfig,
        world: World,
        module: nn.Module,
        precision: Precision,
        strategy: Strategy,
        optimizer: Optimizer | None,
        lr_scheduler: Any,
        scaler: LossScale | None,
        training_dataloader: Loader | None,
    ) -> None:
        super().__init__()
        self.module = module
        self.__dict__["_module"] = module  # past nn.Module's look-up, and not listed a second time
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.training_dataloader: Loader | None = None
        self.loader_wrappers: list[LoaderWrapper] = []  # of each pass over it, such as a bar
        self.config, self.world, self.precision = config, world, precision
        self.device, self.global_rank, self.local_rank = world.device, world.rank, world.local_rank
        self.world_size = world.size
        self.callbacks: list[Callback] = []
        self.client_state_on_sigterm: Callable[[], dict[str, Any]] | None = None
        self.is_compiled = False
        self.steps_per_print = config.steps_per_print
        self.schedule_start = None if optimizer is None else ScheduleStart(lr_scheduler, optimizer)

        # nn.Module takes a microsecond to set an attribute, so what changes at every step is in objects of its own.
        self._strategy, self._masters = strategy, strategy.params.masters
        self._counters = Counters()
        self._optimizer_step = OptimizerStep(
            optimizer, strategy, scaler, skips=precision.skips, clip_norm=config.gradient_clipping
        )
        self._state = AccumulationState(
            config.gradient_accumulation_steps, managed=config.managed_gradient_accumulation
        )
        self._accumulation = Accumulation(strategy, self._state, world, self._optimizer_step)
        self._finite_check = FiniteCheck(world)
        self._checkpointer = Checkpointer(config)
        # Autocast has no meta device; a run without values goes without its casts.
        self._autocast_device = "cpu" if world.device.type == "meta" else world.device.type
        self._input_casts: InputCasts | None = None
        if precision.compute is not torch.float32:
            self._input_casts = InputCasts(module, precision.compute, world.device.type)
        self._first_batches = FirstBatches(
            micro_batch=config.train_micro_batch_size_per_gpu,
            train_batch_size=config.train_batch_size,
            num_ranks=world.size,
        )
        if training_dataloader is not None:
            self._use_for_training(training_dataloader)
        weakref.finalize(self, warn_unfinished, self._state)

    def _use_for_training(self, loader: Loader) -> None:
        """Count, save and show the position in this loader."""
        loader.wrappers = self.loader_wrappers
        self.training_dataloader = self._first_batches.loader = loader
        self._counters.data_position = loader.position

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; in bf16 and fp16 layers cast fp32 inputs, see `redline.input_casts`."""
        grad_enabled = torch.is_grad_enabled()
        self._strategy.begin_call(TRAINS if grad_enabled and self._module.training else EVALUATES)
        if grad_enabled:
            if self._first_batches.watching and self._module.training:
                self._first_batches.see(args, kwargs)
            if self._strategy.params.groups_changed():  # new parameters become rank 0's before they are used
                self._accumulation.refresh_params("forward")
            state = self._state
            self._strategy.prepare_forward(is_last=state.managed and state.is_boundary(), no_sync=state.in_no_sync)
        try:
            if self._input_casts is not None:
                return self._input_casts.call(args, kwargs)
            if self.precision.autocast is not None:
                return call_in_autocast(self._module, args, kwargs, self._autocast_device, self.precision.autocast)
            return self._module(*args, **kwargs)
        except BaseException as error:
            torch.set_grad_enabled(grad_enabled)  # an interrupt may keep a hook from setting it back
            explain_failure(error, "forward")  # first: where a rank is lost, nothing can be cleaned up together
            self._strategy.reset_forward()
            explain_error(error, "forward", self._module, self.precision.compute)
            raise

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Accumulate this micro-batch's gradients.

        Several calls before a :meth:`step` add up. If it raises, on all ranks, the current accumulation is dropped, and
        the next micro-batch begins a new one.

        Args:
            loss: scalar; the mean over the micro-batch.
            retain_graph: as in `torch.autograd.backward`.
            scale_wrt_gas: divide by the accumulation steps, so that the optimizer step takes the mean gradient.

        Returns:
            The loss as it was differentiated, but for fp16's loss scale.

        Raises:
            EngineError: no optimizer; a loss that is no scalar tensor or has no graph; gradients that did not come from
                this method, or that were cleared within an accumulation.
        """
        if self.optimizer is None:
            raise EngineError(
                'backward: there is no optimizer; give the config an "optimizer" section or initialize one'
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise EngineError(f"backward: got {given}; expected a scalar tensor, such as loss.mean()")
        accumulation, steps = self._accumulation, self._state.steps
        accumulation.drop_interrupted()
        accumulation.check("backward")
        accumulation.refresh_params("backward")
        if self._optimizer_step.pending is not None:
            self.resolve_pending_step()
        if scale_wrt_gas and steps > 1:
            loss = loss / steps
        scaled = loss if self.scaler is None else loss.float() * self.scaler.value
        try:
            accumulation.backward(loss, scaled, retain_graph=retain_graph, divided=scale_wrt_gas)
        except BaseException as error:
            accumulation.drop(f"backward was interrupted by {type(error).__name__}")
            explain_failure(error, "backward")
            explain_error(error, "backward", self._module, self.precision.compute)
            raise
        return loss

    def step(self) -> None:
        """End a micro-batch; at the accumulation boundary run the optimizer, then the learning rate schedule.

        Raises:
            EngineError: there was no backward since the last step, or it is called inside :meth:`no_sync`; gradients
                did not come from :meth:`backward`; no loss of the accumulation has reached a parameter that trains; in
                fp16, an overflow with the loss scale at its minimum.
        """
        state = self._state
        if state.in_no_sync:
            raise EngineError(
                "step: called inside no_sync(), where gradients are not complete; call it after the block"
            )
        if not state.pending:
            raise EngineError(
                "step: no backward since the last step; call engine.backward(loss) first, not loss.backward()"
            )
        self._accumulation.check("step")
        grad_enabled = torch.is_grad_enabled()
        try:
            self._checkpointer.check()
            self._counters.micro_steps += 1
            if state.end_micro_batch():
                self._accumulation.refresh_params("step")
                self._take_step(self._accumulation.reduce())
        except BaseException as error:
            self._recover_from("step", error, grad_enabled)
            raise

    def _take_step(self, gradients: list[Tensor]) -> None:
        """The optimizer, callbacks, the schedule, callbacks."""
        if self._first_batches.watching:
            self._first_batches.compare(self.world)
        state, counters, step = self._state, self._counters, self._optimizer_step
        micro_batches = state.micro_batches if state.managed else state.backwards
        loss = torch.zeros((), device=self.device) if state.loss is None else state.loss  # None: they had no graph
        try:
            skipped = step.run(gradients, loss)
        finally:  # also where it is interrupted: the weights may have moved, so that these gradients have been used
            self._accumulation.reset()
        counters.global_steps += 1
        counters.global_samples += micro_batches * self.config.train_micro_batch_size_per_gpu * self.world.size
        if self.training_dataloader is not None:
            counters.data_position = self.training_dataloader.position
        norm = step.grad_norm
        assert norm is not None and self.optimizer is not None
        is_pending = skipped is None  # only the device knows yet
        if not is_pending:
            self._record_outcome(loss, norm, skipped=bool(skipped))
        try:
            for callback in self.callbacks:
                callback.on_step(self)
            if skipped:
                self._call_on_skip()
        finally:  # the step is made: schedule and loss scale follow it also where a callback raises
            if is_pending:
                step.pending = PendingStep(loss, HostCopy(norm), step_undoably(self.lr_scheduler, self.optimizer))
            elif self.lr_scheduler is not None and not skipped:
                self.lr_scheduler.step()
            if self.scaler is not None and not is_pending:
                self.scaler.update(bool(skipped))
        for callback in self.callbacks:
            callback.on_step_end(self)

    def resolve_pending_step(self) -> None:
        """Wait for the overflow check of the last optimizer step, if it is pending on the device.

        If the step was skipped, its schedule step is undone, and it is counted and reported. The next backward() does
        this by itself.
        """
        step = self._optimizer_step
        pending, step.pending = step.pending, None
        if pending is None:
            return
        (norm,) = pending.norm.read()
        skipped = not math.isfinite(norm)
        try:
            if skipped:
                pending.undo_schedule()  # it was stepped as if this step were taken
                step.undo()
            self._record_outcome(pending.loss, norm, skipped=skipped)
            if skipped:
                self._call_on_skip()
        finally:  # also where a callback raises
            if self.scaler is not None:
                self.scaler.update(skipped)

    def _record_outcome(self, loss: Tensor, norm: Tensor | float, *, skipped: bool) -> None:
        """Count and report the last optimizer step, once it is known whether it was skipped."""
        self._counters.skipped_steps += skipped
        step, own = self._counters.global_steps - 1, self._optimizer_step.own
        if skipped:
            self._finite_check.skipped(step, loss, float(norm), own, self.scaler)
        else:
            self._finite_check.taken(step, loss, norm, own)

    def _call_on_skip(self) -> None:
        for callback in self.callbacks:
            callback.on_skip(self, self._counters.global_steps)

    def _recover_from(self, method: str, error: BaseException, grad_enabled: bool) -> None:
        """After an exception or an interrupt in a step: drop what is unfinished, so that the next batch trains."""
        torch.set_grad_enabled(grad_enabled)  # an interrupt may keep an optimizer from setting it back
        # An EngineError has refused the step, and left the accumulation to the script, or has reset it already.
        if self._state.backwards and not isinstance(error, EngineError):
            self._accumulation.drop(f"{method} was interrupted by {type(error).__name__}")
        explain_failure(error, method)  # before the next line, a collective: it would wait for a rank that is lost
        self._optimizer_step.recover()

    # -- what a script may do to an accumulation -----------------------------------------------------

    def flush(self) -> bool:
        """Run the optimizer now, with the mean over the micro-batches so far: for an accumulation that ends early.

        The mean is over all ranks, which may have accumulated different numbers of micro-batches; every rank calls
        this. Losses that the script has scaled itself (``scale_wrt_gas=False``) are taken as they are.

        Returns:
            Whether there were any micro-batches.

        Raises:
            EngineError: some of the losses were scaled by the engine and others by the script.
        """
        self._accumulation.check("flush")
        self._checkpointer.check()
        self.resolve_pending_step()  # there is one on a rank that had no backward since; its loss scale is outdated
        grad_enabled = torch.is_grad_enabled()
        try:
            gradients = self._accumulation.reduce_early()
            if gradients is None:
                return False
            self._take_step(gradients)
        except BaseException as error:
            self._recover_from("flush", error, grad_enabled)
            raise
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients of the model and of the optimizer.

        :meth:`step` leaves none. Within an accumulation this loses gradients of the next optimizer step, which the next
        :meth:`backward` or :meth:`step` refuses; :meth:`drop_update` starts a new accumulation.
        """
        super().zero_grad(set_to_none)
        if not self._state.backwards:
            self._strategy.clear_gradients()
        for param in self._strategy.params.all:  # also where the model has others, such as FSDP2's unsharded ones
            param.grad = None

    def gradient_of(self, param: Tensor) -> Tensor | None:
        """A model parameter's gradient between backward() and step(), times the loss scale of fp16; None without one.

        At the accumulation boundary of several ranks it is the one that the optimizer gets, a DTensor where that is
        sharded; before it, and on one rank, what this rank has accumulated.
        """
        return self._strategy.gradient_of(param)

    def drop_update(self) -> None:
        """Drop the micro-batches since the last optimizer step, and their gradients."""
        self._accumulation.reset()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this block backward passes keep their gradients on this rank; the next reduction includes them."""
        outer = self._state.in_no_sync  # the context may be nested
        self._state.in_no_sync = True
        try:
            yield
        finally:
            self._state.in_no_sync = outer

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of its accumulation.

        With `managed_gradient_accumulation` false this is False, since every step() is an optimizer step.
        """
        return self._state.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Set whether the next micro-batches each end their accumulation; the engine stops counting them.

        Raises:
            EngineError: with `managed_gradient_accumulation` false, where every step() is an optimizer step.
        """
        if not self._state.managed:
            raise EngineError(
                "set_gradient_accumulation_boundary: managed_gradient_accumulation is false, so that every step() is "
                "an optimizer step; call step() only where one is due"
            )
        self._state.boundary = bool(is_boundary)

    def train(self, mode: bool = True) -> Any:
        """Set the training mode, as of any module; the next optimizer step also finds writes through ``.data``."""
        if self._masters is not None:
            # Scripts swap weights for their average around an evaluation, by writes that change no version.
            self._masters.compare_values()
        return super().train(mode)
