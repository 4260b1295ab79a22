"""Parameters that have been replaced: whoever holds the old ones is given the new ones.

A model that is shared out, or filled, has other parameters than the script made its groups or its optimizer of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["carry_optimizer_over", "carry_over"]

Moved = Mapping[Tensor, Tensor]  # the new parameter in the place of each old one


def carry_over(parameters: Iterable[Any], moved: Moved) -> list[Any]:
    """Parameters, names and parameters, or groups of either, as torch's optimizers take them."""
    return [_carried(each, moved) for each in parameters]


def _carried(given: Any, moved: Moved) -> Any:
    if isinstance(given, Tensor):
        return moved.get(given, given)
    if isinstance(given, tuple) and len(given) == 2:  # a name and its parameter
        return given[0], moved.get(given[1], given[1])
    if isinstance(given, dict) and "params" in given:
        inner = given["params"]
        return {**given, "params": _carried(inner, moved) if isinstance(inner, Tensor) else carry_over(inner, moved)}
    return given


def carry_optimizer_over(
    optimizer: Optimizer, moved: Moved, convert: Callable[[Any, Tensor, Tensor], Any] = lambda value, old, new: value
) -> None:
    """Give an optimizer the new parameters, in place, and their state with them.

    Args:
        optimizer: groups keep their settings.
        moved: old parameters to new ones.
        convert: a value of the state, the old parameter and the new, to the value that the new one has.
    """
    for group in optimizer.param_groups:
        group["params"] = carry_over(group["params"], moved)
    for old, new in moved.items():
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = {key: convert(value, old, new) for key, value in state.items()}
