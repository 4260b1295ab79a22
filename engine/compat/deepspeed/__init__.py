"""DeepSpeed's names over Redline's engine: the package that `redline run` lets a script import as `deepspeed`.

Thin: every function translates names and arguments, and warns where DeepSpeed is lenient and Redline strict. `redline`
does the training. It covers the training API of DeepSpeed 0.19.8; what Redline does not have (pipelines, MoE,
inference, compression, sparse attention) can be imported and raises `NotImplementedError` when it is used.

An import loads little beyond torch: what takes longer (pydantic, DTensors) is imported in the functions that need it.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

import redline
from deepspeed import _paths  # first: it makes the other modules importable

from deepspeed import accelerator, checkpointing, comm, ops, utils  # type: ignore[attr-defined]  # isort: skip
from deepspeed._config import DeepSpeedConfig, DeepSpeedConfigError, raises_as_deepspeed, round_weights, settings_of
from deepspeed._engine import DeepSpeedEngine
from deepspeed._utils import OnDevice, git_branch, git_hash, log_dist, logger, version
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import init_distributed

__all__ = [
    "DeepSpeedConfig", "DeepSpeedConfigError", "DeepSpeedEngine", "OnDevice", "accelerator", "add_config_arguments",
    "checkpointing", "comm", "dist", "get_accelerator", "init_distributed", "initialize", "log_dist", "logger", "ops",
    "utils", "zero",
]  # fmt: skip

__version__, __git_hash__, __git_branch__ = version, git_hash, git_branch
__version_major__, __version_minor__, __version_patch__ = map(int, version.split("."))
__redline__ = True  # tells this package from DeepSpeed's own
dist = comm
zero = importlib.import_module("deepspeed.runtime.zero")  # what the file `zero` has, and the modules of that path
__getattr__ = _paths.getter("deepspeed")


def initialize(
    args: Any = None, model: nn.Module | None = None, optimizer: Optimizer | Callable[..., Any] | None = None,
    model_parameters: Iterable[Any] | None = None, training_data: Any = None, lr_scheduler: Any = None,
    distributed_port: int = 29500, mpu: Any = None, dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None, config: Any = None, mesh_param: Any = None, config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:  # fmt: skip
    """As DeepSpeed's: an engine for the model, its optimizer, the loader of the training data, and the schedule.

    Raises:
        AssertionError, ValueError: as DeepSpeed raises them, for arguments and configs that cannot be obeyed.
        NotImplementedError: model parallelism of the script's own.
    """
    assert model is not None, "deepspeed.initialize requires a model"
    for kind in ("model", "pipe"):
        ranks = getattr(mpu, f"get_{kind}_parallel_world_size", lambda: 1)()
        if ranks > 1:
            raise NotImplementedError(f"mpu: {kind} parallelism over {ranks} ranks; Redline trains data-parallel")
    if config is None:
        config = config_params
    for name in ("deepspeed_config", "deepscale_config"):
        if (given := getattr(args, name, None)) is not None:
            assert config is None, f"got a config in args.{name} and another in initialize(config=...); give one"
            config = given
    settings, source = settings_of(config, args)
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    round_weights(model, settings)
    engine: Any = raises_as_deepspeed(redline.initialize)(
        model,
        source,
        optimizer=optimizer,
        model_parameters=model_parameters.parameters() if isinstance(model_parameters, nn.Module) else model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
    )
    engine.__class__ = DeepSpeedEngine
    engine.wear_face(settings)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a script's arguments."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", default=False, action="store_true", help="train with the engine")
    group.add_argument("--deepspeed_config", default=None, type=str, help="DeepSpeed's JSON file")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser
