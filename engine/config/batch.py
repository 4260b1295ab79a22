"""The batch triple: ``train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * world size``.

A pure function that infers what was not given as DeepSpeed does (`_set_batch_related_parameters` in
`deepspeed/runtime/config.py`), and says, where nothing fits, what would.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.config.words import either, shown

__all__ = ["BATCH_KEYS", "Batch", "World", "find_world", "resolve_batch"]

TRAIN, MICRO, STEPS = BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


_UNASKED = "the default: WORLD_SIZE is not set"


class Batch(NamedTuple):
    """The triple, whole; samples, samples and micro-batches."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int


class World(NamedTuple):
    """How many processes train, and how that is known."""

    size: int
    origin: str


def find_world(asked: Any = None) -> World | str:
    """The world size asked for, else torchrun's, else one process; or what is wrong with it."""
    expected = "expected a whole number >= 1"
    if asked is not None:
        if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
            return World(asked, "from the argument")
        return f"world size: got {asked!r:.40}; {expected}"
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return World(1, _UNASKED)
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= 1:
        return World(int(text), "from WORLD_SIZE")
    return f"environment variable WORLD_SIZE: got {shown(text)}; {expected}"


def resolve_batch(given: Mapping[str, int], world: World) -> Batch | str:
    """The whole triple from the one or two (or three) numbers given, each >= 1; or what is wrong with them.

    >>> resolve_batch({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, World(2, "from WORLD_SIZE"))
    Batch(train_batch_size=32, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=4)
    """
    train, micro, steps = (given.get(key) for key in BATCH_KEYS)
    if train is None:
        if micro is None:
            return f"missing; give {TRAIN} or {MICRO}" + (f"; {STEPS} alone does not tell it" if steps else "")
        return Batch(micro * (steps or 1) * world.size, micro, steps or 1)
    unit = (micro or steps or 1) * world.size
    if train % unit or (micro and steps and train != unit * steps):
        return _misfit(train, micro, steps, unit, world)
    share = train // unit
    return Batch(train, micro or share, steps or (share if micro else 1))


def _misfit(train: int, micro: int | None, steps: int | None, unit: int, world: World) -> str:
    """Every number with its origin, and the two nearest batch sizes that work."""
    factors = [f"{value} ({key}, given)" for key, value in ((MICRO, micro), (STEPS, steps)) if value]
    product = " x ".join([*factors, f"{world.size} (world size, {world.origin})"])
    if micro and steps:
        expected = f"{unit * steps} = {product}"
        working = {train, unit * steps} if train % unit == 0 else set()
    else:
        expected = f"a multiple of {unit} = {product}"
        working = set()
    working = working or {train // unit * unit, train // unit * unit + unit} - {0}
    free = STEPS if micro else MICRO
    choices = either(f"{size} ({free} {size // unit})" for size in sorted(working))
    message = f"got {train}; expected {expected}; with world size {world.size}: {choices}"
    share = (micro or 1) * (steps or 1)
    if micro and steps and train % share == 0 and world.origin == _UNASKED:
        message += f"; as it is, it fits world size {train // share}"
    return message
