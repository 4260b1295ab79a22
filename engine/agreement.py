"""Whether all processes were given one config.

A batch size or a schedule that differs between ranks trains something that nobody asked for, or waits for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.distributed import World
from engine.errors import ConfigError, Problem

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["check_agreement"]


def check_agreement(config: EngineConfig, world: World) -> None:
    """Compare the configs in force of all processes; a collective where there are several.

    Raises:
        ConfigError: they differ; on every process, with the keys, the values and the ranks.
    """
    from engine.config import fingerprint  # see engine/__init__.py

    if world.size == 1:
        return
    mine = fingerprint(config)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    everyone: list[dict[str, str]] = world.gather(mine)
    written = config.as_written()
    problems = []
    for path in dict.fromkeys(path for each in everyone for path in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(everyone):
            ranks.setdefault(each.get(path, "nothing"), []).append(rank)
        if len(ranks) > 1:
            values = "; ".join(f"{value} on {_named(where)}" for value, where in ranks.items())
            line, column = written.locate(tuple(path.split(".")))
            problems.append(Problem(path, f"got {values}; expected one config on all ranks", line, column))
    raise ConfigError(problems, written.source)


def _named(ranks: Sequence[int]) -> str:
    """``rank 0``, ``ranks 1, 3-7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
