"""What scripts read of DeepSpeed's optimizers, on Redline's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from deepspeed._not_built import ATTRIBUTES, not_built

__all__ = ["face_of"]

_faces: dict[type, type] = {}


def face_of(cls: type) -> type:
    """The optimizer's class with DeepSpeed's names; keeps its own name."""
    if cls not in _faces:
        _faces[cls] = type(cls.__name__, (_Face, cls), {"__module__": cls.__module__})
    return _faces[cls]


class _Face(Optimizer):
    """Answers for the engine, of which DeepSpeed's optimizers are a part."""

    deepspeed_engine: weakref.ref[Any]

    @property
    def optimizer(self) -> Optimizer:
        return self

    loss_scaler = optimizer  # whose loss_scale, cur_scale, scale_window and cur_iter are read

    def zero_grad(self, set_to_none: bool = True) -> None:
        engine = self.deepspeed_engine()
        if engine is None:
            super().zero_grad(set_to_none)
        else:
            engine.zero_grad(set_to_none)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ENGINE and (engine := self.deepspeed_engine()) is not None:
            return _OF_ENGINE[name](engine)
        if name in ATTRIBUTES:
            return not_built(f"deepspeed.DeepSpeedOptimizer.{name}", ATTRIBUTES[name])
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


_OF_ENGINE: dict[str, Callable[[Any], Any]] = {
    "overflow": lambda engine: engine.overflowed,
    "loss_scale": lambda engine: engine.loss_scale or 1.0,
    "cur_scale": lambda engine: engine.loss_scale or 1.0,
    "scale_window": lambda engine: engine.scaler.window,
    "cur_iter": lambda engine: engine.scaler.state_dict()["_updates"],
    "_global_grad_norm": lambda engine: engine.get_global_grad_norm(),
    "clip_grad": lambda engine: engine.gradient_clipping(),
    "dynamic_loss_scale": lambda engine: engine.dynamic_loss_scale(),
    "gradient_accumulation_steps": lambda engine: engine.gradient_accumulation_steps(),
    "is_gradient_accumulation_boundary": lambda engine: engine.is_gradient_accumulation_boundary(),
    "dtype": lambda engine: engine.precision.compute,
    "device": lambda engine: engine.device,
    "dp_process_group": lambda engine: engine.data_parallel_group,
    "cpu_offload": lambda engine: bool(engine.zero_cpu_offload()),
    "mpu": lambda engine: None,
    # Methods.
    "backward": lambda engine: engine.backward,
    "get_lr": lambda engine: lambda: engine.optimizer.param_groups[0]["lr"],
    "set_lr": lambda engine: engine.set_lr,
    "refresh_fp32_params": lambda engine: engine.reshard,  # takes over what was written into the model
    "update_lp_params": lambda engine: engine.copy_master_to_model,
}
