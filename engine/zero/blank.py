"""Models that were built on the meta device: without memory, to be filled part by part.

What DeepSpeed's `zero.Init` is for: a model larger than one host's memory is never whole anywhere. Each module's
weights are made when its part is shared out, by the module's own ``reset_parameters`` or, in a model of Hugging Face,
the model's ``_init_weights``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.errors import EngineError

__all__ = ["fill", "is_blank"]


def is_blank(module: nn.Module) -> bool:
    """Whether some of the model's parameters or buffers have no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def fill(model: nn.Module, part: Iterable[tuple[str, nn.Module]], device: torch.device) -> dict[Tensor, Tensor]:
    """Give the modules of a part memory and their initial weights.

    Args:
        model: the whole model.
        part: names and modules; what is in them by themselves is filled, not what is in modules within them.
        device: where.

    Returns:
        The parameter behind each one that had no memory. One that several modules share stays one.

    Raises:
        EngineError: nothing gives some tensors their values.
    """
    made: dict[Tensor, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for name, each in [(name, each) for name, each in part if _own(each)]:
        shared: list[tuple[Tensor, Tensor]] = []  # with a module before it, which has given them their values
        for key, tensor in _own(each).items():
            if tensor in made:
                shared.append((made[tensor], made[tensor].detach().clone()))
            if tensor not in made:
                # not a number, so that what nothing has filled shows
                value = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0, device=device)
                made[tensor] = value
                if isinstance(tensor, nn.Parameter):
                    made[tensor] = nn.Parameter(value, requires_grad=tensor.requires_grad)
                    made[tensor].__dict__.update(tensor.__dict__)
            place = each._parameters if key in each._parameters else each._buffers
            place[key] = made[tensor]  # type: ignore[assignment]
            filled[f"{name}.{key}" if name else key] = made[tensor]
        _reset(model, each)
        for tensor, value in shared:
            tensor.copy_(value)
    lost = [name for name, tensor in filled.items() if tensor.is_floating_point() and tensor.isnan().any()]
    if lost:
        raise EngineError(
            f"model: on the meta device, and nothing gives {_listed(lost)} a value; give their modules a "
            "reset_parameters(), or build the model on the CPU"
        )
    return made


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors without memory."""
    own = [*module._parameters.items(), *module._buffers.items()]
    return {key: tensor for key, tensor in own if tensor is not None and tensor.is_meta}


def _reset(model: nn.Module, module: nn.Module) -> None:
    own = getattr(module, "reset_parameters", None)
    whole = getattr(model, "_init_weights", None)
    if callable(own):
        own()
    if callable(whole):  # the model's word counts: it comes after each module's own when the model is built, too
        whole(module)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
