"""The sections ``optimizer`` and ``scheduler``: the name of a class and its parameters.

DeepSpeed's own optimizers and schedules have a model here, with its names and defaults (`deepspeed/ops/*`,
`_configure_basic_optimizer` in `deepspeed/runtime/engine.py`, `deepspeed/runtime/lr_schedules.py`); SGD and Adagrad
have torch's. Any other class of torch, or a registered one, is checked against its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationInfo, WithJsonSchema, field_validator

from redline.config.messages import nearest, shown
from redline.config.section import (
    FROM_DATA,
    NOT_HERE,
    TO_DEFAULT,
    TO_NULL,
    Betas,
    Conflict,
    Count,
    Fraction,
    Index,
    NonNegative,
    PerGroup,
    Positive,
    Ratio,
    Section,
    Whole,
    key,
    required,
    unread,
)

__all__ = [
    "AUTO_PARAMS", "COMPONENTS", "Component", "OneCycleParams", "OptimizerConfig", "SchedulerConfig", "WarmupLRParams",
]  # fmt: skip

Models = dict[str, type[Section]]  # defined here: in a class with a field `type`, that word means the field
Classes = dict[str, type]

AUTO_PARAMS: Final = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), TO_DEFAULT)
_PARAMS = {"type": ["object", "null"], "description": "Parameters of the type."}


class Component(Section):
    """The name of a class and its parameters: ``{"type": "Adam", "params": {"lr": 0.001}}``."""

    loose: ClassVar[bool] = True
    kind: ClassVar[str]  # "optimizer", the name of the section
    models: ClassVar[Models]  # the types whose parameters have a model
    any_case: ClassVar[tuple[str, ...]] = ()  # the types that DeepSpeed accepts in upper and lower case
    not_built: ClassVar[dict[str, str]]  # names, in lower case, that are refused: why, what to use instead

    type: str
    params: Annotated[SerializeAsAny[Section], WithJsonSchema(_PARAMS)] = Field(default=None, validate_default=True)

    def arguments(self) -> dict[str, Any]:
        """The parameters that were given, as keyword arguments; those left out are not in it."""
        given, extra = self.params.model_fields_set, self.params.model_extra or {}
        return {name: getattr(self.params, name) for name in type(self.params).model_fields if name in given} | extra

    def takes(self, parameter: str) -> bool:
        """Whether the class has a parameter of this name."""
        if self.type in self.models:
            return parameter in type(self.params).model_fields
        parameters = inspect.signature(self.classes()[self.type]).parameters
        return parameter in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    @classmethod
    def classes(cls) -> Classes:
        """Every class that can be named, with a model or not."""
        # Here, not above: a config that names Adam and WarmupLR needs no torch.
        if cls.kind == "optimizer":
            from redline.optimizers import known as known_optimizers

            return {**known_optimizers()}
        from redline.schedulers import known as known_schedules

        return known_schedules()

    @classmethod
    def canonical(cls, name: str) -> str:
        """A type as it is spelled here."""
        return next((known for known in cls.any_case if known.lower() == name.lower()), name)

    @classmethod
    def objection_to(cls, name: str) -> tuple[str, bool] | None:
        """The message about a type that cannot be used, and whether DeepSpeed has it; None if it can."""
        if name in cls.models:
            return None
        known, reason = cls.classes(), cls.not_built.get(name.lower())
        if reason and (name not in known or known[name].__module__.startswith("torch.")):  # not a registered one
            return f"{shown(name)} is not built; {reason}", True
        if name in known:
            return None
        usable = {**known, **cls.models}
        guess = nearest(name, usable)
        names = sorted(name for name in usable if name.lower() not in cls.not_built)
        hint = f'did you mean "{guess}"?' if guess else f"known: {', '.join(names)}"
        return f"unknown {cls.kind} {shown(name)}; {hint}", False

    @field_validator("params", mode="wrap")
    @classmethod
    def _of_its_type(cls, params: Any, _: Callable[[Any], Any], info: ValidationInfo) -> Section:
        # No "type" in the data: it has a mistake of its own, and nothing tells what it would take.
        model = cls.models.get(info.data.get("type", ""), FreeParams)
        return model.model_validate({} if params is None else params)


class FreeParams(Section):
    """Parameters of a class that has no model here; `load` checks them against its signature."""

    model_config = ConfigDict(extra="allow")


# -- optimizers ------------------------------------------------------------------------------------------

_CLIPPING = 'unknown key here; gradients are clipped by the top-level key "gradient_clipping"; move the number there'
_FULL_MATRICES = "only false is built: torch's Muon takes full matrices; leave it out"
_SET_TO_NONE = "gradients are always set to None, which saves memory"
_MOMENTS = "the moments have the parameters' dtype; DeepSpeed reads it on the CPU only"


class _OptimizerParams(Section):
    auto: ClassVar[dict[str, str]] = AUTO_PARAMS
    retired: ClassVar[dict[str, str]] = {"max_grad_norm": _CLIPPING}

    lr: NonNegative = key(1e-3, "Learning rate.")
    weight_decay: NonNegative = key(0.0, "Weight decay per step, as a factor of the learning rate.")


class _TorchParams(_OptimizerParams):
    foreach: bool | None = key(None, "torch's multi-tensor implementation; null lets torch choose.")
    fused: bool | None = key(None, "torch's fused implementation; null takes it where there is one.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.fused and self.foreach:
            yield "fused foreach", "got true with foreach: true; torch takes one of the two"


class AdamParams(_TorchParams):
    betas: Betas = key((0.9, 0.999), "Decay of the running means of the gradient and of its square.")
    eps: NonNegative = key(1e-8, "Added to the denominator, in units of the gradient.")
    bias_correction: bool = key(True, "Correct the means for starting at zero.")
    amsgrad: bool = key(False, "Divide by the largest mean square so far; as in DeepSpeed, needs torch_adam.")
    adam_w_mode: bool = key(True, "Decouple the weight decay from the gradient; AdamW does so in either case.")
    torch_adam: bool = key(False, "Take torch's defaults where DeepSpeed's own Adam has others; the code is torch's.")
    set_grad_none: bool = unread(True, "Set gradients to None instead of zero.", _SET_TO_NONE)
    fp32_optimizer_states: bool | None = unread(None, "Keep the moments in fp32.", _MOMENTS)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.amsgrad and not self.torch_adam:
            yield "amsgrad torch_adam", 'got true; expected false, or "torch_adam": true with it, as in DeepSpeed'


class SGDParams(_TorchParams):
    momentum: NonNegative = key(0.0, "Share of the last step that the next one keeps.")
    dampening: float = key(0.0, "Share of the gradient that does not enter the momentum.")
    nesterov: bool = key(False, "Nesterov momentum.")
    maximize: bool = key(False, "Ascend the gradient.")
    differentiable: bool = key(False, "Let autograd see the step.")

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            needs = "a momentum > 0 and a dampening of 0 with it"
            yield "nesterov momentum dampening", f"got true; expected false, or {needs}"


class AdagradParams(_TorchParams):
    lr: NonNegative = key(1e-2, "Learning rate.")
    lr_decay: NonNegative = key(0.0, "The learning rate at step t is divided by 1 + (t - 1) of this.")
    eps: NonNegative = key(1e-10, "Added to the denominator, in units of the gradient.")
    initial_accumulator_value: NonNegative = key(0.0, "What the sum of squares starts from.")
    maximize: bool = key(False, "Ascend the gradient.")
    differentiable: bool = key(False, "Let autograd see the step.")


class LambParams(_OptimizerParams):
    betas: Betas = key((0.9, 0.999), "Decay of the running means of the gradient and of its square.")
    eps: NonNegative = key(1e-8, "Added to the denominator, in units of the gradient.")
    eps_inside_sqrt: bool = key(False, "Add eps under the root, and not to the root.")
    bias_correction: bool = key(True, "Correct the learning rate for means that start at zero.")
    max_coeff: NonNegative = key(10.0, "Largest norm of a tensor over that of its step.")
    min_coeff: NonNegative = key(0.01, "Smallest norm of a tensor over that of its step.")
    amsgrad: Literal[False] = key(False, "Only false; DeepSpeed's Lamb has no other.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.min_coeff > self.max_coeff:
            message = f"got {self.min_coeff:g}; expected at most max_coeff, which is {self.max_coeff:g}"
            yield "min_coeff max_coeff", message


class LionParams(_OptimizerParams):
    betas: Betas = key((0.9, 0.999), "Share of the momentum in the step, and its decay per step.")
    set_grad_none: bool = unread(True, "Set gradients to None instead of zero.", _SET_TO_NONE)
    fp32_optimizer_states: bool | None = unread(None, "Keep the momentum in fp32.", _MOMENTS)


class MuonParams(_OptimizerParams):
    """Parameters of DeepSpeed's Muon: of Muon for the hidden matrices, and of Adam for the rest."""

    lr: NonNegative | None = key(  # type: ignore[assignment]  # the two have two defaults
        None, "Learning rate of both; null takes 0.02 for matrices and 0.0003 for the rest."
    )
    muon_lr: NonNegative | None = key(None, "Learning rate of the matrices; null takes lr.")
    adam_lr: NonNegative | None = key(None, "Learning rate of the rest; null takes lr.")
    momentum: Fraction = key(0.95, "Decay of the running mean of the matrices' gradients.")
    betas: Betas = key((0.9, 0.95), "As Adam's, of the rest.")
    eps: NonNegative = key(1e-10, "As Adam's, of the rest.")
    ns_method: Literal["gram", "standard"] = unread("gram", "Order of Newton-Schulz.", "torch has the standard one")
    adam_w_mode: bool = key(True, "Decouple the weight decay from the gradient, of the rest.")
    torch_adam: bool = key(False, "Without effect here: Adam is torch's anyway.")
    fp32_optimizer_states: bool | None = unread(None, "Keep the moments in fp32.", _MOMENTS)
    per_head_muon: bool = key(False, "Orthogonalize by attention head.", _FULL_MATRICES, allowed=[])


_COMPRESSED = "it compresses communication, and DeepSpeed has removed it; use"
_OR_YOUR_OWN = "or pass an optimizer of your own to initialize, or register it"


class OptimizerConfig(Component):
    """The optimizer and its parameters."""

    kind: ClassVar[str] = "optimizer"
    models: ClassVar[Models] = {
        "Adam": AdamParams, "AdamW": AdamParams, "SGD": SGDParams, "Adagrad": AdagradParams, "Lamb": LambParams,
        "Lion": LionParams, "Muon": MuonParams,
    }  # fmt: skip
    any_case: ClassVar[tuple[str, ...]] = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon")
    not_built: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("muadam", "muadamw"), f"use AdamW, {_OR_YOUR_OWN} (from mup)"),
        "musgd": f"use SGD, {_OR_YOUR_OWN} (from mup)",
        **dict.fromkeys(("onebitadam", "zerooneadam"), f"{_COMPRESSED} Adam"),
        "onebitlamb": f"{_COMPRESSED} AdamW, {_OR_YOUR_OWN}",
        "cpuadam": "with zero_optimization.offload_optimizer torch's Adam runs on the CPU; use Adam",
        "lbfgs": "its step evaluates the loss again, which Engine.step cannot; use another",
    }

    type: str = required("Adam, AdamW, Lamb, Lion, Muon, a class of torch.optim, or a registered one.", "Adam")
    legacy_fusion: bool = unread(False, "Take an older kernel of DeepSpeed's fp16 Adam.", "the kernel is torch's")


# -- schedules -------------------------------------------------------------------------------------------


class _ScheduleParams(Section):
    last_batch_iteration: Index = key(-1, "Steps taken before this run, minus one; -1 starts the schedule.")

    def _ordered(self, low: str, high: str, also: str = "") -> Iterator[Conflict]:
        """Of two keys with a number or one per group, the first must nowhere be above the second."""
        given = [getattr(self, name) for name in (low, high)]
        if None in given:
            return
        sizes = {len(value) for value in given if isinstance(value, tuple)}
        if len(sizes) == 2:
            message = f"got {len(given[1])} values; expected {len(given[0])}, one per parameter group, as in {low}"
            yield f"{high} {low}{also}", message
            return
        # A single number stands for all groups.
        num_groups = max(sizes, default=1)
        least, most = (value if isinstance(value, tuple) else (value,) * num_groups for value in given)
        if any(first > second for first, second in zip(least, most)):
            message = f"got {self._shown(low)}; expected at most {high}, which is {self._shown(high)}"
            yield f"{low} {high}{also}", message

    def _shown(self, name: str) -> str:
        return shown(getattr(self, name)) + ("" if name in self.model_fields_set else " by default")


class LRRangeTestParams(_ScheduleParams):
    """Parameters of LRRangeTest: min_lr * (1 + step_rate * step / step_size); see redline.range_test.growth."""

    lr_range_test_min_lr: PerGroup[Positive] = key(1e-3, "Learning rate at the first step; a list is one per group.")
    lr_range_test_step_size: Count = key(2000, "Steps over which the learning rate grows by step_rate times min_lr.")
    lr_range_test_step_rate: Positive = key(1.0, "Growth of the learning rate per step_size, in units of min_lr.")
    lr_range_test_staircase: bool = key(False, "Hold the learning rate for step_size steps, then jump.")


class OneCycleParams(_ScheduleParams):
    """Parameters of OneCycle: learning rate up and down again, momentum the other way, then a decay."""

    cycle_min_lr: PerGroup[NonNegative] = required("Learning rate at both ends; a list is one per group.", 0.0001)
    cycle_max_lr: PerGroup[Positive] = required("Learning rate at the peak; a list is one per group.", 0.001)
    decay_lr_rate: NonNegative = key(0.0, "Growth of the learning rate's divisor, per decay_step_size steps.")
    cycle_first_step_size: Count = key(2000, "Steps from cycle_min_lr up to cycle_max_lr.")
    cycle_second_step_size: Whole | None = key(None, "Steps back down; null takes the first half's.")
    cycle_first_stair_count: Whole = key(0, "Stairs on the way up; 0 for a straight line.")
    cycle_second_stair_count: Whole | None = key(None, "Stairs on the way down; null takes the first half's.")
    decay_step_size: Whole = key(0, "Steps per interval of the decay after the cycle; 0 for no decay.")
    cycle_momentum: bool = key(True, "Cycle the momentum, too.")
    cycle_min_mom: PerGroup[Fraction] = key(0.8, "Momentum at the peak; a list is one per group.")
    cycle_max_mom: PerGroup[Fraction] = key(0.9, "Momentum at both ends; a list is one per group.")
    decay_mom_rate: NonNegative = key(0.0, "Growth of the momentum's factor, per decay_step_size steps.")

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._ordered("cycle_min_lr", "cycle_max_lr")
        if self.cycle_momentum:
            yield from self._ordered("cycle_min_mom", "cycle_max_mom", " cycle_momentum")


class _Warmup(_ScheduleParams):
    auto: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("warmup_min_lr", "warmup_num_steps", "warmup_type"), TO_DEFAULT),
        **dict.fromkeys(("warmup_min_ratio", "cos_min_ratio"), TO_DEFAULT),
        "warmup_max_lr": TO_NULL, "total_num_steps": FROM_DATA, "decay_num_steps": NOT_HERE,
    }  # fmt: skip

    # DeepSpeed refuses 0; Hugging Face's integration makes it 1, and so it is meant.
    warmup_num_steps: Whole = key(1000, "Steps of the warm-up; 0 counts as 1 and, as in DeepSpeed, 1 as 2.")
    warmup_type: Literal["log", "linear"] = key("log", "Shape of the warm-up.")

    @field_validator("warmup_num_steps")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        return max(1, value)


_PEAK = "Learning rate at the warm-up's end; a list is one per group; null takes the optimizer's."


class WarmupLRParams(_Warmup):
    """Parameters of WarmupLR: up from warmup_min_lr, then warmup_max_lr for good."""

    warmup_min_lr: PerGroup[NonNegative] = key(0.0, "Learning rate at the start; a list is one per group.")
    warmup_max_lr: PerGroup[NonNegative] | None = key(None, _PEAK)

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._ordered("warmup_min_lr", "warmup_max_lr")


class WarmupDecayLRParams(WarmupLRParams):
    """Parameters of WarmupDecayLR: up, then down to zero in a straight line."""

    total_num_steps: Count = required("Steps of the whole run; the learning rate is zero at its end.", 10000)
    warmup_max_lr: PerGroup[NonNegative] | None = key(1e-3, _PEAK)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from self._ordered("warmup_num_steps", "total_num_steps")


class WarmupStableDecayLRParams(WarmupLRParams):
    """Parameters of WarmupStableDecayLR, Redline's own: up, hold, then down to zero in a straight line."""

    total_num_steps: Count = required("Steps of the whole run; the learning rate is zero at its end.", 10000)
    decay_num_steps: Count = required("Steps of the decay, the last ones of the run.", 2000)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from self._ordered("warmup_num_steps", "total_num_steps")
        yield from self._ordered("decay_num_steps", "total_num_steps")


class WarmupCosineLRParams(_Warmup):
    """Parameters of WarmupCosineLR: ratios of the optimizer's learning rate, up, then down a half cosine."""

    total_num_steps: Count = required("Steps of the whole run; the learning rate is lowest at its end.", 10000)
    warmup_min_ratio: Ratio = key(0.0, "Learning rate at the start, as a share of the optimizer's.")
    cos_min_ratio: Ratio = key(1e-4, "Learning rate at the end, as a share of the optimizer's.")

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._ordered("warmup_num_steps", "total_num_steps")


_OBJECTS = "it takes Python objects, which a config cannot give; pass the schedule as lr_scheduler to initialize"


class SchedulerConfig(Component):
    """The learning rate schedule and its parameters; it moves once per optimizer step."""

    kind: ClassVar[str] = "scheduler"
    models: ClassVar[Models] = {
        "LRRangeTest": LRRangeTestParams, "OneCycle": OneCycleParams, "WarmupLR": WarmupLRParams,
        "WarmupDecayLR": WarmupDecayLRParams, "WarmupCosineLR": WarmupCosineLRParams,
        "WarmupStableDecayLR": WarmupStableDecayLRParams,
    }  # fmt: skip
    not_built: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("lambdalr", "multiplicativelr", "sequentiallr", "chainedscheduler"), _OBJECTS),
        "reducelronplateau": "its step wants a metric, which the engine does not have; step it in your script",
    }

    type: str = required(
        "One of DeepSpeed's five, WarmupStableDecayLR, or the name of a registered schedule or of torch's.", "WarmupLR"
    )


COMPONENTS: dict[str, type[Component]] = {each.kind: each for each in (OptimizerConfig, SchedulerConfig)}
