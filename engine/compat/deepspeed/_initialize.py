"""`deepspeed.initialize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import redline
from deepspeed import comm
from deepspeed._config import deepspeeds_errors, settings_of
from deepspeed._engine import DeepSpeedEngine

__all__ = ["initialize"]


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
    for name, size in (("model", "get_model_parallel_world_size"), ("pipeline", "get_pipe_parallel_world_size")):
        if mpu is not None and hasattr(mpu, size) and getattr(mpu, size)() > 1:
            raise NotImplementedError(f"mpu: {name} parallelism over more than 1 rank; Redline trains data-parallel")
    if config is None:
        config = config_params
    for name in ("deepspeed_config", "deepscale_config"):
        given = getattr(args, name, None) if args is not None else None
        if given is not None:
            assert config is None, f"got a config in args.{name} and another in initialize(config=...); give one"
            config = given
    settings, source = settings_of(config, args)
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    if isinstance(model_parameters, nn.Module):
        model_parameters = model_parameters.parameters()
    given = {"optimizer": optimizer, "model_parameters": model_parameters, "training_data": training_data,
             "lr_scheduler": lr_scheduler, "collate_fn": collate_fn}  # fmt: skip
    _round(model, settings)
    with deepspeeds_errors():
        own = redline.initialize(model, source, **given)
    own.__class__ = DeepSpeedEngine
    engine: Any = own
    engine._wear_face(settings)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


@torch.no_grad()
def _round(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """DeepSpeed casts the model before it makes master weights from it, so that these start from rounded values."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16)):
        section = settings.get(name)
        if isinstance(section, Mapping) and section.get("enabled") is True:
            for param in model.parameters():
                if param.dtype is torch.float32 and not param.is_meta:
                    param.copy_(param.to(dtype))
