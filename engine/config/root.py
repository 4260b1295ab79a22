"""The whole config: every top-level key that is honoured, the batch sizes, and the rules across sections.

Keys that are refused or have no effect are in `refused.json`; to build one, move it from there to a field here.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, Field, PrivateAttr, WithJsonSchema

from redline.config import sections
from redline.config.components import OneCycleParams, OptimizerConfig, SchedulerConfig, WarmupLRParams
from redline.config.document import Document, Route, copy_document
from redline.config.messages import either, shown
from redline.config.section import TO_DEFAULT, Conflict, Count, NonNegative, Positive, Section, key, section
from redline.config.zero import ZeroConfig

__all__ = [
    "BATCH_KEYS", "Batch", "EngineConfig", "World", "conflicts", "count_steps", "find_world", "resolve_batch",
    "unbuilt",
]  # fmt: skip

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
BATCH_KEYS = (TRAIN, MICRO, STEPS)
# Null, like leaving it out, asks to infer it; `load` has taken it out by then.
BatchSize = Annotated[Count, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})]


ReduceOp = Annotated[Literal["mean", "sum", "MEAN", "SUM", "Mean", "Sum"], AfterValidator(str.lower)]


def _batch_size(meaning: str, default: int | None = None) -> Any:
    return Field(default=0, description=meaning, json_schema_extra={"default": default})  # 0: not inferred yet


_PRESCALED = "gradient_predivide_factor is not used then; from zero_optimization.stage 1 on torch divides"
_PREDIVIDED = "and by the rest after; DeepSpeed's arithmetic, torch's at stage 3"
_CLIPPING = 'unknown key here; gradients are clipped by "gradient_clipping"; move the number there'


class EngineConfig(Section):
    """A training run: DeepSpeed's keys that are honoured, and `redline`. Made by `load_config`."""

    aliases: ClassVar[dict[str, str]] = {"bfloat16": "bf16"}
    auto: ClassVar[dict[str, str]] = {
        "gradient_clipping": TO_DEFAULT, **dict.fromkeys(BATCH_KEYS, "inferred from the other two")
    }  # fmt: skip
    loose: ClassVar[bool] = True
    retired: ClassVar[dict[str, str]] = {"max_grad_norm": _CLIPPING}

    train_batch_size: BatchSize = _batch_size("Samples per optimizer step, over all ranks; inferred if left out.")
    train_micro_batch_size_per_gpu: BatchSize = _batch_size("Samples per rank and backward pass; inferred if left out.")
    gradient_accumulation_steps: BatchSize = _batch_size("Micro-batches per optimizer step; inferred if left out.", 1)
    optimizer: OptimizerConfig | None = key(None, "The optimizer; null if the script brings its own.")
    scheduler: SchedulerConfig | None = key(None, "The learning rate schedule; null for a fixed learning rate.")
    gradient_clipping: NonNegative = key(1.0, "Largest norm of all gradients together; 0 switches clipping off.")
    steps_per_print: Count | None = key(None, "Optimizer steps between two lines of progress; null for none.")
    dataloader_drop_last: bool = key(False, "Drop an epoch's last batch if it is not full.", "of initialize's loader")
    redline: sections.RedlineConfig = key(sections.RedlineConfig(), "Redline's own options.")
    prescale_gradients: bool = key(False, "Divide gradients by the ranks before they are summed.", _PRESCALED)
    gradient_predivide_factor: Positive = key(1.0, "Divide gradients by it before they are summed.", _PREDIVIDED)
    gradient_allreduce_op: ReduceOp = key("mean", "Whether gradients are averaged or summed over ranks.")
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = key(None, "Dtype of reductions.", "null is fp32")
    managed_gradient_accumulation: bool = key(True, "Count micro-batches; false makes every step() an optimizer step.")
    fp16: sections.FP16Config | None = section("Half precision.", "fp32 master params; DeepSpeed's loss scale")
    bf16: sections.BF16Config | None = section("bfloat16.", "fp32 master params, gradients reduced in fp32")
    torch_autocast: sections.TorchAutocastConfig | None = section("torch.autocast in forward.", "params: fp32 or bf16")
    data_types: sections.DataTypesConfig | None = section("Dtypes that gradients add up in, and that buffers have.")
    zero_optimization: ZeroConfig | None = section(
        "Parameters, gradients and optimizer state sharded over ranks.",
        "parameters are full on every rank up to stage 2; stage 3 is torch's FSDP2",
        off={"type": "boolean"},  # true is stage 1: an older spelling of DeepSpeed's
        switch="stage",
    )
    tensorboard: sections.TensorBoardConfig | None = section("Event files.", "needs the extra tensorboard")
    wandb: sections.WandbConfig | None = section("Weights & Biases.", "needs the extra wandb")
    csv_monitor: sections.CsvMonitorConfig | None = section("One CSV file for each number.", "its header comes once")
    comet: sections.CometConfig | None = section("Comet.", "needs the extra comet")
    flops_profiler: sections.FlopsProfilerConfig | None = section("Operations and time of each module in one step.")
    comms_logger: sections.CommsLoggerConfig | None = section("Time and size of each collective.")
    timers: sections.TimersConfig | None = section("Samples per second, in the lines of steps_per_print.")
    wall_clock_breakdown: bool | None = key(False, "Print times of a step's parts with steps_per_print, else every 10.")
    memory_breakdown: bool | None = key(False, "Print memory in use, with the lines of steps_per_print.")
    dump_state: bool | None = key(False, "Print the config in force at the start, each value with its origin.")
    compile: sections.CompileConfig | None = section("torch.compile of the model.", "as engine.compile() does it")
    checkpoint: sections.CheckpointConfig | None = section("How tags are checked; see redline.checkpoint, too.")

    # Not fields: they are no keys of the JSON.
    _document: Document | None = PrivateAttr(default=None)
    _world_size: int | None = PrivateAttr(default=None)
    _autos: frozenset[Route] = PrivateAttr(default=frozenset())

    @property
    def world_size(self) -> int | None:
        """The number of ranks that the batch sizes hold for; None before they are resolved."""
        return self._world_size

    def document(self) -> dict[str, Any]:
        """The config as it was written, comment keys included; a copy."""
        return copy.deepcopy(self.as_written().value)

    def as_written(self) -> Document:
        """The document that this config was read from."""
        return self._document or copy_document(self.model_dump(mode="json", exclude_unset=True))

    def is_auto(self, route: Route) -> bool:
        """Whether the document has "auto" for a key, under any of its spellings."""
        return route in self._autos

    def resolved(
        self, document: Document, autos: frozenset[Route], batch: Batch | None, world_size: int | None
    ) -> EngineConfig:
        """This config with its document and its batch sizes; without the latter where nothing tells them."""
        config = self.model_copy(update=batch._asdict() if batch else {})
        config._document, config._autos, config._world_size = document, autos, world_size
        return config


# -- batch sizes -----------------------------------------------------------------------------------------

_UNASKED = "the default: WORLD_SIZE is not set"


class Batch(NamedTuple):
    """The triple, whole; samples, samples and micro-batches."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int


class World(NamedTuple):
    """How many ranks train, and how that is known."""

    size: int
    origin: str


def find_world(asked: Any = None) -> World | str:
    """The world size asked for, else torchrun's, else one rank; or what is wrong with it."""
    expected = "expected a whole number >= 1"
    if asked is not None:
        if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
            return World(asked, "from the argument")
        return f"world size: got {asked!r:.40}; {expected}"
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return World(1, _UNASKED)
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= 1:
        return World(int(text), "from WORLD_SIZE")
    return f"environment variable WORLD_SIZE: got {shown(text)}; {expected}"


def resolve_batch(given: Mapping[str, int], world: World) -> Batch | str:
    """The whole triple from the one or two (or three) numbers given, each >= 1; or what is wrong with them.

    What is not given is inferred as in DeepSpeed's `_set_batch_related_parameters` (`deepspeed/runtime/config.py`).

    >>> resolve_batch({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, World(2, "from WORLD_SIZE"))
    Batch(train_batch_size=32, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=4)
    """
    train, micro, steps = (given.get(key) for key in BATCH_KEYS)
    if train is None and micro is None:
        return f"missing; give {TRAIN} or {MICRO}" + (f"; {STEPS} alone does not tell it" if steps else "")
    if train is None:
        micro, steps = micro or 1, steps or 1
        return Batch(micro * steps * world.size, micro, steps)
    # The smallest batch that what was given allows; DeepSpeed divides first and complains about the rest.
    unit = (micro or steps or 1) * world.size
    share = train // unit
    if train % unit == 0 and not (micro and steps and steps != share):
        return Batch(train, micro or share, steps or (share if micro else 1))
    # Every number with its origin, and the two nearest batch sizes that work.
    factors = [f"{value} ({key}, given)" for key, value in ((MICRO, micro), (STEPS, steps)) if value]
    expected = " x ".join([*factors, f"{world.size} (world size, {world.origin})"])
    expected = f"{unit * steps} = {expected}" if micro and steps else f"a multiple of {unit} = {expected}"
    working = {share * unit, share * unit + unit} - {0} if train % unit else {train, unit * (steps or 1)}
    free = STEPS if micro else MICRO
    choices = either(f"{size} ({free} {size // unit})" for size in sorted(working))
    message = f"got {train}; expected {expected}; with world size {world.size}: {choices}"
    if micro and steps and train % (micro * steps) == 0 and world.origin == _UNASKED:
        message += f"; as it is, it fits world size {train // (micro * steps)}"
    return message


def count_steps(settings: Mapping[str, Any], world: World, num_samples: int) -> int | None:
    """Optimizer steps of the run that ``redline.epochs`` asks for; None where the config does not tell them."""
    ours = settings.get("redline")
    epochs = ours.get("epochs") if isinstance(ours, dict) else None
    given = {key: settings.get(key) for key in BATCH_KEYS}
    batch = resolve_batch({key: size for key, size in given.items() if type(size) is int and size > 0}, world)
    if not isinstance(batch, Batch) or type(epochs) is not int or epochs < 1:
        return None
    micro_batches = math.ceil(num_samples / world.size) / batch.train_micro_batch_size_per_gpu  # as the loader has them
    per_epoch = math.floor(micro_batches) if settings.get("dataloader_drop_last") else math.ceil(micro_batches)
    return max(1, epochs * per_epoch // batch.gradient_accumulation_steps)


# -- rules across sections -------------------------------------------------------------------------------


def conflicts(config: EngineConfig, world: World | None) -> Iterator[Conflict]:
    """What cannot be obeyed together although each part is sound; `world` is None where that is not known."""
    yield from _schedule_conflicts(config)
    yield from _precision_conflicts(config)
    yield from _zero_conflicts(config)
    if world is not None:
        yield from _shard_group_conflicts(config, world)


def _schedule_conflicts(config: EngineConfig) -> Iterator[Conflict]:
    optimizer, scheduler, types = config.optimizer, config.scheduler, "optimizer.type scheduler.type"
    if optimizer is None or scheduler is None:
        return
    params, prefix = scheduler.params, "scheduler.params."
    if isinstance(params, OneCycleParams) and params.cycle_momentum:
        names = ("cycle_momentum", "cycle_min_mom", "cycle_max_mom")
        asked = [name for name in names if name in params.model_fields_set]
        if asked and not (optimizer.takes("betas") or optimizer.takes("momentum")):
            message = f"{optimizer.type} has no momentum to cycle; set cycle_momentum to false and leave its bounds out"
            yield f"{prefix}{asked[0]} {types}", message
    peak = getattr(optimizer.params, "lr", None)
    if isinstance(params, WarmupLRParams) and params.warmup_max_lr is None and isinstance(peak, float):
        start = params.warmup_min_lr
        if max(start if isinstance(start, tuple) else (start,)) > peak:
            keys = f"{prefix}warmup_min_lr {prefix}warmup_max_lr optimizer.params.lr {types}"
            limit = f"optimizer.params.lr, which is {peak:g}: warmup_max_lr is null"
            yield keys, f"got {shown(start)}; expected at most {limit}"


def _precision_conflicts(config: EngineConfig) -> Iterator[Conflict]:
    on, fp16, zero = _precisions(config), config.fp16, config.zero_optimization
    if "fp16" in on and "bf16" in on:
        message = "got true with fp16.enabled: true; a run has one precision; set one of the two to false"
        yield "bf16.enabled fp16.enabled", message
    elif "fp16" in on and "torch_autocast" in on:
        message = "got true with fp16.enabled: true; autocast takes fp32 or bf16 params; set one of the two to false"
        yield "torch_autocast.enabled fp16.enabled", message
    autocast = config.torch_autocast and config.torch_autocast.dtype
    if on == ["bf16", "torch_autocast"] and autocast and sections.SHORT[autocast] != "bf16":
        message = f'got {shown(autocast)} with bf16.enabled: true; expected "bfloat16" or null with it'
        yield "torch_autocast.dtype torch_autocast.enabled bf16.enabled", message
    if fp16 is not None and fp16.fp16_master_weights_and_grads and not (zero and zero.stage):
        keys = "fp16.fp16_master_weights_and_grads zero_optimization.stage"
        yield keys, "got true; expected false, or zero_optimization.stage 1, 2 or 3"


def _zero_conflicts(config: EngineConfig) -> Iterator[Conflict]:
    zero, compile = config.zero_optimization, config.compile
    if zero is not None and zero.stage in (2, 3) and zero.reduce_scatter:
        keys = "zero_optimization.stage zero_optimization.reduce_scatter"
        instead = f'with zero_optimization.stage {zero.stage}, or "reduce_scatter": false there'
        if config.prescale_gradients:
            yield f"prescale_gradients {keys}", f"got true; expected false {instead}"
        if (factor := config.gradient_predivide_factor) != 1.0:
            yield f"gradient_predivide_factor {keys}", f"got {factor:g}; expected 1 {instead}"
    if zero is not None and not zero.compute_grad_norm and (limit := config.gradient_clipping):
        message = f'got false; expected true, or "gradient_clipping": 0 with it; gradient_clipping is {limit:g}'
        yield "zero_optimization.compute_grad_norm gradient_clipping", message
    asked = {
        "zero_optimization.stage": zero is not None and zero.stage == 3 and "ZeRO stage 3",
        "zero_optimization.zenflow": zero is not None and zero.zenflow is not None and "ZenFlow",
        "compile.deepcompile": compile is not None and compile.deepcompile and "DeepCompile",
    }
    for route, name in asked.items():
        if config.gradient_allreduce_op == "sum" and name:
            yield f"gradient_allreduce_op {route}", f'got "sum", which is not supported with {name}; expected "mean"'


def _shard_group_conflicts(config: EngineConfig, world: World) -> Iterator[Conflict]:
    """Groups that ranks cannot be divided into. One rank shards nothing."""
    zero, ranks = config.zero_optimization, world.size
    if zero is None or zero.stage == 0 or ranks == 1:
        return
    divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
    # DeepSpeed takes a second copy's larger group for all ranks, and so does this.
    second_copy = min(zero.zero_hpz_partition_size, ranks)
    for name, size in (("mics_shard_size", zero.mics_shard_size), ("zero_hpz_partition_size", second_copy)):
        if size > 0 and size not in divisors:
            expected = f"a divisor of {ranks} (world size, {world.origin}): {either(map(str, divisors))}"
            yield f"zero_optimization.{name} zero_optimization.stage", f"got {size}; expected {expected}"


def unbuilt(config: EngineConfig) -> Iterator[Conflict]:
    """What works together in DeepSpeed, and is not built here."""
    yield from _unwritten(config)
    asked = config.data_types and config.data_types.grad_accum_dtype
    if not asked:
        return
    on = next((name for name in _precisions(config) if name != "torch_autocast"), "fp32")
    if sections.SHORT[asked] not in ("fp32", on):
        keys = "data_types.grad_accum_dtype" + (f" {on}.enabled" if on != "fp32" else "")
        yield keys, f"got {shown(asked)}; gradients add up in fp32, or in the training's own dtype, which is {on}"
    zero = config.zero_optimization
    shared = config.redline.zero.accumulate == "shared"
    if zero and (zero.stage == 3 or (zero.stage and shared)):
        add_up, what = config.communication_data_type or "fp32", "full gradients add up in communication_data_type"
        if shared:
            add_up, what = "fp32", "sharded gradients add up in fp32"
        if sections.SHORT[asked] != add_up:
            keys = "data_types.grad_accum_dtype zero_optimization.stage communication_data_type"
            yield keys, f"got {shown(asked)}; expected {shown(add_up)} or null: {what}; see redline.zero.accumulate"


def _unwritten(config: EngineConfig) -> Iterator[Conflict]:
    """What DeepSpeed would write otherwise than `redline.checkpoint.format` does."""
    if config.redline.checkpoint.format != "deepspeed":
        return
    key, zero, optimizer = "redline.checkpoint.format", config.zero_optimization, config.optimizer
    low = [name for name in _precisions(config) if name != "torch_autocast"]
    if low and (zero is None or zero.stage == 0):
        reason = f"at stage 0 DeepSpeed's files of {low[0]} depend on its kernels"
        message = f'got "deepspeed"; {reason}; expected zero_optimization.stage 1, 2 or 3 with it, or "redline"'
        yield f"{key} {low[0]}.enabled zero_optimization.stage", message
    for name in ("round_robin_gradients", "parameter_alignment", "mics_shard_size"):
        if zero is not None and getattr(zero, name) > 0:
            yield f"{key} zero_optimization.{name}", f'got "deepspeed"; expected "redline", or no {name}'
    if optimizer is not None and optimizer.type == "Muon":
        yield f"{key} optimizer.type", 'got "deepspeed"; expected "redline" with Muon'


def _precisions(config: EngineConfig) -> list[str]:
    """Of fp16, bf16 and torch_autocast those that are on."""
    switches = {"fp16": config.fp16, "bf16": config.bf16, "torch_autocast": config.torch_autocast}
    return [name for name, switch in switches.items() if switch is not None and switch.enabled]
