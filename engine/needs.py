"""What weights, gradients and optimizer state will take of a process's memory, said when training starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.distributed import World
from engine.parts import Parts
from engine.precision import Formats
from engine.zero.blocks import find_blocks
from engine.zero.memory import Bytes, Elements, Held, adds_up_whole, count, estimate, memory_of, shown, state_of

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["count_model", "tell_needs", "verdict"]


def count_model(model: nn.Module, config: EngineConfig, world: World) -> Elements | None:
    """The numbers in a model that is not shared out yet; None where there is nothing to tell of its memory."""
    if world.size == 1 and _stage(config) == 0:
        return None
    options, formats = config.redline.zero, Formats.of(config)
    low = formats.compute is not torch.float32 and formats.buffers is None
    return count(model, find_blocks(model, options.blocks, options.smallest_block), low=low)


def tell_needs(parts: Parts, elements: Elements | None) -> Iterator[str]:
    """What they take at each stage of ZeRO, and why the one asked for gains nothing, if that is so.

    Args:
        parts: of the engine.
        elements: what `count_model` returned.
    """
    if elements is None or elements.trained == 0 or parts.optimizer is None:
        return
    config, world, zero, stage = parts.config, parts.world, parts.config.zero_optimization, _stage(parts.config)
    room, accumulate = memory_of(world.device), config.redline.zero.accumulate
    offloaded = zero is not None and zero.offloads and world.device.type == "cuda"
    state, guessed = state_of(parts.optimizer)
    needs = estimate(
        elements,
        _bytes(parts, state),
        world.size,
        group=0 if zero is None else max(zero.mics_shard_size, 0),
        second_copy=0 if zero is None else zero.zero_hpz_partition_size,
        micro_batches=config.gradient_accumulation_steps,
        add_up_whole=[each for each in (1, 2, 3) if adds_up_whole(each, accumulate, elements.trained, room)],
        offloaded=offloaded,
    )
    name = f"{type(parts.optimizer).__name__}'s state"
    text = _line(stage, needs, f"{name} (taken for {state:g} bytes a weight)" if guessed else name)
    yield f"{text}; shares are in the CPU's memory, and not counted" if offloaded else text
    if world.size > 1 and not offloaded and (futile := verdict(stage, needs, room)):
        yield futile


def verdict(stage: int, needs: Mapping[int, Held], room: int | None) -> str | None:
    """Why a smaller stage would do as well; None where this one gains something.

    Args:
        stage: the config's.
        needs: what `estimate` returned.
        room: bytes of the device; None where that is not known.
    """
    name, mine = f"zero_optimization.stage {stage} gains nothing for this model", needs[stage].most
    for smaller in {1: (0,), 2: (0,), 3: (0, 2)}.get(stage, ()):
        takes = needs[smaller].most
        if takes <= mine:
            return f"{name}: stage {smaller} takes {shown(takes)} of each process's memory, this one {shown(mine)}"
        if room is not None and takes <= room // 10:
            return f"{name}: stage {smaller} takes {shown(takes)} of the {shown(room)} that each process has"
    return None


def _line(stage: int, needs: Mapping[int, Held], state: str) -> str:
    """What the stages take, the one in force first."""
    what = f"memory per process for weights, gradients and {state}"
    same = needs[1] == needs[2]
    totals = {
        "1 and 2" if same and each == 2 else f"{each}": held.most
        for each, held in needs.items()
        if each != 1 or not same
    }
    if len(set(needs.values())) == 1:
        return f"{what}: {shown(needs[0].most)}"
    others = ", ".join(f"{shown(total)} at {name}" for name, total in totals.items() if str(stage) not in name)
    return f"{what}: {shown(needs[stage].most)} at stage {stage}; {others}"


def _bytes(parts: Parts, state: float) -> Bytes:
    precision = parts.precision
    if Formats.of(parts.config).stored is None:  # as the model was brought, in whatever format
        every = list(parts.module.parameters())
        size = round(sum(each.numel() * each.element_size() for each in every) / sum(each.numel() for each in every))
        return Bytes(size, size, precision.reduce.itemsize, state)
    return Bytes(precision.compute.itemsize, precision.stored.itemsize, precision.reduce.itemsize, state)


def _stage(config: EngineConfig) -> int:
    return 0 if config.zero_optimization is None else config.zero_optimization.stage
