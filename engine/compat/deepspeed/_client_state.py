"""What a script gives to `save_checkpoint`: its own state as data, and one folder for all ranks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm
from redline.log import log

__all__ = ["LEFT_OUT", "as_data", "folder_of_rank_0"]

LEFT_OUT = object()


def as_data(value: Any, where: str) -> Any:
    """A value as a checkpoint stores it: namespaces are dicts, arrays tensors; functions and objects are left out."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        items = {key: as_data(each, f"{where}[{key!r}]") for key, each in value.items()}
        return {key: each for key, each in items.items() if each is not LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return type(value)(each for each in (as_data(each, where) for each in value) if each is not LEFT_OUT)
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        return torch.from_numpy(value.copy()) if getattr(value, "ndim", 0) else value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor, torch.dtype, set)):
        return value
    log.warning("%s: a %s is no data, and is not saved", where, type(value).__name__)
    return LEFT_OUT


def folder_of_rank_0(save_dir: str) -> str:
    """Rank 0's folder, with a warning where this rank's differs."""
    if comm.get_world_size() == 1:
        return save_dir
    given = [save_dir]
    comm.broadcast_object_list(given, src=0)
    if given[0] != save_dir:
        log.warning("save_checkpoint: rank 0 saves into %s, this rank gave %s; rank 0's is taken", given[0], save_dir)
    return given[0]
