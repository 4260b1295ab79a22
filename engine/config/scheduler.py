"""The ``scheduler`` section.

The five schedules of `schedulers` take DeepSpeed's parameters: names and defaults are those of its
constructors (`deepspeed/runtime/lr_schedules.py`); what it warns of or finds in the first step is refused
here. Any other schedule of `schedulers.known()` is checked against its signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from engine.config.component import Classes, Component, Models
from engine.config.section import (
    NOT_HERE,
    TO_DEFAULT,
    TO_NULL,
    Count,
    Fraction,
    Index,
    NonNegative,
    PerGroup,
    Positive,
    Ratio,
    Section,
    Whole,
)
from engine.config.words import shown

__all__ = [
    "LRRangeTestParams",
    "OneCycleParams",
    "SchedulerConfig",
    "WarmupCosineLRParams",
    "WarmupDecayLRParams",
    "WarmupLRParams",
]


class _Params(Section):
    """What all schedules share."""

    last_batch_iteration: Index = Field(
        -1, description="Updates taken before this run, less one; -1 starts the schedule."
    )

    def _ordered(self, low: str, high: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """Of two keys with a number or one per group, the first must nowhere be above the second."""
        least, most = getattr(self, low), getattr(self, high)
        if least is None or most is None:
            return
        if isinstance(least, tuple) and isinstance(most, tuple) and len(least) != len(most):
            yield (high, low), f"got {len(most)} values; expected {len(least)}, one per parameter group, as in {low}"
            return
        size = max(len(value) if isinstance(value, tuple) else 1 for value in (least, most))
        pairs = zip(*(value if isinstance(value, tuple) else (value,) * size for value in (least, most)))
        if any(first > second for first, second in pairs):
            yield (low, high), f"got {self._shown(low)}; expected at most {high}, which is {self._shown(high)}"

    def _shown(self, key: str) -> str:
        return shown(getattr(self, key)) + ("" if key in self.model_fields_set else " by default")


class LRRangeTestParams(_Params):
    """Parameters of LRRangeTest: min_lr * (1 + step_rate * step / step_size); see redline.range_test.growth."""

    lr_range_test_min_lr: PerGroup[Positive] = Field(
        1e-3, description="Rate at the first update; a list is one per group."
    )
    lr_range_test_step_size: Count = Field(
        2000, description="Updates over which the rate grows by step_rate times min_lr."
    )
    lr_range_test_step_rate: Positive = Field(1.0, description="Growth of the rate per step_size, in units of min_lr.")
    lr_range_test_staircase: bool = Field(False, description="Hold the rate for step_size updates, then jump.")


class OneCycleParams(_Params):
    """Parameters of OneCycle: rate up and down again, momentum the other way, then a decay."""

    cycle_min_lr: PerGroup[NonNegative] = Field(
        description="Rate at both ends of the cycle; a list is one per group.", examples=[0.0001]
    )
    cycle_max_lr: PerGroup[Positive] = Field(description="Rate at the peak; a list is one per group.", examples=[0.001])
    decay_lr_rate: NonNegative = Field(
        0.0, description="Growth of the rate's divisor after the cycle, per decay_step_size updates."
    )
    cycle_first_step_size: Count = Field(2000, description="Updates from cycle_min_lr up to cycle_max_lr.")
    cycle_second_step_size: Whole | None = Field(None, description="Updates back down; null takes the first half's.")
    cycle_first_stair_count: Whole = Field(0, description="Stairs on the way up; 0 for a straight line.")
    cycle_second_stair_count: Whole | None = Field(
        None, description="Stairs on the way down; null takes the first half's."
    )
    decay_step_size: Whole = Field(0, description="Updates per interval of the decay after the cycle; 0 for no decay.")
    cycle_momentum: bool = Field(True, description="Cycle the momentum, too.")
    cycle_min_mom: PerGroup[Fraction] = Field(0.8, description="Momentum at the rate's peak; a list is one per group.")
    cycle_max_mom: PerGroup[Fraction] = Field(0.9, description="Momentum at both ends; a list is one per group.")
    decay_mom_rate: NonNegative = Field(
        0.0, description="Growth of the momentum's factor after the cycle, per decay_step_size updates."
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from self._ordered("cycle_min_lr", "cycle_max_lr")
        if self.cycle_momentum:
            for reads, message in self._ordered("cycle_min_mom", "cycle_max_mom"):
                yield (*reads, "cycle_momentum"), message


class _Warmup(_Params):
    """What the warm-up schedules share."""

    auto: ClassVar[dict[str, str]] = {
        "warmup_min_lr": TO_DEFAULT,
        "warmup_max_lr": TO_NULL,
        "warmup_num_steps": TO_DEFAULT,
        "warmup_type": TO_DEFAULT,
        "warmup_min_ratio": TO_DEFAULT,
        "cos_min_ratio": TO_DEFAULT,
        "total_num_steps": NOT_HERE,
    }

    warmup_num_steps: Whole = Field(
        1000, description="Updates of the warm-up; 0 counts as 1 and, as in DeepSpeed, 1 as 2."
    )
    warmup_type: Literal["log", "linear"] = Field("log", description="Shape of the warm-up.")

    @field_validator("warmup_num_steps")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        return max(1, value)  # DeepSpeed refuses 0; Hugging Face's integration makes it 1, and so it is meant


class WarmupLRParams(_Warmup):
    """Parameters of WarmupLR: up from warmup_min_lr, then warmup_max_lr for good."""

    warmup_min_lr: PerGroup[NonNegative] = Field(0.0, description="Rate at the start; a list is one per group.")
    warmup_max_lr: PerGroup[NonNegative] | None = Field(
        None, description="Rate at the warm-up's end; a list is one per group; null takes the optimizer's."
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from self._ordered("warmup_min_lr", "warmup_max_lr")


class WarmupDecayLRParams(WarmupLRParams):
    """Parameters of WarmupDecayLR: up, then down to zero in a straight line."""

    total_num_steps: Count = Field(
        description="Updates of the whole run; the rate is zero at its end.", examples=[10000]
    )
    warmup_max_lr: PerGroup[NonNegative] | None = Field(
        1e-3, description="Rate at the warm-up's end; a list is one per group; null takes the optimizer's."
    )

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().contradictions()
        yield from self._ordered("warmup_num_steps", "total_num_steps")


class WarmupCosineLRParams(_Warmup):
    """Parameters of WarmupCosineLR: ratios of the optimizer's rate, up, then down a half cosine."""

    total_num_steps: Count = Field(
        description="Updates of the whole run; the rate is at its floor at its end.", examples=[10000]
    )
    warmup_min_ratio: Ratio = Field(0.0, description="Rate at the start, as a share of the optimizer's.")
    cos_min_ratio: Ratio = Field(1e-4, description="Rate at the end, as a share of the optimizer's.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from self._ordered("warmup_num_steps", "total_num_steps")


_OBJECTS = "it takes Python objects, which a config cannot give; pass the schedule as lr_scheduler to initialize"
_NOT_BUILT = {
    **dict.fromkeys(("lambdalr", "multiplicativelr", "sequentiallr", "chainedscheduler"), _OBJECTS),
    "reducelronplateau": "its step wants a metric, which the engine does not have; step it in your script",
}


class SchedulerConfig(Component):
    """The learning rate schedule and its parameters; it moves once per optimizer step."""

    kind: ClassVar[str] = "scheduler"
    models: ClassVar[Models] = {
        "LRRangeTest": LRRangeTestParams,
        "OneCycle": OneCycleParams,
        "WarmupLR": WarmupLRParams,
        "WarmupDecayLR": WarmupDecayLRParams,
        "WarmupCosineLR": WarmupCosineLRParams,
    }
    not_built: ClassVar[dict[str, str]] = _NOT_BUILT

    type: str = Field(
        description="One of DeepSpeed's five, or the name of a registered schedule or of torch's.",
        examples=["WarmupLR"],
    )

    @classmethod
    def classes(cls) -> Classes:
        from schedulers import known  # here, not above: a config that names one of the five needs no torch

        return known()
