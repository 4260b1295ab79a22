"""`deepspeed.ops`: its optimizers, which are torch's and Redline's with DeepSpeed's arguments; nothing is compiled."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepspeed._modules import not_built
from deepspeed._names import NOT_BUILT
from redline.optimizers import build_optimizer
from redline.optimizers.fused import AdamW
from redline.optimizers.lamb import Lamb
from redline.optimizers.state import without_correction

# Whether DeepSpeed could compile it; here these are torch's or Redline's.
__compatible_ops__ = dict.fromkeys(
    ("cpu_adam", "cpu_adagrad", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion"), True
)
__installed_ops__ = __compatible_ops__

__all__ = ["DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLamb", "FusedLion"]


class _AnyAdam(type):
    """An engine's Adam counts as DeepSpeed's, whichever class it is of."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.optim.Adam)


class FusedAdam(AdamW, metaclass=_AnyAdam):
    """Adam, with decoupled weight decay unless `adam_w_mode` is false; torch's fused kernel."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:  # fmt: skip
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = adam_w_mode
        self.defaults["decoupled_weight_decay"] = adam_w_mode
        if not bias_correction:
            without_correction(self)
        self.adam_w_mode = adam_w_mode


class DeepSpeedCPUAdam(FusedAdam):
    """The same, as DeepSpeed names it where the optimizer's state is on the CPU."""

    def __init__(
        self, model_params: Any, lr: float = 1e-3, bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0, amsgrad: bool = False,
        adamw_mode: bool = True, fp32_optimizer_states: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


class FusedLamb(Lamb):
    """Redline's Lamb, which computes as DeepSpeed's."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, eps_inside_sqrt: bool = False, weight_decay: float = 0.0, max_grad_norm: float = 0.0,
        max_coeff: float = 10.0, min_coeff: float = 0.01, amsgrad: bool = False,
    ) -> None:  # fmt: skip
        if amsgrad:
            raise RuntimeError("FusedLamb does not support the AMSGrad variant.")
        super().__init__(
            params, lr, betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction,
            max_coeff=max_coeff, min_coeff=min_coeff, eps_inside_sqrt=eps_inside_sqrt,
        )  # fmt: skip


def FusedLion(
    params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0,
    set_grad_none: bool = True,
) -> torch.optim.Optimizer:  # fmt: skip
    return build_optimizer("Lion", {"lr": lr, "betas": betas, "weight_decay": weight_decay}, params)


def DeepSpeedCPULion(
    model_params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0,
    fp32_optimizer_states: bool = True,
) -> torch.optim.Optimizer:  # fmt: skip
    return FusedLion(model_params, lr, betas, weight_decay)


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """torch's Adagrad."""

    def __init__(
        self, model_params: Any, lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0,
        amsgrad: bool = False, fp32_optimizer_states: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


# -- what scripts read of DeepSpeed's optimizers ----------------------------------------------------------


class _FaceOptimizer(Optimizer):
    """What scripts read of DeepSpeed's optimizers."""

    deepspeed_engine: weakref.ref[Any]

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped for gradients that were not finite."""
        engine = self.deepspeed_engine()
        return engine is not None and engine.overflowed

    @property
    def loss_scale(self) -> float:
        """The factor of the next loss; 1 where there is none."""
        engine = self.deepspeed_engine()
        scale = None if engine is None else engine.loss_scale
        return 1.0 if scale is None else scale

    cur_scale = loss_scale

    @property
    def optimizer(self) -> Optimizer:
        return self

    loss_scaler = optimizer  # whose loss_scale and cur_scale are read

    def refresh_fp32_params(self) -> None:
        """Take over what was written into the model."""
        self.deepspeed_engine().reshard()  # type: ignore[union-attr]

    def update_lp_params(self) -> None:
        """Copy the master weights into the model."""
        self.deepspeed_engine().copy_master_to_model()  # type: ignore[union-attr]

    def get_lr(self) -> float:
        return self.param_groups[0]["lr"]  # type: ignore[no-any-return]

    def set_lr(self, lr: float) -> None:
        self.deepspeed_engine().set_lr(lr)  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ENGINE and (engine := self.deepspeed_engine()) is not None:
            return _OF_ENGINE[name](engine)
        if name in NOT_BUILT:
            return not_built(f"deepspeed.DeepSpeedOptimizer.{name}", NOT_BUILT[name])
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def zero_grad(self, set_to_none: bool = True) -> None:
        engine = self.deepspeed_engine()
        if engine is None:
            super().zero_grad(set_to_none)
        else:
            engine.zero_grad(set_to_none)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        engine = self.deepspeed_engine()
        assert engine is not None
        engine.backward(loss, retain_graph=retain_graph)


_OF_ENGINE: dict[str, Callable[[Any], Any]] = {
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
}
_faces: dict[type, type] = {}


def face_of(cls: type) -> type:
    """The optimizer's class with DeepSpeed's names; keeps its own name."""
    if cls not in _faces:
        _faces[cls] = type(cls.__name__, (_FaceOptimizer, cls), {"__module__": cls.__module__})
    return _faces[cls]


# -- builders of compiled operations, of which there are none ---------------------------------------------


class OpBuilder:
    """Says of any of DeepSpeed's compiled operations that it is not there."""

    NAME = "none"
    ACCELERATOR_NAME = "none"

    def is_compatible(self, verbose: bool = False) -> bool:
        return False

    def load(self, verbose: bool = False) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: Redline compiles no operations; torch's own are used")

    def builder(self) -> Any:
        return self.load()


def __getattr__(name: str) -> Any:
    if not name.endswith("Builder"):
        raise AttributeError(f"module 'deepspeed.ops' has no attribute {name!r}")
    words = re.findall("[A-Z]+(?=[A-Z]|$)|[A-Z][a-z0-9]+", name.removesuffix("Builder"))
    return type(name, (OpBuilder,), {"NAME": "_".join(words).lower()})
