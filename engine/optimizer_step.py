"""One optimizer step: unscale, clip, update, and copy master params to the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.gradients import clip, scale_by
from engine.lean import count_steps
from engine.parallel import Parallel
from engine.precision import Precision
from engine.skipping import can_put_back, can_skip, num_state_tensors, step_or_put_back
from engine.transfer import HostCopy, reads_cost_nothing

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
        self._num_steps: Callable[[], int] = int if optimizer is None else count_steps(optimizer)
        self._seen_steps = self._num_steps()
        self._moving = False  # whether master params may differ from the model
        self._undo: Callable[[], None] | None = None
        # What was updated last, and how many tensors of state it had.
        self._stepped: tuple[list[Tensor], int] | None = None

    def undo(self) -> None:
        """Put back what is left on the host of a step that the device has skipped."""
        if self._undo is not None:
            self._undo()

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
        self._undo = None
        # The CPU's numbers cost nothing to read. On CUDA the device skips a step by itself, and the engine learns of it
        # when the next one begins. Only the step that creates an optimizer's state, unless its kernels can skip, and
        # steps of optimizers of which it is not known what they change, wait for the norm.
        free = reads_cost_nothing(gradients[0].device)
        puts_back = not free and precision.skips and not can_skip(optimizer)
        updated = self._parallel.params.updated
        reads_norm = free or (puts_back and not (can_put_back(optimizer) and self._has_state(optimizer, updated)))
        if precision.master_params is not None:
            precision.master_params.adopt_writes()
        self._moving = True
        if reads_norm:
            self.grad_norm = value = (norm.item() if free else HostCopy(norm).read()[0]) / scale
            if precision.skips and not math.isfinite(value):
                self._moving = False
                return True
            clips = limit > 0 and not value + 1e-6 <= limit
            if scale != 1.0:  # both at once, as DeepSpeed does
                scale_by(gradients, 1.0 / (scale * (value + 1e-6) / limit if clips else scale))
            elif clips:
                clip(gradients, norm, limit)
            self._parallel.update(optimizer)
            self._stepped = updated, 0 if free else num_state_tensors(optimizer)
        else:
            self.grad_norm = norm / scale if scale != 1.0 else norm
            if scale != 1.0:
                larger = torch.clamp((self.grad_norm + 1e-6) / limit, min=1.0) if limit > 0 else 1.0
                scale_by(gradients, 1.0 / (scale * larger))
            elif limit > 0:
                clip(gradients, norm, limit)
            self._update(optimizer, norm, puts_back=puts_back)
        if precision.publish is not None:
            precision.publish()
        self._moving = False
        self._parallel.reshard()
        return False if reads_norm else None

    def _has_state(self, optimizer: Optimizer, updated: list[Tensor]) -> bool:
        """Whether the optimizer has all state that its step needs, as an earlier step left it."""
        stepped = self._stepped
        return stepped is not None and stepped[0] is updated and stepped[1] == num_state_tensors(optimizer)

    def _update(self, optimizer: Optimizer, norm: Tensor, *, puts_back: bool) -> None:
        """Let the optimizer make its step, or the device skip it."""
        if not self._precision.skips:
            self._parallel.update(optimizer)
            return
        found_inf = norm.isfinite().logical_not().float()
        if puts_back:
            self._undo = step_or_put_back(optimizer, lambda: self._parallel.update(optimizer), found_inf)
            return
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        try:
            self._parallel.update(optimizer)
        finally:
            optimizer.found_inf = None  # type: ignore[attr-defined]
