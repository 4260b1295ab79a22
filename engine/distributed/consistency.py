"""Checks that all ranks were given the same config, model and dataset.

Where they differ, training goes wrong silently, or hangs.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from redline.distributed.failure import name_ranks
from redline.distributed.process_group import World
from redline.errors import ConfigError, EngineError, Problem

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["check_agreement"]

_SHOWN = 5  # differences of two models that are shown: a wrong width is one mistake in hundreds of weights


def check_agreement(config: EngineConfig, world: World, model: nn.Module, training_data: Any = None) -> None:
    """Compare names, shapes and dtypes of the model, length of the dataset, and effective config of all ranks.

    Raises:
        ConfigError: the configs differ; raised on every rank, with the keys, the values and the ranks.
        EngineError: the models or the datasets differ; likewise.
    """
    if world.size == 1:
        return
    from redline.config import fingerprint  # see engine/__init__.py

    tensors = (*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    described = {name: _describe(tensor) for name, tensor in tensors}
    mine = {"config": fingerprint(config), "model": described, "data": {"samples": _length(training_data)}}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    everyone: list[dict[str, dict[str, str]]] = world.gather(mine)
    if found := _differences([each["config"] for each in everyone]):
        written = config.as_written()
        problems = []
        for path, values in found.items():
            line, column = written.locate(tuple(path.split(".")))
            problems.append(Problem(path, f"got {values}; expected one config on all ranks", line, column))
        raise ConfigError(problems, written.source)
    if found := _differences([each["model"] for each in everyone]):
        lines = [f"\n  {name}: {values}" for name, values in found.items()]
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise EngineError(f"model: expected one model on all ranks, got{''.join(lines[:_SHOWN])}{more}")
    (values,) = _differences([each["data"] for each in everyone]).values()
    raise EngineError(f"training_data: got {values}; expected one dataset on all ranks, which the loader divides")


def _describe(tensor: Tensor) -> str:
    shape = "uninitialized" if is_lazy(tensor) else str(list(tensor.shape))
    kind = " buffer" if not isinstance(tensor, nn.Parameter) else "" if tensor.requires_grad else " frozen"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}{kind}"


def _length(data: Any) -> str:
    try:
        return "no data" if data is None else f"{len(data)} samples"
    except TypeError:
        return "an unknown number of samples"


def _differences(everyone: list[dict[str, str]]) -> dict[str, str]:
    """What is not the same on all ranks, as ``0.5 on rank 0; 1.0 on ranks 1-3``."""
    found = {}
    for name in dict.fromkeys(name for each in everyone for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(everyone):
            ranks.setdefault(each.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            found[name] = "; ".join(f"{value} on {name_ranks(where)}" for value, where in ranks.items())
    return found
