"""Rules across sections: what cannot be obeyed together though each part is sound.

A rule says which keys it reads, by their routes; it counts only if all of them are sound by themselves. Rules
within one section are in its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.batch import World
from engine.config.optimizer import OptimizerConfig
from engine.config.parser import Route
from engine.config.root import EngineConfig
from engine.config.scheduler import OneCycleParams, SchedulerConfig, WarmupLRParams
from engine.config.section import Section
from engine.config.sections.precision import SHORT
from engine.config.words import either, shown

__all__ = ["conflicts", "misfits", "unbuilt"]

Conflict = tuple[tuple[Route, ...], str]  # the routes that are read, the first where it is said; the message


def conflicts(config: EngineConfig, sections: Mapping[str, Section], scalars: Mapping[str, Any]) -> Iterator[Conflict]:
    """All that does not go together in a config: its honoured part, its other sections, its other keys."""
    if config.optimizer is not None and config.scheduler is not None:
        yield from _schedule(config.optimizer, config.scheduler)
    yield from _precision(sections)
    yield from _zero(sections, scalars)


def _schedule(optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> Iterator[Conflict]:
    params, types = scheduler.params, (("optimizer", "type"), ("scheduler", "type"))
    if isinstance(params, OneCycleParams) and params.cycle_momentum:
        asked = [key for key in ("cycle_momentum", "cycle_min_mom", "cycle_max_mom") if key in params.model_fields_set]
        if asked and not (optimizer.takes("betas") or optimizer.takes("momentum")):
            message = f"{optimizer.type} has no momentum to cycle; set cycle_momentum to false and leave its bounds out"
            yield (("scheduler", "params", asked[0]), *types), message
    if isinstance(params, WarmupLRParams) and params.warmup_max_lr is None:
        rate, start = getattr(optimizer.params, "lr", None), params.warmup_min_lr
        if isinstance(rate, float) and max(start if isinstance(start, tuple) else (start,)) > rate:
            reads = tuple(("scheduler", "params", key) for key in ("warmup_min_lr", "warmup_max_lr"))
            yield (
                (*reads, ("optimizer", "params", "lr"), *types),
                f"got {shown(start)}; expected at most optimizer.params.lr, which is {rate:g}: warmup_max_lr is null",
            )


def _precision(sections: Mapping[str, Section]) -> Iterator[Conflict]:
    on = [name for name in ("fp16", "bf16", "torch_autocast") if _get(sections, name, "enabled")]
    if "fp16" in on and "bf16" in on:
        reads = (("bf16", "enabled"), ("fp16", "enabled"))
        yield reads, "got true beside fp16.enabled: true; a run has one number format; set one of the two to false"
    elif "torch_autocast" in on and len(on) > 1:
        reads = (("torch_autocast", "enabled"), (on[0], "enabled"))
        message = f"got true beside {on[0]}.enabled: true; autocast works on fp32 weights; set one of the two to false"
        yield reads, message
    if _get(sections, "fp16", "fp16_master_weights_and_grads") and not _get(sections, "zero_optimization", "stage", 0):
        reads = (("fp16", "fp16_master_weights_and_grads"), ("zero_optimization", "stage"))
        yield reads, "got true; expected false, or zero_optimization.stage 1, 2 or 3"


def unbuilt(config: EngineConfig) -> Iterator[Conflict]:
    """What goes together in DeepSpeed, and is not built here."""
    on = next((name for name in ("fp16", "bf16") if (section := getattr(config, name)) and section.enabled), "fp32")
    asked = config.data_types and config.data_types.grad_accum_dtype
    if asked and SHORT[asked] not in ("fp32", on):
        reads = (("data_types", "grad_accum_dtype"), *(((on, "enabled"),) if on != "fp32" else ()))
        yield reads, f"got {shown(asked)}; gradients add up in fp32, or in the training's own format, which is {on}"
    if asked and config.zero_optimization and config.zero_optimization.stage:
        add_up, what = config.communication_data_type or "fp32", "whole gradients add up in communication_data_type"
        if config.redline.zero.accumulate == "shared":
            add_up, what = "fp32", "shares of gradients add up in fp32"
        if SHORT[asked] != add_up:
            reads = (("data_types", "grad_accum_dtype"), ("zero_optimization", "stage"), ("communication_data_type",))
            yield reads, f"got {shown(asked)}; expected {shown(add_up)} or null: {what}; see redline.zero.accumulate"


def misfits(config: EngineConfig, world: World) -> Iterator[Conflict]:
    """What does not go with the number of processes, batch sizes apart. One process shares out nothing."""
    zero, processes = config.zero_optimization, world.size
    if zero is None or zero.stage == 0 or processes == 1:
        return
    divisors = [size for size in range(1, processes + 1) if processes % size == 0]
    groups = {
        "mics_shard_size": zero.mics_shard_size,
        # DeepSpeed takes a second copy's larger group for all processes, and so does this.
        "zero_hpz_partition_size": min(zero.zero_hpz_partition_size, processes),
    }
    for key, size in groups.items():
        if size > 0 and size not in divisors:
            expected = f"expected a divisor of {processes} (world size, {world.origin}): {either(map(str, divisors))}"
            yield (("zero_optimization", key), ("zero_optimization", "stage")), f"got {size}; {expected}"


def _zero(sections: Mapping[str, Section], scalars: Mapping[str, Any]) -> Iterator[Conflict]:
    stage = _get(sections, "zero_optimization", "stage", 0)
    if stage in (2, 3) and _get(sections, "zero_optimization", "reduce_scatter"):
        reads = (("zero_optimization", "stage"), ("zero_optimization", "reduce_scatter"))
        instead = f'with zero_optimization.stage {stage}, or "reduce_scatter": false there'
        if scalars.get("prescale_gradients"):
            yield (("prescale_gradients",), *reads), f"got true; expected false {instead}"
        if (factor := scalars.get("gradient_predivide_factor", 1.0)) != 1.0:
            yield (("gradient_predivide_factor",), *reads), f"got {factor:g}; expected 1 {instead}"
    if not _get(sections, "zero_optimization", "compute_grad_norm", True) and (limit := scalars["gradient_clipping"]):
        message = f'got false; expected true, or "gradient_clipping": 0 beside it; gradient_clipping is {limit:g}'
        yield (("zero_optimization", "compute_grad_norm"), ("gradient_clipping",)), message
    if scalars.get("gradient_allreduce_op") != "sum":
        return
    route = ("gradient_allreduce_op",)
    if _get(sections, "zero_optimization", "stage") == 3:
        yield (route, ("zero_optimization", "stage")), 'got "sum"; expected "mean" with zero_optimization.stage 3'
    if _get(sections, "zero_optimization", "zenflow") is not None:
        yield (route, ("zero_optimization", "zenflow")), 'got "sum"; expected "mean" with zero_optimization.zenflow'
    if _get(sections, "compile", "deepcompile"):
        yield (route, ("compile", "deepcompile")), 'got "sum"; expected "mean" with compile.deepcompile'


def _get(sections: Mapping[str, Section], name: str, key: str, default: Any = None) -> Any:
    return getattr(sections[name], key) if name in sections else default
