"""Number formats: ``fp16``, ``bf16``, ``torch_autocast``, ``data_types``.

After `deepspeed/runtime/precision_config.py` and `get_torch_autocast_enabled` in `deepspeed/runtime/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from engine.config.section import TO_DEFAULT, Integer, Loose, NonNegative, Section

__all__ = ["SHORT", "BF16Config", "DataTypesConfig", "FP16Config", "TorchAutocastConfig"]

DType = Literal["fp16", "float16", "half", "bf16", "bfloat16", "fp32", "float32", "float", "int8"]
TorchDType = Literal[
    "fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16",
    "fp32", "float32", "float", "torch.float32",
]  # fmt: skip

# Every spelling of a number format, as its short one.
SHORT = {
    spelling: short
    for short, spellings in {
        "fp16": ("fp16", "float16", "half", "torch.float16"),
        "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
        "fp32": ("fp32", "float32", "float", "torch.float32"),
        "int8": ("int8",),
    }.items()
    for spelling in spellings
}


class FP16Config(Section):
    """Half precision with a loss scale."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}

    enabled: bool = Field(False, description="Train in fp16.")
    auto_cast: bool = Field(False, description="Cast the model's inputs to fp16.")
    loss_scale: NonNegative = Field(0.0, description="Factor of the loss; 0 finds it while training.")
    initial_scale_power: Integer = Field(16, description="First factor that is tried, as a power of 2.")
    loss_scale_window: Integer = Field(1000, description="Updates without overflow after which the factor doubles.")
    hysteresis: Integer = Field(2, description="Overflows before the factor is halved.")
    consecutive_hysteresis: bool = Field(False, description="Count overflows anew after an update without one.")
    min_loss_scale: Integer = Field(1, description="Smallest factor.")
    fp16_master_weights_and_grads: bool = Field(
        False, description="Keep the weights that the optimizer updates, and gradients, in fp16."
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.enabled and self.loss_scale == 0:
            for key in ("loss_scale_window", "min_loss_scale"):
                if (value := getattr(self, key)) <= 0:
                    yield (key, "enabled", "loss_scale"), f"got {value}; expected > 0: the scale is dynamic"


class BF16Config(Section):
    """bfloat16."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}

    enabled: bool = Field(False, description="Train in bfloat16.")
    immediate_grad_update: bool = Field(
        False, description="Add each gradient to the fp32 sum as soon as it is there, to save memory."
    )
    check_grad_overflow: bool = Field(True, description="Skip an update whose gradient is not finite.")
    bf16_master_weights_and_grads: bool = Field(
        False, description="Keep the weights that the optimizer updates, and gradients, in bfloat16."
    )
    bf16_optimizer_states: bool = Field(False, description="Keep the optimizer's moments in bfloat16.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            reads = ("bf16_optimizer_states", "bf16_master_weights_and_grads")
            yield reads, 'got true; expected "bf16_master_weights_and_grads": true beside it'


class TorchAutocastConfig(Loose):
    """torch.autocast around the forward pass."""

    enabled: bool = Field(False, description="Run the forward pass under torch.autocast.")
    dtype: TorchDType | None = Field(None, description="Number format of autocast; null takes torch's.")
    lower_precision_safe_modules: list[str] | None = Field(
        None, description="Classes, with their modules, whose gradients are reduced in the lower format."
    )


class DataTypesConfig(Loose):
    """Number formats apart from the training's own."""

    grad_accum_dtype: DType | None = Field(None, description="Format that gradients add up in; null takes the model's.")
    param_dtype: DType | None = Field(None, description="Format of the parameters; null takes the training's.")
    buffer_dtype: DType | None = Field(None, description="Format of the buffers; null leaves them.")
    keep_in_fp32_modules: Literal["auto"] | list[str] = Field(
        "auto", description="Patterns of buffers that stay in fp32; auto takes the model's own list."
    )
