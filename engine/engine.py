"""The engine: a model that trains as its config says, one micro-batch at a time.

    for x, y in loader:
        loss = loss_fn(engine(x), y)
        engine.backward(loss)
        engine.step()

Owns the step loop and its counters; is handed finished parts (`build.py` makes them). Nothing here
waits for the device: losses and norms stay tensors until somebody asks for their value.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from engine.checkpoint import Wanted, load_checkpoint, save_16bit_model, save_checkpoint
from engine.data import CollateFn, Loader, build_loader
from engine.doubt import Doubt, can_skip, undo_of
from engine.errors import EngineError
from engine.finite import FiniteWatch
from engine.gradients import clip, scale_by
from engine.inputs import InputCasts, explain_forward_error
from engine.log import log
from engine.parts import Parts
from engine.peers import explains_losses

if TYPE_CHECKING:
    from engine.checkpoint.background import Background

__all__ = ["Engine", "Observer"]


class Observer(Protocol):
    """What looks at the engine after every update, before rate and momentum move on."""

    def updated(self, engine: Engine) -> None: ...


class Engine(nn.Module):
    """A model, its optimizer and its schedule, driven by a config.

    Made by :func:`engine.initialize`. The names are DeepSpeed's.

    Attributes:
        module: the model as it was given, on the engine's device.
        optimizer: None when neither config nor script gave one; the engine then only evaluates.
        lr_scheduler: None for a fixed rate.
        training_dataloader: over `training_data`, if that was given.
        config: the config in force, batch sizes resolved.
        device: where the model is.
        global_rank, local_rank, world_size: this process among all.
        global_steps: updates done, skipped ones included.
        global_samples: samples of these updates, over all processes.
        micro_steps: micro-batches done.
        is_compiled: whether the model runs as :meth:`compile` made it.
        scaler: of the loss, in fp16; None elsewhere.
        recorder: of a range test, if the config asks for one.
        observers: what looks at every update, in this order.
        after_update: what is called when an update is whole, rate and momentum of the next one included.
        client_state_on_sigterm: gives the `client_state` of the checkpoint that SIGTERM asks for; None for none.
        steps_per_print: updates between two lines about progress; None for no lines. May be changed at any time, on
            all processes alike.
    """

    _module: nn.Module

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
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
        self._masters = parts.precision.masters
        self._publish = parts.precision.publish
        self.scaler = parts.precision.loss_scale
        self._input_casts: InputCasts | None = None
        if parts.precision.compute is not torch.float32:
            self._input_casts = InputCasts(parts.module, parts.precision.compute, parts.world.device.type)
        # What backward leaves gradients in, and what the update takes them from: the same but for master weights.
        self._leaves = [parameter for parameter in parts.module.parameters() if parameter.requires_grad]
        self._weights = self._leaves if self._masters is None else self._masters.weights
        self._unfinished = _Unfinished()
        self._accumulation = self._unfinished.of = parts.config.gradient_accumulation_steps
        self._managed = parts.config.managed_gradient_accumulation
        self._clip_norm = parts.config.gradient_clipping
        self._skipped = 0
        # The CPU's numbers cost nothing to read. On CUDA torch's fused optimizers skip an update by themselves, and
        # the engine learns of it when the next one begins; other optimizers have to be told, which waits.
        on_cpu = all(weight.device.type == "cpu" for weight in self._weights)  # offloaded ones, too
        self._reads_norm = on_cpu or (parts.precision.skips and not can_skip(parts.optimizer))
        self._doubt: Doubt | None = None  # an update of which it is not known yet whether it was skipped
        self._finite: FiniteWatch | None = FiniteWatch()
        self._boundary: bool | None = None  # as the script says; None: as the micro-batches count
        self._pending = False  # a backward whose step has not come yet
        self._in_no_sync = False
        self._reduced = True  # whether the gradients are already those of all processes
        self._background: Background | None = None  # what writes checkpoints, with async_save
        loader = parts.training_dataloader
        self._settled_position = None if loader is None else loader.position  # in the data, after the last update
        self._last_grad: tuple[Tensor | None, int] = (None, 0)
        self._loss: Tensor | None = None  # mean over the micro-batches so far, of the update under way
        self._last_loss: Tensor | None = None
        self._grad_norm: Tensor | float | None = None
        weakref.finalize(self, _say_unfinished, self._unfinished)

    # -- the step loop ---------------------------------------------------------------------------

    @explains_losses
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; in bf16 and fp16 layers cast fp32 inputs, see `engine.inputs`."""
        model: nn.Module = self._module
        if torch.is_grad_enabled():
            last = self._managed and self.is_gradient_accumulation_boundary()
            model = self._parallel.begin(last=last, hold=self._in_no_sync)
        try:
            if self._input_casts is not None:
                return self._input_casts.call(model, args, kwargs)
            if self._precision.autocast is None:
                return model(*args, **kwargs)
            with torch.autocast(self.device.type, self._precision.autocast):
                return model(*args, **kwargs)
        except RuntimeError as error:
            reason = explain_forward_error(error, self._module, self._precision.compute)
            if reason is None:
                raise
            if self._input_casts is not None:
                self._input_casts.watch_again()
            raise EngineError(reason) from error

    @explains_losses
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add this micro-batch's gradients to the update under way.

        Args:
            loss: scalar; the mean over the micro-batch.
            retain_graph: as in `torch.autograd.backward`.
            scale_wrt_gas: divide by the accumulation steps, so that the update has the mean gradient.

        Returns:
            The loss as it was differentiated, but for fp16's loss scale.

        Raises:
            EngineError: no optimizer; a loss that is no scalar tensor; gradients that are not the engine's; on
                several processes, a second backward before the step.
        """
        if self.optimizer is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            raise EngineError(self._why_no_backward(loss))
        if self._pending and self._reduced and not self._parallel.sums_every_backward:
            raise EngineError(
                "backward: a second one before engine.step() would leave its gradients unshared between the "
                "processes; add the losses and call engine.backward once, or use engine.no_sync() for all but the last"
            )
        if self._has_strange_gradients():
            raise EngineError(
                "backward: the parameters have gradients that are not the engine's, or have lost those that were: by a "
                "plain loss.backward(), which neither accumulates nor shares nor scales, or by zero_grad() within an "
                "update; call engine.backward(loss) for every loss, and leave clearing to the engine"
            )
        self._know()
        if scale_wrt_gas and self._accumulation > 1:
            loss = loss / self._accumulation
        scaled = loss if self.scaler is None else loss.float() * self.scaler.value
        scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        self._reduced = self._parallel.synced
        if self._masters is not None:
            if self._reduced and self.world_size > 1:
                self._masters.release()  # the reduction has put them into the masters
            elif self._precision.accumulate is torch.float32:
                self._masters.collect()
        last = self._leaves[-1].grad
        self._last_grad = (last, 0 if last is None else last._version)
        share = loss.detach()
        if share.element_size() < 4:  # what it is added to, and averaged with, should not be rounded again
            share = share.float()
        self._loss = share if self._loss is None else self._loss + share
        self._unfinished.backwards += 1
        self._pending = not self._in_no_sync
        return loss

    @explains_losses
    def step(self) -> None:
        """End a micro-batch; at the accumulation boundary update the weights, then rate and momentum.

        Raises:
            EngineError: there was no backward since the last step, or it stands inside :meth:`no_sync`; in fp16, an
                overflow with the loss scale at its minimum.
        """
        if not self._pending or self._in_no_sync:
            raise EngineError(
                "step: called inside no_sync(), where gradients are not complete; call it after the block"
                if self._in_no_sync
                else "step: no backward since the last step; call engine.backward(loss) first, not loss.backward()"
            )
        if self._background is not None:
            self._background.check()
        self._pending = False
        ends_update = not self._managed or self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        self._unfinished.micro_batches += 1
        if ends_update:
            self._update()

    @explains_losses
    def flush(self) -> bool:
        """Update now, with the mean over the micro-batches since the last update: for an accumulation that ends early.

        Returns:
            Whether there were any.
        """
        done = self._unfinished.micro_batches
        if self._background is not None:
            self._background.check()
        if done == 0:
            return False
        assert self._loss is not None
        factor = self._accumulation / done
        gradients = self._gradients()
        scale_by(gradients, factor)
        self._loss = self._loss * factor
        self._pending = False
        self._update(gradients)
        return True

    def drop_update(self) -> None:
        """Forget the micro-batches since the last update, and their gradients."""
        for parameter in (*self._leaves, *self._weights):
            parameter.grad = None
        self._unfinished.backwards = self._unfinished.micro_batches = 0
        self._parallel.forget()
        self._pending = False
        self._reduced = True
        self._loss = None

    def _update(self, gradients: list[Tensor] | None = None) -> None:
        optimizer = self.optimizer
        assert optimizer is not None and self._loss is not None
        skipped = self._take_step(optimizer, self._gradients() if gradients is None else gradients)
        for weight in self._weights:
            weight.grad = None
        if self._weights is not self._leaves:
            for leaf in self._leaves:  # those that no optimizer has
                leaf.grad = None
        self._last_loss, self._loss = self._loss, None
        self._last_grad = (None, 0)
        if self.recorder is not None:
            self.recorder.record(self.global_steps, optimizer.param_groups[0]["lr"], self._last_loss)
        self.global_steps += 1
        count = self._unfinished.micro_batches if self._managed else self._unfinished.backwards
        self.global_samples += count * self.config.train_micro_batch_size_per_gpu * self.world_size
        self._unfinished.backwards = self._unfinished.micro_batches = 0
        if self.training_dataloader is not None:
            self._settled_position = self.training_dataloader.position
        assert self._grad_norm is not None
        if skipped is not None:
            self._judge(skipped, self._last_loss, self._grad_norm)
        elif self._finite is not None and not self._precision.skips:
            self._finite.see(self.global_steps - 1, self._last_loss, self._grad_norm)
        for observer in self.observers:
            observer.updated(self)
        if skipped is None and self._precision.skips:
            self._doubt = Doubt(self._last_loss, self._grad_norm, undo_of(self.lr_scheduler, optimizer))
        if self.lr_scheduler is not None and not skipped:
            self.lr_scheduler.step()
        if self.scaler is not None and skipped is not None:
            self.scaler.update(skipped)
        if self.after_update is not None:
            self.after_update(self)

    def _take_step(self, optimizer: Optimizer, gradients: list[Tensor]) -> bool | None:
        """Unscale, clip, step; whether the update was skipped instead, None where only the device knows."""
        norm, limit = self._parallel.norm(gradients), self._clip_norm
        scale = 1.0 if self.scaler is None else self.scaler.value
        skipped: bool | None = None
        if self._reads_norm:
            self._grad_norm = value = norm.item() / scale
            if self._precision.skips and not math.isfinite(value):
                return True
            skipped = False
            clips = limit > 0 and not value + 1e-6 <= limit
            if scale != 1.0:  # both at once, as DeepSpeed does
                scale_by(gradients, 1.0 / (scale * (value + 1e-6) / limit if clips else scale))
            elif clips:
                clip(gradients, norm, limit)
            self._parallel.update(optimizer)
        else:
            self._grad_norm = norm / scale if scale != 1.0 else norm
            if scale != 1.0:
                larger = torch.clamp((self._grad_norm + 1e-6) / limit, min=1.0) if limit > 0 else 1.0
                scale_by(gradients, 1.0 / (scale * larger))
            elif limit > 0:
                clip(gradients, norm, limit)
            if self._precision.skips:
                optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
            try:
                self._parallel.update(optimizer)
            finally:
                if self._precision.skips:
                    optimizer.found_inf = None  # type: ignore[attr-defined]
        if self._publish is not None:
            self._publish()
        self._parallel.put_away()
        return skipped

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
        self._judge(skipped, doubt.loss, norm)
        if self.scaler is not None:
            self.scaler.update(skipped)

    def _gradients(self) -> list[Tensor]:
        """Those that the update takes, of all processes."""
        if self._masters is not None and self._precision.accumulate is not torch.float32:
            self._masters.collect()
        gradients = self._parallel.gradients(self._weights, reduced=self._reduced)
        self._reduced = True
        return gradients

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this block backward passes keep their gradients to this process."""
        self._in_no_sync = True
        try:
            yield
        finally:
            self._in_no_sync = False

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its update.

        With `managed_gradient_accumulation` false nothing tells before step(), which always updates.
        """
        if not self._managed:
            return False
        if self._boundary is not None:
            return self._boundary
        return self._unfinished.micro_batches + 1 >= self._accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the micro-batches from here on, one by one, end their update; the engine stops counting.

        Raises:
            EngineError: with `managed_gradient_accumulation` false, where every step() updates.
        """
        if not self._managed:
            raise EngineError(
                "set_gradient_accumulation_boundary: managed_gradient_accumulation is false, so that every step() "
                "updates; call step() where the update is due"
            )
        self._boundary = bool(is_boundary)

    def renew_parallel(self) -> None:
        """Let the next forward be DDP's first: it orders its sums anew after one, which shows in the last bits."""
        self._parallel.renew()

    def settle(self) -> None:
        """Know whether the last update was made or skipped, as the next one will; on CUDA this may wait for it."""
        self._know()

    def put_away(self) -> None:
        """Let `module` have its sharded parameters, where a forward has left it whole ones."""
        self._parallel.put_away()

    def _has_strange_gradients(self) -> bool:
        """Whether something else than this engine has left gradients since its last backward."""
        if self._unfinished.backwards:  # one parameter tells
            grad, version = self._last_grad
            last = self._leaves[-1].grad
            return last is not grad or (grad is not None and grad._version != version)
        for leaf in self._leaves:  # noqa: SIM110  any() takes twice as long
            if leaf.grad is not None:
                return True
        return False

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

        In place: parameters, `module` and the keys of the state dict stay as they are. On several processes DDP
        stays around the compiled model, where torch's compiler finds it and splits the graph at its buckets, so that
        gradients are still sent while the backward runs; a model that is shared out is compiled block by block.

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
        """This process's mean loss over the micro-batches of the last update, on the device; None before it."""
        return self._last_loss

    @property
    def skipped_steps(self) -> int:
        """Updates that were left out for a gradient that was not finite; 0 in fp32."""
        self._know()
        return self._skipped

    def _know(self) -> None:
        if self._doubt is not None:
            self._settle(self._doubt)

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The last update's gradient norm before clipping, over all processes; on CUDA a tensor there."""
        return self._grad_norm

    @property
    def loss_scale(self) -> float | None:
        """The factor of the next loss in fp16; None where there is none."""
        self._know()
        return None if self.scaler is None else self.scaler.value

    def get_lr(self) -> list[Any]:
        """The rate of each parameter group, for the update to come."""
        self._know()
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum, or betas, of each parameter group, for the update to come."""
        self._know()
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group["betas"] if "betas" in group else group.get("momentum") for group in groups]

    def get_global_grad_norm(self) -> float | None:
        """The last update's gradient norm before clipping, over all processes; None before it.

        Not finite after an update that was skipped for that. Waits for the device.
        """
        return None if self._grad_norm is None else float(self._grad_norm)

    def train_batch_size(self) -> int:
        """Samples of one update, over all processes."""
        return self._accumulation * self.config.train_micro_batch_size_per_gpu * self.world_size

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
        if self._unfinished.backwards:
            raise EngineError(
                "set_train_batch_size: an update is under way, whose losses so far are divided by "
                f"{self._accumulation}; call it after the step() that ends one, or after flush()"
            )
        if not isinstance(train_batch_size, int) or train_batch_size < 1 or train_batch_size % stride:
            below = int(train_batch_size // stride) * stride
            nearest = f"{below} and {below + stride}" if below > 0 else f"{stride}"
            raise EngineError(
                f"set_train_batch_size: got {train_batch_size!r}; expected a multiple of {stride}, the micro-batch of "
                f"{micro_batch} on {processes} process{'es' if processes > 1 else ''}; nearest: {nearest}"
            )
        self._accumulation = self._unfinished.of = train_batch_size // stride

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward on one process."""
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one update on one process."""
        return self._accumulation

    def gradient_clipping(self) -> float:
        """The norm above which gradients are scaled down to it; 0 for never."""
        return self._clip_norm

    def record_validation(self, loss: Tensor | float) -> None:
        """Give a range test's record the validation loss of the model as it is; elsewhere do nothing.

        Args:
            loss: this process's; the record takes the mean over all of them.
        """
        if self.recorder is not None:
            self.recorder.record_validation(self.global_steps, loss)


class _Unfinished:
    """What the update under way has so far; outlives the engine by a moment, to say what was left over."""

    backwards = 0
    micro_batches = 0
    of = 1  # micro-batches of a whole one


def _say_unfinished(unfinished: _Unfinished) -> None:
    if unfinished.micro_batches:
        log.warning(
            "training ended within an accumulation: its last %d of %d micro-batches are in no update; call "
            "engine.flush() after the last one, or give a number of micro-batches that divides",
            unfinished.micro_batches, unfinished.of,
        )  # fmt: skip
