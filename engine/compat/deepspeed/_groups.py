"""`deepspeed.utils.groups`: all ranks are data-parallel, and a rank is alone in every other kind of parallelism."""

from __future__ import annotations

import re
from typing import Any

from deepspeed import comm

_NAME = re.compile(r"_?get_(\w+?)_(?:parallel_)?(world_size|rank|group|group_ranks|src_rank|group_name)$")


def __getattr__(name: str) -> Any:
    match = _NAME.match(name)
    if match is None:
        raise AttributeError(f"module 'deepspeed.utils.groups' has no attribute {name!r}")
    all_ranks = match[1] in ("data", "sequence_data", "world", "zero_param_intra")
    values = {
        "world_size": comm.get_world_size if all_ranks else lambda: 1,
        "rank": comm.get_rank if all_ranks else lambda: 0,
        "group": comm.get_world_group if all_ranks else lambda: None,
        "group_ranks": (lambda: range(comm.get_world_size())) if all_ranks else lambda: range(1),
    }
    found = values.get(match[2], lambda: 0)
    return lambda *args, **kwargs: found()


def mpu_is_initialized() -> bool:
    return False
