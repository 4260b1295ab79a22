"""DeepSpeed's names over Redline's engine: the package that `redline run` lets a script import as `deepspeed`.

Thin: every function translates names and arguments, and warns where DeepSpeed is lenient and Redline strict. `redline`
does the training. It covers the training API of DeepSpeed 0.19.8; what Redline does not have (pipelines, MoE,
inference, compression, sparse attention) can be imported and raises `NotImplementedError` when it is used.

An import loads little beyond torch: what takes longer (pydantic, DTensors) is imported in the functions that need it.
"""

from __future__ import annotations

import argparse
from typing import Any

from deepspeed import _modules  # first: it makes the other modules importable
from deepspeed._config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed._engine import DeepSpeedEngine
from deepspeed._initialize import initialize
from deepspeed._modules import not_built
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import init_distributed

from deepspeed import accelerator, checkpointing, comm, ops, utils, zero  # isort: skip
from deepspeed.utils import OnDevice, log_dist, logger  # isort: skip

for _module in (accelerator, comm, ops):
    _module.__path__ = []  # type: ignore[attr-defined]  # packages in DeepSpeed: `_modules` finds what is in them

__version__ = "0.19.8"
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8
__redline__ = True  # tells this package from DeepSpeed's own
__git_hash__ = __git_branch__ = "redline"
version, git_hash, git_branch = __version__, __git_hash__, __git_branch__
dist = comm

__all__ = [
    "DeepSpeedConfig", "DeepSpeedConfigError", "DeepSpeedEngine", "OnDevice", "accelerator", "add_config_arguments",
    "checkpointing", "comm", "dist", "get_accelerator", "init_distributed", "initialize", "log_dist", "logger", "ops",
    "utils", "zero",
]  # fmt: skip


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a script's arguments."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", default=False, action="store_true", help="train with the engine")
    group.add_argument("--deepspeed_config", default=None, type=str, help="DeepSpeed's JSON file")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser


def __getattr__(name: str) -> Any:
    if name in _modules.NOT_BUILT_NAMES:
        return not_built(f"deepspeed.{name}", _modules.NOT_BUILT_NAMES[name])
    if f"deepspeed.{name}" in _modules.TABLE:
        return _modules.load(f"deepspeed.{name}")
    raise AttributeError(f"module 'deepspeed' has no attribute {name!r}")
