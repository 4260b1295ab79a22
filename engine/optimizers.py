"""The config's optimizer section to a torch optimizer, fused and lean where torch has a fused one.

Names and defaults are DeepSpeed's (`deepspeed/runtime/engine.py`, `_configure_basic_optimizer`):
``Adam`` and ``AdamW`` are AdamW without weight decay unless the parameters say otherwise, and
``adam_w_mode: false`` makes ``Adam`` the classic one. ``Lamb``, ``Lion`` and ``Muon`` are DeepSpeed's. All other
names are `torch.optim`'s own.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.errors import EngineError
from engine.lamb import Lamb
from engine.lean import lean
from engine.muon import Muon, split

__all__ = ["build_optimizer", "known", "register", "resolve"]

_registered: dict[str, type[Optimizer]] = {}


def register(name: str, cls: type[Optimizer]) -> type[Optimizer]:
    """Make an optimizer known to configs under a name of its own; called as ``cls(params, **params)``.

    Raises:
        ValueError: the name is torch's or DeepSpeed's, or registered for another class.
    """
    if name in (*_torch_optimizers(), *_DEEPSPEEDS) or _registered.get(name, cls) is not cls:
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


def build_optimizer(
    name: str,
    arguments: dict[str, Any],
    parameters: Iterable[Any],
    *,
    names: Mapping[Tensor, str] | None = None,
) -> Optimizer:
    """The optimizer over these parameters (tensors, or groups with rates of their own).

    Args:
        name: the config's ``optimizer.type``.
        arguments: its ``params``, those that were given.
        parameters: what torch's optimizers take.
        names: of the model's parameters, by which Muon finds the hidden layers.

    Raises:
        EngineError: the optimizer refuses its arguments or the parameters.
    """
    cls: Any
    fused: Any
    parameters = list(parameters)
    if name == "Muon":
        parameters = split(parameters, arguments, names or {})
    cls, arguments = _as_deepspeed(name, arguments)
    fused = lean(cls)
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


_DEEPSPEEDS = ("Lamb", "Lion", "Muon")  # what is neither torch's, as it is here, nor registered

# Parameters that choose among DeepSpeed's implementations and mean nothing to these; the config has refused the
# values that would change the training.
_WITHOUT_EFFECT = ("torch_adam", "set_grad_none", "fp32_optimizer_states")


def _as_deepspeed(name: str, arguments: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """DeepSpeed's reading of a name: a class and its arguments."""
    rest = {key: value for key, value in arguments.items() if key not in _WITHOUT_EFFECT}
    if name == "Lamb":
        rest.pop("amsgrad", None)  # only false
        return Lamb, rest
    if name == "Lion":
        return _lion(), {"lr": 1e-3, "betas": (0.9, 0.999), **rest}  # the library's are 1e-4 and (0.9, 0.99)
    if name == "Muon":  # all others are in the groups
        return Muon, {"adam_w_mode": arguments.get("adam_w_mode", True)}
    if name.lower() not in ("adam", "adamw"):
        return resolve(name), arguments
    rest.pop("bias_correction", None)  # only true
    decoupled = rest.pop("adam_w_mode", True) or name.lower() == "adamw"
    if not arguments.get("torch_adam", False):
        rest.setdefault("weight_decay", 0.0)  # torch's AdamW has 0.01
    return torch.optim.AdamW if decoupled else torch.optim.Adam, rest


def _lion() -> type[Optimizer]:
    try:
        from pytorch_optimizer import Lion
    except ImportError as error:
        message = "optimizer Lion: needs pytorch-optimizer; install it with: pip install 'redline[optimizers]'"
        raise EngineError(message) from error
    cls: type[Optimizer] = Lion
    return cls


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
