"""Access to a parameter's master weight, gradient and optimizer state, at every ZeRO stage.

"full" is the value of all ranks, and a collective; "local" is this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepspeed._engine import engine_of
from deepspeed.zero import full_tensor, shard_like
from redline.optimizers.state import local_tensor

__all__ = [
    "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state", "safe_get_local_fp32_param",
    "safe_get_local_grad", "safe_get_local_optimizer_state", "safe_set_full_fp32_param", "safe_set_full_grad",
    "safe_set_full_optimizer_state", "safe_set_local_fp32_param", "safe_set_local_grad",
    "safe_set_local_optimizer_state", "safe_update_full_grad_vectorized",
]  # fmt: skip


def _find(param: Tensor, what: str, key: str | None) -> Any:
    """The tensor, sharded or not; None where there is none."""
    engine = engine_of(param)
    if what == "grad":
        return engine.gradient_of(param)
    masters = engine.master_params
    updated = param if masters is None else masters.of.get(param, param)
    if what == "fp32_param":
        return updated if param.requires_grad else None  # DeepSpeed has master weights of what trains alone
    return engine.optimizer.state.get(updated, {}).get(key)


def _get(what: str, part: Callable[[Any], Tensor], param: Tensor, optim_state_key: str | None = None) -> Tensor | None:
    found = _find(param, what, optim_state_key)
    if found is None:
        return None
    value, scaler = part(found).detach().to(torch.float32, copy=True), engine_of(param).scaler
    return value / scaler.value if what == "grad" and scaler is not None else value


def _set(
    what: str, part: Callable[[Any], Tensor], param: Tensor, value: Tensor, optim_state_key: str | None = None
) -> None:
    target, engine = _find(param, what, optim_state_key), engine_of(param)
    if part is full_tensor:
        value = shard_like(value, target)
    local = local_tensor(target).detach()
    if what == "grad":
        # The engine refuses gradients that others have written into; `data` passes its check.
        local, value = local.data, value if engine.scaler is None else value * engine.scaler.value
    local.copy_(value)
    if what == "fp32_param":
        engine.copy_master_to_model()


safe_get_full_fp32_param = partial(_get, "fp32_param", full_tensor)
safe_set_full_fp32_param = partial(_set, "fp32_param", full_tensor)
safe_get_local_fp32_param = partial(_get, "fp32_param", local_tensor)
safe_set_local_fp32_param = partial(_set, "fp32_param", local_tensor)
safe_get_full_grad = partial(_get, "grad", full_tensor)
safe_set_full_grad = partial(_set, "grad", full_tensor)
safe_get_local_grad = partial(_get, "grad", local_tensor)
safe_set_local_grad = partial(_set, "grad", local_tensor)
safe_get_full_optimizer_state = partial(_get, "optimizer_state", full_tensor)
safe_set_full_optimizer_state = partial(_set, "optimizer_state", full_tensor)
safe_get_local_optimizer_state = partial(_get, "optimizer_state", local_tensor)
safe_set_local_optimizer_state = partial(_set, "optimizer_state", local_tensor)


def safe_update_full_grad_vectorized(
    param_list: Iterable[Tensor], update_func: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Replace gradients by ``update_func(gradient, parameter)``."""
    for param in param_list:
        if (grad := safe_get_full_grad(param)) is not None:
            safe_set_full_grad(param, update_func(grad, param))
