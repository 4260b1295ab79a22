"""The whole config: the top-level keys that are honoured.

Attribute names are the JSON's keys. What the sections are is in `optimizer` and `scheduler`; what other
keys of DeepSpeed mean here is in `support`; a section that `support` comes to honour gets a field here.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from engine.config.batch import BATCH_KEYS, Batch
from engine.config.document import Document, copy_document
from engine.config.optimizer import OptimizerConfig
from engine.config.scheduler import SchedulerConfig
from engine.config.section import TO_DEFAULT, Count, NonNegative, Section
from engine.config.sections.records import (
    CometConfig,
    CommsLoggerConfig,
    CsvMonitorConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    TimersConfig,
    WandbConfig,
)

__all__ = ["EngineConfig"]


class RangeTestConfig(Section):
    """Where a learning rate range test keeps its record."""

    output_dir: str = Field(
        default="range_test", description="Folder that a run with LRRangeTest writes its record into.", min_length=1
    )


class RedlineConfig(Section):
    """Options that DeepSpeed does not have, and ignores."""

    schedules: Literal["deepspeed", "corrected"] = Field(
        default="deepspeed", description="Whether schedules keep DeepSpeed's surprises or correct them."
    )
    find_unused_parameters: bool = Field(
        default=False, description="Let DDP look for parameters that a forward pass did not use, at some cost per step."
    )
    progress: bool | None = Field(
        default=None,
        description="A bar over engine.training_dataloader on rank 0; null for one on a terminal if tqdm is there.",
    )
    range_test: RangeTestConfig = Field(default=RangeTestConfig(), description="The passive range test.")


class EngineConfig(Section):
    """A training run: DeepSpeed's keys that are honoured, and `redline`. Made by `load_config`."""

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
    steps_per_print: Count | None = Field(
        default=None, description="Optimizer steps between two lines of progress; null for none."
    )
    dataloader_drop_last: bool = Field(default=False, description="Drop the last batch of an epoch if it is not full.")
    tensorboard: TensorBoardConfig | None = Field(default=None, description="Event files for TensorBoard.")
    wandb: WandbConfig | None = Field(default=None, description="Weights & Biases.")
    csv_monitor: CsvMonitorConfig | None = Field(default=None, description="One CSV file for each number.")
    comet: CometConfig | None = Field(default=None, description="Comet.")
    flops_profiler: FlopsProfilerConfig | None = Field(
        default=None, description="Operations and time of each module, counted in one step."
    )
    comms_logger: CommsLoggerConfig | None = Field(default=None, description="Time and size of each collective.")
    timers: TimersConfig | None = Field(default=None, description="DeepSpeed's timers.")
    wall_clock_breakdown: bool | None = Field(
        default=False, description="Print the time of data, forward, backward and step."
    )
    memory_breakdown: bool | None = Field(default=False, description="Print memory in use.")
    dump_state: bool | None = Field(default=False, description="Print the config in force at the start.")
    redline: RedlineConfig = Field(default=RedlineConfig(), description="Redline's own options.")

    _document: Document | None = PrivateAttr(default=None)
    _world_size: int | None = PrivateAttr(default=None)

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
