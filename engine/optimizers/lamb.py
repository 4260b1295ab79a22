"""Lamb as DeepSpeed computes it (`deepspeed/ops/lamb/fused_lamb.py` and its CUDA kernel), on any device.

torch has none, and the libraries' differ in what shows in every loss: none of them clamps the coefficient, and
DeepSpeed corrects the bias in the rate, after the coefficient, so that the first updates are smaller than the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from redline.optimizers.state import local_tensor

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
        lr: learning rate, >= 0.
        betas: decay of the running means of the gradient and of its square.
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                    "bias_correction": bias_correction, "max_coeff": max_coeff, "min_coeff": min_coeff,
                    "eps_inside_sqrt": eps_inside_sqrt}  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_sharding: dict[Any, list[Tensor]] = {}  # norms are reduced over the ranks that share a tensor
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                state["step"] += 1
                sharding = (param.device_mesh, param.placements) if hasattr(param, "_local_tensor") else None
                by_sharding.setdefault(sharding, []).append(param)
            for sharding, params in by_sharding.items():
                _update(group, params, [self.state[param] for param in params], sharding)
        return loss


def _update(
    group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], sharding: tuple[Any, Any] | None
) -> None:
    lists: list[list[Any]] = [
        params,
        [param.grad for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
    ]
    # All but the norms is elementwise, and torch takes longer for lists of DTensors.
    lists = [list(map(local_tensor, tensors)) for tensors in lists]
    if any(map(torch.is_complex, lists[0])):  # pairs of real numbers, as for torch's Adam
        lists = [[torch.view_as_real(each) if each.is_complex() else each for each in tensors] for tensors in lists]
    params, grads, means, squares = lists
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
    torch._foreach_add_(updates, params, alpha=group["weight_decay"])

    param_norms, update_norms = _norms([*params, *updates], sharding).chunk(2)
    coefficients = (param_norms / update_norms).clamp(group["min_coeff"], group["max_coeff"])
    coefficients = torch.where((param_norms != 0) & (update_norms != 0), coefficients, 1.0)
    torch._foreach_mul_(updates, list(coefficients.unbind()))
    lr = group["lr"]
    # A tensor on the GPU is not waited for.
    if isinstance(lr, Tensor) and "cpu" in (lr.device.type, updates[0].device.type):
        lr = lr.item()
    factors = [1.0] * len(states)
    if group["bias_correction"]:
        factors = [math.sqrt(1 - beta2 ** each["step"]) / (1 - beta1 ** each["step"]) for each in states]
    torch._foreach_mul_(updates, [-lr * factor for factor in factors])
    torch._foreach_add_(params, updates)


def _norms(tensors: list[Tensor], sharding: tuple[Any, Any] | None) -> Tensor:
    """2-norms of full tensors or of the shards' full ones, shape (n,); in fp32 for low precision, as ratios need it."""
    low = any(each.element_size() < 4 for each in tensors)
    norms = torch.stack(torch._foreach_norm(tensors, 2, torch.float32 if low else None))
    if sharding is None:
        return norms
    mesh, placements = sharding
    squares = norms.square()
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            dist.all_reduce(squares, group=mesh.get_group(axis))  # one for all norms
    return squares.sqrt()
