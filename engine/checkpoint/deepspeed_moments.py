"""What DeepSpeed's optimizers kept for each weight, in the form in which this engine's keep it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from engine.checkpoint.deepspeed import DeepSpeedCheckpoint, Slot
from engine.checkpoint.shares import share_of
from engine.checkpoint.stored import Stored, read_whole
from engine.errors import EngineError
from engine.log import log

__all__ = ["Moments", "read_moments"]

# What optimizers keep for each weight, beside the count of updates.
_KEPT = {
    "Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq"), "Lamb": ("exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",), "Adagrad": ("sum",), "SGD": ("momentum_buffer",),
}  # fmt: skip
_COUNTING = ("Adam", "AdamW", "Lamb", "Adagrad")
_WITHOUT = "load with load_optimizer_states=False"


class Moments(NamedTuple):
    """The state of an optimizer, read and checked.

    Attributes:
        weights: fp32 weights that only the optimizer has, by name: at stage 0.
        states: for each weight that has moments, by name; tensors are this process's share.
        settings: of each parameter group.
    """

    weights: dict[str, Stored]
    states: dict[str, dict[str, Any]]
    settings: list[Mapping[str, Any]]


def read_moments(
    optimizer: Optimizer,
    checkpoint: DeepSpeedCheckpoint,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
) -> Moments:
    """Take an optimizer's state from a checkpoint.

    Args:
        optimizer: whose state it will be; is left as it is.
        checkpoint: DeepSpeed's.
        weights: what the optimizer has, by name.
        stored: the same weights as the checkpoint's model has them.

    Raises:
        EngineError: it is of another optimizer, or of other parameters.
    """
    names = {id(weight): name for name, weight in weights.items()}
    ours = [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
    groups = checkpoint.groups([[(name, weights[name].shape) for name in group] for group in ours])
    slots = {slot.name: (slot, group.settings) for group in groups for slot in group.slots}
    aliases = checkpoint.aliases
    kind = _kind(optimizer)
    found = Moments({}, {}, [])
    untrained = []
    for own, group in zip(ours, optimizer.param_groups):
        settings: Mapping[str, Any] = {}
        for name in own:
            slot, theirs = slots.get(name) or slots.get(aliases.get(name, "")) or (None, {})
            if slot is None:
                untrained.append(name)
                continue
            if checkpoint.stage == 0 and slot.weight is not None:
                _check_order(checkpoint, name, slot.weight, stored.get(name))
                found.weights[name] = slot.weight
            settings = settings or theirs
            if slot.moments:
                found.states[name] = _state_of(slot, kind, group, weights[name], checkpoint)
        found.settings.append(settings)
    if untrained:
        log.warning(
            "load_checkpoint: %s has no optimizer's state for %s; it begins anew",
            checkpoint.folder, ", ".join(untrained),
        )  # fmt: skip
    return found


def _kind(optimizer: Optimizer) -> str:
    """The optimizer's name, of those whose state is known."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _KEPT:
            return cls.__name__
    raise EngineError(
        f"optimizer {type(optimizer).__name__}: which of DeepSpeed's state would be its own is not known; {_WITHOUT}"
    )


def _check_order(checkpoint: DeepSpeedCheckpoint, name: str, master: Stored, low: Stored | None) -> None:
    """At stage 0 weights have no names in the optimizer; rounded they have to be the model's."""
    if low is not None and not torch.equal(read_whole(master).to(low.dtype), read_whole(low)):
        raise EngineError(
            f"{checkpoint.folder}: the optimizer's weight for {name} is not the model's; give initialize the same "
            f"parameters in the same order as DeepSpeed had them, or {_WITHOUT}"
        )


def _state_of(
    slot: Slot, kind: str, group: Mapping[str, Any], weight: Tensor, checkpoint: DeepSpeedCheckpoint
) -> dict[str, Any]:
    """A weight's state as the optimizer keeps it."""
    needed = set(_KEPT[kind])
    if kind == "SGD" and not group["momentum"]:
        needed = set()
    if group.get("amsgrad"):
        needed.add("max_exp_avg_sq")
    if needed != slot.moments.keys():
        raise EngineError(
            f"{checkpoint.folder}: its optimizer has {', '.join(slot.moments)} for {slot.name}, and {kind} needs "
            f"{', '.join(sorted(needed)) or 'nothing'}; give the config the optimizer that it was saved with, or "
            f"{_WITHOUT}"
        )
    state: dict[str, Any] = {
        key: share_of(read_whole(stored), weight).to(weight.dtype) for key, stored in slot.moments.items()
    }
    if kind in _COUNTING:
        if slot.step is None:
            raise EngineError(f"{checkpoint.folder}: its optimizer does not say how many updates it has made")
        if kind == "Lamb":
            state["step"] = int(slot.step)
        else:  # where torch's own step keeps it
            there = weight.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
            state["step"] = torch.tensor(slot.step, dtype=torch.float32, device=there)
    return state
