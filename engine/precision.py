"""Dtypes of a run, and the loss scale of fp16.

In fp16 and bf16 the model's parameters have that dtype, and the optimizer updates fp32 copies of them, the master
params (`redline.master_params`). Buffers keep their dtype unless the config names one. After DeepSpeed's
`runtime/engine.py`, `runtime/zero/stage_1_and_2.py` and `runtime/fp16/loss_scaler.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from redline.errors import LossScaleError

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["AmpLossScale", "LossScale", "Precision", "build_loss_scale", "call_in_autocast"]


def _to_dtype(name: str) -> torch.dtype:
    """The dtype that a config names."""
    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    dtype: torch.dtype = getattr(torch, short.get(name, name).removeprefix("torch."))
    return dtype


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of one training run."""

    compute: torch.dtype  # of the model's parameters, and so of forward and backward
    stored: torch.dtype | None  # of the parameters that the optimizer updates; None for the model's own dtypes
    autocast: torch.dtype | None  # of torch.autocast around the forward pass; None without
    accumulate: torch.dtype  # of gradient accumulation
    reduce: torch.dtype  # in which gradients are summed over the ranks
    buffers: torch.dtype | None  # of floating-point buffers; None to leave them unchanged
    has_masters: bool  # whether the optimizer updates copies of the model's parameters
    # Round what the optimizer updates to `compute` after every step: DeepSpeed's `bf16_master_weights_and_grads` with
    # fp32 optimizer states.
    rounded: bool
    skips: bool  # optimizer steps with a non-finite gradient

    @classmethod
    def of(cls, config: EngineConfig, stage: int = 0) -> Precision:
        """What a config asks for, at the stage of ZeRO that is in effect: 0 where nothing is sharded."""
        fp16, bf16, types = config.fp16, config.bf16, config.data_types
        compute, stored, autocast, rounded, skips = torch.float32, None, None, False, False
        if fp16 is not None and fp16.enabled:
            compute, stored, skips = torch.float16, torch.float32, True
        elif bf16 is not None and bf16.enabled:
            compute, stored, skips = torch.bfloat16, torch.float32, bf16.check_grad_overflow
            if bf16.bf16_master_weights_and_grads:
                stored, rounded = (compute, False) if bf16.bf16_optimizer_states else (torch.float32, True)
        if config.torch_autocast is not None and config.torch_autocast.enabled:
            autocast = _to_dtype(config.torch_autocast.dtype or "bf16")
        reduce = _to_dtype(config.communication_data_type or "fp32")
        is_low, stored_low = compute is not torch.float32, stored is not None and stored is compute
        # At stage 3 the model's parameters are the master params, which torch gathers in the compute dtype.
        has_masters = stage in (1, 2) or (stage == 0 and is_low and not stored_low)
        accumulate = torch.float32
        if is_low and has_masters and types is not None and types.grad_accum_dtype is not None:
            accumulate = _to_dtype(types.grad_accum_dtype)
        elif stored_low:
            accumulate = reduce if stage else compute
        return cls(
            compute, stored, autocast, accumulate, reduce,
            buffers=None if types is None or types.buffer_dtype is None else _to_dtype(types.buffer_dtype),
            has_masters=has_masters,
            rounded=rounded,
            skips=skips or autocast is torch.float16,
        )  # fmt: skip

    def cast(self, module: nn.Module, *, params: bool) -> None:
        """Bring buffers and, unless torch casts them when it gathers shards, parameters into their dtypes, in place."""
        for each in module.modules():
            # Batch norm takes low-precision inputs with fp32 weights, but no low-precision weights with fp32 statistics
            keeps = self.buffers is None and getattr(each, "running_mean", None) is not None
            for parameter in each.parameters(recurse=False):
                if params and not keeps and self.compute is not torch.float32 and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.compute)
                    parameter.grad = None
            for buffer in each.buffers(recurse=False):
                if self.buffers is not None and buffer.is_floating_point():
                    buffer.data = buffer.data.to(self.buffers)

    def table(self, *, has_optimizer: bool) -> str:
        """The dtype of each kind of tensor, as a table of two lines; "" where all are float32."""
        stored = self.stored or self.compute
        columns = {
            "parameters": self.compute if self.has_masters else stored,
            "computation": self.autocast or self.compute,
            "gradients": self.accumulate,
            "reduction": self.reduce,
            "master weights": stored if self.has_masters else None,
            "optimizer state": stored if has_optimizer else None,
        }
        if {dtype for dtype in columns.values() if dtype is not None} == {torch.float32}:
            return ""
        cells = [(name, "-" if dtype is None else str(dtype).removeprefix("torch.")) for name, dtype in columns.items()]
        widths = [max(map(len, cell)) for cell in cells]
        rows = ("  ".join(cell[row].ljust(width) for cell, width in zip(cells, widths)) for row in (0, 1))
        return "\n".join(row.rstrip() for row in rows)


def call_in_autocast(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str, dtype: torch.dtype
) -> Any:
    """``function(*args, **kwargs)`` under autocast, which is off afterwards, also after an interrupt.

    An interrupt while `torch.autocast` exits would leave it on, or leave its cache of cast weights to later forwards.
    """
    enabled, autocast_dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    try:
        with torch.autocast(device_type, dtype):
            return function(*args, **kwargs)
    except BaseException:
        torch.set_autocast_enabled(device_type, enabled)
        torch.set_autocast_dtype(device_type, autocast_dtype)
        if not enabled:  # this was the outermost autocast: the depth must be zero, or no later one clears the cache
            for _ in range(torch.autocast_increment_nesting()):
                torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        raise


def build_loss_scale(config: EngineConfig) -> LossScale | None:
    """The config's loss scale; None without fp16."""
    fp16 = config.fp16
    if fp16 is not None and fp16.enabled:
        return LossScale(
            fp16.loss_scale or 2.0**fp16.initial_scale_power,
            dynamic=fp16.loss_scale == 0,
            window=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            minimum=float(fp16.min_loss_scale),
        )
    return AmpLossScale() if Precision.of(config).autocast is torch.float16 else None


class LossScale:
    """The factor of the loss that keeps small gradients from underflowing in fp16.

    Follows DeepSpeed's `DynamicLossScaler`: an overflow halves it, after the first `hysteresis` - 1 overflows; `window`
    steps without one double it.
    """

    def __init__(
        self,
        scale: float,  # the first value, and the only one unless it is dynamic
        *,
        dynamic: bool,
        window: int = 1000,  # steps without an overflow after which it doubles
        hysteresis: int = 2,  # overflows until it is halved
        consecutive_hysteresis: bool = False,  # count overflows anew after every step without, not only when it doubles
        minimum: float = 1.0,
    ) -> None:
        self.value = float(scale)  # the factor of the next loss
        self.dynamic, self.window, self.minimum = dynamic, window, minimum
        self.hysteresis, self.consecutive_hysteresis = hysteresis, consecutive_hysteresis
        self._patience = self.hysteresis
        self._updates = 0
        self._last_overflow = -1
        self._first_bad = -1  # of the overflows since the scale last grew

    def update(self, overflow: bool) -> None:
        """Update the scale after an optimizer step.

        Raises:
            LossScaleError: an overflow at the minimum.
        """
        if self.dynamic:
            if overflow:
                self._shrink()
            else:
                self._grow()
        self._updates += 1

    def _shrink(self) -> None:
        if self._first_bad < 0 or self._last_overflow != self._updates - 1:
            self._first_bad = self._updates
        if self.hysteresis == 1 or self._patience == 1:
            if self.value == self.minimum:
                raise LossScaleError(
                    f"fp16: the gradients of step {self._updates} are not finite, and the loss scale is at its "
                    f"minimum, {self.value:g}; the first such step in this sequence was {self._first_bad}; lower the "
                    "learning rate, warm it up, clip gradients, or train in bf16"
                )
            self.value = max(self.value / 2, self.minimum)
        else:
            self._patience -= 1
        self._last_overflow = self._updates

    def _grow(self) -> None:
        stable = self._updates - self._last_overflow - 1
        doubles = stable > 0 and stable % self.window == 0
        if doubles or self.consecutive_hysteresis:
            self._patience = self.hysteresis
        if doubles:
            self.value *= 2

    _STATE = ("value", "_patience", "_updates", "_last_overflow", "_first_bad")  # the keys in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The current value and counts; the rules come from the config."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        for name in self._STATE:
            setattr(self, name, state[name])


class AmpLossScale(LossScale):
    """The scale of fp16 autocast, by the rule of `torch.amp.GradScaler`, which DeepSpeed uses there."""

    def __init__(self, scale: float = 2.0**16, window: int = 2000) -> None:
        super().__init__(scale, dynamic=True, window=window, hysteresis=1, minimum=0.0)

    def _shrink(self) -> None:
        self.value /= 2
        self._last_overflow = self._updates

    def _grow(self) -> None:
        if (self._updates - self._last_overflow) % self.window == 0:
            self.value *= 2
