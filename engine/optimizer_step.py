"""One optimizer step: unscale, clip, update, and copy master params to the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.doubt import can_skip
from engine.gradients import clip, scale_by
from engine.lean import count_steps
from engine.parallel import Parallel
from engine.precision import Precision

__all__ = ["OptimizerStep"]


class OptimizerStep:
    """What happens to reduced gradients at the accumulation boundary.

    Args:
        optimizer: moved by every call.
        parallel: has the model, and runs the optimizer.
        precision: loss scale, and whether steps with a non-finite gradient are skipped.
        clip_norm: the gradient norm to clip to; 0 for no clipping.

    Attributes:
        grad_norm: of the last step before clipping, over all ranks; a tensor where only the device knows it.
    """

    def __init__(self, optimizer: Optimizer | None, parallel: Parallel, precision: Precision, clip_norm: float) -> None:
        self._optimizer, self._parallel, self._precision, self._clip_norm = optimizer, parallel, precision, clip_norm
        self.grad_norm: Tensor | float | None = None
        self._num_steps: Callable[[], int] = _no_steps if optimizer is None else count_steps(optimizer)
        self._seen_steps = self._num_steps()
        self._moving = False  # whether master params may differ from the model

    def called_elsewhere(self) -> bool:
        """Whether the optimizer's step() was called since the last :meth:`run`, or since this was last asked."""
        steps = self._num_steps()
        if steps == self._seen_steps:
            return False
        self._seen_steps = steps
        return True

    def run(self, gradients: list[Tensor]) -> bool | None:
        """Make a step.

        Returns:
            Whether it was skipped; None where only the device knows.
        """
        try:
            skipped = self._run(gradients)
        except BaseException:
            self.recover()
            raise
        self._seen_steps = self._num_steps()
        return skipped

    def recover(self) -> None:
        """Take the optimizer step for made that an exception, or an interrupt, has broken off."""
        self._seen_steps = self._num_steps()
        if self._moving:
            self._moving = False
            masters = self._precision.master_params
            # With sharded ones this is a collective, and the other ranks may not have been interrupted.
            if self._precision.publish is not None and (masters is None or masters.sharding is None):
                self._precision.publish()

    def _run(self, gradients: list[Tensor]) -> bool | None:
        optimizer, precision, limit = self._optimizer, self._precision, self._clip_norm
        assert optimizer is not None
        norm = self._parallel.norm(gradients)
        scale = 1.0 if precision.loss_scale is None else precision.loss_scale.value
        # The CPU's numbers cost nothing to read. On CUDA torch's fused optimizers skip a step by themselves, and the
        # engine learns of it when the next one begins; other optimizers have to be told, which waits.
        reads_norm = gradients[0].device.type == "cpu" or (precision.skips and not can_skip(optimizer))
        if precision.master_params is not None:
            precision.master_params.adopt_writes()
        self._moving = True
        if reads_norm:
            self.grad_norm = value = norm.item() / scale
            if precision.skips and not math.isfinite(value):
                self._moving = False
                return True
            clips = limit > 0 and not value + 1e-6 <= limit
            if scale != 1.0:  # both at once, as DeepSpeed does
                scale_by(gradients, 1.0 / (scale * (value + 1e-6) / limit if clips else scale))
            elif clips:
                clip(gradients, norm, limit)
            self._parallel.update(optimizer)
        else:
            self.grad_norm = norm / scale if scale != 1.0 else norm
            if scale != 1.0:
                larger = torch.clamp((self.grad_norm + 1e-6) / limit, min=1.0) if limit > 0 else 1.0
                scale_by(gradients, 1.0 / (scale * larger))
            elif limit > 0:
                clip(gradients, norm, limit)
            if precision.skips:
                optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
            try:
                self._parallel.update(optimizer)
            finally:
                if precision.skips:
                    optimizer.found_inf = None  # type: ignore[attr-defined]
        if precision.publish is not None:
            precision.publish()
        self._moving = False
        self._parallel.reshard()
        return False if reads_norm else None


def _no_steps() -> int:
    return 0
