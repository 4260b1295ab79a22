"""What DeepSpeed has and Redline does not build: modules, names, and attributes of the engine and of optimizers.

All can be imported, subclassed and given to isinstance, exceptions can be caught; any other use says what to use
instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["ATTRIBUTES", "MODULES", "NAMES", "module_instead", "not_built"]


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: instead for instead, names in table.items() for name in names.split()}


_CHECKPOINTS = "save_checkpoint and load_checkpoint save and load a whole run"
_COMPILE = "engine.compile() runs torch.compile"
_DATA = "prepare the data in the script's own DataLoader"
_DATA_PARALLEL = "train data-parallel, with zero_optimization for models larger than a GPU"
_FLOPS = "the config's section flops_profiler counts with torch's own counter"
_INFERENCE = "call the module, or a library for inference such as vLLM"
_LAYER = "use torch.nn.TransformerEncoderLayer"
_METRICS = "the config's sections tensorboard, wandb, csv_monitor and comet write metrics"
_OFFLOAD = "keep optimizer state in memory, with offload_optimizer.device cpu"
_SEQUENCES = "train data-parallel, with redline.activation_checkpointing for long sequences"

# Of the package itself.
NAMES = _by_name({
    _DATA_PARALLEL: """PipelineModule PipelineEngine DualPipeVEngine DualPipeVModule set_autotp_mode
        tp_model_init""",
    _INFERENCE: """init_inference InferenceEngine DeepSpeedInferenceConfig default_inference_config
        replace_transformer_layer revert_transformer_layer""",
    _LAYER: "DeepSpeedTransformerLayer DeepSpeedTransformerConfig",
    "train with initialize, and generate with the module": "DeepSpeedHybridEngine",
    "engine.deepspeed_io makes a loader": "DeepSpeedDataLoader",
    "initialize returns the optimizer": "DeepSpeedOptimizer",
})  # fmt: skip

# Modules, with all that is in them; the first that fits.
MODULES = _by_name({
    _DATA_PARALLEL: "pipe runtime.pipe",
    _INFERENCE: "inference module_inject model_implementations",
    _DATA: "runtime.data_pipeline",
    _FLOPS: "profiling.flops_profiler",
    _METRICS: "monitor",
    _OFFLOAD: "nvme ops.aio",
    _SEQUENCES: "sequence runtime.sequence_parallel",
    _COMPILE: "compile",
    "write the experts in torch; a loss need not reach all of them": "moe",
    "use torch.ao.quantization or torch.nn.utils.prune": "compression",
    "redline tune finds the learning rate": "autotuning",
    "use torch.nn.attention.flex_attention": "ops.sparse_attention",
    "use torch.nn.functional.scaled_dot_product_attention": "ops.transformer",
    "use Adam or Lamb": "runtime.fp16.onebit",
    "redline run starts ranks": "launcher",
    "use torch.nn.Linear, which zero_optimization.stage 3 shards": "runtime.zero.tiling",
    "torch.save, or redline.checkpoint.async_save in the config": "io",
    "it is an inner part of DeepSpeed's": """accelerator checkpoint comm compat constants datastates elasticity
        env_report git_version_info linear ops profiling runtime utils""",
})  # fmt: skip

# Of the engine and of optimizers.
ATTRIBUTES = _by_name({
    "call the engine, backward(loss) and step()": """train_batch eval_batch scale losses timers engine_timers
        get_wall_clock_timers print_forward_breakdown step_fused_adam enter_backward exit_backward scale_if_loss
        needs_scaler""",
    "set_train_batch_size changes the accumulation": "set_train_micro_batch_size",
    _METRICS: "monitor summary_events",
    _FLOPS: "flops_profiler flops get_compile_time",
    _DATA: """set_data_post_process_func set_custom_curriculum_learning_schedule random_ltd_scheduler
        random_ltd_initialize random_ltd_config data_efficiency_config data_sampling_config
        curriculum_learning_config""",
    _COMPILE: """register_compile_pass get_deepcompile_backend get_autosp_backend get_autotp_backend
        get_deepspeed_compile_backend""",
    _CHECKPOINTS: """checkpoint_engine save_zero_checkpoint save_non_zero_checkpoint load_moe_state_dict
        get_lean_optimizer_state checkpoint_event_prologue checkpoint_event_epilogue""",
    _DATA_PARALLEL: "grid is_first_stage is_last_stage is_pipe_parallel set_batch_fn reset_activation_shape",
    "utils.safe_get_full_grad reads gradients, and utils.safe_set_full_grad writes them": """allreduce_bucket
        allreduce_no_retain allreduce_and_copy buffered_allreduce_fallback sparse_allreduce
        sparse_allreduce_no_retain sparse_all_gather all_gather_scalar clip_fp32_gradients
        averaged_gradients all_grad_tensors reduce_gradients process_gradients get_grads_to_reduce
        get_fp32_grad_for_param set_fp32_grad_for_param get_fp32_grad_partitions get_local_fp32_grad_for_param
        get_all_grad_tensors fp32_groups_gradients fp32_groups_gradients_flat clear_hp_grads clear_lp_grads
        update_hp_grads unscale_and_clip_grads independent_gradient_partition_epilogue get_param_gradient_attribute
        ipg_buckets""",
    "utils.safe_get_full_fp32_param reads master weights, and utils.safe_set_full_fp32_param writes them": """
        bit16_groups bit16_groups_flat bf16_groups bf16_groups_flat fp16_groups fp16_groups_flat
        fp16_partitioned_groups fp16_partitioned_groups_flat fp32_groups_flat fp32_groups_flat_partition
        fp32_partitioned_groups_flat single_partition_of_fp32_groups parallel_partitioned_bit16_groups
        bf16_partitioned_groups params_in_partition params_not_in_partition get_full_hp_param set_full_hp_param
        get_local_fp32_param set_local_hp_param parameter_offload persistent_parameters params_already_reduced
        round_robin_bit16_groups trainable_param_groups get_param_coordinator partition_all_parameters
        _restore_from_bit16_weights initialize_optimizer_states flatten unflatten param_names param_dict""",
})  # fmt: skip


def module_instead(path: str) -> str | None:
    """What to use instead of a module; None where it is not of DeepSpeed's."""
    package, _, path = path.partition(".")
    if package != "deepspeed":  # a script's own module may be named `utils`
        return None
    return next((instead for prefix, instead in MODULES.items() if f"{path}.".startswith(f"{prefix}.")), None)


class _NotBuilt(type):
    """The class of what stands for a function, class or value."""

    instead: str

    def _refuse(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__module__}.{cls.__qualname__}: Redline does not build it; {cls.instead}")

    __call__ = __iter__ = __len__ = __getitem__ = __setitem__ = __enter__ = _refuse
    __float__ = __int__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return not_built(f"{cls.__module__}.{cls.__qualname__}.{name}", cls.instead)


@cache
def not_built(name: str, instead: str) -> type:
    """A class that stands for something of DeepSpeed's; for an exception, one that nothing raises."""
    module, _, own = name.rpartition(".")
    if own.endswith(("Error", "Exception")):
        return type(own, (Exception,), {"__doc__": "Not raised.", "__module__": module})
    return _NotBuilt(own, (), {"instead": instead, "__doc__": f"Not built: {instead}", "__module__": module})
