"""A test's config at another batch size and with other settings of the optimizer: a pure function of documents."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from engine.optimizers import resolve

__all__ = ["adapt"]

_BETAS = ("adam", "adamw", "lamb", "lion")  # DeepSpeed's names; torch's say so themselves


def adapt(
    config: Mapping[str, Any], batch_sizes: tuple[int, int], world_size: int, settings: Mapping[str, float]
) -> dict[str, Any]:
    """The config with another batch size, the micro-batch as it was, and with these settings of its optimizer.

    Args:
        config: as it was given.
        batch_sizes: samples of an update: under that config, and those wanted.
        world_size: processes that it is resolved for.
        settings: `weight_decay` and `momentum`; an optimizer that is not the config's stays as it is.
    """
    new = copy.deepcopy(dict(config))
    before, wanted = batch_sizes
    if wanted != before:
        accumulation, micro_batch = (
            value if isinstance(value := new.pop(key, None), int) else None
            for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu")
        )
        micro_batch = micro_batch or before // (world_size * (accumulation or 1))
        new |= {"train_batch_size": wanted, "train_micro_batch_size_per_gpu": micro_batch}
    if settings and new.get("optimizer"):
        params = new["optimizer"]["params"] = {**(new["optimizer"].get("params") or {})}
        for name, value in settings.items():
            if name == "momentum" and _takes_betas(new["optimizer"]["type"]):
                params["betas"] = [value, params.get("betas", (0.9, 0.999))[1]]
            else:
                params[name] = value
    return new


def _takes_betas(name: str) -> bool:
    if name == "Muon" or name.lower() in _BETAS:
        return name != "Muon"
    return "betas" in inspect.signature(resolve(name)).parameters
