"""The ``optimizer`` section.

Adam, AdamW, Lamb, Lion and Muon take DeepSpeed's parameters with DeepSpeed's defaults (`deepspeed/ops/*` and
`_configure_basic_optimizer` in `deepspeed/runtime/engine.py`), SGD and Adagrad torch's; any other class of
torch.optim, or registered with `engine.optimizers.register`, is checked against its signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from engine.config.component import AUTO_PARAMS, Classes, Component, Models
from engine.config.section import REFUSAL, TO_DEFAULT, Betas, Fraction, NonNegative, Section, wrong

__all__ = ["AdagradParams", "AdamParams", "LambParams", "LionParams", "MuonParams", "OptimizerConfig", "SGDParams"]

_CLIPPING = 'gradients are clipped by the top-level key "gradient_clipping"; move the number there'


class _Params(Section):
    """What all share."""

    auto: ClassVar[dict[str, str]] = dict.fromkeys(AUTO_PARAMS, TO_DEFAULT)

    lr: NonNegative = Field(1e-3, description="Learning rate, per update.")
    weight_decay: NonNegative = Field(0.0, description="Decay of the weights per update, as a factor of the rate.")

    @classmethod
    def refused(cls, key: str) -> str | None:
        return f"unknown key here; {_CLIPPING}" if key == "max_grad_norm" else None


class _TorchParams(_Params):
    """What torch's own share."""

    foreach: bool | None = Field(None, description="torch's multi-tensor implementation; null lets torch choose.")
    fused: bool | None = Field(None, description="torch's fused implementation; null takes it where there is one.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.fused and self.foreach:
            yield ("fused", "foreach"), "got true beside foreach: true; torch takes one of the two"


class AdamParams(_TorchParams):
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


class SGDParams(_TorchParams):
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


class AdagradParams(_TorchParams):
    """Parameters of torch's Adagrad."""

    lr: NonNegative = Field(1e-2, description="Learning rate, per update.")
    lr_decay: NonNegative = Field(0.0, description="The rate at update t is divided by 1 + (t - 1) of this.")
    eps: NonNegative = Field(1e-10, description="Added to the denominator, in units of the gradient.")
    initial_accumulator_value: NonNegative = Field(0.0, description="What the sum of squares starts from.")
    maximize: bool = Field(False, description="Go up the gradient.")
    differentiable: bool = Field(False, description="Let autograd see the step.")


class LambParams(_Params):
    """Parameters of DeepSpeed's Lamb."""

    betas: Betas = Field(
        (0.9, 0.999), description="Decay of the running means of the gradient and of its square, per update."
    )
    eps: NonNegative = Field(1e-8, description="Added to the denominator, in units of the gradient.")
    eps_inside_sqrt: bool = Field(False, description="Add eps under the root, and not to the root.")
    bias_correction: bool = Field(True, description="Correct the rate for means that start at zero.")
    max_coeff: NonNegative = Field(10.0, description="Largest length of a tensor over that of its update.")
    min_coeff: NonNegative = Field(0.01, description="Smallest length of a tensor over that of its update.")
    amsgrad: Literal[False] = Field(False, description="Only false; DeepSpeed's Lamb has no other.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().contradictions()
        if self.min_coeff > self.max_coeff:
            reads = ("min_coeff", "max_coeff")
            yield reads, f"got {self.min_coeff:g}; expected at most max_coeff, which is {self.max_coeff:g}"


class LionParams(_Params):
    """Parameters of DeepSpeed's Lion."""

    betas: Betas = Field((0.9, 0.999), description="Share of the momentum in the update, and its decay per update.")
    set_grad_none: bool = Field(True, description="No effect: gradients are always set to None, which saves memory.")
    fp32_optimizer_states: bool | None = Field(
        None, description="No effect: the momentum has the parameters' type; DeepSpeed reads it on the CPU only."
    )


class MuonParams(_Params):
    """Parameters of DeepSpeed's Muon: of the one that updates hidden matrices, and of Adam, which updates the rest."""

    lr: NonNegative | None = Field(  # type: ignore[assignment]  # the two have two defaults
        None, description="Learning rate, per update, of both; null takes 0.02 for matrices and 0.0003 for the rest."
    )
    muon_lr: NonNegative | None = Field(None, description="Learning rate of the matrices; null takes lr.")
    adam_lr: NonNegative | None = Field(None, description="Learning rate of the rest; null takes lr.")
    momentum: Fraction = Field(0.95, description="Decay of the running mean of the matrices' gradients, per update.")
    betas: Betas = Field((0.9, 0.95), description="As Adam's, of the rest.")
    eps: NonNegative = Field(1e-10, description="As Adam's, of the rest.")
    ns_method: Literal["gram", "standard"] = Field(
        "gram", description="How DeepSpeed orders one iteration; torch's is taken, which is the standard one."
    )
    adam_w_mode: bool = Field(True, description="Decouple the weight decay from the gradient, of the rest.")
    torch_adam: bool = Field(False, description="No effect: Adam is torch's anyway.")
    fp32_optimizer_states: bool | None = Field(None, description="No effect: the moments have the parameters' type.")
    per_head_muon: bool = Field(
        False,
        description="Orthogonalize by head of attention; only false is built.",
        json_schema_extra={"const": False},
    )

    @field_validator("per_head_muon")
    @classmethod
    def _built(cls, value: bool) -> bool:
        if value:
            raise wrong(REFUSAL, "true is not built; torch's Muon takes whole matrices; leave it out")
        return value


_OR_YOUR_OWN = "or pass an optimizer of your own to initialize, or register it"
_NOT_BUILT = {
    "muadam": f"use AdamW, {_OR_YOUR_OWN} (mup.MuAdam)",
    "muadamw": f"use AdamW, {_OR_YOUR_OWN} (mup.MuAdamW)",
    "musgd": f"use SGD, {_OR_YOUR_OWN} (mup.MuSGD)",
    "onebitadam": "it compresses communication, and DeepSpeed has removed it; use Adam",
    "zerooneadam": "it compresses communication, and DeepSpeed has removed it; use Adam",
    "onebitlamb": f"it compresses communication, and DeepSpeed has removed it; use AdamW, {_OR_YOUR_OWN}",
    "cpuadam": "with zero_optimization.offload_optimizer torch's Adam runs on the CPU; use Adam",
    "lbfgs": "its step evaluates the loss again, which Engine.step cannot; use another",
}


class OptimizerConfig(Component):
    """The optimizer and its parameters."""

    kind: ClassVar[str] = "optimizer"
    models: ClassVar[Models] = {
        "Adam": AdamParams,
        "AdamW": AdamParams,
        "SGD": SGDParams,
        "Adagrad": AdagradParams,
        "Lamb": LambParams,
        "Lion": LionParams,
        "Muon": MuonParams,
    }
    any_case: ClassVar[tuple[str, ...]] = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")
    not_built: ClassVar[dict[str, str]] = _NOT_BUILT

    type: str = Field(
        description="Adam, AdamW, Lamb, Lion, Muon, or the name of a class in torch.optim or of a registered one.",
        examples=["Adam"],
    )
    legacy_fusion: bool = Field(False, description="No effect: chose an older kernel of DeepSpeed's fp16 Adam.")

    @classmethod
    def classes(cls) -> Classes:
        from engine.optimizers import known  # here, not above: a config that names Adam needs no torch

        return {**known()}
