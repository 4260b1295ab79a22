"""One model on all ranks: what the engine needs of it.

Gradients accumulate on each rank and are reduced once per optimizer step. The number of collectives depends on which
parameters train, never on which of them a loss has reached or how the forward was called, so that ranks whose losses
reach different parameters stay in step. The two strategies are in `ddp` (stages 0 to 2) and `fsdp` (stage 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.distributed.sharding import RunCollective
from redline.errors import EngineError
from redline.gradients import Reduction, norm_of
from redline.master_params import TrainedParams
from redline.optimizers.state import local_tensor

__all__ = ["ExpectedGradients", "Reduced", "Strategy", "refuse_replaced"]

# The gradients of all ranks, as an optimizer step takes them (plain tensors, full ones or this rank's rows; they count
# in the norm and are clipped), and the sums over the ranks of the numbers that each rank gave, on the device (None
# where there is one rank). A plain tuple: a named one takes longer to make than one rank's reduction.
Reduced = tuple[list[Tensor], Tensor | None]


class Strategy(ABC):
    """One model on all ranks, seen from one of them."""

    module: nn.Module  # the model
    reduction: Reduction  # how the gradients of all ranks become one
    params: TrainedParams  # what trains
    reduces_in_backward = False  # whether every backward is a collective already
    always_reduces = False  # whether gradients are to be reduced after every backward, and not at the boundary alone

    def __init__(self, module: nn.Module, reduction: Reduction, group: Any, expected: ExpectedGradients) -> None:
        self.module, self.reduction = module, reduction
        self._group = group  # of the ranks that shard what the optimizer updates; None without shards
        self._run_collective: RunCollective = lambda op, size, run: run()
        self._reached = False  # whether a backward has left a gradient
        self._num_sharded = 0  # of the gradients that were reduced last: these come first
        self._expected = expected

    def begin_call(self, call: str) -> None:  # noqa: B027
        """Called before the collectives of a call of the script, one of `call_order.CALLS`."""

    @abstractmethod
    def prepare_forward(self, *, is_last: bool, no_sync: bool) -> nn.Module:
        """Prepare for a forward; returns the module to call.

        Args:
            is_last: whether its backward ends an accumulation.
            no_sync: whether its gradients stay on this rank.
        """

    @abstractmethod
    def gradients_unchanged(self) -> bool:
        """Whether nobody has changed the gradients since :meth:`collect_gradients` or :meth:`clear_gradients`."""

    @abstractmethod
    def refresh_params(self) -> None:
        """Follow changes of which parameters train; gradients of those that no longer do are dropped."""

    def prepare_backward(self) -> None:  # noqa: B027
        """Called before a backward: set earlier gradients aside where its own must not be added to them."""

    @abstractmethod
    def collect_gradients(self) -> None:
        """Called after a backward: take over its gradients."""

    def has_gradients(self) -> bool:
        """Whether some gradient has been collected on this rank."""
        return self._reached

    def gradient_of(self, param: Tensor) -> Tensor | None:
        """A model parameter's gradient so far, with fp16's loss scale; once it is reduced, that of all ranks."""
        return param.grad

    @abstractmethod
    def reduce_gradients(self, status: Sequence[float]) -> Reduced:
        """Reduce the collected gradients over the ranks and give them to the optimizer; a collective.

        A parameter that no loss has reached gets zeros, as in DeepSpeed. What was reduced before, since the last
        :meth:`clear_gradients`, is added. `status` are numbers of this rank that are summed with the gradients.
        """

    def grad_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients of all ranks together; a scalar tensor."""
        count = self._num_sharded
        if count == 0:
            return norm_of(gradients)
        # In fp64, where the square of a large fp16 loss scale's norm is still finite.
        square = norm_of(gradients[:count]).double().square()
        square = square.to(self.params.model[0].device)  # offloaded gradients are in the CPU's memory
        self._run_collective("all_reduce", square.nbytes, lambda: dist.all_reduce(square, group=self._group))
        if len(gradients) > count:
            square = square + norm_of(gradients[count:]).double().square()
        return square.sqrt().to(torch.promote_types(gradients[0].dtype, torch.float32))

    def run_optimizer(self, optimizer: Optimizer) -> None:
        """Call the optimizer's step.

        Raises:
            EngineError: it uses an operation that torch does not have for sharded parameters.
        """
        try:
            optimizer.step()
        except (NotImplementedError, RuntimeError) as error:
            if self._group is None or "aten." not in str(error):  # no operation of torch's
                raise
            raise EngineError(
                f"optimizer {type(optimizer).__name__}: torch can't run it on sharded parameters "
                f"({str(error).splitlines()[0]}); use zero_optimization.stage 0, or an optimizer such as AdamW"
            ) from error

    @abstractmethod
    def clear_gradients(self) -> None:
        """Drop all gradients, and what an interrupted forward or backward has left."""

    def reset_forward(self) -> None:  # noqa: B027
        """Clean up after a forward that has raised; gradients stay."""

    def reshard(self) -> None:  # noqa: B027
        """Free unsharded copies of parameters, which become outdated when the shards change."""

    def observe_collectives(self, run_collective: RunCollective) -> None:
        """Let `run_collective` run the collectives of parameters and gradients that are not the reduction's."""
        self._run_collective = run_collective

    @abstractmethod
    def compile(self, **options: Any) -> None:
        """Compile the model in place; options as of torch.compile."""


class ExpectedGradients:
    """The gradients as the engine left them, to detect changes that others make.

    A plain ``loss.backward()`` adds to a gradient in place, or creates one; `zero_grad` removes it, or writes zeros.
    Of DTensors, whose own version stays 0, the shards' versions are compared. Plain loops are used since they take a
    third of the time of `any` and `all` for a few tensors.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.grads: list[Any] = []  # the recorded gradient of each parameter; empty where none is expected
        self.complete = False  # whether every parameter has one
        self._sharded = sharded
        self._params: list[Any] = []
        self._written: list[Any] = []  # the gradients, or their shards
        self._versions: list[int | None] = []

    def record(self, params: list[Any]) -> bool:
        """Record the current gradients of these parameters; returns whether there are any."""
        self._params = params
        self.grads = written = [param.grad for param in params]
        if self._sharded:
            written = [local_tensor(grad) for grad in written]
        self._written = written
        try:
            self._versions = [grad._version for grad in written]
            self.complete = bool(written)
            return self.complete
        except AttributeError:  # some are None
            self._versions = [None if grad is None else grad._version for grad in written]
            self.complete = False
            return any(version is not None for version in self._versions)

    def record_none(self, params: list[Any]) -> None:
        """Expect no gradient on any of these parameters."""
        self._params, self.complete = params, False
        self.grads = self._written = []  # also frees the gradients

    def unchanged(self) -> bool:
        """Whether the gradients still are those that were recorded."""
        if not self.grads:
            for param in self._params:  # noqa: SIM110  any() takes twice as long
                if param.grad is not None:
                    return False
            return True
        for param, grad, written, version in zip(self._params, self.grads, self._written, self._versions):
            if param.grad is not grad or (version is not None and written._version != version):
                return False
        return True


def refuse_replaced(name: str) -> None:
    """Refuse a parameter that is another object than when the engine was built."""
    raise EngineError(
        f"{name}: the model has another parameter object than the optimizer's, which would never train; write into the "
        "old one, with load_state_dict(..., assign=False) or copy_() under torch.no_grad(), or call initialize again"
    )
