"""One optimizer step: unscale, clip, call the optimizer, and copy master params to the model.

On the CPU the gradient norm can be read at once, and a step whose gradients are not finite is not made. On CUDA nothing
waits for it: the device skips a step by itself (see `redline.optimizers.state`), and the host learns of it when the
next step begins, or later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redline.device import HostCopy, reads_cost_nothing
from redline.distributed.process_group import World
from redline.distributed.strategy import Strategy
from redline.gradients import clip, scale_by
from redline.log import log
from redline.optimizers.state import can_put_back, can_skip, count_steps, num_state_tensors, step_or_put_back
from redline.precision import LossScale

__all__ = ["FiniteCheck", "OptimizerStep", "PendingStep"]


class OptimizerStep:
    """What happens to reduced gradients at the accumulation boundary.

    Args:
        optimizer: called by every step.
        strategy: has the model, and calls the optimizer.
        scaler: has scaled the loss; None without a loss scale.
        skips: whether steps with a non-finite gradient are skipped.
        clip_norm: the gradient norm to clip to; 0 for no clipping.
    """

    def __init__(
        self, optimizer: Any, strategy: Strategy, scaler: LossScale | None, *, skips: bool, clip_norm: float
    ) -> None:
        self._optimizer, self._strategy, self._scaler = optimizer, strategy, scaler
        self._skips, self._clip_norm = skips, clip_norm
        self.loss: Tensor | None = None  # this rank's mean over the micro-batches of the last step
        self.grad_norm: Tensor | float | None = None  # of the last step, before clipping, over all ranks
        self.own: Tensor | None = None  # the sum of this rank's gradients before the last step's reduction
        self.pending: PendingStep | None = None  # the last step, while its overflow check is on the device
        self.undo: Callable[[], None] = _nothing  # the host's part of the last step, if the device has skipped it
        if optimizer is not None:
            count_steps(optimizer)
        self._num_steps = 0 if optimizer is None else optimizer.num_steps  # when it was last called from here
        self._moving = False  # whether master params may differ from the model
        # The parameters of the last step, and how many tensors of state they had.
        self._stepped: tuple[list[Tensor], int] | None = None

    def called_elsewhere(self) -> bool:
        """Whether the optimizer's step() was called since the last :meth:`run` or :meth:`recover`."""
        return self._optimizer is not None and self._optimizer.num_steps != self._num_steps

    def recover(self) -> None:
        """After a step that an exception has interrupted, or that the script has made: accept it as made.

        With sharded master params a collective, as the rest of the step would have been.
        """
        if self._optimizer is not None:
            self._num_steps = self._optimizer.num_steps
        if self._moving:
            self._moving = False
            self._strategy.params.copy_to_model()

    def run(self, gradients: list[Tensor], loss: Tensor) -> bool | None:
        """Make a step.

        Args:
            gradients: of all ranks, as the optimizer has them; they are scaled and clipped in place.
            loss: the mean over this rank's micro-batches, which is kept.

        Returns:
            Whether it was skipped; None while only the device knows.
        """
        optimizer, params = self._optimizer, self._strategy.params
        self.loss, self.undo = loss, _nothing
        self.own = self._strategy.reduction.own.take()
        norm = self._strategy.grad_norm(gradients)
        scale = 1.0 if self._scaler is None else self._scaler.value
        # Two kinds of steps wait for the norm on CUDA, too: those that create an optimizer's state, unless its kernels
        # can skip, and those of optimizers that may keep state elsewhere.
        free = reads_cost_nothing(gradients[0].device)
        puts_back = not free and self._skips and not can_skip(optimizer)
        known = free or (puts_back and not (can_put_back(optimizer) and self._has_state()))
        if params.masters is not None:
            params.masters.adopt_writes()
        value: float | None = None
        if known:
            self.grad_norm = value = (norm.item() if free else HostCopy(norm).read()[0]) / scale
            if self._skips and not math.isfinite(value):
                return True
        else:
            self.grad_norm = norm / scale if scale != 1.0 else norm
        self._unscale_and_clip(gradients, norm, scale, value)
        self._moving = True
        if known or not self._skips:
            self._strategy.run_optimizer(optimizer)
        else:
            self._run_optimizer_if_finite(norm, puts_back=puts_back)
        if known and not free:
            self._stepped = params.updated, num_state_tensors(optimizer)
        params.copy_to_model()
        self._moving = False
        self._strategy.reshard()
        self._num_steps = optimizer.num_steps
        return False if known or not self._skips else None

    def _unscale_and_clip(self, gradients: list[Tensor], norm: Tensor, scale: float, value: float | None) -> None:
        """Both at once, as DeepSpeed does; `value` is the unscaled norm, where the host knows it."""
        limit = self._clip_norm
        clips = limit > 0 and (value is None or not value + 1e-6 <= limit)
        if scale == 1.0:
            if clips:
                clip(gradients, norm, limit)
            return
        divisor: Any = scale
        if clips and value is not None:
            divisor = scale * (value + 1e-6) / limit
        elif clips:
            divisor = scale * torch.clamp((norm / scale + 1e-6) / limit, min=1.0)
        scale_by(gradients, 1.0 / divisor)

    def _has_state(self) -> bool:
        """Whether the optimizer has all state that its step needs, as an earlier step left it."""
        if self._stepped is None or self._stepped[0] is not self._strategy.params.updated:
            return False
        return self._stepped[1] == num_state_tensors(self._optimizer)

    def _run_optimizer_if_finite(self, norm: Tensor, *, puts_back: bool) -> None:
        """Call the optimizer; the device skips its step, or puts it back, if the norm is not finite."""
        optimizer = self._optimizer
        found_inf = norm.isfinite().logical_not().float()
        if puts_back:
            self.undo = step_or_put_back(optimizer, lambda: self._strategy.run_optimizer(optimizer), found_inf)
            return
        optimizer.found_inf = found_inf
        try:
            self._strategy.run_optimizer(optimizer)
        finally:
            optimizer.found_inf = None


def _nothing() -> None: ...


class PendingStep(NamedTuple):
    """An optimizer step whose overflow check is still pending on the GPU."""

    loss: Tensor
    norm: HostCopy  # of its gradients, on the way from the device
    undo_schedule: Callable[[], None]  # the host has stepped the schedule as if this step were taken


class FiniteCheck:
    """Logs the 1st, 2nd, 4th, 8th... optimizer step whose loss or gradient norm is not finite.

    Rank 0 does, for all; of several ranks each one whose own loss or gradients are not finite does, too, and says which
    it is. With fp16's loss scale gradients overflow now and then, on whatever rank, so that they are nobody's.
    """

    def __init__(self, world: World) -> None:
        self._place = f" on rank {world.rank}" if world.size > 1 else ""
        self.enabled = True  # False where losses are meant to diverge, as in a range test
        self._count = 0
        self._arriving: deque[tuple[int, HostCopy]] = deque()

    def taken(self, step: int, loss: Tensor, norm: Tensor | float, own: Tensor | None) -> None:
        """Check a step that was taken; on CUDA some steps later, without waiting.

        `own` is the sum of this rank's own gradients; None on one rank.
        """
        if not self.enabled:
            return
        if reads_cost_nothing(loss.device):
            if not (math.isfinite(norm) and math.isfinite(loss)):
                self._check(step, float(loss), float(norm), 0.0 if own is None else float(own))
            return
        while self._arriving and self._arriving[0][1].has_arrived():
            earlier, values = self._arriving.popleft()
            self._check(earlier, *values.read())
        self._arriving.append((step, HostCopy(loss, norm, 0.0 if own is None else own)))

    def _check(self, step: int, loss: float, norm: float, own: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._log(
                f"step {step}", loss, norm, own,
                "the weights have been updated with it; lower the learning rate, clip gradients, or look at this "
                "step's data",
            )  # fmt: skip

    def skipped(self, step: int, loss: Tensor, norm: float, own: Tensor | None, scaler: LossScale | None) -> None:
        """Report a step that was skipped."""
        if self.enabled:
            own_sum = 0.0 if own is None or scaler is not None else float(own)
            scale = "" if scaler is None else f"the loss scale was {scaler.value:g}; "
            self._log(
                f"step {step} is skipped", float(loss), norm, own_sum, f"{scale}weights and schedule are unchanged"
            )

    def _log(self, step: str, loss: float, norm: float, own: float, outcome: str) -> None:
        self._count += 1
        if self._count & (self._count - 1):
            return
        finite = math.isfinite(loss) and math.isfinite(own)
        note = ""
        if self._place and finite:
            note = " (a rank whose loss or gradients are not finite logs that itself)"
        elif math.isfinite(loss) and not finite:
            note = f", and the gradients{self._place} were not finite before they were reduced"
        so_far = f" ({self._count} such steps so far)" if self._count > 1 else ""
        log.warning(
            "%s: its gradient norm is %g, its loss%s is %g%s; %s%s",
            step, norm, self._place, loss, note, outcome, so_far,
            extra={"from_any_rank": not finite},
        )  # fmt: skip
