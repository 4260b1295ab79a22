"""The whole config: the top-level keys that are honoured.

Attribute names are the JSON's keys. What the sections are is in `optimizer` and `scheduler`; what other
keys of DeepSpeed mean here is in `support`; a section that `support` comes to honour gets a field here.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from engine.config.batch import BATCH_KEYS, Batch
from engine.config.document import Document, copy_document
from engine.config.optimizer import OptimizerConfig
from engine.config.scheduler import SchedulerConfig
from engine.config.section import (
    OR_OFF,
    OR_SWITCH,
    TO_DEFAULT,
    Count,
    NonNegative,
    Positive,
    Section,
    Whole,
    sections_in,
)
from engine.config.sections.precision import BF16Config, DataTypesConfig, FP16Config, TorchAutocastConfig
from engine.config.sections.records import (
    CometConfig,
    CommsLoggerConfig,
    CsvMonitorConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    TimersConfig,
    WandbConfig,
)
from engine.config.sections.storage import CheckpointConfig
from engine.config.sections.zero import ZeroConfig

__all__ = ["EngineConfig"]


class RangeTestConfig(Section):
    """How a learning rate range test grows, and where it keeps its record."""

    output_dir: str = Field(
        default="range_test", description="Folder that a run with LRRangeTest writes its record into.", min_length=1
    )
    growth: Literal["linear", "exponential"] = Field(
        default="linear",
        description="How LRRangeTest grows: by equal amounts, as in DeepSpeed, or by equal factors: "
        "min_lr * (1 + step_rate) ** (step / step_size).",
    )


class DataConfig(Section):
    """How a loader that the engine builds reads its dataset."""

    seed: Whole = Field(default=0, description="Seed of the order of samples, and of random numbers in workers.")
    shuffle: bool = Field(default=True, description="Give a map-style dataset a new order each epoch.")
    workers: Whole = Field(
        default=0, description="Processes per rank that read ahead; 0 reads in the training process itself."
    )
    prefetch_factor: Count = Field(default=2, description="Micro-batches that each worker reads ahead.")
    pin_memory: bool = Field(
        default=True, description="Put batches into pinned memory, from where they are copied to a GPU without waiting."
    )
    split_by_rank: bool | None = Field(
        default=None,
        description="Whether an iterable dataset gives each rank samples of its own already, as many as the others'; "
        "false splits it between the ranks, null compares the ranks' first samples at the start to find out.",
    )

    def arguments(self) -> dict[str, Any]:
        """As `engine.data.build_loader` takes them."""
        return self.model_dump()


class SavingConfig(Section):
    """How checkpoints are kept and written, beyond DeepSpeed's section `checkpoint`."""

    keep_last: Count | None = Field(
        default=None, description="Newest checkpoints that are kept in a folder; older ones are removed; null for all."
    )
    keep_every: Count | None = Field(
        default=None, description="Steps between checkpoints that keep_last never removes; null for none."
    )
    async_save: bool = Field(
        default=False, description="Stop training only to copy the state; write it while training goes on."
    )
    override_schedule: bool = Field(
        default=False,
        description="Go on from a checkpoint with the config's schedule where its type or parameters have changed.",
    )
    save_on_sigterm: str | None = Field(
        default=None, description="Folder to save into at the next step after SIGTERM; null for none.", min_length=1
    )


class ZeroOptionsConfig(Section):
    """How a model is shared out, where DeepSpeed has no key for it."""

    blocks: list[str] | None = Field(
        default=None,
        description="Classes or names (with * and ?) of the modules that are gathered as one; null for the modules "
        "that the model repeats, an empty list for the model as one.",
    )
    smallest_block: Whole = Field(
        default=100_000, description="Blocks with fewer elements than this are gathered with the model, unless named."
    )
    accumulate: Literal["local", "shared"] | None = Field(
        default=None,
        description="Where gradients of micro-batches add up: local, in full on each rank and reduced once per "
        "optimizer step; shared, sharded and reduced after every backward. Null: local at stages 1 and 2, and at stage "
        "3 where full gradients take at most a quarter of the device's memory.",
    )


class RedlineConfig(Section):
    """Options that DeepSpeed does not have, and ignores."""

    schedules: Literal["deepspeed", "corrected"] = Field(
        default="deepspeed", description="Whether schedules keep DeepSpeed's surprises or correct them."
    )
    find_unused_parameters: bool = Field(
        default=False,
        description="No longer needed: a forward may leave out parameters at any time, on some ranks or all; their "
        "gradients are zero.",
    )
    distributed_timeout: Positive = Field(
        default=600.0,
        description="Seconds that a process waits for the others, at the start and in each collective; then it ends.",
    )
    data: DataConfig = Field(default=DataConfig(), description="The loader of training data.")
    zero: ZeroOptionsConfig = Field(default=ZeroOptionsConfig(), description="How ZeRO shares a model out.")
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep no activations in the model's blocks (redline.zero.blocks): backward computes them again.",
    )
    progress: bool | None = Field(
        default=None,
        description="A bar over engine.training_dataloader on rank 0; null for one on a terminal if tqdm is there.",
    )
    range_test: RangeTestConfig = Field(default=RangeTestConfig(), description="The learning rate range test.")
    checkpoint: SavingConfig = Field(default=SavingConfig(), description="How checkpoints are kept and written.")


class EngineConfig(Section):
    """A training run: DeepSpeed's keys that are honoured, and `redline`. Made by `load_config`."""

    aliases: ClassVar[dict[str, str]] = {"bfloat16": "bf16"}
    auto: ClassVar[dict[str, str]] = {
        **dict.fromkeys(BATCH_KEYS, "inferred from the other two"),
        "gradient_clipping": TO_DEFAULT,
    }

    train_batch_size: Count = Field(
        default=0, description="Samples per optimizer step, over all processes and micro-batches; inferred if left out."
    )
    train_micro_batch_size_per_gpu: Count = Field(
        default=0, description="Samples per process and backward pass; inferred if left out."
    )
    gradient_accumulation_steps: Count = Field(
        default=0, description="Micro-batches per optimizer step; inferred if left out."
    )
    optimizer: OptimizerConfig | None = Field(
        default=None, description="The optimizer; null if the script brings its own."
    )
    scheduler: SchedulerConfig | None = Field(
        default=None, description="The learning rate schedule; null for a fixed rate."
    )
    gradient_clipping: NonNegative = Field(
        default=1.0, description="Largest norm of the gradient of all parameters together; 0 switches clipping off."
    )
    gradient_allreduce_op: Literal["mean", "sum"] = Field(
        default="mean", description="Whether gradients of processes are averaged or summed."
    )
    prescale_gradients: bool = Field(
        default=False, description="Divide gradients by the number of processes before they are summed, not after."
    )
    gradient_predivide_factor: Positive = Field(
        default=1.0, description="Divide gradients by this before they are summed, and by the rest after."
    )
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = Field(
        default=None, description="Number format in which gradients are summed over processes; null for fp32."
    )
    managed_gradient_accumulation: bool = Field(
        default=True, description="Let the engine count micro-batches; false updates at every step()."
    )
    fp16: Annotated[FP16Config | None, OR_OFF] = Field(default=None, description="Half precision with a loss scale.")
    bf16: Annotated[BF16Config | None, OR_OFF] = Field(default=None, description="bfloat16 with fp32 master weights.")
    torch_autocast: Annotated[TorchAutocastConfig | None, OR_OFF] = Field(
        default=None, description="torch.autocast around the forward pass."
    )
    data_types: Annotated[DataTypesConfig | None, OR_OFF] = Field(
        default=None, description="Number formats apart from the training's own."
    )
    steps_per_print: Count | None = Field(
        default=None, description="Optimizer steps between two lines of progress; null for none."
    )
    dataloader_drop_last: bool = Field(default=False, description="Drop the last batch of an epoch if it is not full.")
    zero_optimization: Annotated[ZeroConfig | None, OR_SWITCH] = Field(
        default=None, description="Parameters, gradients and optimizer state shared out among processes."
    )
    tensorboard: Annotated[TensorBoardConfig | None, OR_OFF] = Field(
        default=None, description="Event files for TensorBoard."
    )
    wandb: Annotated[WandbConfig | None, OR_OFF] = Field(default=None, description="Weights & Biases.")
    csv_monitor: Annotated[CsvMonitorConfig | None, OR_OFF] = Field(
        default=None, description="One CSV file for each number."
    )
    comet: Annotated[CometConfig | None, OR_OFF] = Field(default=None, description="Comet.")
    flops_profiler: Annotated[FlopsProfilerConfig | None, OR_OFF] = Field(
        default=None, description="Operations and time of each module, counted in one step."
    )
    comms_logger: Annotated[CommsLoggerConfig | None, OR_OFF] = Field(
        default=None, description="Time and size of each collective."
    )
    timers: Annotated[TimersConfig | None, OR_OFF] = Field(default=None, description="DeepSpeed's timers.")
    checkpoint: Annotated[CheckpointConfig | None, OR_OFF] = Field(
        default=None, description="What processes that save under different tags get."
    )
    wall_clock_breakdown: bool | None = Field(
        default=False, description="Print the time of data, forward, backward and step."
    )
    memory_breakdown: bool | None = Field(default=False, description="Print memory in use.")
    dump_state: bool | None = Field(default=False, description="Print the config in force at the start.")
    redline: RedlineConfig = Field(default=RedlineConfig(), description="Redline's own options.")

    _document: Document | None = PrivateAttr(default=None)
    _world_size: int | None = PrivateAttr(default=None)

    @classmethod
    def section(cls, name: str) -> type[Section] | None:
        """The model of a key at the top, under either spelling; None where it is no section, or not honoured."""
        name = cls.aliases.get(name, name)
        return next(sections_in(cls.model_fields[name].annotation), None) if name in cls.model_fields else None

    @property
    def world_size(self) -> int | None:
        """The number of processes that the batch sizes hold for; None before they are resolved."""
        return self._world_size

    def document(self) -> dict[str, Any]:
        """The config as it was written, comment keys included; a copy."""
        return copy.deepcopy(self.as_written().value)

    def as_written(self) -> Document:
        """The document that this config was read from."""
        return self._document or copy_document(self.model_dump(mode="json", exclude_unset=True))

    def resolved(self, batch: Batch, world_size: int, document: Document) -> EngineConfig:
        """This config with its batch sizes filled in."""
        config = self.model_copy(update=batch._asdict())
        config._document, config._world_size = document, world_size
        return config

    def unresolved(self, document: Document) -> EngineConfig:
        """This config without batch sizes, which nothing tells."""
        config = self.model_copy()
        config._document = document
        return config
