"""What scripts ask of DeepSpeed's engine, besides training and checkpoints, and how Redline's answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

from deepspeed import comm

__all__ = ["ENGINE"]

# The progress line has the throughput; scripts call this at the end of an epoch.
_THROUGHPUT: Any = SimpleNamespace(
    update_epoch_count=lambda: None, start=lambda: None, stop=lambda *args, **kwargs: None
)

_METHODS: dict[str, Callable[..., Any]] = {
    "get_batch_info": lambda self: (
        self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()
    ),
    "zero_optimization": lambda self: self._stage > 0,
    "zero_optimization_partition_gradients": lambda self: self._stage >= 2,
    "zero_optimization_partition_weights": lambda self: self._stage >= 3,
    "is_first_weights_partition_group": lambda self: self._stage >= 3,
    "dynamic_loss_scale": lambda self: self.scaler is not None and self.scaler.dynamic,
    "optimizer_name": lambda self: None if self.config.optimizer is None else self.config.optimizer.type.lower(),
    "optimizer_params": lambda self: self.config.get("optimizer", {"params": None}).get("params", {}),
    "scheduler_name": lambda self: None if self.config.scheduler is None else self.config.scheduler.type,
    "scheduler_params": lambda self: self.config.get("scheduler", {"params": None}).get("params", {}),
    "log_level": lambda self: self.config.get("log_level"),
    "get_type": lambda self: [group.get("type") for group in self.optimizer.param_groups],
    "get_data_types": lambda self: (self.precision.compute, self.precision.accumulate),
    "postscale_gradients": lambda self: not self.config.prescale_gradients,
    "empty_partition_cache": lambda self: self.reshard(),
    "get_sequence_parallel_group": lambda self: None,  # sequences are not split
    "get_data_parallel_rank": lambda self: self.global_rank,
    "get_model_parallel_rank": lambda self: 0,
    "get_tensor_parallel_rank": lambda self: 0,
    "clip_fp32_gradients": lambda self: None,  # step() clips
    "coalesce_grad_reduction": lambda self: nullcontext(),  # several backward() calls add up, each reduced at once
    "allreduce_gradients": lambda self, *args, **kwargs: None,  # backward() has reduced them
}  # fmt: skip
_VALUES: dict[str, Callable[[Any], Any]] = {
    "dp_world_size": lambda self: self.world_size,
    "mp_world_size": lambda self: 1,
    "data_parallel_group": lambda self: comm.get_world_group(),
    "basic_optimizer": lambda self: self.optimizer,
    "sparse_tensor_module_names": lambda self: set(),
    "communication_data_type": lambda self: self.precision.reduce,
    "mpu": lambda self: None,
    "has_moe_layers": lambda self: False,
    "pipeline_parallelism": lambda self: False,
    "seq_parallel_group": lambda self: None,
    "inside_no_sync_ctxt": lambda self: self._state.in_no_sync,
    "tput_timer": lambda self: _THROUGHPUT,
}
# Methods that return a value of the config, and the keys of those that are not named after it. Keys of a section have
# its prefix.
_GETTERS = """
    checkpoint_tag_validation_enabled checkpoint_tag_validation_fail curriculum_learning_enabled
    data_efficiency_enabled data_sampling_enabled random_ltd_enabled autotuning_enabled flops_profiler_enabled
    flops_profiler_detailed flops_profiler_module_depth flops_profiler_output_file flops_profiler_profile_step
    flops_profiler_recompute_fwd_factor flops_profiler_top_modules memory_breakdown dump_state dataloader_drop_last
    bf16_optimizer_states fp16_auto_cast fp16_enabled gradient_predivide_factor is_deepcompile_enabled
    is_deepcompile_active is_sanity_checks_enabled load_universal_checkpoint managed_gradient_accumulation
    optimizer_legacy_fusion super_offload torch_autocast_dtype torch_autocast_enabled use_node_local_storage
    wall_clock_breakdown zero_allgather_bucket_size zero_allgather_partitions zero_allgather_sequential
    zero_allow_untested_optimizer zero_contiguous_gradients zero_elastic_checkpoint zero_force_ds_cpu_optimizer
    zero_gather_16bit_weights_on_model_save zero_hpz_partition_size zero_ignore_unused_parameters zero_legacy_stage1
    zero_load_from_fp32_weights zero_log_trace_cache_warnings zero_max_live_parameters zero_max_reuse_distance
    zero_model_persistence_threshold zero_module_granularity_threshold zero_multi_rank_bucket_allreduce
    zero_nvme_offload_optimizer zero_offload_optimizer zero_offload_param zero_overlap_comm zero_parameter_alignment
    zero_param_persistence_threshold zero_partial_offload zero_prefetch_bucket_size zero_quantized_gradients
    zero_quantized_nontrainable_weights zero_quantized_weights zero_reduce_bucket_size zero_reduce_scatter
    zero_round_robin_gradients zero_sub_group_size"""
_KEYS = {
    **{name: name for name in _GETTERS.split()},
    "bfloat16_enabled": "bf16_enabled",
    "bf16_master_weights_and_gradients": "bf16_master_weights_and_grads",
    "fp16_master_weights_and_gradients": "fp16_master_weights_and_grads",
    "zero_use_cpu_optimizer": "zero_offload_optimizer",
    "zero_cpu_offload": "zero_offload_optimizer",
}
_SECTIONS = {"zero": "zero_optimization", "flops_profiler": "flops_profiler", "fp16": "fp16", "bf16": "bf16",
             "torch_autocast": "torch_autocast"}  # fmt: skip


def _config_value(name: str, engine: Any) -> Any:
    """The key's value; False where the config has no such key."""
    config = engine.config
    for prefix, section in _SECTIONS.items():
        key = name.removeprefix(f"{prefix}_")
        for each in (key, f"stage3_{key}", name):
            if key != name and hasattr(getattr(config, section), each):
                return getattr(getattr(config, section), each)
    return getattr(config, name, False)


# All of these attributes by name, as functions of the engine.
ENGINE: dict[str, Callable[[Any], Any]] = {
    **_VALUES,
    **{name: partial(partial, method) for name, method in _METHODS.items()},
    **{name: partial(partial, _config_value, key) for name, key in _KEYS.items()},
}
