"""Records every key that the installed DeepSpeed knows into tests/golden/deepspeed_keys.json.

    python scripts/dev/list_deepspeed_keys.py     # where deepspeed is installed; DS_ACCELERATOR=cpu without a GPU

Top-level keys: the constants that DeepSpeed's config reads, the keys that its getters name, and those that it has
removed. Keys of sections that are pydantic models: the models' fields and aliases. Keys of sections that are plain
dicts: the constants that name them. A test compares the table with this list.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import deepspeed.autotuning.constants as autotuning
import deepspeed.profiling.constants as profiling
import deepspeed.runtime.activation_checkpointing.config as activation_checkpointing
import deepspeed.runtime.config as config
import deepspeed.runtime.constants as constants
import deepspeed.runtime.data_pipeline.constants as data
import deepspeed.runtime.model_checkpointing.constants as checkpointing
import deepspeed.runtime.swap_tensor.constants as aio
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.lr_schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

OUT = Path(__file__).parents[2] / "tests" / "golden" / "deepspeed_keys.json"
MODELS: dict[str, type[BaseModel]] = {
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "tensor_parallel": TPTrainingConfig,
    "hybrid_engine": config.HybridEngineConfig,
    "compile": CompileConfig,
    "weight_quantization": WeightQuantConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
}
# Sections that are plain dicts: the module with their constants, and what the constants' names start with.
DICTS: dict[str, tuple[ModuleType, str]] = {
    "aio": (aio, "AIO_"),
    "activation_checkpointing": (activation_checkpointing, "ACT_CHKPT_"),
    "flops_profiler": (profiling, "FLOPS_PROFILER_"),
    "autotuning": (autotuning, "AUTOTUNING_"),
    "autotuning.model_info": (autotuning, "MODEL_INFO_"),
    "torch_autocast": (constants, "TORCH_AUTOCAST_"),
    "data_efficiency": (data, "DATA_EFFICIENCY_"),
    "data_efficiency.data_sampling": (data, "DATA_SAMPLING_"),
    "data_efficiency.data_sampling.dynamic_batching": (data, "DYNAMIC_BATCHING_"),
    "data_efficiency.data_routing": (data, "DATA_ROUTING_"),
    "checkpoint.writer": (checkpointing, "CHECKPOINT_(WRITER|IO|DATA)_"),
}
# Constants that are values, not keys, or are DeepSpeed's own bookkeeping.
VALUES = re.compile(r"_(DEFAULT|FORMAT|MODES|TYPES|UNITS|GRIDSEARCH|RANDOM|MODELBASED|LATENCY|THROUGHPUT|FLOPS|FORWARD"
                    r"|BACK\w+|STEPS|DICT)$|^AUTOTUNING_METRIC_(?!PATH)")  # fmt: skip


def inside(model: type[BaseModel], path: str) -> Iterator[str]:
    """Fields and aliases of a model, and of the models in it."""
    for name, field in model.model_fields.items():
        for key in {name, field.alias or name}:
            yield f"{path}.{key}"
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                for place in {field.alias or name}:
                    yield from inside(part, f"{path}.{place}")


def named(module: ModuleType, prefix: str, path: str) -> Iterator[str]:
    """The string constants of a module whose names start so."""
    for name, value in vars(module).items():
        if re.match(prefix, name) and not VALUES.search(name) and isinstance(value, str):
            yield f"{path}.{value}"


def top() -> Iterator[str]:
    """The keys that DeepSpeedConfig reads from the top of a config."""
    source = Path(config.__file__).read_text()
    words = {**vars(config), **vars(constants), **vars(data)}
    patterns = (
        r"(?<!sub_)param_dict\.get\(\s*([\w'\"]+)", r"(?<!sub_)param_dict\[([\w'\"]+)\]",
        r"get_scalar_param\(\s*param_dict,\s*(\w+)", r"(\w+|'\w+'|\"\w+\") in param_dict\b(?!\[)",
        r"self\._param_dict\.get\((\w+)",
    )  # fmt: skip
    for found in (match for pattern in patterns for match in re.findall(pattern, source)):
        key = found.strip("'\"") if found[0] in "'\"" else words.get(found)
        if isinstance(key, str) and not key.startswith("enabled"):
            yield key
    yield from (
        getattr(constants, name) for name in ("COMMUNICATION_DATA_TYPE", "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE")
    )
    yield from ("sequence_parallel_size", "allgather_size")  # read apart from the getters
    yield from ("aio", "activation_checkpointing", "flops_profiler", "autotuning", "comms_logger", "timers")
    yield from ("datastates_ckpt", "data_efficiency", "tensor_parallel", "zero_optimization", *MODELS)
    yield from config._REMOVED_TOP_LEVEL_CONFIG_KEYS


def nested() -> Iterator[str]:
    for path, model in MODELS.items():
        yield from inside(model, path)
    for path, (module, prefix) in DICTS.items():
        yield from named(module, prefix, path)
    yield from (f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS)
    yield from (f"expert_parallel.{field.name}" for field in dataclasses.fields(AutoEPConfig) if field.name[0] != "_")
    yield from (f"pipeline.{key}" for key in (*config.get_pipeline_config({}), "use_reentrant"))
    yield from ("optimizer.type", "optimizer.params", "optimizer.legacy_fusion", "scheduler.type", "scheduler.params")
    for schedule in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR):
        yield from (f"scheduler.params.{name}" for name in list(signature(schedule).parameters)[1:])
    for optimizer in (FusedAdam, DeepSpeedCPUAdam):
        names = list(signature(optimizer).parameters)[1:]
        yield from (f"optimizer.params.{name}" for name in names if name != "adamw_mode")  # DeepSpeed's own to give
    yield from (f"optimizer.params.{name}" for name in (config.TORCH_ADAM_PARAM, config.ADAM_W_MODE))
    yield "torch_autocast.lower_precision_safe_modules"
    yield from (f"data_types.{getattr(constants, name)}" for name in (
        "GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES"))  # fmt: skip
    yield from (f"checkpoint.{key}" for key in (
        "tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "checkpoint_serialization",
        "writer", "parallel_write.pipeline_stage"))  # fmt: skip
    curriculum = "data_efficiency.data_sampling.curriculum_learning"
    metric, routing = f"{curriculum}.curriculum_metrics.NAME", "data_efficiency.data_routing.random_ltd"
    for path, names in {
        curriculum: ("ENABLED", "CLUSTER_PATH", "METRICS"),
        metric: ("SAMPLE_PATH", "METRIC_PATH", "CLUSTERING_TYPE", "DIFFICULTY_TYPE", "MIN_DIFFICULTY", "MAX_DIFFICULTY",
                 "SCHEDULE_TYPE", "SCHEDULE_CONFIG"),
        f"{metric}.schedule_config": ("SCHEDULE_DIFFICULTY", "SCHEDULE_MAX_STEP", "SCHEDULE_TOTAL_STEP",
                                      "SCHEDULE_DIFFICULTY_STEP", "SCHEDULE_ROOT_DEGREE"),
    }.items():  # fmt: skip
        yield from (f"{path}.{getattr(data, f'CURRICULUM_LEARNING_{name}')}" for name in names)
    for path, names in {
        routing: ("ENABLED", "MODEL_MASK_NAME", "MODEL_TYPE", "MICRO_BATCH_SIZE", "GLOBAL_BATCH_SIZE",
                  "HIDDEN_STATE_ORDER", "LAYER_NUM", "LAYER_ID", "TOTAL_LAYER_NUM", "SCHEDULER",
                  "LAYER_TOKEN_LR_SCHEDULE"),
        f"{routing}.random_ltd_schedule": ("MAX_VALUE", "MIN_VALUE", "SCHEDULE_CONFIG", "SCHEDULER_TYPE"),
        f"{routing}.layer_token_lr_schedule": ("LAYER_TOKEN_LR_ENABLED", "TOTAL_LAYER_TOKENS", "WARMUP_TYPE",
                                               "WARMUP_LAYER_TOKENS"),
    }.items():  # fmt: skip
        yield from (f"{path}.{getattr(data, f'RANDOM_LTD_{name}')}" for name in names)


def main() -> None:
    removed = [f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS]
    keys: dict[str, Any] = {
        "deepspeed": version("deepspeed"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "top": sorted({key for key in top() if "." not in key}),
        "nested": sorted(set(nested())),
        "removed": sorted([*config._REMOVED_TOP_LEVEL_CONFIG_KEYS, *removed]),
    }
    OUT.write_text(json.dumps(keys, indent=1) + "\n")
    print(f"{OUT}: {len(keys['top'])} keys at the top, {len(keys['nested'])} inside")


if __name__ == "__main__":
    main()
