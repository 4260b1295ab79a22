"""Optimizers by their config names: torch's, fused where it has a fused one; Lamb, Muon, and registered ones.

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

from redline.errors import EngineError
from redline.log import log
from redline.optimizers.fused import fused_class, guard_fused
from redline.optimizers.lamb import Lamb
from redline.optimizers.muon import Muon, split
from redline.optimizers.state import without_correction

__all__ = ["build_optimizer", "guard_steps", "known", "register", "resolve", "unfuse_on_shards"]

_registered: dict[str, type[Optimizer]] = {}
_DEEPSPEEDS = ("Lamb", "Lion", "Muon")  # what is neither torch's, as it is here, nor registered

# Parameters that choose among DeepSpeed's implementations and mean nothing to these; the config has refused the
# values that would change the training.
_WITHOUT_EFFECT = ("torch_adam", "set_grad_none", "fp32_optimizer_states")


def register(name: str, cls: type[Optimizer]) -> type[Optimizer]:
    """Make an optimizer known to configs under a name of its own; called as ``cls(params, **params)``.

    Raises:
        ValueError: the name is torch's or DeepSpeed's, or registered for another class.
    """
    if name in _DEEPSPEEDS or known().get(name, cls) is not cls:
        raise ValueError(f"{name}: the name is taken; register the optimizer under another one")
    _registered[name] = cls
    return cls


def known() -> dict[str, type[Optimizer]]:
    """Every name that `resolve` takes, with its class."""
    torch_own = {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    return {**_registered, **torch_own}


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
    name: str, arguments: dict[str, Any], parameters: Iterable[Any], *, names: Mapping[Tensor, str] | None = None
) -> Optimizer:
    """The optimizer over these parameters (tensors, or groups with rates of their own).

    `arguments` are the config's ``optimizer.params``, those that were given. Muon finds the hidden layers by `names`.

    Raises:
        EngineError: the optimizer refuses its arguments or the parameters.
    """
    parameters = list(parameters)
    if name == "Muon":
        parameters = split(parameters, arguments, names or {})
    cls, arguments = _as_deepspeed(name, arguments)
    corrected = arguments.pop("bias_correction", True) if issubclass(cls, torch.optim.Adam) else True
    try:
        optimizer = guard_steps(_build(cls, arguments, parameters, ours=not corrected))
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngineError(f"optimizer {name}: {error}") from error
    return optimizer if corrected else without_correction(optimizer)


def _build(cls: Any, arguments: dict[str, Any], parameters: list[Any], ours: bool) -> Optimizer:
    """Fused where torch can and the arguments do not say otherwise; `ours` is for one of our classes in either case."""
    fused: Any = fused_class(cls)
    choice = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
    if "fused" in inspect.signature(cls).parameters and not choice:
        try:
            default: Optimizer = fused(parameters, fused=True, **arguments)
            if not all(group["fused"] for group in default.param_groups):
                default.defaults["fused"] = None  # what is logged, and what groups that are added later get
            return default
        except RuntimeError:  # torch's word for arguments that have no fused kernel
            pass
    optimizer: Optimizer = (fused if ours or arguments.get("fused") else cls)(parameters, **arguments)
    if arguments.get("fused") and not all(group["fused"] for group in optimizer.param_groups):
        log.warning(
            "optimizer %s: fused is true, but torch's fused kernel cannot take some of the parameters (complex ones, "
            "or slices that are not dense in memory); their groups take the unfused step", cls.__name__,
        )  # fmt: skip
    return optimizer


def guard_steps(optimizer: Optimizer) -> Optimizer:
    """Make an optimizer's steps right where torch's own are not, in place; the script's own optimizers, too.

    Fused ones get gradients and state in the memory layout of their parameters. SparseAdam gets sparse gradients
    where something has made them dense: fp32 copies of a low-precision embedding, or zeros for one without a gradient.
    """
    guard_fused(optimizer)
    if isinstance(optimizer, torch.optim.SparseAdam):
        optimizer.register_step_pre_hook(_make_sparse)
    return optimizer


def unfuse_on_shards(optimizer: Optimizer) -> None:
    """Use kernels that take DTensors: of torch's fused ones only Adam's do.

    Not all foreach operations do, which Lion uses: torch 2.9 lacks one for DTensors, and no version mixes them with
    full parameters that are not scalars.
    """
    module, adam = type(optimizer).__module__, isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for each in (optimizer.defaults, *optimizer.param_groups):  # the defaults are those of groups that are added later
        if module.startswith("pytorch_optimizer.") and each.get("foreach", False) is None:
            each["foreach"] = False
        if module.startswith("torch.") and not adam and each.get("fused"):
            each["fused"] = None
            if each is optimizer.param_groups[0]:
                name = type(optimizer).__name__
                log.info("%s: torch's fused kernel does not take sharded parameters; the plain one is used", name)


@torch.no_grad()
def _make_sparse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and not param.grad.is_sparse and param.ndim > 0:
                rows = param.grad.to_sparse(1)
                # SparseAdam counts no step of an embedding that was not used.
                param.grad = rows if rows._nnz() else None


def _as_deepspeed(name: str, arguments: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """DeepSpeed's reading of a name: a class and its arguments."""
    rest = {key: value for key, value in arguments.items() if key not in _WITHOUT_EFFECT}
    if name == "Lamb":
        rest.pop("amsgrad", None)  # only false
        return Lamb, rest
    if name == "Lion":
        try:
            from pytorch_optimizer import Lion
        except ImportError as error:
            message = "optimizer Lion: needs pytorch-optimizer; install it with: pip install 'redline[optimizers]'"
            raise EngineError(message) from error
        return Lion, {"lr": 1e-3, "betas": (0.9, 0.999), **rest}  # the library's are 1e-4 and (0.9, 0.99)
    if name == "Muon":  # all others are in the groups
        return Muon, {"adam_w_mode": arguments.get("adam_w_mode", True)}
    if name.lower() not in ("adam", "adamw"):
        return resolve(name), arguments
    decoupled = rest.pop("adam_w_mode", True) or name.lower() == "adamw"
    if not arguments.get("torch_adam", False):
        rest.setdefault("weight_decay", 0.0)  # torch's AdamW has 0.01
    return torch.optim.AdamW if decoupled else torch.optim.Adam, rest
