"""What else differs between runs of one rig: the seed, the batch size, settings of the optimizer.

Only sets; the snapshot puts all of it back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from engine.engine import Engine
from engine.errors import EngineError, RangeTestError
from engine.randomness import random_state, reseed
from engine.range_test.sources import generators_in, numbers_in, parts_of

__all__ = ["SETTINGS", "check", "reorder", "set_batch_size", "set_settings", "settings_of"]

SETTINGS = ("weight_decay", "momentum")  # what a test may vary


def reorder(seed: int, data: Any) -> None:
    """Give this process other random numbers, and the data another order; seed 0 leaves both as they are.

    Both follow from what they were and from the seed; so processes that had the same still have the same.
    """
    if seed == 0:
        return
    reseed(random_state(), seed)
    parts = parts_of(data)
    for generator in generators_in(parts):
        generator.manual_seed(_mixed(generator.get_state().numpy().tobytes(), seed))
    for part, before in numbers_in(parts, "seed"):
        part.seed = _mixed(str(before).encode(), seed)


def check(engine: Engine, train_batch_size: int | None, settings: Mapping[str, float]) -> None:
    """Find out before any run is made.

    Raises:
        RangeTestError: the engine cannot have that batch size, or its optimizer those settings.
    """
    own = engine.train_batch_size()
    set_batch_size(engine, train_batch_size)
    engine.set_train_batch_size(own)
    for name, value in settings.items():
        _check(engine, name, value)


def set_batch_size(engine: Engine, train_batch_size: int | None) -> None:
    """Reach a batch size by accumulation; None for the engine's own."""
    if train_batch_size is None:
        return
    try:
        engine.set_train_batch_size(train_batch_size)
    except EngineError as error:
        raise RangeTestError(f"range test: {error}") from None


def set_settings(engine: Engine, settings: Mapping[str, float]) -> None:
    """Set weight decay and momentum (the first of betas) in every parameter group that has them.

    Groups that are spared from weight decay, as biases often are, stay so.
    """
    assert engine.optimizer is not None
    groups = engine.optimizer.param_groups
    for name, value in settings.items():
        own = [group for group in groups if _value(group, name) is not None]
        if name == "weight_decay":
            own = [group for group in own if group[name] != 0] or own
        for group in own:
            if name == "momentum" and "betas" in group:
                group["betas"] = (value, *group["betas"][1:])
            else:
                group[name] = value


def settings_of(engine: Engine, name: str) -> float | None:
    """The engine's own value of a setting: the one that its groups share, those spared from weight decay apart."""
    groups = [] if engine.optimizer is None else engine.optimizer.param_groups
    values = {float(value) for group in groups if (value := _value(group, name)) is not None}
    if name == "weight_decay" and len(values) > 1:
        values.discard(0.0)
    return values.pop() if len(values) == 1 else None


def _value(group: Mapping[str, Any], name: str) -> Any:
    if name == "momentum" and "betas" in group:
        return group["betas"][0]
    return group.get(name)


def _check(engine: Engine, name: str, value: float) -> None:
    if name not in SETTINGS:
        raise RangeTestError(f'settings: got "{name}"; expected {" or ".join(SETTINGS)}')
    assert engine.optimizer is not None
    if all(_value(group, name) is None for group in engine.optimizer.param_groups):
        raise RangeTestError(
            f"settings: {name}: the optimizer, {type(engine.optimizer).__name__}, has none; leave it out"
        )
    if not 0 <= value < (1 if name == "momentum" else math.inf):
        limits = "a number from 0 to below 1" if name == "momentum" else "a number >= 0"
        raise RangeTestError(f"settings: {name}: got {value!r}; expected {limits}")


def _mixed(value: bytes, seed: int) -> int:
    """A seed out of what there was and a number, unlike that of any neighbours."""
    return int.from_bytes(hashlib.blake2b(value + seed.to_bytes(8, "big"), digest_size=8).digest(), "big") >> 2
