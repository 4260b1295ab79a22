"""Lamb as DeepSpeed computes it (`deepspeed/ops/lamb/fused_lamb.py` and its CUDA kernel), on any device.

torch has none, and the libraries' differ in what shows in every loss: none of them clamps the coefficient, and
DeepSpeed corrects the bias in the rate, after the coefficient, so that the first updates are smaller than the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Lamb"]


class Lamb(Optimizer):
    r"""Adam whose update of each tensor is as long as a share of the tensor (https://arxiv.org/abs/1904.00962).

    .. math::
        u = m / (\sqrt{v} + \epsilon) + \lambda w, \quad
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \min(\max(|w| / |u|, c_{min}), c_{max})\, u

    where a tensor or an update of zeros has the coefficient 1.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, per update; >= 0.
        betas: decay of the running means of the gradient and of its square, per update.
        eps: added to the denominator, in units of the gradient; under the root with `eps_inside_sqrt`.
        weight_decay: part of the update, and so of what the coefficient scales.
        bias_correction: correct the rate for means that start at zero.
        max_coeff: largest coefficient.
        min_coeff: smallest coefficient.
        eps_inside_sqrt: see `eps`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        eps_inside_sqrt: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "eps_inside_sqrt": eps_inside_sqrt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
            for sharded in (False, True):  # torch's operations on lists take no mixture
                parameters = [each for each in with_grad if hasattr(each, "_local_tensor") is sharded]
                if parameters:
                    _update(group, parameters, [self._counted(parameter) for parameter in parameters])
        return loss

    def _counted(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's state, this update counted."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state


def _update(group: dict[str, Any], parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
    grads: list[Any] = [parameter.grad for parameter in parameters]
    means, squares = [each["exp_avg"] for each in states], [each["exp_avg_sq"] for each in states]
    if any(map(torch.is_complex, parameters)):  # pairs of real numbers, as for torch's Adam
        parameters, grads, means, squares = (list(map(_as_real, each)) for each in (parameters, grads, means, squares))
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

    if group["eps_inside_sqrt"]:
        divisors = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(divisors)
    else:
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, group["eps"])
    updates = torch._foreach_div(means, divisors)
    torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])

    lengths, paces = torch.stack(_norms(parameters)), torch.stack(_norms(updates))
    coefficients = (lengths / paces).clamp(group["min_coeff"], group["max_coeff"])
    coefficients = torch.where((lengths != 0) & (paces != 0), coefficients, 1.0)
    torch._foreach_mul_(updates, list(coefficients.unbind()))
    lr = group["lr"]
    # A tensor on the GPU is not waited for.
    if isinstance(lr, Tensor) and (lr.device.type == "cpu" or hasattr(updates[0], "_local_tensor")):
        lr = lr.item()
    torch._foreach_mul_(updates, [-lr * _bias_correction(group, each["step"]) for each in states])
    torch._foreach_add_(parameters, updates)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norms, in fp32 for low precision: the coefficient is their ratio."""
    low = any(each.element_size() < 4 for each in tensors)
    return list(torch._foreach_norm(list(tensors), 2, torch.float32 if low else None))


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _bias_correction(group: dict[str, Any], step: int) -> float:
    if not group["bias_correction"]:
        return 1.0
    beta1, beta2 = group["betas"]
    factor: float = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return factor
