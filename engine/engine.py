"""The engine: a model that trains as its config says, one micro-batch at a time.

    for x, y in loader:
        loss = loss_fn(engine(x), y)
        engine.backward(loss)
        engine.step()

Owns the step loop and its counters; is handed finished parts (`build.py` makes them). Nothing here
waits for the device: losses and norms stay tensors until somebody asks for their value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from engine.data import Loader
from engine.distributed import World
from engine.errors import EngineError
from engine.parallel import wrap_model

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
        global_steps: updates done.
        micro_steps: backward passes done.
        skipped_steps: updates that were left out for an overflow; 0 in fp32.
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
        self.micro_steps = 0
        self.skipped_steps = 0

        # Past nn.Module's own attribute look-up, which is slow and would list the model twice.
        self.__dict__["_parallel"] = parts.parallel
        self.__dict__["_module"] = parts.module
        self._parameter_list = [parameter for parameter in parts.module.parameters() if parameter.requires_grad]
        self._accumulation = parts.config.gradient_accumulation_steps
        self._clip_norm = parts.config.gradient_clipping
        self.steps_per_print = parts.config.steps_per_print
        self._pending = False  # a backward whose step has not come yet
        self._in_no_sync = False
        self._renew_parallel = False
        self._loss: Tensor | None = None  # mean over the micro-batches so far, of the update under way
        self._last_loss: Tensor | None = None
        self._grad_norm: Tensor | None = None

    # -- the step loop ---------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        parallel = self._parallel
        if parallel is None or not torch.is_grad_enabled():
            return self._module(*args, **kwargs)
        if self._renew_parallel:
            parallel = self._wrap_again()
        # DDP decides in the forward whether the backward will send anything.
        parallel.require_backward_grad_sync = self._syncs()
        return parallel(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add this micro-batch's gradients to the update under way.

        Args:
            loss: scalar; the mean over the micro-batch.
            retain_graph: as in `torch.autograd.backward`.
            scale_wrt_gas: divide by the accumulation steps, so that the update has the mean gradient.

        Returns:
            The loss as it was differentiated.

        Raises:
            EngineError: no optimizer; a loss that is no scalar tensor; on several processes, a second backward
                before the step.
        """
        if self.optimizer is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            raise EngineError(self._why_no_backward(loss))
        if self._pending and self._parallel is not None:
            raise EngineError(
                "backward: a second one before engine.step() would leave its gradients unshared between the "
                "processes; add the losses and call engine.backward once, or use engine.no_sync() for all but the last"
            )
        if scale_wrt_gas and self._accumulation > 1:
            loss = loss / self._accumulation
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        share = loss.detach()
        self._loss = share if self._loss is None else self._loss + share
        self._pending = not self._in_no_sync
        return loss

    def step(self) -> None:
        """End a micro-batch; at the accumulation boundary update the weights, then rate and momentum.

        Raises:
            EngineError: there was no backward since the last step, or it stands inside :meth:`no_sync`.
        """
        if not self._pending or self._in_no_sync:
            raise EngineError(
                "step: called inside no_sync(), where gradients are not complete; call it after the block"
                if self._in_no_sync
                else "step: no backward since the last step; call engine.backward(loss) first, not loss.backward()"
            )
        self._pending = False
        if self.is_gradient_accumulation_boundary():
            self._update()
        self.micro_steps += 1

    def _update(self) -> None:
        assert self.optimizer is not None and self._loss is not None
        if self._clip_norm > 0:
            self._grad_norm = nn.utils.clip_grad_norm_(self._parameter_list, self._clip_norm, foreach=True)
        self.optimizer.step()
        for parameter in self._parameter_list:
            parameter.grad = None
        self._last_loss, self._loss = self._loss, None
        if self.recorder is not None:
            self.recorder.record(self.global_steps, self.optimizer.param_groups[0]["lr"], self._last_loss)
        self.global_steps += 1
        for observer in self.observers:
            observer.updated(self)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this block backward passes keep their gradients to this process."""
        self._in_no_sync = True
        try:
            yield
        finally:
            self._in_no_sync = False

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its update."""
        return (self.micro_steps + 1) % self._accumulation == 0

    def renew_parallel(self) -> None:
        """Let the next forward be DDP's first: it orders its sums anew after one, which shows in the last bits."""
        self._renew_parallel = True  # there and not here: making DDP is a collective, and a process may be failing

    def _wrap_again(self) -> DistributedDataParallel:
        self._renew_parallel = False
        self.__dict__["_parallel"] = None  # before the new one: both would hook the parameters
        unused = self.config.redline.find_unused_parameters
        parallel = wrap_model(self._module, self.world, find_unused_parameters=unused)
        assert parallel is not None
        self.__dict__["_parallel"] = parallel
        return parallel

    def _syncs(self) -> bool:
        return self.is_gradient_accumulation_boundary() and not self._in_no_sync

    def _why_no_backward(self, loss: Any) -> str:
        if self.optimizer is None:
            return 'backward: there is no optimizer; give the config an "optimizer" section or initialize one'
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        return f"backward: got {given}; expected a scalar tensor, such as loss.mean()"

    # -- what a user may ask ---------------------------------------------------------------------

    @property
    def loss(self) -> Tensor | None:
        """This process's mean loss over the micro-batches of the last update, on the device; None before it."""
        return self._last_loss

    @property
    def grad_norm(self) -> Tensor | None:
        """The last update's gradient norm before clipping, over all processes, on the device; None without clipping."""
        return self._grad_norm

    @property
    def global_samples(self) -> int:
        """Samples of all updates so far, over all processes."""
        return self.global_steps * self.config.train_batch_size

    @property
    def loss_scale(self) -> float | None:
        """The factor of the loss in fp16; None where there is none."""
        return None

    def get_lr(self) -> list[Any]:
        """The rate of each parameter group, for the update to come."""
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum, or betas, of each parameter group, for the update to come."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group["betas"] if "betas" in group else group.get("momentum") for group in groups]

    def get_global_grad_norm(self) -> float | None:
        """The last update's gradient norm before clipping, over all processes; None without clipping.

        Waits for the device.
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
