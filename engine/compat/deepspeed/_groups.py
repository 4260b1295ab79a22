"""`deepspeed.utils.groups`: all ranks are data-parallel, and a rank is alone in every other kind of parallelism."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from deepspeed import comm

_NAME = re.compile(r"_?get_(\w+?)_(?:parallel_)?(world_size|rank|group|group_ranks|src_rank|group_name)$")
_OF_ALL: dict[str, Callable[[], Any]] = {
    "world_size": comm.get_world_size,
    "rank": comm.get_rank,
    "group": comm.get_world_group,
    "group_ranks": lambda: range(comm.get_world_size()),
}
_ALONE = {"world_size": 1, "group": None, "group_ranks": range(1)}


def __getattr__(name: str) -> Any:
    match = _NAME.match(name)
    if match is None:
        raise AttributeError(f"module 'deepspeed.utils.groups' has no attribute {name!r}")
    kind, what = match.groups()
    if kind in ("data", "sequence_data", "world", "zero_param_intra") and what in _OF_ALL:
        return lambda *args, **kwargs: _OF_ALL[what]()
    return lambda *args, **kwargs: _ALONE.get(what, 0)


def mpu_is_initialized() -> bool:
    return False
