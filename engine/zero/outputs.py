"""Outputs of sharded modules, whatever they are made of.

FSDP2 begins a module's backward, with its all-gather, by hooks on the tensors that the forward returned. It finds them
in lists, tuples, dicts and, in newer versions, dataclasses. In any other object it finds none, and the backward reads
parameters that have been freed, or its gradients are never reduced. Read in torch 2.6 to 2.13
(`FSDPState._register_pre_backward_hook`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from engine.device import fields_of

__all__ = ["find_outputs"]


def find_outputs(unit: Any) -> None:
    """Let FSDP2 find the tensors that the forward of a `fully_shard` module returns in objects of any kind."""
    unit.register_forward_hook(_hook_outputs)


def _hook_outputs(unit: Any, inputs: Any, outputs: Any) -> None:
    # Hooks run in the order of their registration: FSDP2 has gone through the outputs already. To meet some of their
    # tensors twice does no harm.
    if type(outputs) is not Tensor and torch.is_grad_enabled():
        tensors = [tensor for tensor in _hidden_in(outputs, set()) if tensor.grad_fn is not None]
        if tensors:
            unit._get_fsdp_state()._register_pre_backward_hook(tensors)


def _hidden_in(value: Any, seen: set[int], *, hidden: bool = False) -> Iterator[Tensor]:
    """Tensors in containers, and in the attributes of objects of any kind, that some version of FSDP2 does not find."""
    if isinstance(value, Tensor):
        if hidden:
            yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))  # objects may refer to each other
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (tuple, MutableSequence, AbstractSet)):
        items = list(value)
    else:
        items = list(getattr(value, "__dict__", {}).values())
        items += [getattr(value, name) for name in fields_of(value) if hasattr(value, name)]  # those in slots, too
    hidden = hidden or type(value) not in (list, tuple, dict)
    for item in items:
        yield from _hidden_in(item, seen, hidden=hidden)
