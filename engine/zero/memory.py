"""How much of a process's memory a stage of ZeRO takes, told from the sizes alone.

Counts parameters, gradients and the optimizer's state, as the ZeRO paper does (https://arxiv.org/abs/1910.02054,
section 3), and what is whole for a moment: a block's parameters and gradients. Activations come on top.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from engine.zero.blocks import stays_whole

__all__ = ["Bytes", "Elements", "Held", "adds_up_whole", "count", "estimate", "memory_of", "shown", "state_of"]


@dataclass(frozen=True, slots=True)
class Elements:
    """Numbers in a model.

    Attributes:
        trained: of parameters that are trained.
        frozen: of those that are not.
        whole: of those, trained or not, that every process keeps all of at any stage.
        rest: of those in no block, which are gathered with the model.
        largest: in the largest block; 0 without blocks.
    """

    trained: int
    frozen: int = 0
    whole: int = 0
    rest: int = 0
    largest: int = 0


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one number.

    Attributes:
        computed: in the weights of forward and backward.
        updated: in the weights that the optimizer updates, and their gradients.
        summed: in gradients that add up whole, or travel.
        state: in the optimizer's state, all that there is for one weight.
    """

    computed: int = 4
    updated: int = 4
    summed: int = 4
    state: float = 8


class Held(NamedTuple):
    """Bytes of one process in the course of an update.

    Attributes:
        parameters: at most, which is in a forward.
        gradients: at the update, or before the last backward where they add up whole.
        state: of the optimizer.
        most: of all three at one time; in a backward also gradients that are still to be shared out.
    """

    parameters: int
    gradients: int
    state: int
    most: int


def count(module: nn.Module, blocks: Mapping[str, nn.Module], *, low: bool) -> Elements:
    """The numbers in a model that has not been shared out yet; one on the meta device will do.

    Args:
        module: a parameter that it has twice counts once.
        blocks: what is gathered as one, by name.
        low: whether batch norm stays whole, see :func:`engine.zero.blocks.stays_whole`.
    """
    whole = stays_whole(module, low=low)
    sizes = [sum(each.numel() for each in block.parameters() if each not in whole) for block in blocks.values()]
    every = list(module.parameters())
    trained = sum(each.numel() for each in every if each.requires_grad)
    kept = sum(each.numel() for each in whole)
    total = sum(each.numel() for each in every)
    return Elements(trained, total - trained, kept, total - kept - sum(sizes), max(sizes, default=0))


def estimate(
    elements: Elements,
    numbers: Bytes,
    processes: int,
    *,
    group: int = 0,
    second_copy: int = 0,
    micro_batches: int = 1,
    add_up_whole: Collection[int] = (1, 2),
    offloaded: bool = False,
) -> dict[int, Held]:
    """What one process holds at each stage.

    Stage 1 is like stage 2: torch gives each gradient to the process that updates with it, and to no other. From stage
    1 on a process has its share of the weights that are updated beside those that are gathered from all shares; the
    paper's would in fp32 be views of them.

    Args:
        elements: what `count` returned.
        numbers: of the weights, and the optimizer's state.
        processes: that train together.
        group: of them that share one model; 0 for all.
        second_copy: processes that share what a forward of stage 3 has gathered; 0 or 1 for none.
        micro_batches: of an update.
        add_up_whole: stages in which their gradients add up before they are shared out.
        offloaded: whether shares are in other memory than what is gathered, and do not count.

    >>> estimate(Elements(1_000_000), Bytes(), 4)[0]
    Held(parameters=4000000, gradients=4000000, state=8000000, most=16000000)
    >>> estimate(Elements(1_000_000, rest=100_000, largest=100_000), Bytes(computed=2), 4)[3]
    Held(parameters=1600000, gradients=1000000, state=2000000, most=4700000)
    """
    everything, trained = elements.trained + elements.frozen, elements.trained
    has_masters = numbers.updated != numbers.computed
    parameters = everything * numbers.computed + (trained * numbers.updated if has_masters else 0)
    gradients, state = trained * numbers.updated, round(trained * numbers.state)
    none_shared = Held(parameters, gradients, state, parameters + gradients + state)
    if processes == 1 and not offloaded:
        return dict.fromkeys((0, 1, 2, 3), none_shared)

    def share(count: int) -> int:
        kept = min(elements.whole, count)
        return kept + (0 if offloaded else math.ceil((count - kept) / (group or processes)))

    # A block that is being put together is there twice: as it has come, and as its parameters.
    shared, rest = everything - elements.whole, elements.rest
    block, around = (elements.largest, rest) if elements.largest else (rest, 0)
    gathered = max(around + 2 * block, 2 * rest)
    copied = math.ceil((shared - around - block) / second_copy) if 1 < second_copy < processes else 0
    on_their_way = (around + block) * numbers.computed  # gradients in a backward that are still to be shared out
    shares, state = share(everything) * numbers.updated, round(share(trained) * numbers.state)
    held = {0: none_shared}
    for stage in (1, 2):  # parameters in full, and the gradients of a backward until it ends
        whole = micro_batches > 1 and stage in add_up_whole
        parameters = everything * numbers.computed + share(trained) * numbers.updated
        gradients = share(trained) * numbers.updated
        apart = numbers.computed != numbers.summed
        there = 0 if micro_batches == 1 else gradients if not whole else trained * numbers.summed if apart else 0
        most = parameters + state + max(gradients, there + trained * numbers.computed)
        held[stage] = Held(parameters, max(gradients, trained * numbers.summed if whole else 0), state, most)
    whole = micro_batches > 1 and 3 in add_up_whole
    gradients = trained * numbers.summed if whole else share(trained) * numbers.updated
    there = gradients if micro_batches > 1 else 0  # when a forward begins
    forward = shares + gathered * numbers.computed
    # Gathers the last blocks when there are nearly all gradients, and the copy has been used up.
    late = there or share(max(trained - around - 2 * block, 0)) * numbers.updated
    moments = [forward + late + on_their_way]
    forward += copied * numbers.computed
    moments += [forward + there + on_their_way]
    held[3] = Held(forward, gradients, state, state + max(*moments, shares + gradients))
    return held


def adds_up_whole(stage: int, accumulate: str | None, trained: int, room: int | None) -> bool:
    """Whether every process adds up whole gradients of micro-batches, and sends them once an update.

    Args:
        stage: 1 to 3.
        accumulate: the config's redline.zero.accumulate.
        trained: elements of the parameters that are trained.
        room: bytes of the device in all, and not what is free, so that a run that is resumed decides alike; None
            where that is not known.
    """
    if accumulate is not None:
        return accumulate == "local"
    return stage < 3 or (room is not None and 4 * trained <= room // 4)


# Numbers of state for each weight. Matched by the class's name or a base's; Adam's is the guess for all others.
_STATE = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "SparseAdam": 2, "Lamb": 2, "Adadelta": 2, "Rprop": 2,
    "Adagrad": 1, "ASGD": 1, "Lion": 1, "RMSprop": 1, "SGD": 0,
}  # fmt: skip


def state_of(optimizer: Optimizer) -> tuple[float, bool]:
    """Bytes of an optimizer's state for each weight that it updates, and whether that is a guess."""
    names = [cls.__name__ for cls in type(optimizer).__mro__]
    known = next((_STATE[name] for name in names if name in _STATE), None)
    elements, total = 0, 0
    for group in optimizer.param_groups:
        numbers = _in_group(names, group, known)
        for parameter in group["params"]:
            elements += parameter.numel()
            total += numbers * parameter.numel() * parameter.element_size()
    return total / elements if elements else 0.0, known is None and "Muon" not in names


def _in_group(names: list[str], group: Mapping[str, Any], known: int | None) -> int:
    if "Muon" in names:
        return 1 if group.get("use_muon", True) else 2
    if known is None:
        return 2
    momentum = "Adam" not in names and bool(group.get("momentum"))  # SGD's, RMSprop's
    return known + momentum + bool(group.get("amsgrad")) + bool(group.get("centered"))


def shown(count: int) -> str:
    """Bytes in the unit that fits.

    >>> shown(3_500_000_000)
    '3.26 GiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5 or unit == "GiB":
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError


def memory_of(device: torch.device) -> int | None:
    """Bytes that a process has on its device in all; None where that is not known.

    Of the CPU, the host's memory by the number of torchrun's processes there.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
