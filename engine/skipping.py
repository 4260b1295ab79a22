"""Optimizer steps that the device leaves out by itself where a gradient is not finite.

torch's fused kernels do so when they are given `found_inf`. For other optimizers the step is made, and what it has
changed is put back on the device: nothing waits, at the price of a copy of parameters and state while the step runs,
when the activations are gone. What an optimizer counts on the host is put back once the host knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

__all__ = ["can_put_back", "can_skip", "num_state_tensors", "step_or_put_back"]


def can_skip(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer leaves a step out by itself where `found_inf` says so."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return optimizer is not None and all(group.get("fused") for group in optimizer.param_groups)


def can_put_back(optimizer: Optimizer) -> bool:
    """Whether all that a step changes is known to be in parameters, state and groups.

    A script's own optimizer may keep more, and the others have state that is no tensor or number.
    """
    module = type(optimizer).__module__
    if isinstance(optimizer, (LBFGS, SparseAdam)):
        return False
    return module.startswith(("torch.optim.", "engine.")) or module == "pytorch_optimizer.optimizer.lion"


def num_state_tensors(optimizer: Optimizer) -> int:
    """How many tensors an optimizer's state has."""
    return sum(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())


@torch.no_grad()
def step_or_put_back(optimizer: Optimizer, step: Callable[[], None], found_inf: Tensor) -> Callable[[], None]:
    """Make a step, and put it back on the device where `found_inf` is not 0.

    Args:
        optimizer: with the state that its step needs; what a first step makes would stay.
        step: makes the step.
        found_inf: a scalar on the device of the parameters.

    Returns:
        What puts back state on the host, if the step has been left out.
    """
    device = found_inf.device
    params = [_local(param) for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    on_device = [(param, param.clone()) for param in params]
    kept: list[tuple[dict[Any, Any], Any, Tensor]] = []  # of state on the device
    on_host: list[tuple[dict[Any, Any], Any, Any]] = []
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "lr":
                local = _local(value)
                (kept if local.device == device else on_host).append((state, key, local.clone()))
            elif type(value) is int or type(value) is float:
                on_host.append((state, key, value))

    step()
    skip = found_inf.bool()
    on_device += [(_local(state[key]), then) for state, key, then in kept]
    for now, then in on_device:
        torch.where(skip, then, now, out=now)
    changed = [(state, key, then) for state, key, then in on_host if isinstance(then, Tensor) or state.get(key) != then]

    def put_back() -> None:
        for state, key, then in changed:
            if isinstance(then, Tensor):
                _local(state[key]).copy_(then)
            else:
                state[key] = then

    return put_back


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a sharded tensor, without its graph; of any other tensor all of it."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard.detach()
