"""Names of DeepSpeed's engine and optimizers that are a value of the config, or that are not built."""

from __future__ import annotations

from typing import Any

__all__ = ["ENGINE_GETTERS", "NOT_BUILT", "config_value"]

# Methods of the engine that return a value of the config; those of zero_optimization, without its own prefix stage3_.
_GETTERS = """
    checkpoint_tag_validation_enabled checkpoint_tag_validation_fail curriculum_learning_enabled
    data_efficiency_enabled data_sampling_enabled random_ltd_enabled autotuning_enabled flops_profiler_enabled
    flops_profiler_detailed flops_profiler_module_depth flops_profiler_output_file flops_profiler_profile_step
    flops_profiler_recompute_fwd_factor flops_profiler_top_modules memory_breakdown dump_state dataloader_drop_last
    fp16_auto_cast fp16_master_weights_and_gradients bf16_master_weights_and_gradients bf16_optimizer_states
    gradient_predivide_factor is_deepcompile_enabled is_deepcompile_active is_sanity_checks_enabled
    load_universal_checkpoint log_level managed_gradient_accumulation optimizer_legacy_fusion super_offload
    torch_autocast_dtype use_node_local_storage zero_allgather_bucket_size zero_allgather_partitions
    zero_allgather_sequential zero_allow_untested_optimizer zero_contiguous_gradients zero_cpu_offload
    zero_elastic_checkpoint zero_force_ds_cpu_optimizer zero_hpz_partition_size zero_ignore_unused_parameters
    zero_legacy_stage1 zero_load_from_fp32_weights zero_log_trace_cache_warnings zero_max_live_parameters
    zero_max_reuse_distance zero_model_persistence_threshold zero_module_granularity_threshold
    zero_multi_rank_bucket_allreduce zero_nvme_offload_optimizer zero_offload_optimizer zero_offload_param
    zero_overlap_comm zero_parameter_alignment zero_param_persistence_threshold zero_partial_offload
    zero_prefetch_bucket_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    zero_reduce_bucket_size zero_reduce_scatter zero_round_robin_gradients zero_sub_group_size
    zero_use_cpu_optimizer"""
ENGINE_GETTERS = frozenset(_GETTERS.split())

_CALL = "call the engine, backward(loss) and step()"
_GRADS = "utils.safe_get_full_grad reads gradients, and utils.safe_set_full_grad writes them"
_PARAMS = "utils.safe_get_full_fp32_param reads master weights, and utils.safe_set_full_fp32_param writes them"
_DATA = "prepare the data in the script's own DataLoader"

# What else they have, by what to use instead.
_NOT_BUILT = {
    _CALL: """train_batch eval_batch scale losses timers engine_timers get_wall_clock_timers print_forward_breakdown
    step_fused_adam enter_backward exit_backward scale_if_loss needs_scaler""",
    "the config's sections tensorboard, wandb, csv_monitor and comet write metrics": "monitor summary_events",
    "use a section flops_profiler of the config": "flops_profiler flops get_compile_time",
    "set_train_batch_size changes the accumulation": "set_train_micro_batch_size",
    _DATA: """set_data_post_process_func set_custom_curriculum_learning_schedule random_ltd_scheduler
    random_ltd_initialize random_ltd_config data_efficiency_config data_sampling_config curriculum_learning_config""",
    "a model is compiled by engine.compile()": """register_compile_pass get_deepcompile_backend get_autosp_backend
    get_autotp_backend get_deepspeed_compile_backend""",
    "save_checkpoint and load_checkpoint save and load a whole run": """checkpoint_engine save_zero_checkpoint
    save_non_zero_checkpoint load_moe_state_dict get_lean_optimizer_state checkpoint_event_prologue
    checkpoint_event_epilogue""",
    "train data-parallel, with zero_optimization for models larger than a GPU": """grid is_first_stage is_last_stage
    is_pipe_parallel set_batch_fn reset_activation_shape""",
    _GRADS: """allreduce_bucket allreduce_no_retain allreduce_and_copy buffered_allreduce_fallback sparse_allreduce
    sparse_allreduce_no_retain sparse_all_gather all_gather_scalar clip_fp32_gradients coalesce_grad_reduction
    averaged_gradients all_grad_tensors reduce_gradients process_gradients get_grads_to_reduce get_fp32_grad_for_param
    set_fp32_grad_for_param get_fp32_grad_partitions get_local_fp32_grad_for_param get_all_grad_tensors
    fp32_groups_gradients fp32_groups_gradients_flat clear_hp_grads clear_lp_grads update_hp_grads
    unscale_and_clip_grads independent_gradient_partition_epilogue get_param_gradient_attribute ipg_buckets""",
    _PARAMS: """bit16_groups bit16_groups_flat bf16_groups bf16_groups_flat fp16_groups fp16_groups_flat
    fp16_partitioned_groups fp16_partitioned_groups_flat fp32_groups_flat fp32_groups_flat_partition
    fp32_partitioned_groups_flat single_partition_of_fp32_groups parallel_partitioned_bit16_groups
    bf16_partitioned_groups params_in_partition params_not_in_partition get_full_hp_param set_full_hp_param
    get_local_fp32_param set_local_hp_param parameter_offload persistent_parameters params_already_reduced
    round_robin_bit16_groups trainable_param_groups get_param_coordinator partition_all_parameters
    _restore_from_bit16_weights initialize_optimizer_states flatten unflatten param_names param_dict""",
}
NOT_BUILT = {name: instead for instead, names in _NOT_BUILT.items() for name in names.split()}

_RENAMED = {
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "bf16_master_weights_and_gradients": "bf16.bf16_master_weights_and_grads",
    "bf16_optimizer_states": "bf16.bf16_optimizer_states",
    "torch_autocast_dtype": "torch_autocast.dtype",
    "zero_use_cpu_optimizer": "zero_optimization.offload_optimizer",
    "zero_cpu_offload": "zero_optimization.offload_optimizer",
}


def config_value(config: Any, name: str) -> Any:
    """What one of :data:`ENGINE_GETTERS` returns; False where the config has no such key."""
    if name in _RENAMED:
        section, _, key = _RENAMED[name].partition(".")
        return getattr(getattr(config, section), key, False)
    for section in ("zero_optimization", "flops_profiler", "fp16"):
        key = name.removeprefix("zero_" if section == "zero_optimization" else f"{section}_")
        for each in (key, f"stage3_{key}", name):
            if key != name and hasattr(getattr(config, section), each):
                return getattr(getattr(config, section), each)
    return getattr(config, name, False)
