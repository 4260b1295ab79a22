"""`deepspeed.ops`: its optimizers, which are torch's and Redline's with DeepSpeed's arguments; nothing is compiled."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch.optim import Optimizer

from redline.optimizers import build_optimizer
from redline.optimizers.fused import AdamW
from redline.optimizers.lamb import Lamb
from redline.optimizers.state import without_correction

__all__ = ["DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLamb", "FusedLion"]
__path__: list[str] = []  # a package in DeepSpeed: `_paths` finds what is in it

# Whether DeepSpeed could compile it; here these are torch's or Redline's, and there are no others.
__compatible_ops__ = __installed_ops__ = defaultdict(
    bool, dict.fromkeys(("cpu_adam", "cpu_adagrad", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion"), True)
)


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
        _refuse_amsgrad(self, amsgrad)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in (self.defaults, *self.param_groups):
            group["decoupled_weight_decay"] = adam_w_mode
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
        _refuse_amsgrad(self, amsgrad)
        super().__init__(
            params, lr, betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction,
            max_coeff=max_coeff, min_coeff=min_coeff, eps_inside_sqrt=eps_inside_sqrt,
        )  # fmt: skip


def _refuse_amsgrad(optimizer: Optimizer, amsgrad: bool) -> None:
    if amsgrad:
        raise RuntimeError(f"{type(optimizer).__name__} does not support the AMSGrad variant.")


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """torch's Adagrad."""

    def __init__(
        self, model_params: Any, lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0,
        amsgrad: bool = False, fp32_optimizer_states: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


def FusedLion(
    params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0,
    set_grad_none: bool = True,
) -> Optimizer:  # fmt: skip
    return build_optimizer("Lion", {"lr": lr, "betas": betas, "weight_decay": weight_decay}, params)


def DeepSpeedCPULion(
    model_params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0,
    fp32_optimizer_states: bool = True,
) -> Optimizer:  # fmt: skip
    return FusedLion(model_params, lr, betas, weight_decay)


# -- builders of compiled operations, of which there are none ---------------------------------------------


class OpBuilder:
    """Says of any of DeepSpeed's compiled operations that it is not there."""

    NAME = "none"
    ACCELERATOR_NAME = "none"

    def is_compatible(self, verbose: bool = False) -> bool:
        return False

    def load(self, verbose: bool = False) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: Redline compiles no operations; torch's own are used")

    builder = load


def __getattr__(name: str) -> Any:
    if not name.endswith("Builder"):
        raise AttributeError(f"module 'deepspeed.ops' has no attribute {name!r}")
    words = re.findall("[A-Z]+(?=[A-Z]|$)|[A-Z][a-z0-9]+", name.removesuffix("Builder"))
    return type(name, (OpBuilder,), {"NAME": "_".join(words).lower()})
