"""What torch's fused kernels may be given: parameters, gradients and state of one dtype, device and memory layout.

The kernels walk through memory and look at no strides. Given a slice of columns, or a gradient that is laid out
differently from its parameter, they write to the wrong elements on the CPU and refuse on CUDA. Parameters that they
cannot take are left to torch's unfused step; gradients and state are copied into their parameter's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

__all__ = [
    "FusedInputs", "Inputs", "by_kind", "fuse_again", "is_fusable", "move_state", "prepare_step",
    "unfuse_where_needed",
]  # fmt: skip

_FUSED_ON_SHARDS = (Adam, AdamW)
_DEVICES = ("cpu", "cuda")


# One group's tensors as its kernel may take them: parameters with a gradient, their gradients, their state (one list
# per key), and the indices of equal dtype and device (None where all are equal). Of sharded ones, this rank's shards.
# A plain tuple: a named one takes longer to make than the rest of a small model's check.
Inputs = tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[list[int]] | None]


class _Checked(NamedTuple):
    """A group as it was checked last. While its tensors are the same ones, they need no second look."""

    params: list[Tensor]
    state: list[list[Tensor]]
    layout: Callable[[Tensor], Any]  # of a tensor, as far as its kernel cares
    layouts: list[Any]  # of the (local) parameters
    local_state: list[list[Tensor]]
    kinds: list[list[int]] | None
    is_sharded: bool


class FusedInputs:
    """The inputs of one optimizer's fused kernels, group by group.

    Costs about 0.1 us per parameter and step: the layouts of parameters and gradients are read every time, since both
    can be replaced at any time; state is checked when its tensors are not the ones of the last check.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._checked: dict[int, _Checked] = {}
        self._keys_of = next(keys for cls, keys in _STATE_KEYS if isinstance(optimizer, cls))

    def of(self, optimizer: Optimizer, number: int, group: dict[str, Any]) -> Inputs | None:
        """The inputs for the group of this number; None where torch's unfused step has to do it.

        State that does not exist yet is created. State that does not match its parameter is replaced.
        """
        params: list[Tensor] = group["params"]
        grads: list[Any] = [param.grad for param in params]
        for grad in grads:
            if grad is None:  # of a frozen parameter, for example
                params = [param for param in params if param.grad is not None]
                grads = [param.grad for param in params]
                break
        if not params:
            return [], [], [], None
        keys = self._keys_of(group)
        state = _collect_state(optimizer, params, keys)
        if state is None:
            if not _create_state(optimizer, group, params):
                return None
            state = [[optimizer.state[param][key] for param in params] for key in keys]

        checked = self._checked.get(number)
        local = params
        if checked is not None and checked.is_sharded:
            local, grads = [_local(param) for param in params], [_local(grad) for grad in grads]
        if checked is None or not _is_unchanged(checked, params, local, state):
            checked = self._check(optimizer, number, params, keys, state)
            if checked is None:
                return None
            if checked.is_sharded:
                local, grads = [_local(param) for param in params], [_local(grad) for grad in grads]
        try:
            layouts = list(map(checked.layout, grads))
        except RuntimeError:  # sparse gradients have no strides
            return None
        if layouts != checked.layouts:
            if any(grad.layout is not torch.strided for grad in grads):
                return None
            grads = [
                grad if layout == wanted else _like(grad, param)
                for grad, param, layout, wanted in zip(grads, local, layouts, checked.layouts)
            ]
        return local, grads, checked.local_state, checked.kinds

    def _check(
        self,
        optimizer: Optimizer,
        number: int,
        params: list[Tensor],
        keys: tuple[str, ...],
        state: list[list[Tensor]],
    ) -> _Checked | None:
        self._checked.pop(number, None)
        local = [_local(param) for param in params]
        if not all(map(is_fusable, local)):
            return None
        # The CPU's kernels take any strides of dimensions of size 1, CUDA's none but the parameter's.
        simple = all(each.is_contiguous() and each.is_cpu for each in local)
        layout: Callable[[Tensor], Any] = Tensor.is_contiguous if simple else Tensor.stride
        for key, values in zip(keys, state):
            for index, (value, param) in enumerate(zip(values, params)):
                if isinstance(value, Tensor) and value.layout is not torch.strided:  # an unfused step left it sparse
                    return None
                values[index] = optimizer.state[param][key] = _fitting(key, value, param)
        found: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, each in enumerate(local):
            found.setdefault((each.dtype, each.device), []).append(index)
        checked = _Checked(
            list(params),
            state,
            layout,
            list(map(layout, local)),
            [[_local(value) for value in values] for values in state],
            None if len(found) == 1 else list(found.values()),
            any(each is not param for each, param in zip(local, params)),
        )
        self._checked[number] = checked
        return checked


def by_kind(inputs: Inputs) -> list[Inputs]:
    """Inputs of one dtype and device each, as one call of a kernel takes them."""
    params, grads, state, kinds = inputs
    if kinds is None:
        return [inputs]

    def picked(tensors: list[Tensor], kind: list[int]) -> list[Tensor]:
        return [tensors[index] for index in kind]

    return [(picked(params, kind), picked(grads, kind), [picked(each, kind) for each in state], None) for kind in kinds]


def is_fusable(param: Tensor) -> bool:
    """Whether the fused kernels can take a parameter: floating point, on CPU or CUDA, and dense in memory."""
    param = _local(param)
    if not param.is_floating_point() or param.device.type not in _DEVICES or param.layout is not torch.strided:
        return False
    # empty_like keeps the strides of a tensor without gaps and overlaps, and of no other.
    return param.is_contiguous() or torch.empty_like(param, device="meta").stride() == param.stride()


def unfuse_where_needed(group: dict[str, Any]) -> bool:
    """Leave a group that the fused kernels cannot take to the unfused step; returns whether it was changed."""
    if not group.get("fused") or all(map(is_fusable, group["params"])):
        return False
    group["fused"] = None
    return True


@torch.no_grad()
def prepare_step(optimizer: Optimizer, inputs: FusedInputs) -> list[dict[str, Any]]:
    """Make torch's own step right, whatever it is given; returns the groups that run unfused this once."""
    unfused = []
    fused_on_shards = isinstance(optimizer, _FUSED_ON_SHARDS)
    for number, group in enumerate(optimizer.param_groups):
        if not group["fused"]:
            continue
        ready = inputs.of(optimizer, number, group)
        params = [param for param in group["params"] if param.grad is not None]
        if ready is None or not (fused_on_shards or all(map(is_, params, ready[0]))):
            unfused.append(group)
            group["fused"] = None
            continue
        for param, grad in zip(params, ready[1]):
            if param.grad is not grad and _local(param) is param:
                param.grad = grad
    if not all(group["fused"] for group in optimizer.param_groups):
        _unscale(optimizer)
    return unfused


def fuse_again(groups: list[dict[str, Any]]) -> None:
    """Undo what `prepare_step` did to groups for one step."""
    for group in groups:
        group["fused"] = True


def _unscale(optimizer: Any) -> None:
    """Do what only the fused kernels can: divide by `grad_scale`, and skip a step for `found_inf`. May wait for it."""
    found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    if found_inf is not None:
        optimizer.found_inf = None
        if found_inf.item():
            for param in params:
                param.grad = None
            params = []
    if grad_scale is not None:
        optimizer.grad_scale = None
        for param in params:
            param.grad.div_(grad_scale.to(param.grad.device))


def move_state(
    optimizer: Optimizer, old: Tensor, new: Tensor, *, shard: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Give the state of one parameter to the parameter that takes its place in the optimizer.

    Tensors of the parameter's shape get the new one's dtype, device and memory layout. Of all others, those that had
    the old parameter's device or floating-point dtype get the new one's. ``step`` follows torch's rule: float32 on the
    parameter's device where the group is fused or capturable, on the CPU elsewhere.

    Args:
        optimizer: holds the old or the new parameter in one of its groups.
        old: parameter with or without state.
        new: parameter of the same shape; any dtype, device and layout.
        shard: what makes a full tensor of the parameter's shape one that is sharded as `new`; None where `new` is not.
    """
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    on_device = any(
        bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        if any(param is old or param is new for param in group["params"])
    )
    optimizer.state[new] = {key: _moved(key, value, old, new, on_device, shard) for key, value in state.items()}


def _moved(
    key: str, value: Any, old: Tensor, new: Tensor, on_device: bool, shard: Callable[[Tensor], Tensor] | None
) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        dtype = torch.float32 if on_device or value.element_size() < 4 else value.dtype
        return value.to(_local(new).device if on_device else "cpu", dtype)
    if value.shape == old.shape and value.ndim > 0:
        return _like(value if shard is None else shard(value), new)
    follows = value.dtype == old.dtype and value.is_floating_point() and value.ndim > 0
    stays = value.ndim == 0 and value.device != old.device
    return value.to(value.device if stays else _local(new).device, new.dtype if follows else value.dtype)


def _adams_keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step") if group["amsgrad"] else _ADAMS


def _sgds_keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _adagrads_keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("sum", "step")


# What the kernels take of a parameter's state, in their order.
_ADAMS = ("exp_avg", "exp_avg_sq", "step")
_STATE_KEYS: tuple[tuple[type[Optimizer], Callable[[dict[str, Any]], tuple[str, ...]]], ...] = (
    (SGD, _sgds_keys), (Adagrad, _adagrads_keys), (Adam, _adams_keys), (AdamW, _adams_keys)
)  # fmt: skip


def _collect_state(optimizer: Optimizer, params: list[Tensor], keys: tuple[str, ...]) -> list[list[Tensor]] | None:
    """One list per key; None where something does not exist yet."""
    if not keys:
        return []
    state = optimizer.state
    try:
        own = [state[param] for param in params]
        lists = [[each[key] for each in own] for key in keys]
    except KeyError:
        return None
    if len(keys) == 1:
        for value in lists[0]:
            if value is None:  # SGD's, of a step without momentum
                return None
    return lists


def _create_state(optimizer: Any, group: dict[str, Any], params: list[Tensor]) -> bool:
    """What torch's first step would make; False where only torch's unfused step makes it rightly."""
    if isinstance(optimizer, SGD):
        # The first step takes the gradient as it is. A buffer of zeros comes to the same without dampening, and stays
        # right if the step is skipped; torch's fused step leaves memory that nobody has written then, and fails where
        # some parameters of the group have a buffer and others do not.
        if group["dampening"] != 0:
            return False
        for param in params:
            if optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    elif isinstance(optimizer, Adagrad):
        for param in params:
            if not optimizer.state[param]:
                optimizer.state[param]["step"] = torch.zeros((), device=param.device, dtype=torch.float32)
                optimizer.state[param]["sum"] = torch.full_like(param, group["initial_accumulator_value"])
    else:
        optimizer._init_group(group, [], [], [], [], [], [])
    return True


def _is_unchanged(
    checked: _Checked, params: list[Tensor], local: list[Tensor], state: Sequence[Sequence[Tensor]]
) -> bool:
    if len(params) != len(checked.params) or len(state) != len(checked.state):
        return False
    if not all(map(is_, params, checked.params)) or list(map(checked.layout, local)) != checked.layouts:
        return False
    for now, before in zip(state, checked.state):  # noqa: SIM110  all() takes twice as long
        if not all(map(is_, now, before)):
            return False
    return True


def _fitting(key: str, value: Any, param: Tensor) -> Tensor:
    """A parameter's state as the kernels take it; the same tensor if it is so already."""
    local = _local(param)
    if key == "step":
        value = value if isinstance(value, Tensor) else torch.tensor(float(value))
        fitting: Tensor = value.to(local.device, torch.float32)
        return fitting
    if not isinstance(value, Tensor):
        return value  # type: ignore[no-any-return]  # nonsense, which the kernel will refuse
    own = _local(value)
    if own.dtype == local.dtype and own.device == local.device and own.stride() == local.stride():
        return value
    return _like(value, param)


@torch.no_grad()
def _like(value: Tensor, param: Tensor) -> Tensor:
    """A copy in the dtype, device and memory layout of a parameter."""
    return torch.empty_like(param, requires_grad=False).copy_(value)


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor unchanged."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard
