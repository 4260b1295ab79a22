"""How much of a process's memory a stage of ZeRO takes, told from the sizes alone.

Counts parameters, gradients and the optimizer's state, as the ZeRO paper does (https://arxiv.org/abs/1910.02054,
section 3). Activations come on top, and in stage 3 the one or two blocks that are whole at the moment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

__all__ = ["Sizes", "estimate", "memory_of", "verdict"]

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is to be held, in elements and bytes.

    Attributes:
        trained: elements of parameters that are trained.
        frozen: elements of those that are not.
        computed: bytes of an element in forward and backward.
        state: bytes of the optimizer's state for each trained element, master weights apart.
        weight: bytes of the weight that the optimizer updates.
    """

    trained: int
    frozen: int = 0
    computed: int = 4
    state: int = 8
    weight: int = 4


def estimate(sizes: Sizes, processes: int, *, accumulates: bool = False) -> dict[int, int]:
    """Bytes of one process in the middle of a step, for each stage.

    Stage 1 is like stage 2 here: torch gives each gradient to the process that updates with it, and to no other. Both
    hold the whole parameters besides the share that is updated; in one format DeepSpeed's would be views of them.

    Args:
        sizes: what there is to hold.
        processes: that share it.
        accumulates: whether micro-batches add up unshared, so that all gradients are held until the last one.

    >>> estimate(Sizes(trained=1_000_000), 4)
    {0: 16000000, 1: 8000000, 2: 8000000, 3: 4000000}
    """
    everything = sizes.trained + sizes.frozen
    whole = everything * sizes.computed
    masters = 0 if sizes.computed == sizes.weight else sizes.trained * sizes.weight
    gradients = sizes.trained * sizes.weight
    state = sizes.trained * sizes.state
    share = everything * sizes.weight // processes
    kept = gradients if accumulates else gradients // processes
    partly = whole + share + kept + state // processes
    return {0: whole + masters + gradients + state, 1: partly, 2: partly, 3: share + kept + state // processes}


def verdict(stage: int, needs: dict[int, int], room: int | None) -> str | None:
    """Why a smaller stage would do as well; None where this one gains something.

    Args:
        stage: the config's.
        needs: what `estimate` returned.
        room: bytes of the device; None where that is not known.
    """
    if not stage or room is None:
        return None
    enough = next(each for each in STAGES if needs[each] <= room // 10 or each == stage)
    if enough == stage:
        return None
    return (
        f"zero_optimization.stage {stage} gains nothing for this model: stage {enough} keeps {shown(needs[enough])} on "
        f"each process, of {shown(room)}, and sends less"
    )


def shown(count: int) -> str:
    """Bytes in the unit that fits.

    >>> shown(3_500_000_000)
    '3.3 GiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB" if value < 1000 else f"{value:.0f} GiB"


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has in all; of the CPU, this host's memory. None where it does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
