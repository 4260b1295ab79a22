"""ZeRO stage 3's leaf modules, whose parameters DeepSpeed gathers as one: marks that nothing here needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

__all__ = [
    "get_z3_leaf_modules", "set_z3_leaf_module", "set_z3_leaf_modules", "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix", "unset_z3_leaf_modules", "z3_leaf_module", "z3_leaf_parameter",
]  # fmt: skip

Matches = Callable[[str, nn.Module, Any], bool]  # whether a module, given with its name, is one that is asked for


def _mark(
    flag: bool, matches: Matches, model: nn.Module, wanted: Iterable[Any], raise_if_not_found: bool
) -> tuple[list[nn.Module], list[Any]]:
    """Mark modules, or take their marks away; returns them, and what of `wanted` none of them is."""
    wanted, named = list(wanted), list(model.named_modules())
    found = [module for name, module in named if any(matches(name, module, each) for each in wanted)]
    missing = [each for each in wanted if not any(matches(name, module, each) for name, module in named)]
    if raise_if_not_found and missing and (not found or matches is not _is_class):
        raise ValueError(f"No modules of type or name {missing} found in model {type(model).__name__}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found, missing


def _is_class(name: str, module: nn.Module, wanted: Any) -> bool:
    cls = type(module)
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    return wanted in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark modules of these classes, given as such or by name; returns them."""
    return _mark(True, _is_class, model, leaf_module_classes, raise_if_not_found)[0]


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Undo :func:`set_z3_leaf_modules`."""
    return _mark(False, _is_class, model, leaf_module_classes, raise_if_not_found)[0]


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their names in the model; returns them, and the names that it does not have."""
    return _mark(True, lambda name, _, wanted: name == wanted, model, module_names, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by how their names end; returns them, and the endings that none has."""
    return _mark(True, lambda name, _, suffix: name.endswith(suffix), model, name_suffixes, raise_if_not_found)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if z3_leaf_module(each)]


def z3_leaf_module(model: nn.Module) -> bool:
    return bool(getattr(model, "_z3_leaf", False))


def z3_leaf_parameter(param: Tensor) -> bool:
    return False


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    model._z3_leaf = flag  # type: ignore[assignment]
