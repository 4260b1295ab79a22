"""Activations that are computed again in backward, block by block, so that a forward keeps those between blocks only.

`torch.utils.checkpoint` around each block's forward, inside the block's hooks: a block that is shared out is gathered
once for its second forward and its backward. Random numbers are those of the first forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]


def recompute(block: nn.Module) -> None:
    """Let a block's backward compute its activations again; in place, names and parameters stay."""
    forward = block.forward

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = checkpointed
