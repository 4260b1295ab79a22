"""Searches and compilers: ``autotuning``, ``compile``, ``weight_quantization``.

After `deepspeed/autotuning/config.py`, `deepspeed/compile/config.py` and `WeightQuantConfig` in
`deepspeed/inference/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from engine.config.section import TO_DEFAULT, Count, Integer, Loose, Rare, Whole

__all__ = ["AutotuningConfig", "CompileConfig", "ModelInfoConfig", "WeightQuantizationConfig"]


class ModelInfoConfig(Loose):
    """What the search would else find out about the model."""

    profile: bool = Field(False, description="Find it out by a run.")
    num_params: Whole | None = Field(None, description="Parameters of the model.")
    hidden_size: Whole | None = Field(None, description="Width of the model.")
    num_layers: Whole | None = Field(None, description="Depth of the model.")


class AutotuningConfig(Loose):
    """A search for the fastest batch size and ZeRO stage, made by DeepSpeed's launcher."""

    enabled: bool = Field(False, description="Search instead of training.")
    fast: bool = Field(True, description="Search stages and batch sizes only.")
    results_dir: str = Field("autotuning_results", description="Folder of the results.", min_length=1)
    exps_dir: str = Field("autotuning_exps", description="Folder of the runs.", min_length=1)
    overwrite: bool = Field(True, description="Write over earlier results.")
    start_profile_step: Integer = Field(3, description="First update that is timed.")
    end_profile_step: Integer = Field(5, description="Last update that is timed.")
    metric: str = Field("throughput", description="What is best: latency, throughput or flops.")
    metric_path: str | None = Field(None, description="File that the script writes its own metric into.")
    tuner_type: str = Field("gridsearch", description="Order of the search: gridsearch, random or model_based.")
    tuner_early_stopping: Integer = Field(5, description="Runs without progress after which the search ends.")
    tuner_num_trials: Integer = Field(50, description="Runs at most.")
    arg_mappings: dict[str, Any] | None = Field(None, description="Which of the script's arguments is which key.")
    model_info: ModelInfoConfig | None = Field(None, description="What is known of the model.")
    model_info_path: str | None = Field(None, description="File of what is known of the model.")
    mp_size: Count = Field(1, description="Processes that share the model.")
    max_train_batch_size: Count | None = Field(None, description="Largest batch to try, in samples.")
    min_train_batch_size: Count | None = Field(1, description="Smallest batch to try, in samples.")
    max_train_micro_batch_size_per_gpu: Count | None = Field(1024, description="Largest micro-batch to try.")
    min_train_micro_batch_size_per_gpu: Count | None = Field(1, description="Smallest micro-batch to try.")
    num_tuning_micro_batch_sizes: Count | None = Field(3, description="Micro-batch sizes to try.")


class CompileConfig(Rare):
    """DeepSpeed's compiler passes (DeepCompile)."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}

    deepcompile: bool = Field(False, description="Let the compiler place ZeRO's communication.")
    autoep_non_moe: bool = Field(False, description="Compile what surrounds layers of experts.")
    free_activation: bool = Field(False, description="Free large activations early.")
    free_activation_threshold: Integer = Field(10_485_760, description="Bytes from which an activation is large.")
    offload_activation: bool = Field(False, description="Move activations to the CPU's memory until backward.")
    offload_activation_pin_memory: bool = Field(True, description="Keep them in page-locked memory.")
    offload_opt_states: bool = Field(False, description="Move the optimizer's state to the CPU until its step.")
    double_buffer: bool = Field(True, description="Fill one buffer while another is reduced.")
    symmetric_memory: bool = Field(False, description="Reduce through symmetric memory.")
    debug_log: bool = Field(False, description="Write the compiled graphs down.")
    offload_parameters: bool = Field(False, description="Move parameters to the CPU's memory.")
    sync_before_reduce: bool = Field(False, description="Wait for the device before a reduction.")
    sync_after_reduce: bool = Field(False, description="Wait for the device after a reduction.")
    sync_before_allgather: bool = Field(False, description="Wait for the device before a gather.")
    sync_after_allgather: bool = Field(False, description="Wait for the device after a gather.")
    keep_int_input_tensors: bool = Field(True, description="Keep the values of integer inputs.")
    keep_all_input_tensors: bool = Field(False, description="Keep the values of all inputs.")
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = Field(None, description="Passes to run.")

    @classmethod
    def refused(cls, key: str) -> str | None:
        if key in ("enabled", "disable", "backend", "kwargs"):
            return "an older DeepSpeed's key, which 0.19.8 refuses; compile the model yourself with torch.compile"
        return None

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        for key in ("offload_activation", "offload_opt_states"):
            if getattr(self, key) and self.offload_parameters:
                yield (
                    (key, "offload_parameters"),
                    "got true beside offload_parameters: true; take one of the two",
                )


class WeightQuantizationConfig(Rare):
    """Weights in a few bits while the model is loaded."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}

    enabled: bool = Field(True, description="Quantize.")
    num_bits: Integer = Field(8, description="Bits of a weight.")
    q_type: Literal["symmetric", "asymmetric"] = Field("symmetric", description="Whether zero is in the middle.")
    q_groups: Integer = Field(1, description="Groups of weights with a scale each.")
    quantized_initialization: dict[str, Any] = Field({}, description="Quantize as the model is made.")
    post_init_quant: dict[str, Any] = Field({}, description="Quantize modules, by name, after the model is made.")
