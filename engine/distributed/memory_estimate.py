"""An estimate of the memory per rank at each stage of ZeRO, from the sizes alone, logged when training starts.

Counts parameters, gradients and the optimizer's state, as the ZeRO paper does (https://arxiv.org/abs/1910.02054,
section 3), and what is unsharded for a moment: a block's parameters and gradients. Activations come on top.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from redline.distributed.blocks import find_blocks, unsharded_params
from redline.distributed.process_group import World
from redline.precision import Precision

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["Bytes", "Elements", "Held", "accumulates_unsharded", "count", "count_model", "describe_memory", "estimate",
           "memory_of", "shown", "state_of", "verdict"]  # fmt: skip


class Elements(NamedTuple):
    """Numbers in a model."""

    trained: int  # of parameters that are trained
    frozen: int = 0  # of those that are not
    whole: int = 0  # of those, trained or not, that are not sharded at any stage
    rest: int = 0  # of those in no block, which are unsharded with the model
    largest: int = 0  # in the largest block; 0 without blocks


class Bytes(NamedTuple):
    """Bytes of one number."""

    computed: int = 4  # in the parameters of forward and backward
    updated: int = 4  # in the parameters that the optimizer updates, and their gradients
    summed: int = 4  # in gradients that accumulate unsharded, or are communicated
    state: float = 8  # in the optimizer's state, in total for one parameter


class Held(NamedTuple):
    """Bytes of one rank in the course of an optimizer step."""

    parameters: int = 0  # at most, which is in a forward
    gradients: int = 0  # at the optimizer step, or before the last backward where they accumulate unsharded
    state: int = 0  # of the optimizer
    most: int = 0  # of all three at one time, including gradients that are not reduced yet


def count_model(model: nn.Module, config: EngineConfig, world: World) -> Elements | None:
    """The numbers in a model that is not sharded yet; None where its memory is not reported."""
    if world.size == 1 and _stage(config) == 0:
        return None
    options, dtypes = config.redline.zero, Precision.of(config)
    low = dtypes.compute is not torch.float32 and dtypes.buffers is None
    return count(model, find_blocks(model, options.blocks, options.smallest_block), low=low)


def describe_memory(
    config: EngineConfig, world: World, module: nn.Module, optimizer: Optimizer | None, elements: Elements | None
) -> Iterator[str]:
    """Lines for the log: the memory at each stage of ZeRO, and whether the config's stage saves any.

    `elements` is what :func:`count_model` returned.
    """
    if elements is None or elements.trained == 0 or optimizer is None:
        return
    zero, stage, accumulate = config.zero_optimization, _stage(config), config.redline.zero.accumulate
    room = memory_of(world.device)
    offloaded = zero is not None and zero.offloads and world.device.type == "cuda"
    state, guessed = state_of(optimizer)
    precision = Precision.of(config)
    computed, updated = precision.compute.itemsize, (precision.stored or precision.compute).itemsize
    if precision.stored is None:  # as the model was brought, in whatever format
        every = list(module.parameters())
        size = sum(each.numel() * each.element_size() for each in every) / sum(each.numel() for each in every)
        computed = updated = round(size)
    needs = estimate(
        elements,
        Bytes(computed, updated, precision.reduce.itemsize, state),
        world.size,
        group=0 if zero is None else max(zero.mics_shard_size, 0),
        second_copy=0 if zero is None else zero.zero_hpz_partition_size,
        micro_batches=config.gradient_accumulation_steps,
        accumulate_unsharded=[n for n in (1, 2, 3) if accumulates_unsharded(n, accumulate, elements.trained, room)],
        offloaded=offloaded,
    )
    guess = f" (assumed to be {state:g} bytes a parameter)" if guessed else ""
    text = f"memory per rank for weights, gradients and {type(optimizer).__name__}'s state{guess}: "
    if len(set(needs.values())) == 1:
        text += shown(needs[0].most)
    else:
        names = {0: "0", 2: "1 and 2", 3: "3"} if needs[1] == needs[2] else {0: "0", 1: "1", 2: "2", 3: "3"}
        others = (f"{shown(needs[each].most)} at {name}" for each, name in names.items() if str(stage) not in name)
        text += f"{shown(needs[stage].most)} at stage {stage}; {', '.join(others)}"
    yield f"{text}; shards are in the CPU's memory, and not counted" if offloaded else text
    if world.size > 1 and not offloaded and (futile := verdict(stage, needs, room)):
        yield futile


def _stage(config: EngineConfig) -> int:
    return 0 if config.zero_optimization is None else config.zero_optimization.stage


def verdict(stage: int, needs: Mapping[int, Held], room: int | None) -> str | None:
    """Why a smaller stage would do as well, with `room` bytes on the device; None where this one saves memory."""
    name, mine = f"zero_optimization.stage {stage} gains nothing for this model", needs[stage].most
    for smaller in {1: (0,), 2: (0,), 3: (0, 2)}.get(stage, ()):
        takes = needs[smaller].most
        if takes <= mine:
            return f"{name}: stage {smaller} takes {shown(takes)} of each rank's memory, this one {shown(mine)}"
        if room is not None and takes <= room // 10:
            return f"{name}: stage {smaller} takes {shown(takes)} of the {shown(room)} that each rank has"
    return None


def count(module: nn.Module, blocks: Mapping[str, nn.Module], *, low: bool) -> Elements:
    """The numbers in a model that is not sharded yet; it may be on the meta device.

    A shared parameter counts once. `low` is that of :func:`redline.distributed.blocks.unsharded_params`.
    """
    whole = unsharded_params(module, low=low)
    sizes = [sum(each.numel() for each in block.parameters() if each not in whole) for block in blocks.values()]
    every = list(module.parameters())
    trained = sum(each.numel() for each in every if each.requires_grad)
    kept = sum(each.numel() for each in whole)
    total = sum(each.numel() for each in every)
    return Elements(trained, total - trained, kept, total - kept - sum(sizes), max(sizes, default=0))


def estimate(
    elements: Elements,
    numbers: Bytes,
    num_ranks: int,
    *,
    group: int = 0,
    second_copy: int = 0,
    micro_batches: int = 1,
    accumulate_unsharded: Collection[int] = (1, 2),
    offloaded: bool = False,
) -> dict[int, Held]:
    """The memory of one rank at each stage.

    Stage 1 is like stage 2: each gradient is reduced to the rank that needs it. From stage 1 on a rank has its shard of
    the master params next to the full parameters; in the paper the former would, in fp32, be views of the latter.

    Args:
        group: ranks that shard one model; 0 for all.
        second_copy: ranks among which stage 3 shards parameters after a forward; 0 or 1 for none.
        micro_batches: of an optimizer step.
        accumulate_unsharded: stages in which gradients accumulate before they are reduced.
        offloaded: whether shards are in the CPU's memory, and do not count.

    >>> estimate(Elements(1_000_000), Bytes(), 4)[0]
    Held(parameters=4000000, gradients=4000000, state=8000000, most=16000000)
    >>> estimate(Elements(1_000_000, rest=100_000, largest=100_000), Bytes(computed=2), 4)[3]
    Held(parameters=1600000, gradients=1000000, state=2000000, most=4700000)
    """
    trained, everything = elements.trained, elements.trained + elements.frozen
    computed, updated, summed = numbers.computed, numbers.updated, numbers.summed

    def shard(count: int) -> int:
        kept = min(elements.whole, count)
        return kept + (0 if offloaded else math.ceil((count - kept) / (group or num_ranks)))

    parameters = everything * computed + (trained * updated if updated != computed else 0)
    gradients, state = trained * updated, round(trained * numbers.state)
    unsharded = Held(parameters, gradients, state, parameters + gradients + state)
    if num_ranks == 1 and not offloaded:
        return dict.fromkeys((0, 1, 2, 3), unsharded)

    held, local = {0: unsharded}, micro_batches > 1
    own, state = shard(trained) * updated, round(shard(trained) * numbers.state)
    for stage in (1, 2):  # parameters in full, and the gradients of a backward until it ends
        full = local and stage in accumulate_unsharded
        parameters = everything * computed + own
        apart = trained * summed if computed != summed else 0
        earlier = 0 if not local else apart if full else own
        most = parameters + state + max(own, earlier + trained * computed)
        held[stage] = Held(parameters, max(own, trained * summed if full else 0), state, most)

    # A block that is being put together is there twice: as it has come, and as its parameters.
    rest = elements.rest
    block, around = (elements.largest, rest) if elements.largest else (rest, 0)
    gathered = max(around + 2 * block, 2 * rest)
    left = everything - elements.whole - around - block
    copied = math.ceil(left / second_copy) if 1 < second_copy < num_ranks else 0
    reducing = (around + block) * computed  # gradients of a backward that are still to be reduced
    shards = shard(everything) * updated
    gradients = trained * summed if local and 3 in accumulate_unsharded else own
    earlier = gradients if local else 0  # when a forward begins
    # Gathers the last blocks when there are nearly all gradients, and the copy has been used up.
    late = earlier or shard(max(trained - around - 2 * block, 0)) * updated
    forward = shards + gathered * computed
    most = max(forward + late + reducing, forward + copied * computed + earlier + reducing, shards + gradients)
    held[3] = Held(forward + copied * computed, gradients, state, state + most)
    return held


def accumulates_unsharded(stage: int, accumulate: str | None, trained: int, room: int | None) -> bool:
    """Whether every rank accumulates unsharded gradients, and reduces them once an optimizer step.

    Args:
        stage: 1 to 3.
        accumulate: the config's redline.zero.accumulate.
        trained: elements of the parameters that are trained.
        room: bytes of the device, or None; not what is free, so that a run that is resumed decides alike.
    """
    if accumulate is not None:
        return accumulate == "local"
    return stage < 3 or (room is not None and 4 * trained <= room // 4)


# Numbers of state for each weight. Matched by the class's name or a base's; Adam's is the guess for all others.
_STATE = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "SparseAdam": 2, "Lamb": 2, "Adadelta": 2, "Rprop": 2,
    "Muon": 2, "Adagrad": 1, "ASGD": 1, "Lion": 1, "RMSprop": 1, "SGD": 0,
}  # fmt: skip


def state_of(optimizer: Optimizer) -> tuple[float, bool]:
    """Bytes of an optimizer's state for each weight that it updates, and whether that is a guess."""
    names = [cls.__name__ for cls in type(optimizer).__mro__]
    known = next((_STATE[name] for name in names if name in _STATE), None)
    elements, total = 0, 0
    for group in optimizer.param_groups:
        numbers = 2 if known is None else known
        if "Muon" in names:
            numbers -= group.get("use_muon", True)
        elif known is not None:
            momentum = "Adam" not in names and bool(group.get("momentum"))  # SGD's, RMSprop's
            numbers += momentum + bool(group.get("amsgrad")) + bool(group.get("centered"))
        for parameter in group["params"]:
            elements += parameter.numel()
            total += numbers * parameter.numel() * parameter.element_size()
    return total / elements if elements else 0.0, known is None


def shown(count: int) -> str:
    """Bytes in the unit that fits.

    >>> shown(3_500_000_000)
    '3.26 GiB'
    """
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value >= 999.5:
            value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"


def memory_of(device: torch.device) -> int | None:
    """The total memory of a rank's device in bytes; None where that is not known.

    On the CPU, the host's memory divided by the number of torchrun's ranks there.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
