"""What becomes of every key of DeepSpeed: the one table of statuses.

Each key of DeepSpeed 0.19.8's documentation and parser (`deepspeed/runtime/config.py`, `constants.py` and
the section classes they call) is honoured, has no effect here (why), or is refused (why, and the nearest
thing that works). A refused key refuses nothing while its value switches nothing on. A key within a section
shares the section's row unless it has its own; none is refused in a section that its switch leaves off. Types,
ranges and defaults are the models' in `sections`.

To build what is refused: change its status here, and give a section a field in `root.EngineConfig`.
"""

from __future__ import annotations

from typing import Any, Literal

from engine.config.key import HONOURED, NO_EFFECT, REFUSED, SECTION, Key, Status
from engine.config.section import Integer
from engine.config.sections import precision, zero  # noqa: F401  most configs have them: not on first use

__all__ = ["HONOURED", "INSIDE", "KEYS", "NO_EFFECT", "REFUSED", "Key", "row_of"]


def _harmless(name: str, kind: Any, default: Any, meaning: str, why: str) -> Key:
    return Key(name, NO_EFFECT, why, default, kind, meaning=meaning)


def _unread(name: str, section: str, why: str) -> Key:
    return Key(name, NO_EFFECT, why, None, SECTION, section)


def _refused(name: str, kind: Any, default: Any, meaning: str, why: str) -> Key:
    return Key(name, REFUSED, why, default, kind, meaning=meaning)


def _later(name: str, section: str, instead: str, switch: str = "enabled", on: bool = False) -> Key:
    return Key(name, REFUSED, f"not built yet; {instead}", None, SECTION, section, switch, on)


def _removed(name: str, meaning: str, instead: str, kind: Any = SECTION) -> Key:
    default = None if kind is SECTION else False
    why = f"DeepSpeed has removed it, and refuses a config that has it; {instead}"
    return Key(name, REFUSED, why, default, kind, "", "enabled", on=True, meaning=meaning)


_LEAVE_OUT = "leave it out"
_FP32 = "leave it out to train in fp32"
_SAVE = "redline.checkpoint.async_save writes while training goes on"
_FORMAT = Literal["fp16", "bf16", "fp32"]

_TABLE = (
    # Honoured: see root.py
    Key("train_batch_size", HONOURED, "samples per optimizer step"),
    Key("train_micro_batch_size_per_gpu", HONOURED, "samples per process and backward pass"),
    Key("gradient_accumulation_steps", HONOURED, "micro-batches per optimizer step", 1),
    Key("optimizer", HONOURED, "torch's optimizers, with DeepSpeed's names and defaults"),
    Key("scheduler", HONOURED, "DeepSpeed's five schedules, step by step the same; torch's; registered ones"),
    Key("gradient_clipping", HONOURED, "norm of all gradients together; 0 for none", 1.0),
    Key("steps_per_print", HONOURED, "progress on rank 0"),
    Key("dataloader_drop_last", HONOURED, "for a loader that initialize builds", False),
    Key("redline", HONOURED, "Redline's own options"),
    # Communication
    Key("prescale_gradients", HONOURED, "divides before the sum; gradient_predivide_factor then counts for nothing; "
        "from zero_optimization.stage 1 on torch divides", False),
    Key("gradient_predivide_factor", HONOURED, "DeepSpeed's arithmetic; torch's at stage 3", 1.0),
    Key("gradient_allreduce_op", HONOURED, "the mean, or the sum", "mean"),
    Key("communication_data_type", HONOURED, "null sums in fp32, in every precision; DeepSpeed in the training's"),
    Key("managed_gradient_accumulation", HONOURED, "false: every step() is an update, and sends the gradients", True),
    _harmless("disable_allgather", bool, False,
              "Gather parameters by broadcasts.", "chose a collective of an older ZeRO"),
    _harmless("allgather_size", Integer, 500_000_000,
              "Elements that are gathered at a time.", "sized a buffer of an older ZeRO"),
    _harmless("seq_parallel_communication_data_type", _FORMAT, "fp32",
              "Number format of sequence parallelism's communication.", "there is no sequence parallelism"),
    _harmless("use_data_before_expert_parallelism", bool, False,
              "Order of the process groups of expert and data parallelism.", "there is no expert parallelism"),
    _harmless("sparse_gradients", bool, False,
              "Reduce gradients of embeddings as sparse tensors.",
              "DeepSpeed has removed it; embeddings built with sparse=True are reduced so, whatever this says"),
    _harmless("fp32_allreduce", bool, False,
              "Reduce gradients in fp32.", "an older DeepSpeed's; gradients are reduced in fp32 as it is"),
    _refused("sequence_parallel_size", Integer, 1,
             "Processes that share one sample's tokens.", f"there is no sequence parallelism; {_LEAVE_OUT}"),
    # Precision
    Key("fp16", HONOURED, "fp32 master weights; DeepSpeed's loss scale, as its ZeRO stages have it"),
    Key("bf16", HONOURED, "fp32 master weights, gradients summed in fp32"),
    Key("bfloat16", HONOURED, "an older spelling of bf16"),
    Key("torch_autocast", HONOURED, "weights stay fp32; fp16 has torch's loss scale"),
    Key("data_types", HONOURED, "which format gradients add up in, and buffers have"),
    # Memory and parallelism
    Key("zero_optimization", HONOURED,
        "parameters are full on every rank up to stage 2; stage 3 is torch's FSDP2", False, switch="stage"),
    _harmless("zero_allow_untested_optimizer", bool, False,
              "Let ZeRO run with any optimizer.", "every optimizer may be used"),
    _harmless("zero_force_ds_cpu_optimizer", bool, True,
              "Insist on DeepSpeed's own optimizer with offload.", "the optimizer is torch's, on the CPU, too"),
    _unread("aio", "memory:AioConfig", "only NVMe offload reads it"),
    _unread("activation_checkpointing", "memory:ActivationCheckpointingConfig",
            "only deepspeed.checkpointing reads it; redline.activation_checkpointing needs no change of the model"),
    _unread("pipeline", "parallelism:PipelineConfig", "only DeepSpeed's PipelineModule reads it"),
    _later("tensor_parallel", "parallelism:TensorParallelConfig",
           "shard the model with torch.distributed.tensor.parallel first", "autotp_size"),
    _later("expert_parallel", "parallelism:ExpertParallelConfig", _LEAVE_OUT),
    _later("hybrid_engine", "parallelism:HybridEngineConfig", "generate with the bare model between steps"),
    _later("compile", "tuning:CompileConfig", "engine.compile() compiles without it", "deepcompile"),
    _later("weight_quantization", "tuning:WeightQuantizationConfig", "quantize the model before initialize", on=True),
    # Data
    _later("data_efficiency", "data_efficiency:DataEfficiencyConfig", "give your own data loader"),
    # Records
    Key("tensorboard", HONOURED, "needs tensorboard, of the extra of that name"),
    Key("wandb", HONOURED, "needs wandb, of the extra of that name"),
    Key("csv_monitor", HONOURED, "DeepSpeed's files; the header comes once"),
    Key("comet", HONOURED, "needs comet_ml, of the extra comet"),
    Key("flops_profiler", HONOURED, "counted by torch, forward and backward each"),
    Key("comms_logger", HONOURED, "gradients, and the engine's own numbers"),
    Key("timers", HONOURED, "samples per second in the lines of steps_per_print"),
    Key("wall_clock_breakdown", HONOURED, "with the lines of steps_per_print; every 10 updates if that is null", False),
    Key("memory_breakdown", HONOURED, "after the start, and with the lines of steps_per_print", False),
    Key("dump_state", HONOURED, "each value with its origin", False),
    _harmless("log_level", str, None, "Level of DeepSpeed's logger.", "set the level of the Python logger"),
    _harmless("vocabulary_size", Integer, None,
              "Tokens of the vocabulary.", "DeepSpeed only warns when it is no multiple of 8"),
    _harmless("disable_python_gc", bool, False,
              "Switch Python's garbage collection off while training.", "Python's garbage collector is left alone"),
    # Checkpoints and tuning
    Key("checkpoint", HONOURED, "tag_validation; see redline.checkpoint, too"),
    Key("datastates_ckpt", REFUSED, f"not built; {_SAVE}", None, SECTION, "", "enabled", on=True,
        meaning="Checkpoints written while training goes on."),
    _later("autotuning", "tuning:AutotuningConfig",
           "find the learning rate with redline range-test; try batch sizes by hand"),
    # What DeepSpeed 0.19.8 has removed
    _removed("amp", "NVIDIA's Apex AMP.", _FP32),
    _removed("nebula", "Checkpoints by Azure's Nebula.", _SAVE),
    _removed("compression_training",
             "Quantization and pruning while training.", "quantize or prune the model before initialize"),
    _removed("quantize_training",
             "Weights in fewer bits as training goes on.", "use torch.ao.quantization on the model"),
    _removed("eigenvalue", "Curvature of layers, for quantize_training.", _LEAVE_OUT),
    _removed("sparse_attention",
             "Attention over parts of a sequence.", "use torch.nn.attention.flex_attention in your model"),
    _removed("elasticity",
             "Batch sizes that fit several numbers of processes.",
             "give the batch sizes themselves; torchrun restarts on another number of processes"),
    _removed("curriculum_learning", "Short sequences first; now in data_efficiency.", "give your own data loader"),
    _removed("progressive_layer_drop", "Drop layers at random while training.", "drop layers in your model's forward"),
    _removed("graph_harvesting", "Run the model as a CUDA graph.", "use torch.compile", bool),
)  # fmt: skip

_BY_BLOCK = "buckets have 25 MiB up to stage 2; at stage 3 a block is sent as one, see redline.zero.blocks"
_ONE_BLOCK = "one block is whole at a time, and the next on its way, see redline.zero.blocks"
_OWN_ORDER = "gradients are reduced after the last backward up to stage 2, and block by block during it at stage 3"
_ONLY_DEEPSPEEDS = "only DeepSpeed's own code reads it"
_NO_NVME = 'nothing is kept on a disk; keep it in the CPU\'s memory with "cpu"'
_ONLY_NVME = "only NVMe offload reads it"
_BOTH = "on CUDA; sharded weights, gradients and optimizer state are in one place, so that either key offloads all"
_NO_PARTS = f"all of it is offloaded, or nothing; {_LEAVE_OUT}"
_NO_QUANTIZED = f"there is no quantized communication; {_LEAVE_OUT}"
_FP32_STATE = f"weights and moments are kept in fp32; {_LEAVE_OUT}"
_GONE = f"DeepSpeed has removed it, and refuses a config that has it; {_LEAVE_OUT}"


def _own(section: str, status: Status, note: str, *names: str) -> tuple[Key, ...]:
    return tuple(Key(f"{section}.{name}", status, note) for name in names)


_INSIDE = (
    *_own("optimizer", NO_EFFECT, "chose an older kernel of DeepSpeed's fp16 Adam", "legacy_fusion"),
    *_own("optimizer.params", NO_EFFECT, "gradients are always set to None, which saves memory", "set_grad_none"),
    *_own("optimizer.params", NO_EFFECT, "the moments have the parameters' type", "fp32_optimizer_states"),
    *_own("optimizer.params", NO_EFFECT, "torch's Muon has one order of its iteration", "ns_method"),
    # Precision
    *_own("fp16", NO_EFFECT, "inputs are cast where a layer needs it", "auto_cast"),
    *_own("fp16", REFUSED, _FP32_STATE, "fp16_master_weights_and_grads"),
    *_own("bf16", NO_EFFECT, "gradients add up in fp32 after every backward", "immediate_grad_update"),
    *_own("torch_autocast", NO_EFFECT, "gradients are fp32, and summed in communication_data_type",
          "lower_precision_safe_modules"),
    *_own("data_types", NO_EFFECT, "buffers keep the format they have", "keep_in_fp32_modules"),
    *_own("data_types", REFUSED, "parameters have the format of fp16 or bf16, or fp32", "param_dtype"),
    # ZeRO
    Key("zero_optimization.stage", HONOURED,
        "1 is 2 here: a gradient is reduced to the rank that owns its shard"),
    *_own("zero_optimization", HONOURED, _BOTH, "offload_param", "offload_optimizer"),
    Key("zero_optimization.zero_hpz_partition_size", HONOURED,
        "with stage 3; from forward to backward the parameters are shared out among so few"),
    Key("zero_optimization.mics_shard_size", HONOURED,
        "groups of so many processes share a whole model out, and sum gradients between them; "
        "DeepSpeed has removed it, and refuses a config that has it"),
    *_own("zero_optimization", NO_EFFECT, _BY_BLOCK, "reduce_bucket_size", "allgather_bucket_size",
          "use_multi_rank_bucket_allreduce", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
          "stage3_module_granularity_threshold"),
    *_own("zero_optimization", NO_EFFECT, _ONE_BLOCK, "stage3_prefetch_bucket_size", "stage3_max_live_parameters",
          "stage3_max_reuse_distance"),
    *_own("zero_optimization", NO_EFFECT, _OWN_ORDER, "contiguous_gradients", "reduce_scatter", "allgather_partitions",
          "overlap_comm", "round_robin_gradients", "parameter_alignment"),
    *_own("zero_optimization", NO_EFFECT, "small parameters are shared out with their block, which is sent as one",
          "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
    *_own("zero_optimization", NO_EFFECT, "a process updates all of its share at once", "sub_group_size"),
    *_own("zero_optimization", NO_EFFECT, "a block is gathered as one as it is; name others in redline.zero.blocks",
          "leaf_module"),
    *_own("zero_optimization", HONOURED, "in stage 3 without it, save_16bit_model saves nothing, as in DeepSpeed",
          "stage3_gather_16bit_weights_on_model_save"),
    *_own("zero_optimization", NO_EFFECT, "the norm is always computed; it costs one number per process",
          "compute_grad_norm"),
    *_own("zero_optimization", NO_EFFECT, "a weight without a gradient counts as one with a gradient of zeros",
          "ignore_unused_parameters"),
    *_own("zero_optimization", NO_EFFECT, _ONLY_DEEPSPEEDS, "load_from_fp32_weights", "elastic_checkpoint",
          "pipeline_loading_checkpoint", "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings",
          "enable_sanity_checks"),
    *_own("zero_optimization", NO_EFFECT, _ONLY_NVME, "save_muon_momentum_buffer_in_memory"),
    *(Key(f"zero_optimization.{name}.device", HONOURED, _NO_NVME, "none", off=("cpu", "auto"))
      for name in ("offload_param", "offload_optimizer")),
    *_own("zero_optimization.offload_param", NO_EFFECT, _ONLY_NVME, "nvme_path", "buffer_count", "buffer_size",
          "max_in_cpu"),
    *_own("zero_optimization.offload_optimizer", NO_EFFECT, _ONLY_NVME, "nvme_path", "buffer_count", "pipeline_read",
          "pipeline_write", "fast_init"),
    *_own("zero_optimization.offload_optimizer", NO_EFFECT, "only super_offload reads it", "cpuadam_cores_perc"),
    Key("zero_optimization.offload_optimizer.ratio", REFUSED, _NO_PARTS, 1.0, off=("auto",)),
    Key("zero_optimization.offload_optimizer.super_offload", REFUSED, _NO_PARTS, False, off=("auto",)),
    Key("zero_optimization.zenflow", REFUSED, _NO_PARTS, off=("auto",)),
    *(Key(f"zero_optimization.zero_quantized_{name}", REFUSED, _NO_QUANTIZED, False, off=("auto",))
      for name in ("weights", "nontrainable_weights", "gradients")),
    Key("zero_optimization.mics_hierarchical_params_gather", REFUSED, _GONE, False, off=("auto",)),
    Key("zero_optimization.zeropp_loco_param", REFUSED, _GONE, off=("auto",)),
    Key("zero_optimization.legacy_stage1", REFUSED, _GONE, False, off=("auto",)),
    # Records
    *_own("timers.throughput", NO_EFFECT, "the clock is read where the loss is, which has waited", "synchronized"),
    # Checkpoints
    Key("checkpoint.load_universal", REFUSED, f"DeepSpeed's universal format is not read; {_LEAVE_OUT}", False),
    Key("checkpoint.use_node_local_storage", REFUSED,
        "a checkpoint is one folder, which all hosts share; leave it out", False),
    *_own("checkpoint", NO_EFFECT, "each process writes its share", "parallel_write"),
    *_own("checkpoint", NO_EFFECT, "chose DeepSpeed's file format", "checkpoint_serialization"),
    *_own("checkpoint", NO_EFFECT, "chose DeepSpeed's own file writer", "writer"),
)  # fmt: skip

KEYS = {key.name: key for key in _TABLE}
INSIDE = {key.name: key for key in _INSIDE}  # those within a section that differ from it


def row_of(path: str) -> Key | None:
    """The row that a path is under: its own, else that of what it is in."""
    while path not in INSIDE and path not in KEYS and "." in path:
        path = path.rpartition(".")[0]
    return INSIDE.get(path) or KEYS.get(path)
