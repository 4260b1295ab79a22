"""The smaller sections: precision, monitors, profilers, checkpoints, and Redline's own options.

After DeepSpeed's `runtime/precision_config.py`, `get_torch_autocast_enabled` and `get_checkpoint_params` in
`runtime/config.py`, `monitor/config.py`, `profiling/config.py`, `comm/config.py`, `utils/config.py` and
`runtime/model_checkpointing/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from redline.config.section import (
    AutoSection,
    Conflict,
    Count,
    Index,
    LooseSection,
    NonNegative,
    Positive,
    Section,
    Text,
    Whole,
    key,
    refused,
    shown,
    unread,
)  # fmt: skip

__all__ = [
    "SHORT", "BF16Config", "CheckpointConfig", "CometConfig", "CommsLoggerConfig", "CompileConfig", "CsvMonitorConfig",
    "DataTypesConfig", "FP16Config", "FlopsProfilerConfig", "RedlineConfig", "TensorBoardConfig", "TimersConfig",
    "TorchAutocastConfig", "WandbConfig",
]  # fmt: skip

# -- precision -------------------------------------------------------------------------------------------

DType = Literal["fp16", "float16", "half", "bf16", "bfloat16", "fp32", "float32", "float", "int8"]
TorchDType = Literal[
    "fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16",
    "fp32", "float32", "float", "torch.float32",
]  # fmt: skip

# Why keys have no effect here, or are refused.
_FP32_STATE = "master params and optimizer state are fp32; leave it out"
_REDUCED = "they are reduced in communication_data_type"
_BUFFERS = "buffers keep their dtype"
_ONE_FOLDER = "a checkpoint is one folder, which all hosts share; leave it out"

# Every spelling of a dtype, with its short one.
SHORT = {
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    "int8": "int8",
}


class FP16Config(AutoSection):
    enabled: bool = key(False, "Train in fp16.")
    auto_cast: bool = unread(False, "Cast the model's inputs to fp16.", "inputs are cast where a layer needs it")
    loss_scale: NonNegative = key(0.0, "Factor of the loss; 0 finds it while training.")
    initial_scale_power: int = key(16, "First factor that is tried, as a power of 2.")
    loss_scale_window: int = key(1000, "Optimizer steps without overflow until the factor doubles.")
    hysteresis: int = key(2, "Overflows before the factor is halved.")
    consecutive_hysteresis: bool = key(False, "Count overflows anew after a step without one.")
    min_loss_scale: int = key(1, "Smallest factor.")
    fp16_master_weights_and_grads: bool = refused(False, "Keep master params and gradients in fp16.", _FP32_STATE)

    def conflicts(self) -> Iterator[Conflict]:
        if self.enabled and self.loss_scale == 0:
            for name in ("loss_scale_window", "min_loss_scale"):
                if (value := getattr(self, name)) <= 0:
                    yield f"{name} enabled loss_scale", f"got {value}; expected > 0: the scale is dynamic"


class BF16Config(AutoSection):
    enabled: bool = key(False, "Train in bfloat16.")
    immediate_grad_update: bool = unread(False, "Add each gradient to the fp32 sum at once.", "each backward adds it")
    check_grad_overflow: bool = key(True, "Skip a step whose gradient is not finite.")
    bf16_master_weights_and_grads: bool = key(False, "Keep master params and gradients in bfloat16.")
    bf16_optimizer_states: bool = key(False, "Keep the optimizer's moments in bfloat16.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            keys = "bf16_optimizer_states bf16_master_weights_and_grads"
            yield keys, 'got true; expected false, or "bf16_master_weights_and_grads": true with it'


class TorchAutocastConfig(LooseSection):
    enabled: bool = key(False, "Run the forward pass under torch.autocast.")
    dtype: TorchDType | None = key(None, "Dtype of autocast; null takes torch's.")
    lower_precision_safe_modules: list[str] | None = unread(None, "Classes with gradients reduced in dtype.", _REDUCED)


class DataTypesConfig(LooseSection):
    grad_accum_dtype: DType | None = key(None, "Dtype that gradients add up in; null takes the model's.")
    param_dtype: DType | None = refused(None, "Dtype of the parameters.", "they have that of fp16 or bf16, or fp32")
    buffer_dtype: DType | None = key(None, "Dtype of the buffers; null leaves them.")
    keep_in_fp32_modules: Literal["auto"] | list[str] = unread("auto", "Patterns of buffers left in fp32.", _BUFFERS)


# -- torch.compile ---------------------------------------------------------------------------------------

_DEEPCOMPILE = "only DeepCompile reads it"


class CompileConfig(AutoSection):
    """What `Engine.compile` is called with, and the switches of DeepSpeed's own compiler passes."""

    enabled: bool | None = key(None, "Compile the model when the engine is made; null: if backend or kwargs is given.")
    disable: bool | None = key(None, "The opposite, as DeepSpeed once called it.")
    backend: str = key("inductor", "Backend of torch.compile.")
    kwargs: dict[str, Any] = key({}, "Other arguments of torch.compile, such as mode and dynamic.")
    deepcompile: bool = refused(False, "Let the compiler place ZeRO's communication.", "engine.compile() is torch's")
    autoep_non_moe: bool = unread(False, "Compile what surrounds layers of experts.", "there are none")
    free_activation: bool = unread(False, "Free large activations early.", _DEEPCOMPILE)
    free_activation_threshold: int = unread(10_485_760, "Bytes of a large activation.", _DEEPCOMPILE)
    offload_activation: bool = unread(False, "Keep activations in the CPU's memory until backward.", _DEEPCOMPILE)
    offload_activation_pin_memory: bool = unread(True, "Keep them in page-locked memory.", _DEEPCOMPILE)
    offload_opt_states: bool = unread(False, "Keep optimizer state in the CPU's memory.", _DEEPCOMPILE)
    double_buffer: bool = unread(True, "Fill one buffer while another is reduced.", _DEEPCOMPILE)
    symmetric_memory: bool = unread(False, "Reduce through symmetric memory.", _DEEPCOMPILE)
    debug_log: bool = unread(False, "Write the compiled graphs down.", _DEEPCOMPILE)
    offload_parameters: bool = unread(False, "Keep parameters in the CPU's memory.", _DEEPCOMPILE)
    sync_before_reduce: bool = unread(False, "Wait for the device before a reduction.", _DEEPCOMPILE)
    sync_after_reduce: bool = unread(False, "Wait for the device after a reduction.", _DEEPCOMPILE)
    sync_before_allgather: bool = unread(False, "Wait for the device before a gather.", _DEEPCOMPILE)
    sync_after_allgather: bool = unread(False, "Wait for the device after a gather.", _DEEPCOMPILE)
    keep_int_input_tensors: bool = unread(True, "Keep the values of integer inputs.", _DEEPCOMPILE)
    keep_all_input_tensors: bool = unread(False, "Keep the values of all inputs.", _DEEPCOMPILE)
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = unread(None, "Passes to run.", _DEEPCOMPILE)

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled when the engine is made."""
        if self.enabled is None and self.disable is None:
            return not self.model_fields_set.isdisjoint(("backend", "kwargs"))
        return bool(self.enabled) if self.disable is None else not self.disable

    def conflicts(self) -> Iterator[Conflict]:
        if self.enabled is not None and self.enabled == self.disable:
            yield (
                "disable enabled",
                f"got {shown(self.disable)} with enabled: {shown(self.enabled)}; give one of the two",
            )
        for name in ("offload_activation", "offload_opt_states"):
            if self.offload_parameters and getattr(self, name):
                yield f"{name} offload_parameters", "got true with offload_parameters: true; take one of the two"


# -- monitors and profilers ------------------------------------------------------------------------------


class _Monitor(AutoSection):
    enabled: bool = key(False, "Write to it.")


class _FileMonitor(_Monitor):
    output_path: str = key("", "Folder; empty for the script's own.")
    job_name: str = key("DeepSpeedJobName", "Folder within output_path.")


class TensorBoardConfig(_FileMonitor):
    """Event files for TensorBoard."""


class CsvMonitorConfig(_FileMonitor):
    """One CSV file for each number."""


class WandbConfig(_Monitor):
    group: str | None = key(None, "Group of runs.")
    team: str | None = key(None, "Team that owns the run.")
    project: str = key("deepspeed", "Project of the run.")


class CometConfig(_Monitor):
    samples_log_interval: int = key(100, "Samples between two records.")
    project: str | None = key(None, "Project of the run.")
    workspace: str | None = key(None, "Workspace of the project.")
    api_key: str | None = key(None, "Key of the account; better set COMET_API_KEY.")
    experiment_name: str | None = key(None, "Name of the run.")
    experiment_key: str | None = key(None, "Key of the run, 32 to 50 letters and digits.")
    online: bool | None = key(None, "Send records at once; null for true.")
    mode: str | None = key(None, "get, create, or get_or_create a run.")


class FlopsProfilerConfig(LooseSection):
    enabled: bool = key(False, "Profile one step.")
    recompute_fwd_factor: NonNegative = key(0.0, "Share of the forward pass that backward repeats.")
    profile_step: int = key(1, "Optimizer steps before the one that is profiled.")
    module_depth: Index = key(-1, "Depth of modules that is printed; -1 for the innermost.")
    top_modules: int = key(1, "Modules that are named at each depth.")
    detailed: bool = key(True, "Print the model module by module.")
    output_file: str | None = key(None, "File of the report; null prints it.")


class CommsLoggerConfig(Section):
    enabled: bool = key(False, "Record collectives.")
    prof_all: bool = key(True, "Record all of them.")
    prof_ops: list[str] = key([], "Names of those to record.")
    verbose: bool = key(False, "Print each after its optimizer step, which waits for the device.")
    debug: bool = key(False, "Add the name of the caller.")


class ThroughputConfig(Section):
    enabled: bool = key(True, "Time steps.")
    synchronized: bool = unread(True, "Wait for the device before the clock is read.", "the loss, read with it, waits")


class TimersConfig(LooseSection):
    throughput: ThroughputConfig | None = key(None, "Samples per second.")


# -- checkpoints -----------------------------------------------------------------------------------------

TagValidation = Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL"]
WriterType = Literal["MOCK", "PYTHON", "FAST", "mock", "python", "fast"]
DataParallel = Literal["REPLICA", "SOCKET", "MACHINE", "replica", "socket", "machine"]


class ParallelWriteConfig(LooseSection):
    pipeline_stage: bool = key(False, "Each pipeline stage writes its own layers.")


class WriterConfig(LooseSection):
    type: WriterType = key("FAST", "Code that writes files.")
    io_buffer_size: Count = key(67_108_864, "Bytes of a buffer.")
    io_buffer_double: bool = key(True, "Fill one buffer while another is written.")
    io_multiplier: Count = key(1, "Writers per rank.")
    show_statistics: bool = key(False, "Print the speed.")
    data_parallel: DataParallel | None = key(None, "Ranks that write one file together.")
    decoupled: bool = key(False, "Write while training goes on.")


class CheckpointConfig(LooseSection):
    tag_validation: TagValidation = key("Warn", "What happens if ranks save under different tags.")
    load_universal: bool = refused(False, "Load DeepSpeed's universal format.", "it is not read; leave it out")
    use_node_local_storage: bool = refused(False, "Each host writes to its own disk.", _ONE_FOLDER)
    parallel_write: ParallelWriteConfig | None = unread(None, "How ranks divide the writing.", "each writes its shard")
    checkpoint_serialization: bool = unread(True, "Write torch's zip format.", "chose DeepSpeed's file format")
    writer: WriterConfig | None = unread(None, "DeepSpeed's file writer; null for torch's.", "torch's is used")


# -- Redline's own ---------------------------------------------------------------------------------------


class RangeTestConfig(Section):
    output_dir: Text = key("range_test", "Folder for the record of a run with LRRangeTest.")
    growth: Literal["linear", "exponential"] = key(
        "linear", "Growth of LRRangeTest: linear, or exponential: min_lr * (1 + step_rate) ** (step / step_size)."
    )


class DataConfig(Section):
    seed: Whole = key(0, "Seed of the order of samples, and of random numbers in workers.")
    shuffle: bool = key(True, "Give a map-style dataset a new order each epoch.")
    workers: Whole = key(0, "Worker processes per rank; 0 loads in the training process itself.")
    prefetch_factor: Count = key(2, "Micro-batches that each worker loads in advance.")
    pin_memory: bool = key(True, "Put batches into pinned memory, from where they are copied to a GPU without waiting.")
    split_by_rank: bool | None = key(
        None,
        "Whether each rank has its own samples of an iterable dataset; false splits it, null compares first samples.",
    )

    def arguments(self) -> dict[str, Any]:
        """As `redline.data.build_loader` takes them."""
        return self.model_dump()


class SavingConfig(Section):
    """How checkpoints are written and kept, in addition to DeepSpeed's section `checkpoint`."""

    keep_last: Count | None = key(None, "Newest checkpoints of a folder to keep; older ones are removed; null for all.")
    keep_every: Count | None = key(None, "Steps between checkpoints that keep_last never removes; null for none.")
    async_save: bool = key(False, "Pause training only to copy the state; write it while training goes on.")
    format: Literal["redline", "deepspeed"] = key(
        "redline", "Files of a checkpoint: deepspeed adds those that DeepSpeed loads on as many ranks."
    )
    override_schedule: bool = key(False, "Continue a checkpoint with the config's schedule where that has changed.")
    save_on_sigterm: Text | None = key(None, "Folder to save into at the next step after SIGTERM; null for none.")


class ZeroOptionsConfig(Section):
    blocks: list[str] | None = key(
        None,
        "Classes or names (with * and ?) of modules gathered as one; null: repeated ones, []: the whole model.",
    )
    smallest_block: Whole = key(100_000, "Smaller blocks, in elements, are gathered with the model, unless named.")
    accumulate: Literal["local", "shared"] | None = key(
        None,
        "Where gradients of micro-batches add up: local, in full on each rank and reduced once per "
        "optimizer step; shared, sharded and reduced after every backward. Null: local at stages 1 and 2, and at stage "
        "3 where full gradients take at most a quarter of the device's memory.",
    )


class RedlineConfig(Section):
    """Options that DeepSpeed does not have, and ignores."""

    epochs: Count | None = key(None, 'Epochs over training_data, which tell a total_num_steps that is "auto".')
    schedules: Literal["deepspeed", "corrected"] = key("deepspeed", "DeepSpeed's schedules as they are, or corrected.")
    find_unused_parameters: bool = key(
        False,
        "No longer needed: a forward may leave out any parameters on any rank; their gradients are zero.",
    )
    distributed_timeout: Positive = key(600.0, "Seconds a rank waits for the others, at start and in each collective.")
    data: DataConfig = key(DataConfig(), "The loader of training data.")
    zero: ZeroOptionsConfig = key(ZeroOptionsConfig(), "How ZeRO shards a model.")
    activation_checkpointing: bool = key(False, "Compute activations of the model's blocks again in backward.")
    progress: bool | None = key(None, "A bar over the training loop on rank 0; null: on a terminal or in a notebook.")
    log_dir: str | None = key(None, "Folder for the numbers of each step as CSV files, which `redline report` draws.")
    range_test: RangeTestConfig = key(RangeTestConfig(), "The learning rate range test.")
    checkpoint: SavingConfig = key(SavingConfig(), "How checkpoints are written and kept.")
