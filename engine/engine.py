"""The engine: a model that trains as its config says, one micro-batch at a time.

    for x, y in loader:
        loss = loss_fn(engine(x), y)
        engine.backward(loss)
        engine.step()

Owns the step loop and its counters; `build.py` makes the parts. Gradients add up on each rank, and are reduced in
the backward() that ends an accumulation, or in step() where only that ends it; see `engine.parallel`. Nothing here
waits for the device: losses and norms stay tensors until their value is asked for.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.accumulation import AccumulationState
from engine.checkpoint import Wanted, load_checkpoint, save_16bit_model, save_checkpoint
from engine.data import CollateFn, Loader, build_loader
from engine.distributed import can_reduce_on_host
from engine.doubt import Doubt
from engine.errors import EngineError
from engine.finite import FiniteWatch
from engine.first_batches import FirstBatches
from engine.gradients import scale_by
from engine.inputs import InputCasts, explain_forward_error
from engine.log import log
from engine.optimizer_step import OptimizerStep
from engine.parts import Parts
from engine.peers import explains_losses
from engine.schedule_state import step_undoably
from engine.transfer import reads_cost_nothing

if TYPE_CHECKING:
    from engine.checkpoint.background import Background

__all__ = ["Engine", "Observer"]


class Observer(Protocol):
    """What looks at the engine after every optimizer step, before learning rate and momentum move on."""

    def updated(self, engine: Engine) -> None: ...


class Engine(nn.Module):
    """A model, its optimizer and its schedule, driven by a config.

    Made by :func:`engine.initialize`. The names are DeepSpeed's.

    Attributes:
        module: the model as it was given, on the engine's device. Up to ZeRO stage 2 its parameters are full on every
            rank, in the dtype of the computation; at stage 3 they are DTensors, of which each rank has its fp32 shard.
        optimizer: None when neither config nor script gave one; the engine then only evaluates. Its groups have the
            master params in low precision and at stages 1 and 2 (there as DTensors), else the model's own.
        lr_scheduler: None for a fixed learning rate.
        training_dataloader: over `training_data`, if that was given.
        config: the config in force, batch sizes resolved.
        device: where the model is.
        global_rank, local_rank, world_size: this rank among all.
        global_steps: optimizer steps done, skipped ones included.
        global_samples: samples of these steps, over all ranks.
        micro_steps: micro-batches done.
        is_compiled: whether the model runs as :meth:`compile` made it.
        scaler: of the loss, in fp16; None elsewhere.
        recorder: of a range test, if the config asks for one.
        observers: what looks at every optimizer step, in this order.
        after_update: what is called when an optimizer step is complete, and learning rate and momentum have moved.
        client_state_on_sigterm: gives the `client_state` of the checkpoint that SIGTERM asks for; None for none.
        steps_per_print: optimizer steps between two progress lines; None for no lines. May be changed at any time, on
            all ranks alike.
    """

    _module: nn.Module

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self._schedule_start = parts.schedule_start
        self.training_dataloader = parts.training_dataloader
        self.recorder = parts.recorder
        self.observers: list[Observer] = []
        self.after_update: Callable[[Engine], None] | None = None
        self.client_state_on_sigterm: Callable[[], dict[str, Any]] | None = None
        self.config = parts.config
        self.world = parts.world
        self.device = parts.world.device
        self.global_rank = parts.world.rank
        self.local_rank = parts.world.local_rank
        self.world_size = parts.world.size
        self.global_steps = 0
        self.global_samples = 0
        self.micro_steps = 0
        self.is_compiled = False
        self.steps_per_print = parts.config.steps_per_print

        # Past nn.Module's own attribute look-up, which is slow and would list the model twice.
        self.__dict__["_module"] = parts.module
        self._parallel = parts.parallel
        self._precision = parts.precision
        self._masters = parts.precision.master_params
        self.scaler = parts.precision.loss_scale
        # Autocast knows no meta device; a run without values goes without its casts.
        self._autocast_device = "cpu" if parts.world.device.type == "meta" else parts.world.device.type
        self._input_casts: InputCasts | None = None
        if parts.precision.compute is not torch.float32:
            self._input_casts = InputCasts(parts.module, parts.precision.compute, parts.world.device.type)
        self._accumulation = AccumulationState(
            parts.config.gradient_accumulation_steps, managed=parts.config.managed_gradient_accumulation
        )
        self._optimizer_step = OptimizerStep(
            parts.optimizer, parts.parallel, parts.precision, parts.config.gradient_clipping
        )
        self._skipped = 0
        self._doubt: Doubt | None = None  # an update of which it is not known yet whether it was skipped
        self._finite: FiniteWatch | None = FiniteWatch()
        # At stage 3 a backward is a row of collectives, which a rank whose loss has no graph would leave out.
        self._agrees_before_backward = (
            parts.world.size > 1 and parts.parallel.reduces_in_backward and can_reduce_on_host()
        )
        self._reduces_at_boundary = parts.world.size > 1 and not parts.parallel.reduces_in_backward
        self._background: Background | None = None  # what writes checkpoints, with async_save
        loader = parts.training_dataloader
        self._settled_position = None if loader is None else loader.position  # in the data, after the last update
        self._first_batches = FirstBatches(
            micro_batch=parts.config.train_micro_batch_size_per_gpu,
            train_batch_size=parts.config.train_batch_size,
            num_ranks=parts.world.size,
            loader=loader,
        )
        self._loss: Tensor | None = None  # mean over the micro-batches so far, of the update under way
        self._last_loss: Tensor | None = None
        weakref.finalize(self, _report_unfinished, self._accumulation)

    # -- the step loop ---------------------------------------------------------------------------

    @explains_losses
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; in bf16 and fp16 layers cast fp32 inputs, see `engine.inputs`."""
        model: nn.Module = self._module
        if torch.is_grad_enabled():
            if self._first_batches.watching and self._module.training:
                self._first_batches.see(args, kwargs)
            if self._parallel.params.regrouped():  # new parameters become rank 0's before they are used
                self._follow_params()
            accumulation = self._accumulation
            last = accumulation.managed and accumulation.is_boundary()
            model = self._parallel.begin(last=last, hold=accumulation.in_no_sync)
        try:
            if self._input_casts is not None:
                return self._input_casts.call(model, args, kwargs)
            if self._precision.autocast is None:
                return model(*args, **kwargs)
            with torch.autocast(self._autocast_device, self._precision.autocast):
                return model(*args, **kwargs)
        except BaseException as error:
            self._parallel.recover()
            reason = None
            if isinstance(error, RuntimeError):
                reason = explain_forward_error(error, self._module, self._precision.compute)
            if reason is None:
                raise
            if self._input_casts is not None:
                self._input_casts.watch_again()
            raise EngineError(reason) from error

    @explains_losses
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Accumulate this micro-batch's gradients.

        Several calls before a :meth:`step` add up. If it raises, on all ranks, the accumulation under way is dropped,
        and the next micro-batch begins a new one.

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
        if self.optimizer is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            raise EngineError(self._why_no_backward(loss))
        accumulation = self._accumulation
        if accumulation.pending and _shown_exception() is not accumulation.shown_exception:
            self._drop("an exception came between its backward() and its step()")
        self._check_gradients("backward")
        self._follow_params()
        self._know()
        if scale_wrt_gas and accumulation.steps > 1:
            loss = loss / accumulation.steps
        scaled = loss if self.scaler is None else loss.float() * self.scaler.value
        try:
            self._parallel.prepare()
            if self._agrees_before_backward and self.world.sum(_flag(not loss.requires_grad)):
                raise EngineError(f"on another rank, {_NO_GRAPH}" if loss.requires_grad else _NO_GRAPH)
            if loss.requires_grad:
                scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            elif self._reduces_at_boundary:
                accumulation.no_graph = True  # the ranks find out together, when they reduce
            else:
                raise EngineError(_NO_GRAPH)
            self._parallel.collect()
            share = loss.detach()
            if share.element_size() < 4:  # what it is added to, and averaged with, should not be rounded again
                share = share.float()
            self._loss = share if self._loss is None else self._loss + share
            accumulation.add_backward(divided=scale_wrt_gas)
            accumulation.shown_exception = _shown_exception()
            ends = self._parallel.always_reduces or accumulation.is_boundary()
            if self._reduces_at_boundary and ends and not accumulation.in_no_sync:
                # As DDP and DeepSpeed do: between backward() and step() gradients are those of all ranks.
                self._reduce()
        except BaseException as error:
            self._drop(f"backward was broken off by {type(error).__name__}")
            raise
        return loss

    @explains_losses
    def step(self) -> None:
        """End a micro-batch; at the accumulation boundary make an optimizer step, then move learning rate and momentum.

        Raises:
            EngineError: there was no backward since the last step, or it stands inside :meth:`no_sync`; gradients
                that did not come from :meth:`backward`; no loss of the accumulation has reached a parameter that
                trains; in fp16, an overflow with the loss scale at its minimum.
        """
        accumulation = self._accumulation
        if not accumulation.pending or accumulation.in_no_sync:
            raise EngineError(
                "step: called inside no_sync(), where gradients are not complete; call it after the block"
                if accumulation.in_no_sync
                else "step: no backward since the last step; call engine.backward(loss) first, not loss.backward()"
            )
        self._check_gradients("step")
        grad_enabled = torch.is_grad_enabled()
        try:
            if self._background is not None:
                self._background.check()
            ends = accumulation.end_micro_batch()
            self.micro_steps += 1
            if ends:
                self._follow_params()
                self._update(self._reduce_for_step())
        except BaseException as error:
            torch.set_grad_enabled(grad_enabled)  # an interrupt may keep an optimizer from setting it back
            self._optimizer_step.recover()
            if accumulation.backwards:
                self._drop(f"step was broken off by {type(error).__name__}")
            raise

    @explains_losses
    def flush(self) -> bool:
        """Step now, with the mean over the micro-batches so far: for an accumulation that ends early.

        The mean is over all ranks, which may have accumulated different numbers of micro-batches; every rank calls
        this. Losses that the script has scaled itself (``scale_wrt_gas=False``) are taken as they are.

        Returns:
            Whether there were any.

        Raises:
            EngineError: some of the losses were scaled by the engine and others by the script.
        """
        accumulation = self._accumulation
        self._check_gradients("flush")
        if self._background is not None:
            self._background.check()
        own = accumulation.accumulated
        counts = [own, accumulation.scaling == "engine", accumulation.scaling in ("script", "both")]
        counts.append(accumulation.scaling == "both")
        total, engine_scaled, script_scaled, mixed = (
            counts if self.world_size == 1 else self.world.sum(torch.tensor(counts, device=self.device)).tolist()
        )
        if total == 0:
            return False
        if mixed or (engine_scaled and script_scaled):
            raise EngineError(
                "flush: some losses of this accumulation were divided by gradient_accumulation_steps and others were "
                "not (scale_wrt_gas=False), so that their mean is not known; scale all of them in one way"
            )
        self._follow_params()
        gradients = self._reduce_for_step()
        if engine_scaled:
            scale_by(gradients, accumulation.steps * self.world_size / total)
        if self._loss is None:
            self._loss = torch.zeros((), device=self.device)
        elif accumulation.scaling == "engine":
            self._loss = self._loss * (accumulation.steps / own)
        self._update(gradients)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients of the model and of the optimizer.

        :meth:`step` leaves none. Within an accumulation this loses gradients that count in the next optimizer step,
        which the next :meth:`backward` or :meth:`step` refuses; :meth:`drop_update` begins an accumulation anew.
        """
        super().zero_grad(set_to_none)
        if not self._accumulation.backwards:
            self._parallel.clear()
        for param in self._parallel.params.all:  # also where the model shows others, as FSDP2's gathered ones
            param.grad = None

    def drop_update(self) -> None:
        """Forget the micro-batches since the last optimizer step, and their gradients."""
        self._parallel.clear()
        self._accumulation.reset()
        self._loss = None

    def _drop(self, why: str) -> None:
        count = self._accumulation.accumulated
        self.drop_update()
        if count:
            log.warning(
                "backward: %s; the gradients of %d micro-batch%s are dropped, and the next one begins a new "
                "accumulation",
                why, count, "es" if count > 1 else "",
            )  # fmt: skip

    def _check_gradients(self, doing: str) -> None:
        """Refuse gradients that the engine has not left so, and optimizer steps that it has not made."""
        if self._optimizer_step.called_elsewhere():
            self.drop_update()
            raise EngineError(
                f"{doing}: the optimizer's own step() was called since the last engine.step(): it knows nothing of "
                "clipping, the loss scale, gradient accumulation or the learning rate schedule; call engine.step() "
                "alone after engine.backward(loss)"
            )
        if self._parallel.untouched():
            return
        if self._accumulation.backwards:
            raise EngineError(
                f"{doing}: gradients of the accumulation under way were changed since the last engine.backward(): "
                "cleared by zero_grad(), added to by a plain loss.backward(), or written into; call "
                "engine.backward(loss) for every loss and leave clearing to engine.step(), or begin the accumulation "
                "anew with engine.drop_update()"
            )
        raise EngineError(
            f"{doing}: the parameters have gradients that did not come from engine.backward(), such as those of a "
            "plain loss.backward(); call engine.backward(loss) for every loss, or clear them with engine.zero_grad()"
        )

    def _follow_params(self) -> None:
        """Take up what trains now."""
        if self._parallel.params.refresh():
            self._parallel.follow()

    def _reduce(self) -> list[Tensor]:
        """Reduce the gradients over all ranks.

        Raises:
            EngineError: on all ranks: a loss had no graph.
        """
        accumulation = self._accumulation
        reached, no_graph = self._parallel.reached(), accumulation.no_graph
        reduced = self._parallel.reduce((reached, no_graph))
        status = reduced.status
        accumulation.reached = accumulation.reached or reached
        # What this rank knows without asking the device is enough while all is well.
        if status is not None and (reads_cost_nothing(status.device) or no_graph or not reached):
            ranks_reached, ranks_without_graph = status.tolist()
            accumulation.reached = accumulation.reached or ranks_reached > 0.5
            if ranks_without_graph > 0.5:
                self.drop_update()
                raise EngineError(_NO_GRAPH if no_graph else f"on another rank, {_NO_GRAPH}")
        return reduced.gradients

    def _reduce_for_step(self) -> list[Tensor]:
        """The gradients of all ranks.

        Raises:
            EngineError: on all ranks: a loss had no graph, or none has reached a parameter.
        """
        gradients = self._reduce()
        if not self._accumulation.reached or not gradients:
            self.drop_update()
            raise EngineError(self._why_nothing_reached())
        return gradients

    def _why_nothing_reached(self) -> str:
        count = len(self._parallel.params.model)
        if count == 0:
            return (
                "step: none of the optimizer's parameters requires gradients now, so that there is nothing to train; "
                "thaw some with requires_grad_(True)"
            )
        return (
            f"step: no loss has reached any of the {count} parameters that train, on any rank; compute the loss from "
            "the model's output, without detach() or torch.no_grad(), or give the optimizer the parameters that it "
            "depends on"
        )

    def _update(self, gradients: list[Tensor]) -> None:
        optimizer = self.optimizer
        assert optimizer is not None
        if self._loss is None:  # this rank's losses had no graph
            self._loss = torch.zeros((), device=self.device)
        if self._first_batches.watching:
            self._first_batches.compare(self.world)
        try:
            skipped = self._optimizer_step.run(gradients)
        finally:  # also where it is interrupted: the weights may have moved, so that these gradients have been used
            accumulation = self._accumulation
            count = accumulation.micro_batches if accumulation.managed else accumulation.backwards
            self._parallel.clear()
            accumulation.reset()
        self._last_loss, self._loss = self._loss, None
        if self.recorder is not None:
            self.recorder.record(self.global_steps, optimizer.param_groups[0]["lr"], self._last_loss)
        self.global_steps += 1
        self.global_samples += count * self.config.train_micro_batch_size_per_gpu * self.world_size
        if self.training_dataloader is not None:
            self._settled_position = self.training_dataloader.position
        grad_norm = self.grad_norm
        assert grad_norm is not None
        if skipped is not None:
            self._judge(skipped, self._last_loss, grad_norm)
        elif self._finite is not None and not self._precision.skips:
            self._finite.see(self.global_steps - 1, self._last_loss, grad_norm)
        for observer in self.observers:
            observer.updated(self)
        if skipped is None and self._precision.skips:
            self._doubt = Doubt(self._last_loss, grad_norm, step_undoably(self.lr_scheduler, optimizer))
        elif self.lr_scheduler is not None and not skipped:
            self.lr_scheduler.step()
        if self.scaler is not None and skipped is not None:
            self.scaler.update(skipped)
        if self.after_update is not None:
            self.after_update(self)

    def _judge(self, skipped: bool, loss: Tensor, norm: Tensor | float) -> None:
        """Count the last update as made or as skipped, and say what was not finite."""
        step = self.global_steps - 1
        if skipped:
            self._skipped += 1
            if self.recorder is not None:
                self.recorder.skip(step)
            if self._finite is not None:
                scale = "" if self.scaler is None else f"; the loss scale was {self.scaler.value:g}"
                self._finite.skipped(step, loss, float(norm), scale)
        elif self._finite is not None:
            self._finite.see(step, loss, norm)

    def _settle(self, doubt: Doubt) -> None:
        """Learn whether the last update was skipped; if so, the schedule has moved too far."""
        self._doubt = None
        norm = doubt.norm()
        skipped = not math.isfinite(norm)
        if skipped:
            doubt.undo()
            self._optimizer_step.undo()
        self._judge(skipped, doubt.loss, norm)
        if self.scaler is not None:
            self.scaler.update(skipped)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this block backward passes keep their gradients on this rank; the next reduction includes them."""
        self._accumulation.in_no_sync = True
        try:
            yield
        finally:
            self._accumulation.in_no_sync = False

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one of its accumulation.

        With `managed_gradient_accumulation` false this is False, since every step() is an optimizer step.
        """
        return self._accumulation.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Set whether the micro-batches from here on, one by one, end their accumulation; the engine stops counting.

        Raises:
            EngineError: with `managed_gradient_accumulation` false, where every step() is an optimizer step.
        """
        if not self._accumulation.managed:
            raise EngineError(
                "set_gradient_accumulation_boundary: managed_gradient_accumulation is false, so that every step() "
                "updates; call step() where the update is due"
            )
        self._accumulation.set_boundary(bool(is_boundary))

    def settle(self) -> None:
        """Find out whether the last optimizer step was made or skipped, as the next one will; on CUDA this may wait."""
        self._know()

    def put_away(self) -> None:
        """Copy what was written into the model to the master params; free full parameters that only copy shards."""
        self._parallel.reshard()
        if self._masters is not None:
            self._masters.compare_values()
            self._masters.adopt_writes()

    def train(self, mode: bool = True) -> Engine:
        """Set the training mode, as of any module; the next optimizer step also finds writes through ``.data``."""
        if self._masters is not None:
            # Weights are swapped (for their average, say) around an evaluation, by writes that leave no trace.
            self._masters.compare_values()
        return super().train(mode)

    def _why_no_backward(self, loss: Any) -> str:
        if self.optimizer is None:
            return 'backward: there is no optimizer; give the config an "optimizer" section or initialize one'
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        return f"backward: got {given}; expected a scalar tensor, such as loss.mean()"

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: Literal["train", "eval", "predict"] = "train",
        pin_memory: bool = True,
        data_sampler: Iterable[int] | None = None,
        collate_fn: CollateFn | None = None,
        num_local_io_workers: int | None = None,
    ) -> Loader:
        """A loader over this process's share of another dataset; an evaluation's, say.

        Args:
            dataset: map-style or iterable.
            batch_size: samples of one forward on one process; None takes the micro-batch.
            route: "train" is shuffled as the config says, "eval" and "predict" are in order.
            pin_memory: put batches into pinned memory where the device is a GPU.
            data_sampler: indices of this process's samples, in place of the order.
            collate_fn: samples to batch; None takes the one of the training data.
            num_local_io_workers: processes that read ahead; None takes the config's.

        Returns:
            Micro-batches on the device; every process has as many as the others, some samples twice if need be.
        """
        data = self.config.redline.data
        if collate_fn is None and self.training_dataloader is not None:
            collate_fn = self.training_dataloader.collate_fn
        return build_loader(
            dataset,
            self.world,
            micro_batch=self.config.train_micro_batch_size_per_gpu if batch_size is None else batch_size,
            collate_fn=collate_fn,
            sampler=data_sampler,
            shuffle=data.shuffle and route == "train",
            seed=data.seed,
            drop_last=self.config.dataloader_drop_last,
            workers=data.workers if num_local_io_workers is None else num_local_io_workers,
            prefetch_factor=data.prefetch_factor,
            pin_memory=pin_memory,
            split_by_rank=bool(data.split_by_rank),  # rather not found out here: one rank alone may call this
            survives_sigterm=self.config.redline.checkpoint.save_on_sigterm is not None,
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save all of the run; every process calls this.

        Args:
            save_dir: a folder that all processes share; made if need be.
            tag: the checkpoint's name in it; None takes ``global_stepN``. One that is there is replaced.
            client_state: the script's own: numbers, strings, lists, dicts, tensors. Of several processes
                rank 0's counts.
            save_latest: whether it becomes the checkpoint that `load_checkpoint` takes by itself.
            exclude_frozen_parameters: leave out parameters that do not require gradients.

        Returns:
            True; with `redline.checkpoint.async_save` as soon as the state is copied.

        Raises:
            EngineError: on all processes, if one could not save; the checkpoints that were there are still whole. With
                async_save the next save, step, flush or :meth:`wait_for_checkpoint` raises it.
        """
        self._know()
        return save_checkpoint(
            self,
            save_dir,
            tag,
            client_state or {},
            save_latest=save_latest,
            exclude_frozen=exclude_frozen_parameters,
        )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from a checkpoint, saved by any number of processes; every process calls this.

        Args:
            load_dir: where `save_checkpoint` saved, or DeepSpeed's.
            tag: which one; None takes the latest, or if that is broken the newest that is whole.
            load_module_strict: refuse a model with other names than the checkpoint's.
            load_optimizer_states: the optimizer's, too.
            load_lr_scheduler_states: the schedule's, too.
            load_module_only: nothing but the model.
            custom_load_fn: called as ``custom_load_fn(src=state_dict, dst=module)`` to load the model.

        Returns:
            The checkpoint's folder and the `client_state` that was saved; (None, None) if there is no checkpoint.

        Raises:
            EngineError: on all processes; the tag that was asked for is broken or not there, none is whole, or the
                checkpoint does not go with this engine. The engine is as it was.
        """
        self._know()
        self.wait_for_checkpoint()
        wanted = Wanted(
            load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, custom_load_fn
        )
        return load_checkpoint(self, load_dir, tag, wanted)

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that is being written is on the disk, with `redline.checkpoint.async_save`.

        Raises:
            EngineError: it could not be written.
        """
        if self._background is not None:
            self._background.wait()

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Save the model alone, whole, in the format that it computes in; every process calls this, rank 0 writes.

        Args:
            save_dir: a folder; made if need be.
            save_filename: a file in it. One that ends in ``.safetensors`` has that format, in which a tied weight is
                there under one of its names; any other is for ``torch.load``, and goes into the bare model with
                ``load_state_dict``.
            exclude_frozen_parameters: leave out parameters that do not require gradients.

        Returns:
            True; False in ZeRO stage 3 without `stage3_gather_16bit_weights_on_model_save`: then nothing is saved.

        Raises:
            EngineError: on all processes, if it could not be saved.
        """
        return save_16bit_model(self, save_dir, save_filename, exclude_frozen=exclude_frozen_parameters)

    # -- the compiler ----------------------------------------------------------------------------

    def compile(
        self, backend: str | Callable[..., Any] = "inductor", compile_kwargs: dict[str, Any] | None = None
    ) -> None:
        """From here on run the model as `torch.compile` makes it; once is enough, a second call does nothing.

        In place: parameters, `module` and the keys of the state dict stay as they are. Up to ZeRO stage 2 the model is
        compiled as one, on any number of ranks, since gradients are reduced after the backward; at stage 3 it is
        compiled block by block.

        Args:
            backend: as in `torch.compile`.
            compile_kwargs: its other arguments: `mode`, `dynamic`, `fullgraph`, `options`.

        Raises:
            EngineError: `compile_kwargs` names a backend, too.
        """
        if compile_kwargs and "backend" in compile_kwargs:
            raise EngineError('compile: compile_kwargs has "backend"; give it as compile(backend=...)')
        if self.is_compiled:
            return
        self._parallel.compile(backend=backend, **(compile_kwargs or {}))
        self.is_compiled = True

    # -- what a user may ask ---------------------------------------------------------------------

    @property
    def loss(self) -> Tensor | None:
        """This rank's mean loss over the last optimizer step's micro-batches, on the device; None before it."""
        return self._last_loss

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped for a gradient that was not finite; 0 in fp32."""
        self._know()
        return self._skipped

    def _know(self) -> None:
        if self._doubt is not None:
            self._settle(self._doubt)

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The last optimizer step's gradient norm before clipping, over all ranks; on CUDA a tensor there."""
        return self._optimizer_step.grad_norm

    @property
    def loss_scale(self) -> float | None:
        """The factor of the next loss in fp16; None where there is none."""
        self._know()
        return None if self.scaler is None else self.scaler.value

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group, for the next optimizer step."""
        self._know()
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum, or betas, of each parameter group, for the next optimizer step."""
        self._know()
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group["betas"] if "betas" in group else group.get("momentum") for group in groups]

    def get_global_grad_norm(self) -> float | None:
        """The last optimizer step's gradient norm before clipping, over all ranks; None before it.

        Of the optimizer's parameters that require grad; at stage 0 without fp16 or bf16, of all that have a gradient.
        Not finite after a step that was skipped for that. Waits for the device.
        """
        norm = self._optimizer_step.grad_norm
        return None if norm is None else float(norm)

    def train_batch_size(self) -> int:
        """Samples of one update, over all processes."""
        return self._accumulation.steps * self.config.train_micro_batch_size_per_gpu * self.world_size

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Train with another number of samples an update from here on, by way of the accumulation steps.

        The micro-batch stays; the loss is divided by the new number of steps. Every process calls this, between two
        updates.

        Args:
            train_batch_size: samples of one update, over all processes.

        Raises:
            EngineError: no whole number of micro-batches makes up that many; an update is under way.
        """
        micro_batch, processes = self.config.train_micro_batch_size_per_gpu, self.world_size
        stride = micro_batch * processes
        if self._accumulation.backwards:
            raise EngineError(
                "set_train_batch_size: an update is under way, whose losses so far are divided by "
                f"{self._accumulation.steps}; call it after the step() that ends one, or after flush()"
            )
        if not isinstance(train_batch_size, int) or train_batch_size < 1 or train_batch_size % stride:
            below = int(train_batch_size // stride) * stride
            nearest = f"{below} and {below + stride}" if below > 0 else f"{stride}"
            raise EngineError(
                f"set_train_batch_size: got {train_batch_size!r}; expected a multiple of {stride}, the micro-batch of "
                f"{micro_batch} on {processes} process{'es' if processes > 1 else ''}; nearest: {nearest}"
            )
        self._accumulation.steps = train_batch_size // stride

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward on one process."""
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one update on one process."""
        return self._accumulation.steps

    def gradient_clipping(self) -> float:
        """The norm above which gradients are scaled down to it; 0 for never."""
        return self.config.gradient_clipping

    def record_validation(self, loss: Tensor | float) -> None:
        """Give a range test's record the validation loss of the model as it is; elsewhere do nothing.

        Args:
            loss: this process's; the record takes the mean over all of them.
        """
        if self.recorder is not None:
            self.recorder.record_validation(self.global_steps, loss)


_NO_GRAPH = (
    "backward: the loss does not require gradients, so that it can't train anything; compute it from the model's "
    "output, outside of torch.no_grad() and torch.inference_mode(), and without detach() or item()"
)


def _flag(value: bool) -> Tensor:
    """A number on the host, for a collective there: nothing waits for the device."""
    return torch.tensor(float(value))


def _shown_exception() -> Any:
    """The last exception that Python has shown to the user: in a notebook, of a cell that was stopped."""
    return getattr(sys, "last_value", None)


def _report_unfinished(accumulation: AccumulationState) -> None:
    if accumulation.micro_batches:
        log.warning(
            "training ended within an accumulation: its last %d of %d micro-batches are in no optimizer step; call "
            "engine.flush() after the last one, or give a number of micro-batches that divides",
            accumulation.micro_batches, accumulation.steps,
        )  # fmt: skip
