"""Gradients after backward: how they are summed over the ranks, their norm, clipping.

The arithmetic of the sum is DeepSpeed's (`allreduce_bucket` in `deepspeed/runtime/engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["Reduction", "clip", "norm_of", "scale_by"]


class OwnGradients:
    """The sum of all gradients of this rank before they are reduced, which tells whose a NaN is.

    After the reduction every rank has the same gradients, and a NaN is everybody's.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, buffer: Tensor) -> None:
        """Add gradients that are about to be reduced."""
        total = buffer.sum(dtype=torch.float32)
        self._sum = total if self._sum is None else self._sum + total

    def take(self) -> Tensor | None:
        """The sum since the last call, a scalar tensor, not finite if a gradient is not; None where there was none."""
        total, self._sum = self._sum, None
        return total


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the gradients of all ranks become one."""

    size: int  # number of ranks
    dtype: torch.dtype = torch.float32  # of the collective
    before: float = 1.0  # factor of each rank's gradient before the sum
    after: float = 1.0  # factor of the sum
    own: OwnGradients = field(default_factory=OwnGradients, repr=False, compare=False)

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

    def start(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """Reduce a buffer of `dtype` in place, without waiting; all ranks call this in the same order."""
        self.own.add(buffer)
        if self.before != 1.0:
            buffer.mul_(self.before)
        work: torch.futures.Future[list[Tensor]] = dist.all_reduce(buffer, async_op=True).get_future()

        def finish(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = done.value()[0]
            return total.mul_(self.after) if self.after != 1.0 else total

        return work.then(finish)

    def reduce_sparse(self, gradient: Tensor) -> Tensor:
        """The sum of a sparse gradient over the ranks: their rows side by side."""
        total = gradient.coalesce()
        self.own.add(total.values())
        dist.all_reduce(total)
        factor = self.before * self.after
        return total.mul_(factor) if factor != 1.0 else total


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, as a scalar tensor on their device; of sparse ones, too."""
    if not gradients:
        return torch.zeros(())
    # bf16 has too few digits for a norm, and fp16 overflows.
    wide = torch.float64 if gradients[0].dtype is torch.float64 else torch.float32
    try:
        norms = torch._foreach_norm(list(gradients), 2, wide)
    except RuntimeError:  # sparse, complex or mixed ones; to look at each gradient at every step would cost more
        norms = tuple(_norm(gradient) for gradient in gradients)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if values.element_size() < 4 else None)
    return norm


def clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of this norm down to `limit`, in place; as `torch.nn.utils.clip_grad_norm_` does."""
    scale_by(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def scale_by(gradients: list[Tensor], factor: Tensor | float) -> None:
    """Multiply gradients, in place; does not wait for a factor on the device."""
    try:
        torch._foreach_mul_(gradients, factor)
    except RuntimeError:  # sparse ones
        for gradient in gradients:
            gradient.mul_(factor)
