"""The ``optimizer`` section.

Adam and AdamW take DeepSpeed's parameters with DeepSpeed's defaults (`deepspeed/ops/adam/fused_adam.py` and
`_configure_basic_optimizer` in `deepspeed/runtime/engine.py`), SGD torch's; any other class of torch.optim,
or registered with `engine.optimizers.register`, is checked against its signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field, field_validator

from engine.config.component import AUTO_PARAMS, Classes, Component, Models
from engine.config.section import REFUSAL, TO_DEFAULT, Betas, NonNegative, Section, wrong

__all__ = ["AdamParams", "OptimizerConfig", "SGDParams"]

_CLIPPING = 'gradients are clipped by the top-level key "gradient_clipping"; move the number there'


class _Params(Section):
    """What both families share."""

    auto: ClassVar[dict[str, str]] = dict.fromkeys(AUTO_PARAMS, TO_DEFAULT)

    lr: NonNegative = Field(1e-3, description="Learning rate, per update.")
    weight_decay: NonNegative = Field(0.0, description="Decay of the weights per update, as a factor of the rate.")
    foreach: bool | None = Field(None, description="torch's multi-tensor implementation; null lets torch choose.")
    fused: bool | None = Field(None, description="torch's fused implementation; null takes it where there is one.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.fused and self.foreach:
            yield ("fused", "foreach"), "got true beside foreach: true; torch takes one of the two"

    @classmethod
    def refused(cls, key: str) -> str | None:
        return f"unknown key here; {_CLIPPING}" if key == "max_grad_norm" else None


class AdamParams(_Params):
    """Parameters of Adam and AdamW."""

    betas: Betas = Field(
        (0.9, 0.999), description="Decay of the running means of the gradient and of its square, per update."
    )
    eps: NonNegative = Field(1e-8, description="Added to the denominator, in units of the gradient.")
    bias_correction: bool = Field(
        True,
        description="Correct the means for starting at zero; only true is built.",
        json_schema_extra={"const": True},
    )
    amsgrad: bool = Field(
        False, description="Divide by the largest mean square so far; as in DeepSpeed, needs torch_adam."
    )
    adam_w_mode: bool = Field(
        True, description="Decouple the weight decay from the gradient; AdamW does so whatever this says."
    )
    torch_adam: bool = Field(
        False,
        description="Take torch's defaults where they differ from DeepSpeed's own Adam; the code is torch's anyway.",
    )
    set_grad_none: bool = Field(True, description="No effect: gradients are always set to None, which saves memory.")
    fp32_optimizer_states: bool | None = Field(
        None, description="No effect: the moments have the parameters' type; DeepSpeed reads it on the CPU only."
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().contradictions()
        if self.amsgrad and not self.torch_adam:
            yield (
                ("amsgrad", "torch_adam"),
                'got true; expected false, or "torch_adam": true beside it, as in DeepSpeed',
            )

    @field_validator("bias_correction")
    @classmethod
    def _built(cls, value: bool) -> bool:
        if not value:
            raise wrong(REFUSAL, "false is not built; torch's Adam always corrects the bias; leave it out")
        return value


class SGDParams(_Params):
    """Parameters of torch's SGD."""

    momentum: NonNegative = Field(0.0, description="Share of the last step that the next one keeps.")
    dampening: float = Field(0.0, description="Share of the gradient that does not enter the momentum.")
    nesterov: bool = Field(False, description="Look ahead along the momentum.")
    maximize: bool = Field(False, description="Go up the gradient.")
    differentiable: bool = Field(False, description="Let autograd see the step.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().contradictions()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            reads = ("nesterov", "momentum", "dampening")
            yield reads, "got true; expected false, or a momentum > 0 and a dampening of 0 beside it"


_OR_YOUR_OWN = "or pass an optimizer of your own to initialize, or register it"
_NOT_BUILT = {
    "lamb": f"use AdamW, {_OR_YOUR_OWN}",
    "lion": f"use AdamW with a rate 3 to 10 times as high, {_OR_YOUR_OWN}",
    "muon": f"DeepSpeed's splits the parameters between Muon and Adam; use AdamW, {_OR_YOUR_OWN}",
    "muadam": f"use AdamW, {_OR_YOUR_OWN} (mup.MuAdam)",
    "muadamw": f"use AdamW, {_OR_YOUR_OWN} (mup.MuAdamW)",
    "musgd": f"use SGD, {_OR_YOUR_OWN} (mup.MuSGD)",
    "onebitadam": "it compresses communication, and DeepSpeed has removed it; use Adam",
    "zerooneadam": "it compresses communication, and DeepSpeed has removed it; use Adam",
    "onebitlamb": f"it compresses communication, and DeepSpeed has removed it; use AdamW, {_OR_YOUR_OWN}",
    "cpuadam": "there is no offload; use Adam",
    "lbfgs": "its step evaluates the loss again, which Engine.step cannot; use another",
}


class OptimizerConfig(Component):
    """The optimizer and its parameters."""

    kind: ClassVar[str] = "optimizer"
    models: ClassVar[Models] = {"Adam": AdamParams, "AdamW": AdamParams, "SGD": SGDParams}
    any_case: ClassVar[tuple[str, ...]] = ("Adam", "AdamW", "Adagrad")
    not_built: ClassVar[dict[str, str]] = _NOT_BUILT

    type: str = Field(
        description="Adam, AdamW, or the name of a class in torch.optim or of a registered one.", examples=["Adam"]
    )
    legacy_fusion: bool = Field(False, description="No effect: chose an older kernel of DeepSpeed's fp16 Adam.")

    @classmethod
    def classes(cls) -> Classes:
        from engine.optimizers import known  # here, not above: a config that names Adam needs no torch

        return {**known()}
