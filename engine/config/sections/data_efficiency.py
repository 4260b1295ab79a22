"""The ``data_efficiency`` section: which samples, and how much of each, a step sees.

After `deepspeed/runtime/data_pipeline/config.py` and `constants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from engine.config.section import Count, Integer, Loose, NonNegative, Whole

__all__ = ["DataEfficiencyConfig"]


class MetricScheduleConfig(Loose):
    """How a difficulty grows; which keys count depends on schedule_type."""

    total_curriculum_step: Count | None = Field(None, description="Updates until the greatest difficulty.")
    difficulty_step: Count | None = Field(None, description="The difficulty is a multiple of it.")
    root_degree: NonNegative | None = Field(None, description="Root that the growth follows; 1 is a straight line.")
    difficulty: list[float] | None = Field(None, description="The difficulties, one after another.")
    max_step: list[Integer] | None = Field(None, description="Last update of each difficulty but the greatest.")


class MetricConfig(Loose):
    """One measure of difficulty."""

    index_to_sample_path: str | None = Field(None, description="File from difficulty to samples.")
    index_to_metric_path: str | None = Field(None, description="File from sample to difficulty.")
    difficulty_type: Literal["value", "percentile"] | None = Field(None, description="Unit of the difficulty.")
    clustering_type: str | None = Field(None, description="How samples are grouped: single_cluster or schedule_based.")
    min_difficulty: float | None = Field(None, description="Difficulty at the start.")
    max_difficulty: float | None = Field(None, description="Difficulty at the end.")
    schedule_type: Literal["fixed_discrete", "fixed_root", "fixed_linear", "custom"] | None = Field(
        None, description="Shape of the growth."
    )
    schedule_config: MetricScheduleConfig | None = Field(None, description="Numbers of the growth.")


class CurriculumConfig(Loose):
    """Easy samples first."""

    enabled: bool = Field(False, description="Choose samples by difficulty.")
    data_cluster_path: str | None = Field(None, description="Folder for groups of samples.")
    curriculum_metrics: dict[str, MetricConfig] | None = Field(None, description="Measures of difficulty, by name.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.enabled and self.curriculum_metrics is None:
            yield ("enabled", "curriculum_metrics"), "got true; expected curriculum_metrics beside it"


class DynamicBatchingConfig(Loose):
    """Batches of about as many tokens each."""

    enabled: bool = Field(False, description="Let the batch size follow the samples' length.")
    metrics_path: str | None = Field(None, description="Folder of the samples' lengths.")
    lr_scaling_method: Literal["linear", "sqrt", "none"] = Field("linear", description="How the rate follows the size.")
    min_batch_size: Count = Field(1, description="Fewest samples.")
    max_batch_size: Count | None = Field(None, description="Most samples; null for no limit.")
    sequence_picking_order: Literal["random", "seqlen", "dataloader"] = Field(
        "dataloader", description="Order in which samples are packed."
    )
    max_tokens: Count | None = Field(None, description="Tokens of a batch.")
    verbose: bool = Field(False, description="Print the packing.")

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.enabled and self.max_tokens is None:
            yield ("enabled", "max_tokens"), "got true; expected max_tokens beside it"


class DataSamplingConfig(Loose):
    """Which samples a step sees."""

    enabled: bool = Field(False, description="Let DeepSpeed choose samples.")
    num_epochs: Count = Field(1000, description="Epochs that are planned.")
    num_workers: Whole = Field(0, description="Processes that load data.")
    pin_memory: bool = Field(False, description="Load into page-locked memory.")
    curriculum_learning: CurriculumConfig | None = Field(None, description="Easy samples first.")
    dynamic_batching: DynamicBatchingConfig | None = Field(None, description="Batches of about as many tokens each.")


class LayerTokenConfig(Loose):
    """A learning rate that follows the tokens that were processed."""

    enabled: bool = Field(False, description="Let the rate follow tokens.")
    total_layer_tokens: Count | None = Field(None, description="Tokens times layers of the run.")
    warmup_type: str | None = Field(None, description="Shape of the warm-up.")
    warmup_layer_tokens: Whole | None = Field(None, description="Tokens times layers of the warm-up.")


class LtdScheduleConfig(Loose):
    """How the number of kept tokens grows."""

    min_value: Count | None = Field(None, description="Tokens at the start.")
    max_value: Count | None = Field(None, description="Tokens at the end.")
    schedule_type: Literal["fixed_linear"] | None = Field(None, description="Shape of the growth.")
    schedule_config: dict[str, Any] | None = Field(None, description="require_steps and seq_per_step of the growth.")


class RandomLtdConfig(Loose):
    """Layers that drop tokens at random."""

    enabled: bool = Field(False, description="Drop tokens.")
    total_layer_num: Count | None = Field(None, description="Layers of the model.")
    random_ltd_layer_num: Whole | None = Field(None, description="Layers that drop tokens.")
    random_ltd_layer_id: list[Integer] | None = Field(None, description="Their numbers.")
    model_mask_name: str | None = Field(None, description="Name of the mask argument.")
    model_type: str | None = Field(None, description="encoder or decoder.")
    micro_batch_size: Count | None = Field(None, description="Samples per process and backward pass.")
    global_batch_size: Count | None = Field(None, description="Samples per update.")
    hidden_state_order: str | None = Field(None, description="Order of the dimensions, such as batch_seq_dim.")
    layer_token_lr_schedule: LayerTokenConfig | None = Field(None, description="A rate that follows tokens.")
    random_ltd_schedule: LtdScheduleConfig | None = Field(None, description="How the number of tokens grows.")


class DataRoutingConfig(Loose):
    """How much of a sample each layer sees."""

    enabled: bool = Field(False, description="Route tokens around layers.")
    random_ltd: RandomLtdConfig | None = Field(None, description="Layers that drop tokens at random.")


class DataEfficiencyConfig(Loose):
    """Fewer or easier data for the same result."""

    enabled: bool = Field(False, description="Switch the whole section on.")
    seed: Integer = Field(1234, description="Seed of its random numbers.")
    data_sampling: DataSamplingConfig | None = Field(None, description="Which samples a step sees.")
    data_routing: DataRoutingConfig | None = Field(None, description="How much of a sample each layer sees.")
