"""DeepSpeed's Muon: torch's Muon for the hidden matrices and AdamW for the rest, as one optimizer.

Which parameter goes where is DeepSpeed's rule (`deepspeed/__init__.py`, `set_optimizer_flags`), as are the names
and defaults (`deepspeed/runtime/engine.py`, `_muon_param_groups`); the updates are torch's. They agree in momentum,
Nesterov's look ahead, the coefficients and number of Newton-Schulz steps and the factor sqrt(max(1, rows / columns)).
They differ in three things: torch orthogonalizes in bfloat16 everywhere, which is DeepSpeed's `ns_method` "standard"
("gram" is the same iteration in float16); torch takes matrices alone, so convolutions go to AdamW; and a
parameter without a gradient stays as it is, where DeepSpeed decays it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from redline.log import log
from redline.optimizers.fused import fused_class

__all__ = ["Muon", "split"]

_MATRICES: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
_REST: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


class Muon(Optimizer):
    """Steps torch's Muon and Adam, which share its groups and its state.

    Args:
        groups: each with ``use_muon``, and the options of the optimizer that this chooses.
        adam_w_mode: decouple the weight decay of those that Adam updates.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, adam_w_mode: bool = True) -> None:
        super().__init__(groups, {"adam_w_mode": adam_w_mode})

    def step(self, closure: Any = None) -> Any:
        """Update the matrices, then the rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.state = self.state  # which the engine may have replaced
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**(_MATRICES if param_group["use_muon"] else _REST), **param_group})
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Make the two optimizers over the groups as they are; torch's complete these in place."""
        adam: Any = fused_class(torch.optim.AdamW if self.defaults["adam_w_mode"] else torch.optim.Adam)
        matrices = [group for group in self.param_groups if group["use_muon"]]
        rest = [group for group in self.param_groups if not group["use_muon"]]
        self._parts: list[Optimizer] = []
        for groups, make in ((matrices, _Matrices), (rest, partial(adam, fused=True))):
            if groups:
                part = make(groups)
                part.param_groups, part.state = groups, self.state
                self._parts.append(part)


class _Matrices(torch.optim.Muon):
    """torch's Muon, which takes sharded matrices, too: each is gathered once, and every rank keeps its shard."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient."""
        sharded = [
            (group, param)
            for group in self.param_groups
            for param in group["params"]
            if hasattr(param, "_local_tensor") and param.grad is not None
        ]
        for group, param in sharded:
            self._step_sharded(group, param)
        # torch's step does the rest, as gradients tell.
        grads = [param.grad for _, param in sharded]
        try:
            for _, param in sharded:
                param.grad = None
            super().step()  # type: ignore[no-untyped-call]
        finally:
            for (_, param), grad in zip(sharded, grads):
                param.grad = grad

    def _step_sharded(self, group: dict[str, Any], param: Any) -> None:
        from torch.distributed.tensor import distribute_tensor  # slow to import, and not needed without shards

        grad, state, momentum = param.grad, self.state[param], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = (grad.lerp(buffer, momentum) if group["nesterov"] else buffer).full_tensor()
        # What torch's Muon adds to a matrix of zeros is the orthogonalized update times the adjusted learning rate.
        step = torch.zeros_like(update).requires_grad_()
        step.grad = update
        options = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([step], momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()  # type: ignore[no-untyped-call]
        own = distribute_tensor(step.detach(), param.device_mesh, param.placements, src_data_rank=None)
        local = param._local_tensor
        local.mul_(1 - float(group["lr"]) * group["weight_decay"]).add_(own._local_tensor)


def split(parameters: Iterable[Any], arguments: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Each group's parameters as a group for Muon and one for Adam, with their options.

    A group's own option goes before ``muon_lr`` and ``adam_lr`` of the config's `arguments`, and these before ``lr``. A
    parameter may choose by an attribute ``use_muon``. `names` are those of the model's parameters.
    """
    arguments = {key: value for key, value in arguments.items() if value is not None}
    parameters = list(parameters)
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": parameters}]
    halves = []
    for group in groups:
        inside = group["params"]
        members: list[Any] = [inside] if isinstance(inside, Tensor) else list(inside)
        chosen = [_is_for_muon(each, names) for each in members]
        for use_muon, options, own_lr in ((True, _MATRICES, "muon_lr"), (False, _REST, "adam_lr")):
            half = [each for each, for_muon in zip(members, chosen) if for_muon is use_muon]
            given = {key: arguments[key] for key in options if key in arguments}
            if own_lr in arguments:
                given["lr"] = arguments[own_lr]
            own = {key: value for key, value in group.items() if key in options}
            if half:
                halves.append({"params": half, "use_muon": use_muon, **options, **given, **own})
    filters = [each for half in halves for each in half["params"] if _parameter(each).ndim > 2]
    if filters:
        log.warning("Muon: torch's takes matrices only; weights of more dimensions that Adam updates: %d", len(filters))
    return halves


def _is_for_muon(member: Any, names: Mapping[Tensor, str]) -> bool:
    """Whether a parameter is a hidden layer's matrix."""
    parameter = _parameter(member)
    own_name = member[0] if isinstance(member, tuple) else ""
    name = names.get(parameter, own_name).lower()
    hidden = not any(word in name for word in ("embed", "lm_head"))
    # One without elements has nothing to be orthogonalized, and torch divides by its width; it takes no complex ones.
    is_real_matrix = parameter.ndim == 2 and parameter.numel() > 0 and parameter.is_floating_point()
    return is_real_matrix and bool(getattr(parameter, "use_muon", hidden))


def _parameter(member: Any) -> Tensor:
    """What torch's optimizers take as one: a tensor, or a name and a tensor."""
    parameter: Tensor = member[1] if isinstance(member, tuple) else member
    return parameter
