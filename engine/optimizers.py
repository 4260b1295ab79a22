"""The config's optimizer section to a torch optimizer, fused and lean where torch has a fused one.

Names and defaults are DeepSpeed's (`deepspeed/runtime/engine.py`, `_configure_basic_optimizer`):
``Adam`` and ``AdamW`` are AdamW without weight decay unless the parameters say otherwise, and
``adam_w_mode: false`` makes ``Adam`` the classic one. All other names are `torch.optim`'s own.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from engine.errors import EngineError
from engine.lean import lean

__all__ = ["build_optimizer", "known", "register", "resolve"]

_registered: dict[str, type[Optimizer]] = {}


def register(name: str, cls: type[Optimizer]) -> type[Optimizer]:
    """Make an optimizer known to configs under a name of its own; called as ``cls(params, **params)``.

    Raises:
        ValueError: the name is torch's, or registered for another class.
    """
    if name in _torch_optimizers() or _registered.get(name, cls) is not cls:
        raise ValueError(f"{name}: the name is taken; register the optimizer under another one")
    _registered[name] = cls
    return cls


def known() -> dict[str, type[Optimizer]]:
    """Every name that `resolve` takes, with its class."""
    return {**_registered, **_torch_optimizers()}


def resolve(name: str) -> type[Optimizer]:
    """The class behind an ``optimizer.type`` that is not DeepSpeed's Adam.

    Raises:
        LookupError: there is none; the message names the nearest.
    """
    classes = known()
    if name in classes:
        return classes[name]
    nearest = difflib.get_close_matches(name, classes, n=1, cutoff=0.4)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    raise LookupError(f'"{name}": unknown optimizer; {hint}Known: {", ".join(sorted(classes))}')


def build_optimizer(name: str, arguments: dict[str, Any], parameters: Iterable[Any]) -> Optimizer:
    """The optimizer over these parameters (tensors, or groups with rates of their own).

    Args:
        name: the config's ``optimizer.type``.
        arguments: its ``params``, those that were given.
        parameters: what torch's optimizers take.

    Raises:
        EngineError: the optimizer refuses its arguments or the parameters.
    """
    cls: Any
    fused: Any
    cls, arguments = _deepspeed_adam(name, arguments)
    fused = lean(cls)
    parameters = list(parameters)
    takes = inspect.signature(cls).parameters
    choice = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
    try:
        if "fused" in takes and not choice:
            try:
                return _unfused_where_needed(fused(parameters, fused=True, **arguments))
            except RuntimeError:  # torch's word for arguments that have no fused kernel
                pass
        plain: Optimizer = (fused if arguments.get("fused") else cls)(parameters, **arguments)
        return plain
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngineError(f"optimizer {name}: {error}") from error


def _unfused_where_needed(optimizer: Optimizer) -> Optimizer:
    """Leave groups that the fused kernels cannot take to the plain ones; torch would find out in the first step."""
    for group in optimizer.param_groups:
        if not all(each.is_floating_point() and each.device.type in ("cpu", "cuda") for each in group["params"]):
            group["fused"] = optimizer.defaults["fused"] = None
    return optimizer


def _deepspeed_adam(name: str, arguments: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """DeepSpeed's reading of the names Adam and AdamW as a torch class and its arguments."""
    if name.lower() not in ("adam", "adamw"):
        return resolve(name), arguments
    rest = {key: value for key, value in arguments.items() if key not in _DEEPSPEED_ONLY}
    decoupled = name.lower() == "adamw" or arguments.get("adam_w_mode", True)
    if not arguments.get("torch_adam", False):
        rest.setdefault("weight_decay", 0.0)  # torch's AdamW has 0.01
    return torch.optim.AdamW if decoupled else torch.optim.Adam, rest


# Parameters of DeepSpeed's own Adam that choose among implementations and mean nothing to torch's;
# the config has refused the values that would change the training.
_DEEPSPEED_ONLY = ("adam_w_mode", "torch_adam", "bias_correction", "set_grad_none", "fp32_optimizer_states")


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
