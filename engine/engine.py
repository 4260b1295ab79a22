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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

from engine.data import CollateFn, Loader, build_loader
from engine.distributed import World
from engine.doubt import Doubt, can_skip, undo_of
from engine.errors import EngineError
from engine.finite import FiniteWatch
from engine.gradients import Reduction, clip, norm_of, scale_by
from engine.log import log
from engine.parallel import wrap_model
from engine.peers import explains_losses
from engine.precision import Precision, lower

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["Engine", "Observer", "Parts", "Recorder", "Schedule"]


class Schedule(Protocol):
    """What the engine needs of a learning rate schedule; torch's and ours are such."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Recorder(Protocol):
    """What is told of every update: its index, the rate it ran at, and its loss."""

    def record(self, step: int, lr: float, loss: Tensor) -> None: ...
    def record_validation(self, step: int, loss: Tensor | float) -> None: ...


class Observer(Protocol):
    """What looks at the engine after every update, before rate and momentum move on."""

    def updated(self, engine: Engine) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an engine is made of."""

    config: EngineConfig
    world: World
    module: nn.Module
    precision: Precision
    reduction: Reduction
    parallel: DistributedDataParallel | None
    optimizer: Optimizer | None
    lr_scheduler: Schedule | None
    training_dataloader: Loader | None
    recorder: Recorder | None


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
        scaler: of the loss, in fp16; None elsewhere.
        recorder: of a range test, if the config asks for one.
        observers: what looks at every update, in this order.
        steps_per_print: updates between two lines about progress; None for no lines. May be changed at any time, on
            all processes alike.
    """

    _parallel: DistributedDataParallel | None
    _module: nn.Module

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self.optimizer = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.training_dataloader
        self.recorder = parts.recorder
        self.observers: list[Observer] = []
        self.config = parts.config
        self.world = parts.world
        self.device = parts.world.device
        self.global_rank = parts.world.rank
        self.local_rank = parts.world.local_rank
        self.world_size = parts.world.size
        self.global_steps = 0
        self.global_samples = 0
        self.micro_steps = 0
        self.steps_per_print = parts.config.steps_per_print

        # Past nn.Module's own attribute look-up, which is slow and would list the model twice.
        self.__dict__["_parallel"] = parts.parallel
        self.__dict__["_module"] = parts.module
        self._precision = parts.precision
        self._reduction = parts.reduction
        self._masters = parts.precision.masters
        self.scaler = parts.precision.loss_scale
        self._lowered = None if parts.precision.compute is torch.float32 else parts.precision.compute
        # What backward leaves gradients in, and what the update takes them from: the same but for master weights.
        self._leaves = [parameter for parameter in parts.module.parameters() if parameter.requires_grad]
        self._weights = self._leaves if self._masters is None else self._masters.weights
        self._accumulation = parts.config.gradient_accumulation_steps
        self._managed = parts.config.managed_gradient_accumulation
        self._clip_norm = parts.config.gradient_clipping
        self._skipped = 0
        # The CPU's numbers cost nothing to read. On CUDA torch's fused optimizers skip an update by themselves, and
        # the engine learns of it when the next one begins; other optimizers have to be told, which waits.
        self._reads_norm = self.device.type == "cpu" or (parts.precision.skips and not can_skip(parts.optimizer))
        self._doubt: Doubt | None = None  # an update of which it is not known yet whether it was skipped
        self._finite: FiniteWatch | None = FiniteWatch()
        self._boundary: bool | None = None  # as the script says; None: as the micro-batches count
        self._pending = False  # a backward whose step has not come yet
        self._in_no_sync = False
        self._reduced = True  # whether the gradients are already those of all processes
        self._renew_parallel = False
        self._unfinished = _Unfinished()
        self._last_grad: tuple[Tensor | None, int] = (None, 0)
        self._loss: Tensor | None = None  # mean over the micro-batches so far, of the update under way
        self._last_loss: Tensor | None = None
        self._grad_norm: Tensor | float | None = None
        weakref.finalize(self, _say_unfinished, self._unfinished, self._accumulation)

    # -- the step loop ---------------------------------------------------------------------------

    @explains_losses
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; in fp16 and bf16 floating-point inputs may have either format."""
        if self._lowered is not None:
            args, kwargs = lower(args, self._lowered), lower(kwargs, self._lowered)
        model: nn.Module = self._module
        parallel = self._parallel
        if parallel is not None and torch.is_grad_enabled():
            if self._renew_parallel:
                parallel = self._wrap_again()
            # DDP decides in the forward whether the backward will send anything.
            parallel.require_backward_grad_sync = self._syncs()
            model = parallel
        if self._precision.autocast is None:
            return model(*args, **kwargs)
        with torch.autocast(self.device.type, self._precision.autocast):
            return model(*args, **kwargs)

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
        if self._pending and self._parallel is not None and self._reduced:
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
        self._reduced = self._parallel is None or self._parallel.require_backward_grad_sync
        if self._masters is not None:
            if self._parallel is not None and self._reduced:
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
        if done == 0:
            return False
        assert self._loss is not None
        factor = self._accumulation / done
        scale_by(self._gradients(), factor)
        self._loss = self._loss * factor
        self._pending = False
        self._update()
        return True

    def drop_update(self) -> None:
        """Forget the micro-batches since the last update, and their gradients."""
        for parameter in (*self._leaves, *self._weights):
            parameter.grad = None
        self._unfinished.backwards = self._unfinished.micro_batches = 0
        self._pending = False
        self._reduced = True
        self._loss = None

    def _update(self) -> None:
        optimizer = self.optimizer
        assert optimizer is not None and self._loss is not None
        skipped = self._take_step(optimizer, self._gradients())
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

    def _take_step(self, optimizer: Optimizer, gradients: list[Tensor]) -> bool | None:
        """Unscale, clip, step; whether the update was skipped instead, None where only the device knows."""
        norm, limit = norm_of(gradients), self._clip_norm
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
            optimizer.step()
        else:
            self._grad_norm = norm / scale if scale != 1.0 else norm
            if scale != 1.0:
                larger = torch.clamp((self._grad_norm + 1e-6) / limit, min=1.0) if limit > 0 else 1.0
                scale_by(gradients, 1.0 / (scale * larger))
            elif limit > 0:
                clip(gradients, norm, limit)
            if self._precision.skips:
                optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
            optimizer.step()
            if self._precision.skips:
                optimizer.found_inf = None  # type: ignore[attr-defined]
        if self._masters is not None:
            self._masters.publish()
        return skipped

    def _judge(self, skipped: bool, loss: Tensor, norm: Tensor | float) -> None:
        """Count the last update as made or as skipped, and say what was not finite."""
        step = self.global_steps - 1
        if skipped:
            self._skipped += 1
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
        """Those that the update takes, of all processes; zeros for a weight without one, as in DeepSpeed."""
        if self._masters is not None and self._precision.accumulate is not torch.float32:
            self._masters.collect()
        gradients = []
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        if not self._reduced:
            self._reduction.reduce(gradients)
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
        self._renew_parallel = True  # there and not here: making DDP is a collective, and a process may be failing

    def _wrap_again(self) -> DistributedDataParallel:
        self._renew_parallel = False
        self.__dict__["_parallel"] = None  # before the new one: both would hook the parameters
        parallel = wrap_model(
            self._module,
            self.world,
            self._reduction,
            self._masters,
            find_unused_parameters=self.config.redline.find_unused_parameters,
        )
        assert parallel is not None
        self.__dict__["_parallel"] = parallel
        return parallel

    def _syncs(self) -> bool:
        return self._managed and not self._in_no_sync and self.is_gradient_accumulation_boundary()

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
        )

    # -- the compiler ----------------------------------------------------------------------------

    def compile(
        self, backend: str | Callable[..., Any] = "inductor", compile_kwargs: dict[str, Any] | None = None
    ) -> None:
        """From here on run the model as `torch.compile` makes it; once is enough, a second call does nothing.

        In place: parameters, `module` and the keys of the state dict stay as they are. On several processes DDP
        stays around the compiled model, where torch's compiler finds it and splits the graph at its buckets, so that
        gradients are still sent while the backward runs.

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
        module = self._module

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        # What module.compile() does, but for the function above: the compiler passes over frames of torch's own, so
        # that module.compile() leaves an nn.Sequential as it is, without a word.
        module._compiled_call_impl = torch.compile(call, backend=backend, **(compile_kwargs or {}))

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs compiled."""
        return self._module._compiled_call_impl is not None

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
        return self.config.train_batch_size

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


def _say_unfinished(unfinished: _Unfinished, accumulation: int) -> None:
    if unfinished.micro_batches:
        log.warning(
            "training ended within an accumulation: its last %d of %d micro-batches are in no update; call "
            "engine.flush() after the last one, or give a number of micro-batches that divides",
            unfinished.micro_batches, accumulation,
        )  # fmt: skip
