"""Memory and disk: ``aio`` and ``activation_checkpointing``.

After `deepspeed/runtime/swap_tensor/aio_config.py` and `runtime/activation_checkpointing/config.py`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from engine.config.section import Count, Loose, Whole

__all__ = ["ActivationCheckpointingConfig", "AioConfig"]


class AioConfig(Loose):
    """Asynchronous reads and writes of NVMe offload."""

    aliases: ClassVar[dict[str, str]] = {"thread_count": "intra_op_parallelism"}

    block_size: Count = Field(1_048_576, description="Bytes of a request.")
    queue_depth: Count = Field(8, description="Requests under way at once.")
    intra_op_parallelism: Count = Field(1, description="Threads that share one tensor's requests.")
    single_submit: bool = Field(False, description="Hand requests over one by one.")
    overlap_events: bool = Field(True, description="Hand over new requests while others complete.")
    use_gds: bool = Field(False, description="Let the disk write into the GPU's memory (GPUDirect).")


class ActivationCheckpointingConfig(Loose):
    """Activations that are computed again in backward; only `deepspeed.checkpointing` reads it."""

    aliases: ClassVar[dict[str, str]] = {"partitioned_activations": "partition_activations"}

    partition_activations: bool = Field(False, description="Share each activation out among model-parallel processes.")
    number_checkpoints: Whole | Literal[False] | None = Field(
        None, description="Checkpoints of a pass; sizes a buffer."
    )
    contiguous_memory_optimization: bool = Field(False, description="Copy partitioned activations into one buffer.")
    synchronize_checkpoint_boundary: bool = Field(False, description="Wait for the device at each checkpoint.")
    profile: bool = Field(False, description="Time each checkpoint.")
    cpu_checkpointing: bool = Field(False, description="Keep partitioned activations in the CPU's memory.")
