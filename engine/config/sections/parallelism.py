"""Ways to share a model out: ``pipeline``, ``tensor_parallel``, ``expert_parallel``, ``hybrid_engine``.

After `get_pipeline_config` and `HybridEngineConfig` in `deepspeed/runtime/config.py`,
`deepspeed/runtime/tensor_parallel/config.py` and `deepspeed/module_inject/auto_ep_config.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from engine.config.section import TO_DEFAULT, Count, Integer, Loose, Rare, Whole

__all__ = ["ExpertParallelConfig", "HybridEngineConfig", "PipelineConfig", "TPConfig", "TensorParallelConfig"]


class PipelineConfig(Loose):
    """What DeepSpeed's PipelineModule is trained with."""

    stages: Literal["auto"] | Count = Field("auto", description="Parts of the model, one after another.")
    partition: str = Field("best", description="How layers are shared out among the parts.")
    seed_layers: bool = Field(False, description="Give each layer a random seed of its own.")
    activation_checkpoint_interval: Whole = Field(0, description="Layers between two checkpoints; 0 for none.")
    pipe_partitioned: bool = Field(True, description="Share activations between parts out among model-parallel ranks.")
    grad_partitioned: bool = Field(True, description="Share gradients between parts out among model-parallel ranks.")
    use_reentrant: bool | None = Field(None, description="torch's older way to checkpoint; null for true.")


class TPConfig(Rare):
    """The group of processes that share a layer."""

    tp_size: Count = Field(1, description="Processes that share a layer.")
    tp_grain_size: Count = Field(1, description="A share's width is a multiple of it.")
    mpu: None = Field(None, description="A Python object; a config cannot give it.")
    tp_group: None = Field(None, description="A Python object; a config cannot give it.")


class TensorParallelConfig(Rare):
    """Layers that are shared out among processes."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}
    aliases: ClassVar[dict[str, str]] = {"tensor_parallel": "tp", "replace_with_kernel_inject": "kernel_inject"}

    dtype: str | None = Field(None, description="Number format of the model; null for fp16.")
    autotp_size: Whole = Field(0, description="Processes that share each layer; 0 for none.")
    tp_overlap_comm: bool = Field(False, description="Reduce while the layer computes.")
    vocab_parallel_lm_head: bool | None = Field(None, description="Share the vocabulary out, too; null as the model.")
    vocab_parallel_ce_backend: Literal["torch", "liger"] = Field("torch", description="Code of the loss over shares.")
    tp: TPConfig | None = Field(None, description="The group of processes.")
    injection_policy_tuple: list[str] | None = Field(None, description="Layers whose outputs are summed.")
    partition_config: dict[str, Any] | None = Field(None, description="Rules of your own for sharing layers out.")
    preset_model: str | None = Field(None, description="A known family of models with rules for it.")
    keep_module_on_host: bool = Field(False, description="Load the model into the CPU's memory first.")
    kernel_inject: bool = Field(False, description="Take DeepSpeed's own kernels for inference.")


class ExpertParallelConfig(Loose):
    """Experts that are shared out among processes."""

    enabled: bool = Field(False, description="Share experts out.")
    autoep_size: Count = Field(1, description="Processes that share the experts.")
    expert_tensor_parallel_size: Count = Field(1, description="Processes that share one expert.")
    validate_folding_routing: bool = Field(False, description="Check that processes of one expert route alike.")
    async_split_plan: bool = Field(False, description="Plan the exchange while the device computes.")
    preset_model: str | None = Field(None, description="A known family of models.")
    moe_layer_pattern: str | None = Field(None, description="Names of the layers that have experts, as a pattern.")
    expert_pattern: str | None = Field(None, description="Name of the experts in such a layer.")
    router_pattern: str | None = Field(None, description="Name of the router in such a layer.")
    use_grouped_mm: bool = Field(True, description="Multiply all experts in one operation.")
    disable_triton_grouped_mm: bool = Field(False, description="Leave the Triton code of that operation out.")
    route_norm: bool | None = Field(None, description="Let a token's scores sum to 1; null as the model.")
    route_scale: float = Field(1.0, description="Factor of the scores.")
    score_apply: Literal["auto", "pre", "post"] = Field("auto", description="Where scores multiply.")
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = Field(
        "auto", description="How the experts' outputs are summed."
    )
    row_weighting_impl: Literal["auto", "eager", "fused"] = Field("auto", description="How rows are weighted.")
    gate_up_impl: Literal["separate", "fused"] = Field("separate", description="One or two products per expert.")
    comm_backend: Literal["comm", "deepep"] = Field("comm", description="Library of the exchange.")
    comm_num_sm: Count = Field(12, description="Multiprocessors that the exchange may take.")
    comm_qp_margin: Whole = Field(4, description="Spare queues of the exchange.")
    comm_max_tokens_per_rank: Whole = Field(0, description="Tokens that one process may route.")
    num_expert_groups: Count | None = Field(None, description="Groups that the router chooses among first.")
    num_limited_groups: Count | None = Field(None, description="Groups that a token may go to.")
    score_func: Literal["auto", "softmax", "sigmoid"] = Field("auto", description="Function of the router's scores.")
    top_k: Literal["auto"] | Count = Field("auto", description="Experts per token.")
    load_balance_coeff: None = Field(None, description="Only null: DeepSpeed takes no other value yet.")
    routed_scaling_factor: Literal["auto"] | float = Field("auto", description="Factor of the experts' sum.")
    expert_w1: str | None = Field(None, description="Name of the gate's weight.")
    expert_w2: str | None = Field(None, description="Name of the down projection's weight.")
    expert_w3: str | None = Field(None, description="Name of the up projection's weight; null if it is in w1.")
    num_experts_attr: str | None = Field(None, description="Name of the number of experts in the model's config.")
    top_k_attr: str | None = Field(None, description="Name of the experts per token in the model's config.")
    has_shared_experts: bool | None = Field(None, description="Whether some experts see every token.")
    shared_experts_pattern: str | None = Field(None, description="Name of these experts.")
    shared_experts_gate_pattern: str | None = Field(None, description="Name of their gate.")
    expert_activation: str | None = Field(None, description="Activation of an expert; null as the model.")


class HybridEngineConfig(Rare):
    """One model that trains and generates in turn."""

    enabled: bool = Field(False, description="Switch between training and generation.")
    max_out_tokens: Count = Field(512, description="Tokens that are generated at most.")
    inference_tp_size: Integer = Field(1, description="Processes that share a layer while generating.")
    release_inference_cache: bool = Field(False, description="Free the cache after each generation.")
    pin_parameters: bool = Field(True, description="Keep the generating parameters in place.")
    tp_gather_partition_size: Integer = Field(8, description="Layers that are gathered at a time.")
    enable_cuda_graph: bool = Field(False, description="Generate by a CUDA graph.")
