"""Number formats: what the model computes in, what the optimizer updates, and how the loss is scaled.

In fp16 and bf16 the model's parameters are in that format, and the optimizer works on fp32 copies of them,
the master weights: the model's gradients are added to the masters' after every backward, and the masters are
written back after every update. Buffers keep their format unless the config names one. After DeepSpeed's
`runtime/engine.py`, `runtime/zero/stage_1_and_2.py` and `runtime/fp16/loss_scaler.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import LossScaleError
from engine.master_params import MasterParams, TrainedParams
from engine.sharding import Sharding

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = [
    "AmpLossScale", "Formats", "LossScale", "Precision", "dtype_table", "set_precision", "to_dtype",
]  # fmt: skip

_DTYPES = {
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16, "torch.float16": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "torch.bfloat16": torch.bfloat16,
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32, "torch.float32": torch.float32,
}  # fmt: skip


def to_dtype(name: str) -> torch.dtype:
    """torch's type for a config's name of a number format."""
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class Precision:
    """The formats of one training run.

    Attributes:
        compute: of the parameters, and so of forward and backward.
        autocast: of `torch.autocast` around the forward pass; None without.
        accumulate: in which gradients of micro-batches add up.
        reduce: in which gradients are summed over processes.
        params: what trains; its master params are what the optimizer updates, where there are some.
        publish: what brings updated weights into the model; None where the optimizer updates the model's own.
        stored: the format of the weights that the optimizer updates.
        loss_scale: the factor of the loss; None where there is none.
        skips: whether an update with a gradient that is not finite is left out.
    """

    compute: torch.dtype
    autocast: torch.dtype | None
    accumulate: torch.dtype
    reduce: torch.dtype
    params: TrainedParams
    publish: Callable[[], None] | None
    stored: torch.dtype
    loss_scale: LossScale | None
    skips: bool

    @property
    def master_params(self) -> MasterParams | None:
        """The fp32 weights behind the model's; None where the optimizer has the model's own."""
        return self.params.masters


@dataclass(frozen=True, slots=True)
class Formats:
    """What a config says about number formats, before any model is touched.

    Attributes:
        compute: of forward and backward.
        stored: of the weights that the optimizer updates; None for whatever the model brings.
        autocast: of `torch.autocast` around the forward pass; None without.
        rounded: whether the weights take the precision of `compute` after every update: DeepSpeed's
            `bf16_master_weights_and_grads` with moments in fp32.
        buffers: of floating-point buffers; None for whatever they have.
    """

    compute: torch.dtype
    stored: torch.dtype | None
    autocast: torch.dtype | None
    rounded: bool
    buffers: torch.dtype | None

    @classmethod
    def of(cls, config: EngineConfig) -> Formats:
        """A config's sections fp16, bf16, torch_autocast and data_types."""
        bf16, types = config.bf16, config.data_types
        compute = torch.float16 if _on(config.fp16) else torch.bfloat16 if _on(bf16) else torch.float32
        kept_low = bf16 is not None and bf16.enabled and bf16.bf16_master_weights_and_grads
        all_low = kept_low and bf16 is not None and bf16.bf16_optimizer_states
        autocast = None
        if config.torch_autocast is not None and config.torch_autocast.enabled:
            autocast = to_dtype(config.torch_autocast.dtype or "bf16")
        return cls(
            compute,
            stored=None if compute is torch.float32 else compute if all_low else torch.float32,
            autocast=autocast,
            rounded=kept_low and not all_low,
            buffers=None if types is None or types.buffer_dtype is None else to_dtype(types.buffer_dtype),
        )


def set_precision(
    config: EngineConfig,
    module: nn.Module,
    optimizer: Optimizer | None,
    *,
    fully_sharded: bool = False,
    sharding: Sharding | None = None,
    world_size: int = 1,
) -> Precision:
    """Bring a model and its optimizer into the config's dtypes, in place.

    Args:
        config: its sections fp16, bf16, torch_autocast, data_types, and communication_data_type.
        module: on its device, with equal weights on all ranks; parameters keep their identity.
        optimizer: over the module's parameters; gets master params in their place.
        fully_sharded: whether FSDP2 has sharded the model: its parameters are the master params then, and torch gathers
            them in the dtype of the computation.
        sharding: how master params are divided between the ranks, at ZeRO stages 1 and 2.
        world_size: ranks.
    """
    formats = Formats.of(config)
    low = None if formats.compute is torch.float32 else formats.compute
    reduce = to_dtype(config.communication_data_type or "fp32")
    masters: MasterParams | None = None
    publish: Callable[[], None] | None = None
    if not fully_sharded and (sharding is not None or (low is not None and formats.stored is not low)):
        masters = MasterParams(formats.stored, sharding, rounded=formats.rounded)
        publish = masters.copy_to_model
    params = TrainedParams(module, optimizer, masters, world_size=world_size)
    if low is not None and fully_sharded:
        if formats.rounded and optimizer is not None:
            publish = _rounding(optimizer, low)
            publish()
    elif low is not None:
        _lower_parameters(module, low, whole=formats.buffers is not None)
    if masters is not None and optimizer is not None:
        masters.copy_to_model()
    if formats.buffers is not None:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(formats.buffers)
    sharded = fully_sharded or sharding is not None
    accumulate = torch.float32 if low is None or formats.stored is not low else reduce if sharded else low
    types = config.data_types
    if types is not None and types.grad_accum_dtype is not None and masters is not None and low is not None:
        accumulate = to_dtype(types.grad_accum_dtype)
    return Precision(
        compute=formats.compute,
        autocast=formats.autocast,
        accumulate=accumulate,
        reduce=reduce,
        params=params,
        publish=publish,
        stored=formats.stored or formats.compute,
        loss_scale=_loss_scale(config, formats.autocast),
        skips=low is torch.float16
        or formats.autocast is torch.float16
        or (low is torch.bfloat16 and config.bf16 is not None and config.bf16.check_grad_overflow),
    )


def _rounding(optimizer: Optimizer, dtype: torch.dtype) -> Callable[[], None]:
    """What gives fp32 weights the precision of a lower format."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.is_floating_point()]

    @torch.no_grad()
    def publish() -> None:
        for weight in weights:
            weight.copy_(weight.to(dtype))

    return publish


def _lower_parameters(module: nn.Module, dtype: torch.dtype, *, whole: bool) -> None:
    for each in module.modules():
        # Batch norm takes low inputs with fp32 weights, but no low weights with fp32 statistics.
        if not whole and getattr(each, "running_mean", None) is not None:
            continue
        for parameter in each.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None


def _on(section: Any) -> bool:
    return section is not None and bool(section.enabled)


def _loss_scale(config: EngineConfig, autocast: torch.dtype | None) -> LossScale | None:
    fp16 = config.fp16
    if fp16 is not None and fp16.enabled:
        return LossScale(
            fp16.loss_scale or 2.0**fp16.initial_scale_power,
            dynamic=fp16.loss_scale == 0,
            window=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            minimum=fp16.min_loss_scale,
        )
    return AmpLossScale() if autocast is torch.float16 else None


class LossScale:
    """The factor of the loss that keeps small gradients from vanishing in fp16.

    Follows DeepSpeed's `DynamicLossScaler`: an overflow halves it, once `hysteresis` - 1 overflows have been let pass;
    `window` updates without one double it.

    Args:
        scale: the first, or with `dynamic` False the only, value.
        dynamic: whether it moves.
        window: updates without an overflow after which it doubles.
        hysteresis: overflows until it is halved.
        consecutive_hysteresis: count overflows anew after every update without one, rather than when it doubles.
        minimum: smallest value.

    Attributes:
        value: the factor of the next loss.
    """

    def __init__(
        self,
        scale: float,
        *,
        dynamic: bool,
        window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        minimum: float = 1.0,
    ) -> None:
        self.value = float(scale)
        self.dynamic = dynamic
        self._window = window
        self._hysteresis = hysteresis
        self._consecutive = consecutive_hysteresis
        self._minimum = float(minimum)
        self._patience = hysteresis
        self._updates = 0
        self._last_overflow = -1
        self._first_bad = -1  # of the overflows since the scale last grew

    def update(self, overflow: bool) -> None:
        """Move on after an update.

        Raises:
            LossScaleError: an overflow with the smallest value that is allowed.
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
        if self._hysteresis == 1 or self._patience == 1:
            if self.value == self._minimum:
                raise LossScaleError(
                    f"fp16: the gradients of update {self._updates} are not finite, and the loss scale is at its "
                    f"minimum, {self.value:g}; the first bad update in this row was {self._first_bad}; lower the "
                    "learning rate, warm it up, clip gradients, or train in bf16"
                )
            self.value = max(self.value / 2, self._minimum)
        else:
            self._patience -= 1
        self._last_overflow = self._updates

    def _grow(self) -> None:
        if self._consecutive:
            self._patience = self._hysteresis
        stable = self._updates - self._last_overflow - 1
        if stable > 0 and stable % self._window == 0:
            self._patience = self._hysteresis
            self.value *= 2

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; its rules come from the config."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        for name in self._STATE:
            setattr(self, name, state[name])

    _STATE = ("value", "_patience", "_updates", "_last_overflow", "_first_bad")


class AmpLossScale(LossScale):
    """The scale of fp16 autocast, by the rule of `torch.amp.GradScaler`, which DeepSpeed uses there."""

    def __init__(self, scale: float = 2.0**16, window: int = 2000) -> None:
        super().__init__(scale, dynamic=True, window=window, hysteresis=1, minimum=0.0)

    def _shrink(self) -> None:
        self.value /= 2
        self._last_overflow = self._updates

    def _grow(self) -> None:
        if (self._updates - self._last_overflow) % self._window == 0:
            self.value *= 2


def dtype_table(precision: Precision, optimizer: Optimizer | None) -> str:
    """Which format holds what, as a table of two lines."""
    shared = precision.master_params is None and precision.stored is not precision.compute
    columns = {
        "parameters": precision.stored if shared else precision.compute,
        "computation": precision.autocast or precision.compute,
        "gradients": precision.accumulate,
        "reduction": precision.reduce,
        "master weights": precision.stored if precision.master_params is not None else None,
        "optimizer state": precision.stored if optimizer is not None else None,
    }
    cells = [(name, "-" if dtype is None else str(dtype).removeprefix("torch.")) for name, dtype in columns.items()]
    widths = [max(map(len, cell)) for cell in cells]
    return "\n".join("  ".join(cell[row].ljust(width) for cell, width in zip(cells, widths)).rstrip() for row in (0, 1))
