"""Gradients after backward: summed over processes, measured, clipped.

The arithmetic of the sum is DeepSpeed's (`allreduce_bucket` in `deepspeed/runtime/engine.py`). Where DDP's own
mean in fp32 is what the config asks for, DDP does it; everything else is done in its communication hook, while
backward goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.precision import Masters

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

    from engine.config import EngineConfig

__all__ = ["Reduction", "clip", "communication_hook", "norm_of", "scale_by"]

_BUCKET = 25 * 2**20  # bytes; DDP's own size


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the gradients of all processes become one.

    Attributes:
        size: number of processes.
        dtype: the format they travel in.
        before: factor of each process's gradient before the sum.
        after: factor of the sum.
    """

    size: int
    dtype: torch.dtype = torch.float32
    before: float = 1.0
    after: float = 1.0

    @classmethod
    def of(cls, config: EngineConfig, size: int, dtype: torch.dtype) -> Reduction:
        """What a config asks for: its gradient_allreduce_op, prescale_gradients and gradient_predivide_factor."""
        if config.gradient_allreduce_op == "sum":
            return cls(size, dtype)
        if config.prescale_gradients:
            return cls(size, dtype, before=1.0 / size)
        factor = config.gradient_predivide_factor
        return cls(size, dtype, before=1.0 / factor, after=factor / size)

    @property
    def is_mean(self) -> bool:
        """Whether the gradients are averaged, wherever the division happens."""
        return abs(self.before * self.after * self.size - 1) < 1e-12

    @property
    def is_ddps(self) -> bool:
        """Whether DDP does the same by itself, but for rounding."""
        return self.dtype is torch.float32 and self.is_mean

    def start(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """Reduce a buffer of `dtype` in place, without waiting; all processes, in the same order."""
        if self.before != 1.0:
            buffer.mul_(self.before)
        work: torch.futures.Future[list[Tensor]] = dist.all_reduce(buffer, async_op=True).get_future()

        def finish(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = done.value()[0]
            return total.mul_(self.after) if self.after != 1.0 else total

        return work.then(finish)

    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Reduce gradients in place, and wait; for those that backward has left to this process."""
        if self.size == 1:
            return
        for gradient in gradients:
            if gradient.is_sparse:  # in its own format: rows of several processes come side by side
                total = gradient.coalesce()
                dist.all_reduce(total)
                gradient.copy_(total.mul_(self.before * self.after))
        for bucket in _buckets([gradient for gradient in gradients if not gradient.is_sparse]):
            buffer = torch.cat([gradient.reshape(-1).to(self.dtype) for gradient in bucket])
            total = self.start(buffer).wait()
            for gradient, part in zip(bucket, torch.split(total, [gradient.numel() for gradient in bucket])):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in the order given, as many at a time as fill a bucket."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(each.nbytes for each in bucket) + gradient.nbytes > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def communication_hook(reduction: Reduction, masters: Masters | None) -> Callable[[Any, GradBucket], Any]:
    """What DDP calls with each bucket of gradients as backward fills it.

    With masters the sum never sees the model's low precision: what earlier micro-batches have left in the masters
    is added in fp32, and the result goes to the masters, not to the model.
    """

    def hook(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        local = bucket.buffer()
        if masters is None:
            if local.dtype == reduction.dtype:
                return reduction.start(local)
            return reduction.start(local.to(reduction.dtype)).then(lambda done: local.copy_(done.value()))
        owners = [masters.of.get(parameter) for parameter in bucket.parameters()]
        whole = torch.cat(
            [_plus(gradient.reshape(-1).float(), owner) for gradient, owner in zip(bucket.gradients(), owners)]
        )

        def hand_over(done: torch.futures.Future[Tensor]) -> Tensor:
            parts = torch.split(done.value().float(), [gradient.numel() for gradient in bucket.gradients()])
            for owner, part in zip(owners, parts):
                if owner is not None:
                    owner.grad = part.view_as(owner)
            return local

        return reduction.start(whole.to(reduction.dtype)).then(hand_over)

    hook.__annotations__.clear()  # DDP reads them, and takes classes only
    return hook


def _plus(gradient: Tensor, owner: Tensor | None) -> Tensor:
    return gradient if owner is None or owner.grad is None else gradient.add_(owner.grad.reshape(-1))


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, as a scalar tensor on their device; of sparse ones, too."""
    if not gradients:
        return torch.zeros(())
    # 8 bits of a bf16 norm are too few to report and to clip by, and a norm in fp16 overflows.
    wide = torch.float64 if gradients[0].dtype is torch.float64 else torch.float32
    try:
        norms = torch._foreach_norm(list(gradients), 2, wide)
    except RuntimeError:  # sparse, complex or mixed ones; to look at each gradient at every step would cost more
        norms = tuple(_norm(gradient) for gradient in gradients)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _norm(gradient: Tensor) -> Tensor:
    values = _values(gradient)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if values.element_size() < 4 else None)
    return norm


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of this norm down to `limit`, in place; as `torch.nn.utils.clip_grad_norm_` does."""
    scale_by(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def scale_by(gradients: list[Tensor], factor: Tensor | float) -> None:
    """Multiply gradients, in place; a factor on the device is not waited for."""
    try:
        torch._foreach_mul_(gradients, factor)
    except RuntimeError:  # sparse ones
        for gradient in gradients:
            gradient.mul_(factor)
