"""A checkpoint's plain contents, read: nothing in them is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint import layout
from engine.checkpoint.files import why_unreadable
from engine.checkpoint.layout import Found
from engine.checkpoint.manifest import Broken
from engine.compiled import plain_names

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["Opened", "open_checkpoint", "with_plain_names"]


@dataclass(frozen=True)
class Opened:
    """All of a checkpoint but its tensors.

    Attributes:
        found: where.
        metadata: torch.distributed.checkpoint's.
        entries: which tensors it has: their sizes and number formats, by key.
        shared: what all processes share, as JSON has it.
        own: this process's own; rank 0's, if it was saved by fewer processes.
        is_own: whether it is this process's.
    """

    found: Found
    metadata: Metadata
    entries: Mapping[str, Any]
    shared: dict[str, Any]
    own: dict[str, Any]
    is_own: bool


def open_checkpoint(found: Found, rank: int) -> Opened:
    """Read a checkpoint for one process.

    Raises:
        Broken: something in it is not what a checkpoint has.
    """
    from engine.checkpoint.tensors import read_metadata  # see there

    is_own = rank < found.manifest.world_size
    own = found.folder / layout.rank_file(rank if is_own else 0)
    state = found.folder / layout.STATE
    try:
        shared = json.loads(state.read_text(encoding="utf-8"))
        if not isinstance(shared, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise Broken(f"{state}: cannot be read: {error}") from error
    try:
        mine = torch.load(own, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's loader stumbles in many ways
        raise Broken(why_unreadable(own, error)) from error
    if not isinstance(mine, dict):
        raise Broken(f"{own}: it holds {type(mine).__name__}, not what a checkpoint has")
    metadata = read_metadata(found.folder)
    own_state = {key: plain_names(value) if key == "buffers" else value for key, value in mine.items()}
    return Opened(found, metadata, metadata.state_dict_metadata, with_plain_names(shared), own_state, is_own)


def with_plain_names(shared: dict[str, Any]) -> dict[str, Any]:
    """What all processes share, by the model's plain names; the script's own things as they are."""
    return {key: value if key in ("client_state", "data") else plain_names(value) for key, value in shared.items()}
