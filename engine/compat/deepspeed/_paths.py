"""DeepSpeed's other module paths: a finder makes them importable, so that two tables stand for some eighty files.

`_FILES` says which file here has the names of a path; what it lacks, and all else, is not built: see `_not_built`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from deepspeed._not_built import MODULES, NAMES, module_instead, not_built

__all__ = ["getter"]

_FILES = {
    "_config": "runtime.config runtime.precision_config runtime.zero.config runtime.zero.offload_config",
    "_engine": "runtime.engine",
    "_groups": "utils.groups",
    "_leaf_modules": "utils.z3_leaf_module",
    "_lr_schedules": "runtime.lr_schedules",
    "_tensor_fragment": "utils.tensor_fragment",
    "_utils": """checkpoint.utils compression.helper constants env_report git_version_info launcher.runner moe.utils
        runtime.dataloader runtime.swap_tensor runtime.utils utils utils.logging utils.module_utils utils.nvtx
        utils.torch utils.zero_to_fp32""",
    "accelerator": "accelerator.abstract_accelerator accelerator.real_accelerator",
    "checkpointing": "runtime.activation_checkpointing.checkpointing",
    "comm": "comm.comm",
    "ops": """ops.adagrad ops.adam ops.adam.cpu_adam ops.adam.fused_adam ops.lamb ops.lamb.fused_lamb ops.lion
        ops.op_builder ops.op_builder.builder""",
    "zero": """runtime.zero runtime.zero.partition_parameters runtime.zero.stage3 runtime.zero.stage_1_and_2
        runtime.zero.utils""",
}
_FILE_OF = {f"deepspeed.{path}": f"deepspeed.{file}" for file, paths in _FILES.items() for path in paths.split()}
_PACKAGES = {path.rpartition(".")[0] for path in _FILE_OF} | {f"deepspeed.{path}" for path in MODULES}


def getter(module: str, own: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of a module: modules within it, names that its file makes, what stands for those not built."""

    def find(name: str) -> Any:
        path = f"{module}.{name}"
        if path in _FILE_OF or path in _PACKAGES:
            return importlib.import_module(path)
        if own is not None:
            with suppress(AttributeError):
                return own(name)
        instead = NAMES.get(name) if module == "deepspeed" else module_instead(module)
        if instead is None or name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return not_built(path, instead)

    return find


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the paths of the table, and those that are not built."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name in _FILE_OF or module_instead(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        own = importlib.import_module(_FILE_OF[module.__name__]) if module.__name__ in _FILE_OF else module
        for name, value in vars(own).items():
            # Modules stay out: `deepspeed.utils.logging` is DeepSpeed's, not Python's.
            if not name.startswith("__") and not isinstance(value, ModuleType):
                vars(module).setdefault(name, value)
        module.__getattr__ = getter(module.__name__, vars(own).get("__getattr__"))  # type: ignore[method-assign]


sys.meta_path.append(_Finder())
