"""The ``checkpoint`` section.

After `get_checkpoint_params` in `deepspeed/runtime/config.py` and `deepspeed/runtime/model_checkpointing/config.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.config.section import Count, Loose

__all__ = ["CheckpointConfig", "ParallelWriteConfig", "WriterConfig"]

TagValidation = Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL"]
WriterType = Literal["MOCK", "PYTHON", "FAST", "mock", "python", "fast"]
DataParallel = Literal["REPLICA", "SOCKET", "MACHINE", "replica", "socket", "machine"]


class ParallelWriteConfig(Loose):
    """How processes share the writing out."""

    pipeline_stage: bool = Field(False, description="Each part of a pipeline writes its own layers.")


class WriterConfig(Loose):
    """DeepSpeed's own file writer."""

    type: WriterType = Field("FAST", description="Code that writes files.")
    io_buffer_size: Count = Field(67_108_864, description="Bytes of a buffer.")
    io_buffer_double: bool = Field(True, description="Fill one buffer while another is written.")
    io_multiplier: Count = Field(1, description="Writers per process.")
    show_statistics: bool = Field(False, description="Print the speed.")
    data_parallel: DataParallel | None = Field(None, description="Processes that share one file's writing.")
    decoupled: bool = Field(False, description="Write while training goes on.")


class CheckpointConfig(Loose):
    """How checkpoints are written and found."""

    tag_validation: TagValidation = Field("Warn", description="What happens if processes save under different tags.")
    load_universal: bool = Field(False, description="Load DeepSpeed's universal format.")
    use_node_local_storage: bool = Field(False, description="Each host writes to a disk of its own.")
    parallel_write: ParallelWriteConfig | None = Field(None, description="How processes share the writing out.")
    checkpoint_serialization: bool = Field(True, description="Write torch's zip format.")
    writer: WriterConfig | None = Field(None, description="DeepSpeed's own file writer; null for torch's.")
