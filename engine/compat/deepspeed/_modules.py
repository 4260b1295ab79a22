"""The other module paths of DeepSpeed: which names scripts import from where, and where these are here.

A finder makes them importable, so that one table stands for some forty files.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["NOT_BUILT_NAMES", "TABLE", "load", "not_built"]

_SAFE = tuple(
    f"safe_{verb}_{which}_{what}"
    for verb in ("get", "set")
    for which in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
)
_LEAVES = ("set_z3_leaf_modules", "set_z3_leaf_modules_by_name", "set_z3_leaf_modules_by_suffix",
           "unset_z3_leaf_modules", "get_z3_leaf_modules", "z3_leaf_module", "z3_leaf_parameter",
           "set_z3_leaf_module")  # fmt: skip


def _needs(stage: int) -> str:
    return " ".join(f"estimate_zero{stage}_model_states_mem_needs_all_{kind}" for kind in ("live", "cold"))


# Module: names in it, each of the module named before the colon; "*" for all that this module has.
TABLE: dict[str, str | dict[str, str]] = {
    "deepspeed.comm.comm": "comm",
    "deepspeed.accelerator.real_accelerator": "accelerator",
    "deepspeed.accelerator.abstract_accelerator": {"accelerator": "Accelerator:DeepSpeedAccelerator"},
    "deepspeed.runtime": {},
    "deepspeed.runtime.engine": {"_engine": "DeepSpeedEngine"},
    "deepspeed.runtime.config": "_config",
    "deepspeed.runtime.precision_config": "_config",
    "deepspeed.runtime.zero.config": "_config",
    "deepspeed.runtime.zero.offload_config": "_config",
    "deepspeed.runtime.lr_schedules": "lr_schedules",
    "deepspeed.runtime.dataloader": {"_utils": "RepeatingLoader"},
    "deepspeed.runtime.swap_tensor": {"_utils": "MIN_SWAPPABLE_BYTES"},
    "deepspeed.runtime.utils": {
        "_utils": "see_memory_usage memory_status move_to_device set_random_seed clip_grad_norm_ "
        "required_torch_version noop_decorator"
    },
    "deepspeed.runtime.zero.stage3": {"_utils": _needs(3)},
    "deepspeed.runtime.zero.stage_1_and_2": {"_utils": _needs(2)},
    "deepspeed.constants": {"_utils": "TORCH_DISTRIBUTED_DEFAULT_PORT", "comm": "DEFAULT_TIMEOUT:default_pg_timeout"},
    "deepspeed.env_report": {"_utils": "env_report:main env_report:cli_main"},
    "deepspeed.compression.helper": {"_utils": "recursive_getattr recursive_setattr"},
    "deepspeed.utils.module_utils": {"_utils": "recursive_getattr recursive_setattr"},
    "deepspeed.runtime.zero": "zero",
    "deepspeed.runtime.zero.partition_parameters": "zero",
    "deepspeed.runtime.zero.utils": "zero",
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": "checkpointing",
    "deepspeed.ops.adam": {"ops": "FusedAdam DeepSpeedCPUAdam"},
    "deepspeed.ops.adam.cpu_adam": {"ops": "DeepSpeedCPUAdam"},
    "deepspeed.ops.adam.fused_adam": {"ops": "FusedAdam"},
    "deepspeed.ops.adagrad": {"ops": "DeepSpeedCPUAdagrad"},
    "deepspeed.ops.lamb": {"ops": "FusedLamb"},
    "deepspeed.ops.lamb.fused_lamb": {"ops": "FusedLamb"},
    "deepspeed.ops.lion": {"ops": "FusedLion DeepSpeedCPULion"},
    "deepspeed.utils": "_utils",
    "deepspeed.utils.logging": {
        "_utils": "logger log_dist log_dist:log_dist_once log_dist:print_dist warning_once set_log_level_from_string"
    },
    "deepspeed.utils.groups": "_groups",
    "deepspeed.utils.z3_leaf_module": {"_utils": " ".join(_LEAVES)},
    "deepspeed.utils.tensor_fragment": {"_utils": " ".join((*_SAFE, "safe_update_full_grad_vectorized"))},
    "deepspeed.utils.zero_to_fp32": {
        "_utils": "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint "
        "convert_zero_checkpoint_to_fp32_state_dict"
    },
    "deepspeed.utils.nvtx": {"_utils": "instrument_w_nvtx"},
    "deepspeed.checkpoint": {},
    "deepspeed.checkpoint.utils": {"_utils": "clone_tensors_for_torch_save"},
    "deepspeed.moe.utils": {
        "_utils": "split_params_into_different_moe_groups_for_optimizer is_moe_param has_moe_layers"
    },
    "deepspeed.utils.torch": {"_utils": "required_torch_version"},
    "deepspeed.ops.op_builder": "ops",
    "deepspeed.ops.op_builder.builder": "ops",
    "deepspeed.git_version_info": {"_utils": "version torch_info installed_ops compatible_ops"},
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": {"_utils": "DEEPSPEED_ENVIRONMENT_NAME"},
    "deepspeed.monitor": {},
    "deepspeed.profiling": {},
}

NOT_BUILT_NAMES = {
    "PipelineModule": "train data-parallel, with zero_optimization for models larger than a GPU",
    "PipelineEngine": "train data-parallel, with zero_optimization for models larger than a GPU",
    "init_inference": "call the module, or a library for inference such as vLLM",
    "InferenceEngine": "call the module, or a library for inference such as vLLM",
    "tp_model_init": "train data-parallel, with zero_optimization for models larger than a GPU",
    "DeepSpeedHybridEngine": "train with initialize, and generate with the module",
    "DeepSpeedTransformerLayer": "use torch.nn.TransformerEncoderLayer",
    "DeepSpeedTransformerConfig": "use torch.nn.TransformerEncoderLayer",
    "DeepSpeedInferenceConfig": "call the module, or a library for inference such as vLLM",
    "default_inference_config": "call the module, or a library for inference such as vLLM",
    "replace_transformer_layer": "call the module, or a library for inference such as vLLM",
    "revert_transformer_layer": "call the module, or a library for inference such as vLLM",
    "set_autotp_mode": "train data-parallel, with zero_optimization for models larger than a GPU",
    "DualPipeVEngine": "train data-parallel, with zero_optimization for models larger than a GPU",
    "DualPipeVModule": "train data-parallel, with zero_optimization for models larger than a GPU",
    "DeepSpeedDataLoader": "engine.deepspeed_io makes a loader",
    "DeepSpeedOptimizer": "initialize returns the optimizer",
}
_NOT_BUILT: dict[str, str] = {
    "deepspeed.pipe": NOT_BUILT_NAMES["PipelineModule"],
    "deepspeed.runtime.pipe": NOT_BUILT_NAMES["PipelineModule"],
    "deepspeed.moe": "write the experts in torch; a loss need not reach all of them",
    "deepspeed.inference": NOT_BUILT_NAMES["init_inference"],
    "deepspeed.module_inject": NOT_BUILT_NAMES["init_inference"],
    "deepspeed.model_implementations": NOT_BUILT_NAMES["init_inference"],
    "deepspeed.compression": "use torch.ao.quantization or torch.nn.utils.prune",
    "deepspeed.autotuning": "redline tune finds the learning rate",
    "deepspeed.ops.sparse_attention": "use torch.nn.attention.flex_attention",
    "deepspeed.ops.transformer": "use torch.nn.functional.scaled_dot_product_attention",
    "deepspeed.ops.aio": "keep optimizer state in memory, with offload_optimizer.device cpu",
    "deepspeed.runtime.fp16.onebit": "use Adam or Lamb",
    "deepspeed.profiling.flops_profiler": "the config's section flops_profiler counts with torch's own counter",
    "deepspeed.sequence": "train data-parallel, with redline.activation_checkpointing for long sequences",
    "deepspeed.runtime.sequence_parallel": "train data-parallel, with redline.activation_checkpointing for long "
    "sequences",
    "deepspeed.launcher": "redline run starts ranks",
    "deepspeed.compile": "engine.compile() runs torch.compile",
    "deepspeed.runtime.data_pipeline": "prepare the data in the script's own DataLoader",
    "deepspeed.monitor": "the config's sections tensorboard, wandb, csv_monitor and comet write metrics",
    "deepspeed.io": "torch.save, or redline.checkpoint.async_save in the config",
    "deepspeed.nvme": "keep optimizer state in memory, with offload_optimizer.device cpu",
    **dict.fromkeys(
        ("deepspeed.runtime", "deepspeed.checkpoint", "deepspeed.utils", "deepspeed.ops", "deepspeed.comm",
         "deepspeed.profiling", "deepspeed.elasticity", "deepspeed.linear", "deepspeed.datastates",
         "deepspeed.accelerator", "deepspeed.compat"),
        "it is an inner part of DeepSpeed's",
    ),
}  # fmt: skip


class _NotBuilt(type):
    """Of classes that stand for what is not built: any use of one raises, but subclasses and isinstance work."""

    instead: str

    def refuse(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__module__}.{cls.__qualname__}: Redline does not build it; {cls.instead}")

    __call__ = __iter__ = __len__ = __getitem__ = __setitem__ = __enter__ = refuse

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return not_built(f"{cls.__module__}.{cls.__qualname__}.{name}", cls.instead)


def not_built(name: str, instead: str) -> type:
    """A class that stands for a function, class or value of DeepSpeed."""
    module, _, own = name.rpartition(".")
    return _NotBuilt(own, (), {"instead": instead, "__doc__": f"Not built: {instead}", "__module__": module})


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def _is_not_built(name: str) -> str | None:
    return next((why for path, why in _NOT_BUILT.items() if name == path or name.startswith(path + ".")), None)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the table, and those that are not built."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name in TABLE or _is_not_built(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []
        where = TABLE.get(module.__name__)
        if where is None:
            _refuse_all(module)
        elif isinstance(where, str):
            _forward_all(module, importlib.import_module(f"deepspeed.{where}"))
        else:
            _refuse_all(module)
            for source, names in where.items():
                own = importlib.import_module(f"deepspeed.{source}")
                for each in names.split():
                    name, _, alias = each.partition(":")
                    setattr(module, alias or name, getattr(own, name))


def _forward_all(module: ModuleType, own: ModuleType) -> None:
    values = {name: value for name, value in vars(own).items() if not isinstance(value, ModuleType)}
    vars(module).update({name: value for name, value in values.items() if not name.startswith("__")})
    if hasattr(own, "__getattr__"):
        module.__getattr__ = own.__getattr__  # type: ignore[method-assign]
    else:
        _refuse_all(module)


def _refuse_all(module: ModuleType) -> None:
    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{module.__name__}.{name}" in TABLE:
            return load(f"{module.__name__}.{name}")
        return not_built(f"{module.__name__}.{name}", _is_not_built(module.__name__) or "")

    module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(_Finder())
