"""An optimizer's state: created, given to other parameters, put back after a step that must not count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

__all__ = ["can_put_back", "can_skip", "carry_over", "count_steps", "create_state", "endless", "like", "local_tensor",
           "move_state", "num_state_tensors", "replace_params", "step_or_put_back", "without_correction",
           "without_counts"]  # fmt: skip


def local_tensor(tensor: Any) -> Any:
    """This rank's shard of a sharded tensor; anything else unchanged."""
    return getattr(tensor, "_local_tensor", tensor)


@torch.no_grad()
def like(value: Tensor, param: Tensor) -> Tensor:
    """A copy in the dtype, device and memory layout of a parameter."""
    return torch.empty_like(param, requires_grad=False).copy_(value)


@torch.no_grad()
def create_state(optimizer: Any, group: dict[str, Any], params: list[Tensor]) -> bool:
    """The state that torch's first fused step would make; False where only torch's unfused step makes it rightly."""
    if isinstance(optimizer, torch.optim.SGD):
        # The first step takes the gradient as it is. A buffer of zeros comes to the same without dampening, and stays
        # right if the step is skipped; torch's fused step leaves memory that nobody has written then, and fails where
        # some parameters of the group have a buffer and others do not.
        if group["dampening"] != 0:
            return False
        for param in params:
            if optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    elif isinstance(optimizer, torch.optim.Adagrad):
        for param in params:
            if not optimizer.state[param]:
                optimizer.state[param]["step"] = torch.zeros((), device=param.device, dtype=torch.float32)
                optimizer.state[param]["sum"] = torch.full_like(param, group["initial_accumulator_value"])
    else:
        optimizer._init_group(group, [], [], [], [], [], [])
    return True


def carry_over(given: Any, moved: Mapping[Tensor, Tensor]) -> Any:
    """What torch's optimizers take (parameters, names and parameters, groups of either) with new parameters for old."""
    if isinstance(given, Tensor):
        return moved.get(given, given)
    if isinstance(given, dict):
        return {**given, "params": carry_over(given["params"], moved)} if "params" in given else given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):  # a name and its parameter
        return given[0], carry_over(given[1], moved)
    if isinstance(given, str) or not isinstance(given, Iterable):  # torch says what is wrong with it
        return given
    return [carry_over(each, moved) for each in given]


def replace_params(
    optimizer: Optimizer,
    moved: Mapping[Tensor, Tensor],
    shard: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Give an optimizer new parameters for old ones, in place, and their state with them.

    `shard` makes a full tensor, its second argument, one that is sharded as the new parameter is.
    """
    for group in optimizer.param_groups:
        group["params"] = carry_over(group["params"], moved)
    for old, new in moved.items():
        move_state(optimizer, old, new, shard=None if shard is None else partial(shard, new))


def move_state(
    optimizer: Optimizer, old: Tensor, new: Tensor, *, shard: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Give the state of one parameter to the parameter that takes its place in the optimizer.

    Tensors of the parameter's shape get the new one's dtype, device and memory layout, after `shard` has sharded them
    where the new one is. Of all others, those that had the old one's device or floating-point dtype get the new one's.
    ``step`` follows torch's rule: float32 on the parameter's device where the group is fused or capturable, else on the
    CPU.
    """
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    counts_on_device = any(
        bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        if any(param is old or param is new for param in group["params"])
    )
    device = local_tensor(new).device

    def moved(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if key == "step":
            dtype = torch.float32 if counts_on_device or value.element_size() < 4 else value.dtype
            return value.to(device if counts_on_device else "cpu", dtype)
        if value.shape == old.shape and value.ndim > 0:
            return like(value if shard is None else shard(value), new)
        follows = value.dtype == old.dtype and value.is_floating_point() and value.ndim > 0
        stays = value.ndim == 0 and value.device != old.device
        return value.to(value.device if stays else device, new.dtype if follows else value.dtype)

    optimizer.state[new] = {key: moved(key, value) for key, value in state.items()}


# -- Adam without bias correction -----------------------------------------------------------------------------------
#
# Its factors are 1 - beta ** step: after infinitely many steps they are 1. State keeps the true counts.


def without_correction(optimizer: Optimizer) -> Optimizer:
    """Leave the bias of the means uncorrected, in groups that do not say otherwise; `optimizer` is one of ours."""
    for each in (optimizer.defaults, *optimizer.param_groups):
        each.setdefault("bias_correction", False)
    return optimizer


def endless(steps: list[Tensor]) -> list[Tensor]:
    """Infinite counts for a kernel, which only reads them."""
    return [torch.full_like(steps[0], torch.inf)] * len(steps)


@contextmanager
def without_counts(optimizer: Any) -> Iterator[None]:
    """While torch's own step runs, groups without bias correction have infinite counts."""
    counts: list[tuple[dict[str, Any], Tensor]] = []
    for group in optimizer.param_groups:
        if group.get("bias_correction", True):
            continue
        params = [param for param in group["params"] if param.grad is not None]
        create_state(optimizer, group, params)
        counts += [(optimizer.state[param], optimizer.state[param]["step"]) for param in params]
    for state, step in counts:
        state["step"] = torch.full_like(step, torch.inf)
    taken = 0
    try:
        yield
        taken = 1
    finally:
        found_inf = getattr(optimizer, "found_inf", None)
        for state, step in counts:
            state["step"] = step.add_(taken)
            if taken and found_inf is not None:  # a skipped step does not count
                step.sub_(found_inf.to(step.device))


# -- steps -----------------------------------------------------------------------------------------------------------


def count_steps(optimizer: Any) -> None:
    """Count an optimizer's calls of step() in its `num_steps`."""
    if hasattr(type(optimizer), "num_steps"):  # ours count them themselves, and a hook would slow it down
        return
    optimizer.num_steps = 0

    def count(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.num_steps += 1

    optimizer.register_step_pre_hook(count)


def can_skip(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer leaves a step out by itself where its `found_inf` is not 0, as torch's fused kernels do."""
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
    return module.startswith(("torch.optim.", "redline.")) or module == "pytorch_optimizer.optimizer.lion"


def num_state_tensors(optimizer: Optimizer) -> int:
    """How many tensors an optimizer's state has."""
    return sum(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())


@torch.no_grad()
def step_or_put_back(optimizer: Optimizer, step: Callable[[], None], found_inf: Tensor) -> Callable[[], None]:
    """Make a step, and put it back on the device where `found_inf` is not 0.

    Nothing waits for the device, at the price of a copy of parameters and state while the step runs, when the
    activations are gone.

    The optimizer has the state that its step needs: what a first step makes would stay. `found_inf` is a scalar on the
    device of the parameters. Returns what puts back state on the host, if the step has been left out.
    """
    params = [
        local_tensor(param).detach()
        for group in optimizer.param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    on_device = [(param, param.clone()) for param in params]
    kept: list[tuple[dict[Any, Any], Any, Tensor]] = []  # of state on the device
    on_host: list[tuple[dict[Any, Any], Any, Any]] = []
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "lr":
                local = local_tensor(value).detach()
                (kept if local.device == found_inf.device else on_host).append((state, key, local.clone()))
            elif type(value) is int or type(value) is float:
                on_host.append((state, key, value))

    step()
    skip = found_inf.bool()
    on_device += [(local_tensor(state[key]).detach(), then) for state, key, then in kept]
    for now, then in on_device:
        torch.where(skip, then, now, out=now)
    changed = [(state, key, then) for state, key, then in on_host if isinstance(then, Tensor) or state.get(key) != then]

    def put_back() -> None:
        for state, key, then in changed:
            if isinstance(then, Tensor):
                local_tensor(state[key]).detach().copy_(then)
            else:
                state[key] = then

    return put_back
