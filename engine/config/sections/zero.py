"""The ``zero_optimization`` section: what is shared out among processes, and where it is kept.

After `deepspeed/runtime/zero/config.py`, `offload_config.py`, `leaf_module_config.py` and
`deepspeed/runtime/zenflow/zenflow_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from engine.config.section import TO_DEFAULT, Count, Index, Integer, Ratio, Section, Whole

__all__ = [
    "LETTERS", "STAGES", "LeafModuleConfig", "OffloadOptimizerConfig", "OffloadParamConfig", "Stage", "ZenFlowConfig",
    "ZeroConfig",
]  # fmt: skip

Device = Literal["none", "cpu", "nvme"]


class Stage(NamedTuple):
    """What a stage of ZeRO is here; the letters are in `LETTERS`.

    Attributes:
        stage: the stage, and the key beside it.
        shared: what each process has its share of.
        torch: what FSDP2's `fully_shard` is given as `reshard_after_forward`; "-" where FSDP2 is not used.
        sent: by each rank, per optimizer step.
        memory: of each rank, activations apart.
    """

    stage: str
    shared: str
    torch: str
    sent: str
    memory: str


STAGES = (
    Stage("0", "nothing", "-", "2G", "w + W + G + S; in fp32 W + G + S"),
    Stage("1, 2", "optimizer state, master params", "-", "w + G", "w + g + (W + S)/N"),
    Stage("3", "parameters, too", "True", "2w per micro-batch, G", "(W + G + S)/N + w of a block or two"),
    Stage(
        "3, hpz n", "and a copy of them among n", "n", "w, w among n per micro-batch, G", "as 3, and w/n until backward"
    ),
    Stage(
        "1-3, mics n", "as the stage, but among n", "as the stage", "as the stage, and 2G/n", "as the stage, n for N"
    ),
)
LETTERS = (
    "N processes; W weights as the optimizer has them, w as the model computes with them; G gradients as they are "
    "reduced, g as a backward makes them; S optimizer state. hpz n: zero_hpz_partition_size. mics n: "
    "mics_shard_size, a mesh of N/n by n."
)


class _Offload(Section):
    """What both kinds of offload share."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}

    device: Device = Field("none", description="Where it is kept.")
    nvme_path: str | None = Field(None, description="Folder on an NVMe disk.")
    pin_memory: bool = Field(True, description="Keep it in page-locked memory.")


class OffloadParamConfig(_Offload):
    """Parameters outside the GPU; stage 3 only."""

    buffer_count: Whole = Field(5, description="Buffers between disk and memory.")
    buffer_size: Whole = Field(100_000_000, description="Elements of a buffer.")
    max_in_cpu: Whole = Field(1_000_000_000, description="Elements that may stay in memory beside the disk.")


class OffloadOptimizerConfig(_Offload):
    """The optimizer's state and step outside the GPU."""

    buffer_count: Whole = Field(4, description="Buffers between disk and memory.")
    pipeline_read: bool = Field(False, description="Read the next part while this one is computed.")
    pipeline_write: bool = Field(False, description="Write the last part while this one is computed.")
    fast_init: bool = Field(False, description="Make the state directly on the disk.")
    ratio: Ratio = Field(1.0, description="Share of the state that is outside; below 1 with stage 3 only.")
    super_offload: bool = Field(False, description="Offload for chips that share memory with the CPU; stage 3.")
    cpuadam_cores_perc: Ratio = Field(0.8, description="Share of the CPU's cores for super_offload's Adam.")


class ZenFlowConfig(Section):
    """ZenFlow: the important gradients are applied on the GPU, the others later on the CPU."""

    topk_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="Share of gradients that are important.")
    select_strategy: Literal["auto", "step", "epoch"] = Field("auto", description="When they are chosen anew.")
    select_interval: Literal["auto"] | Integer = Field("auto", description="Steps or epochs between two choices.")
    update_interval: Literal["auto"] | Count = Field("auto", description="Steps between two updates of the others.")
    overlap_step: bool = Field(False, description="Let the CPU's step run beside forward and backward.")
    offload: bool = Field(False, description="Keep the state of the chosen on the CPU, too.")
    auto_ratio: Ratio = Field(0.99, description="Share of the gradient's norm for update_interval auto.")
    full_warm_up_rounds: Integer = Field(0, description="Updates at the start that take all gradients.")
    pt_reserved_cores_perc: Ratio = Field(0.5, description="Share of the CPU's cores that is left to torch.")
    steps_per_epoch: Integer | None = Field(None, description="Updates per epoch; DeepSpeed fills it in.")


class LeafModuleConfig(Section):
    """Modules whose parameters stage 3 gathers as one."""

    classes: str | list[str] = Field(
        [
            f"transformers.models.{module}.modeling_{module}.{name}SparseMoeBlock"
            for module, name in (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"))
        ],
        description="Their classes, with the modules that these are in.",
    )
    names: str | list[str] = Field([], description="Their names in the model.")
    name_suffixes: str | list[str] = Field([], description="Ends of their names.")


class ZeroConfig(Section):
    """ZeRO: optimizer state, gradients and parameters shared out among processes."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}
    aliases: ClassVar[dict[str, str]] = {
        **{
            name: f"stage3_{name}"
            for name in (
                "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
                "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
                "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
            )
        },
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    }  # fmt: skip

    stage: Annotated[Integer, Field(ge=0, le=3, json_schema_extra={"enum": [0, 1, 2, 3]})] = Field(
        0, description="0 shards nothing, 1 optimizer state, 2 gradients as well, 3 parameters as well."
    )
    contiguous_gradients: bool = Field(True, description="Copy gradients into one buffer as they are made.")
    reduce_scatter: bool = Field(True, description="Reduce each gradient to the process that owns it only.")
    reduce_bucket_size: Count = Field(500_000_000, description="Elements that are reduced at a time.")
    use_multi_rank_bucket_allreduce: bool = Field(True, description="Reduce the buckets of several owners at once.")
    allgather_partitions: bool = Field(True, description="Gather parameters at once, not by broadcasts.")
    allgather_bucket_size: Whole = Field(500_000_000, description="Elements that are gathered at a time.")
    overlap_comm: bool | None = Field(None, description="Reduce while backward runs; null does so in stage 3.")
    compute_grad_norm: bool = Field(True, description="Compute the norm of the gradient; false with stage 1 or 2 only.")
    load_from_fp32_weights: bool = Field(True, description="Take a checkpoint's fp32 weights, not its fp16 ones.")
    elastic_checkpoint: bool = Field(False, description="Write checkpoints for another number of processes, as was.")
    offload_param: OffloadParamConfig | None = Field(None, description="Keep parameters outside the GPU.")
    offload_optimizer: OffloadOptimizerConfig | None = Field(None, description="Keep the optimizer outside the GPU.")
    zenflow: ZenFlowConfig | None = Field(None, description="Offload that hides the CPU's step.")
    sub_group_size: Whole = Field(1_000_000_000, description="Elements that the optimizer updates at a time; stage 3.")
    cpu_offload: bool | None = Field(None, description="Older spelling of offload_optimizer with the device cpu.")
    cpu_offload_param: bool | None = Field(None, description="Older spelling of offload_param with the device cpu.")
    cpu_offload_use_pin_memory: bool | None = Field(None, description="Older spelling of pin_memory in both.")
    stage3_prefetch_bucket_size: Whole = Field(50_000_000, description="Elements that are fetched ahead of their use.")
    stage3_param_persistence_threshold: Whole = Field(
        100_000, description="Parameters with fewer elements than this stay whole."
    )
    stage3_model_persistence_threshold: Whole = Field(
        9_223_372_036_854_775_807, description="Elements of the model that may stay whole."
    )
    stage3_max_live_parameters: Whole = Field(1_000_000_000, description="Elements that a GPU may hold at a time.")
    stage3_max_reuse_distance: Whole = Field(
        1_000_000_000, description="A parameter that is used again within as many elements is kept."
    )
    stage3_gather_16bit_weights_on_model_save: bool = Field(
        False, description="Gather the whole model on rank 0 for save_16bit_model."
    )
    stage3_module_granularity_threshold: Integer = Field(
        0, description="Modules with fewer elements per submodule than this are fetched as one."
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(False, description="Fetch by all-reduce, not all-gather.")
    stage3_allgather_sequential: bool = Field(False, description="Fetch one parameter after another, without a bucket.")
    ignore_unused_parameters: bool = Field(True, description="Go on if a parameter got no gradient; stage 2.")
    legacy_stage1: bool = Field(False, description="An older stage 1.")
    round_robin_gradients: bool = Field(False, description="Deal gradients out so that they are offloaded in parallel.")
    parameter_alignment: bool = Field(False, description="Start each parameter on a multiple of 16 bytes.")
    zero_hpz_partition_size: Whole = Field(
        1, description="Processes, of one host say, that keep a second copy among them (ZeRO++); 0 or 1 for none."
    )
    zero_quantized_weights: bool = Field(False, description="Gather parameters as int8 (ZeRO++).")
    zero_quantized_nontrainable_weights: bool = Field(False, description="Keep frozen parameters as int8.")
    zero_quantized_gradients: bool = Field(False, description="Reduce gradients as int4 (ZeRO++).")
    memory_efficient_linear: bool = Field(True, description="A linear layer that keeps no copy of its weight; stage 3.")
    pipeline_loading_checkpoint: bool = Field(False, description="Load checkpoints one process at a time; stage 3.")
    override_module_apply: bool = Field(True, description="Let Module.apply see whole parameters; stage 3.")
    log_trace_cache_warnings: bool = Field(False, description="Say when the order of modules changes; stage 3.")
    enable_sanity_checks: bool = Field(False, description="Check DeepSpeed's own bookkeeping.")
    save_muon_momentum_buffer_in_memory: bool = Field(False, description="Keep Muon's momentum off the disk; stage 3.")
    leaf_module: LeafModuleConfig | None = Field(None, description="Modules that are gathered as one; stage 3.")
    mics_shard_size: Index = Field(
        -1, description="Processes that share out a whole model (MiCS); -1 or 0 for all of them."
    )
    mics_hierarchical_params_gather: bool = Field(
        False, description="Gather within hosts first (MiCS); DeepSpeed has removed it."
    )
    zeropp_loco_param: dict[str, Any] | None = Field(
        None, description="Error feedback of quantized gradients; DeepSpeed has removed it."
    )

    @property
    def offloads(self) -> bool:
        """Whether weights and optimizer state are to be kept in the CPU's memory."""
        sections = (self.offload_optimizer, self.offload_param)
        named = any(section is not None and section.device == "cpu" for section in sections)
        return named or bool(self.cpu_offload) or bool(self.cpu_offload_param)

    @property
    def pins_memory(self) -> bool:
        """Whether that memory is page-locked."""
        sections = [each for each in (self.offload_optimizer, self.offload_param) if each is not None]
        return all(each.pin_memory for each in sections) and self.cpu_offload_use_pin_memory is not False

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.compute_grad_norm and self.stage not in (1, 2):
            yield ("compute_grad_norm", "stage"), f"got false; expected true, or stage 1 or 2; stage is {self.stage}"
        offload = self.offload_optimizer
        if offload is not None and offload.ratio < 1 and self.stage != 3:
            message = f"ratio is {offload.ratio:g}; expected 1, or stage 3; stage is {self.stage}"
            yield ("offload_optimizer", "stage"), message
        if self.stage in (1, 2):  # DeepSpeed goes on without them, and without a word
            if self.offload_param is not None and self.offload_param.device != "none":
                message = f'device is "{self.offload_param.device}"; expected "none", or stage 3; stage is {self.stage}'
                yield ("offload_param", "stage"), message
            if self.cpu_offload_param:
                yield ("cpu_offload_param", "stage"), f"got true; expected false, or stage 3; stage is {self.stage}"
            if (size := self.zero_hpz_partition_size) > 1:
                message = f"got {size}; expected 1, or stage 3; stage is {self.stage}"
                yield ("zero_hpz_partition_size", "stage"), message
        if (group := self.mics_shard_size) > 0:
            if self.stage == 0:
                yield ("mics_shard_size", "stage"), f"got {group}; expected -1, or stage 1, 2 or 3; stage is 0"
            if (size := self.zero_hpz_partition_size) > 1:
                message = f"got {group} beside zero_hpz_partition_size: {size}; take one of the two"
                yield ("mics_shard_size", "zero_hpz_partition_size"), message
        for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            if getattr(self, old) is not None and new in self.model_fields_set:
                yield (old, new), f"given beside {new}, which takes its place; remove it"
