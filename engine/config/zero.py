"""The ``zero_optimization`` section: what is sharded over ranks, and where it is kept.

After `deepspeed/runtime/zero/config.py`, `offload_config.py`, `leaf_module_config.py` and
`deepspeed/runtime/zenflow/zenflow_config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from redline.config.section import AutoSection, Conflict, Count, Index, Ratio, Section, Whole, key, refused, unread

__all__ = ["LETTERS", "STAGES", "OffloadOptimizerConfig", "OffloadParamConfig", "ZeroConfig"]


# What each stage is here: what is sharded, FSDP2's `reshard_after_forward` ("-" where FSDP2 is not used), what a rank
# sends per optimizer step, and its memory aside from activations.
STAGES = (
    ("0", "nothing", "-", "2G", "w + W + G + S; in fp32 W + G + S"),
    ("1, 2", "optimizer state, master params", "-", "w + G", "w + g + (W + S)/N"),
    ("3", "parameters, too", "True", "2w per micro-batch, G", "(W + G + S)/N + w of a block or two"),
    ("3, hpz n", "and a copy of them among n", "n", "w, w among n per micro-batch, G", "as 3, and w/n until backward"),
    ("1-3, mics n", "as the stage, but among n", "as the stage", "as the stage, and 2G/n", "as the stage, n for N"),
)
LETTERS = (
    "N ranks; W parameters as the optimizer has them, w as the model computes with them; G gradients as they are "
    "reduced, g as a backward makes them; S optimizer state. hpz n: zero_hpz_partition_size. mics n: "
    "mics_shard_size, a mesh of N/n by n."
)

_STAGES = "0 shards nothing, 1 optimizer state, 2 gradients as well, 3 parameters as well."
_STAGE_1 = "1 is 2 here: a gradient is reduced to the rank that owns its shard"
_HPZ = "with stage 3; from forward to backward the parameters are sharded over so few ranks"
_MICS = (
    "groups of so many ranks shard a full model, and reduce gradients between them; "
    "DeepSpeed has removed it, and refuses a config that has it"
)
# Why keys have no effect here, or are refused.
_BUCKETS = "buckets have 25 MiB up to stage 2; at stage 3 a block is sent as one, see redline.zero.blocks"
_ONE_BLOCK = "one block is unsharded at a time, and the next on its way, see redline.zero.blocks"
_ORDER = "gradients are reduced after the last backward up to stage 2, and block by block during it at stage 3"
_SMALL = "small parameters are sharded with their block, which is sent as one"
_DEEPSPEED = "only DeepSpeed's own code reads it"
_NVME = "only NVMe offload reads it"
_ONE_PLACE = "on CUDA; params, gradients and optimizer state shards are in one place: either key offloads all"
_NO_NVME = 'nothing is kept on a disk; keep it in the CPU\'s memory with "cpu"'
_NO_PARTS = "all of it is offloaded, or nothing; leave it out"
_NO_INTS = "there is no quantized communication; leave it out"
_REMOVED = "DeepSpeed has removed it, and refuses a config that has it; leave it out"


class _Offload(AutoSection):
    device: Literal["none", "cpu", "nvme"] = key("none", "Where it is kept.", _NO_NVME, allowed=["cpu", "auto"])
    nvme_path: str | None = unread(None, "Folder on an NVMe disk.", _NVME)
    pin_memory: bool = key(True, "Keep it in page-locked memory.")


class OffloadParamConfig(_Offload):
    """Parameters outside the GPU; stage 3 only."""

    buffer_count: Whole = unread(5, "Buffers between disk and memory.", _NVME)
    buffer_size: Whole = unread(100_000_000, "Elements of a buffer.", _NVME)
    max_in_cpu: Whole = unread(1_000_000_000, "Elements that may stay in memory.", _NVME)


class OffloadOptimizerConfig(_Offload):
    buffer_count: Whole = unread(4, "Buffers between disk and memory.", _NVME)
    pipeline_read: bool = unread(False, "Read the next part while this one is computed.", _NVME)
    pipeline_write: bool = unread(False, "Write the last part while this one is computed.", _NVME)
    fast_init: bool = unread(False, "Make the state directly on the disk.", _NVME)
    ratio: Ratio = refused(1.0, "Share of the state that is outside; below 1 with stage 3 only.", _NO_PARTS, "auto")
    super_offload: bool = refused(False, "Offload for chips that share the CPU's memory; stage 3.", _NO_PARTS, "auto")
    cpuadam_cores_perc: Ratio = unread(0.8, "Share of the CPU's cores for super_offload's Adam.", _DEEPSPEED)


class ZenFlowConfig(Section):
    topk_ratio: Annotated[float, Field(gt=0, lt=1)] = key(0.1, "Share of gradients that are important.")
    select_strategy: Literal["auto", "step", "epoch"] = key("auto", "When they are chosen anew.")
    select_interval: Literal["auto"] | int = key("auto", "Steps or epochs between two choices.")
    update_interval: Literal["auto"] | Count = key("auto", "Steps until the others are applied.")
    overlap_step: bool = key(False, "Let the CPU's step overlap with forward and backward.")
    offload: bool = key(False, "Keep the state of the chosen on the CPU, too.")
    auto_ratio: Ratio = key(0.99, "Share of the gradient's norm for update_interval auto.")
    full_warm_up_rounds: int = key(0, "Optimizer steps at the start that take all gradients.")
    pt_reserved_cores_perc: Ratio = key(0.5, "Share of the CPU's cores that is left to torch.")
    steps_per_epoch: int | None = key(None, "Optimizer steps per epoch; DeepSpeed fills it in.")


_EXPERTS = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}


class LeafModuleConfig(Section):
    classes: str | list[str] = key(
        [f"transformers.models.{file}.modeling_{file}.{name}SparseMoeBlock" for file, name in _EXPERTS.items()],
        "Their classes, with the modules that these are in.",
    )
    names: str | list[str] = key([], "Their names in the model.")
    name_suffixes: str | list[str] = key([], "Ends of their names.")


_WITHOUT_PREFIX = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip


class ZeroConfig(AutoSection):
    """ZeRO: optimizer state, gradients and parameters sharded over ranks."""

    aliases: ClassVar[dict[str, str]] = {
        **{name: f"stage3_{name}" for name in _WITHOUT_PREFIX},
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    }

    stage: Annotated[int, Field(ge=0, le=3)] = key(0, _STAGES, _STAGE_1, enum=[0, 1, 2, 3])
    # In the order of DeepSpeed's model.
    contiguous_gradients: bool = unread(True, "Copy gradients into one buffer as they are made.", _ORDER)
    reduce_scatter: bool = unread(True, "Reduce each gradient to the rank that owns it only.", _ORDER)
    reduce_bucket_size: Count = unread(500_000_000, "Elements that are reduced at a time.", _BUCKETS)
    use_multi_rank_bucket_allreduce: bool = unread(True, "Reduce the buckets of several owners at once.", _BUCKETS)
    allgather_partitions: bool = unread(True, "Gather parameters at once, not by broadcasts.", _ORDER)
    allgather_bucket_size: Whole = unread(500_000_000, "Elements that are gathered at a time.", _BUCKETS)
    overlap_comm: bool | None = unread(None, "Reduce while backward runs; null does so in stage 3.", _ORDER)
    compute_grad_norm: bool = unread(True, "Compute the gradient norm; false with stage 1 or 2 only.", "it is computed")
    load_from_fp32_weights: bool = unread(True, "Take a checkpoint's fp32 weights, not its fp16 ones.", _DEEPSPEED)
    elastic_checkpoint: bool = unread(False, "Write checkpoints for another number of ranks.", _DEEPSPEED)
    offload_param: OffloadParamConfig | None = key(None, "Keep parameters outside the GPU.", _ONE_PLACE)
    offload_optimizer: OffloadOptimizerConfig | None = key(None, "Keep the optimizer outside the GPU.", _ONE_PLACE)
    zenflow: ZenFlowConfig | None = refused(None, "Offload that hides the CPU's step.", _NO_PARTS, "auto")
    sub_group_size: Whole = unread(1_000_000_000, "Elements that the optimizer updates at a time.", "it updates all")
    cpu_offload: bool | None = key(None, "Older spelling of offload_optimizer with the device cpu.")
    cpu_offload_param: bool | None = key(None, "Older spelling of offload_param with the device cpu.")
    cpu_offload_use_pin_memory: bool | None = key(None, "Older spelling of pin_memory in both.")
    stage3_prefetch_bucket_size: Whole = unread(50_000_000, "Elements that are fetched before their use.", _ONE_BLOCK)
    stage3_param_persistence_threshold: Whole = unread(100_000, "Smaller parameters stay unsharded.", _SMALL)
    stage3_model_persistence_threshold: Whole = unread(2**63 - 1, "Elements that may stay unsharded.", _SMALL)
    stage3_max_live_parameters: Whole = unread(1_000_000_000, "Elements that a GPU may hold at a time.", _ONE_BLOCK)
    stage3_max_reuse_distance: Whole = unread(1_000_000_000, "Elements until a reuse that keeps it.", _ONE_BLOCK)
    stage3_gather_16bit_weights_on_model_save: bool = key(False, "Let save_16bit_model save in stage 3, from rank 0.")
    stage3_module_granularity_threshold: int = unread(0, "Smaller modules are fetched as one.", _BUCKETS)
    stage3_use_all_reduce_for_fetch_params: bool = unread(False, "Fetch by all-reduce, not all-gather.", _BUCKETS)
    stage3_allgather_sequential: bool = unread(False, "Fetch one parameter after another, without a bucket.", _BUCKETS)
    ignore_unused_parameters: bool = unread(True, "Go on if a parameter got no gradient.", "it counts as zeros")
    legacy_stage1: bool = refused(False, "An older stage 1.", _REMOVED, "auto")
    round_robin_gradients: bool = unread(False, "Distribute gradients to offload them in parallel.", _ORDER)
    parameter_alignment: bool = unread(False, "Start each parameter on a multiple of 16 bytes.", _ORDER)
    zero_hpz_partition_size: Whole = key(1, "Ranks that keep a second copy among them (ZeRO++); 0, 1 for none.", _HPZ)
    zero_quantized_weights: bool = refused(False, "Gather parameters as int8 (ZeRO++).", _NO_INTS, "auto")
    zero_quantized_nontrainable_weights: bool = refused(False, "Keep frozen parameters as int8.", _NO_INTS, "auto")
    zero_quantized_gradients: bool = refused(False, "Reduce gradients as int4 (ZeRO++).", _NO_INTS, "auto")
    memory_efficient_linear: bool = unread(True, "A linear layer without a copy of its weight; stage 3.", _DEEPSPEED)
    pipeline_loading_checkpoint: bool = unread(False, "Load checkpoints one rank at a time; stage 3.", _DEEPSPEED)
    override_module_apply: bool = unread(True, "Let Module.apply see full parameters; stage 3.", _DEEPSPEED)
    log_trace_cache_warnings: bool = unread(False, "Log when the order of modules changes; stage 3.", _DEEPSPEED)
    enable_sanity_checks: bool = unread(False, "Check DeepSpeed's own bookkeeping.", _DEEPSPEED)
    save_muon_momentum_buffer_in_memory: bool = unread(False, "Keep Muon's momentum off the disk; stage 3.", _NVME)
    leaf_module: LeafModuleConfig | None = unread(None, "Modules that are gathered as one; stage 3.", _ONE_BLOCK)
    mics_shard_size: Index = key(-1, "Ranks that hold a full model together (MiCS); -1 or 0 for all.", _MICS)
    mics_hierarchical_params_gather: bool = refused(False, "Gather within hosts first (MiCS).", _REMOVED, "auto")
    zeropp_loco_param: dict[str, Any] | None = refused(None, "Error feedback of quantized gradients.", _REMOVED, "auto")

    @property
    def offloads(self) -> bool:
        """Whether parameters and optimizer state are to be kept in the CPU's memory."""
        sections = (self.offload_optimizer, self.offload_param)
        named = any(section is not None and section.device == "cpu" for section in sections)
        return named or bool(self.cpu_offload) or bool(self.cpu_offload_param)

    @property
    def pins_memory(self) -> bool:
        """Whether that memory is page-locked."""
        sections = [each for each in (self.offload_optimizer, self.offload_param) if each is not None]
        return all(each.pin_memory for each in sections) and self.cpu_offload_use_pin_memory is not False

    def conflicts(self) -> Iterator[Conflict]:
        stage, groups, shards = self.stage, self.zero_hpz_partition_size, self.mics_shard_size
        if not self.compute_grad_norm and stage not in (1, 2):
            yield "compute_grad_norm stage", f"got false; expected true, or stage 1 or 2; stage is {stage}"
        if self.offload_optimizer and self.offload_optimizer.ratio < 1 and stage != 3:
            ratio = self.offload_optimizer.ratio
            yield "offload_optimizer stage", f"ratio is {ratio:g}; expected 1, or stage 3; stage is {stage}"
        if stage in (1, 2):  # DeepSpeed ignores these there, without a warning
            if self.offload_param is not None and self.offload_param.device != "none":
                message = f'device is "{self.offload_param.device}"; expected "none", or stage 3; stage is {stage}'
                yield "offload_param stage", message
            if self.cpu_offload_param:
                yield "cpu_offload_param stage", f"got true; expected false, or stage 3; stage is {stage}"
            if groups > 1:
                yield "zero_hpz_partition_size stage", f"got {groups}; expected 1, or stage 3; stage is {stage}"
        if shards > 0 and stage == 0:
            yield "mics_shard_size stage", f"got {shards}; expected -1, or stage 1, 2 or 3; stage is 0"
        if shards > 0 and groups > 1:
            message = f"got {shards} with zero_hpz_partition_size: {groups}; take one of the two"
            yield "mics_shard_size zero_hpz_partition_size", message
        for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            if getattr(self, old) is not None and new in self.model_fields_set:
                yield f"{old} {new}", f"given next to {new}, which replaces it; remove it"
