"""What one process has of a tensor that is sharded over several: out of a whole one, and as one of that kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "local_of", "sharded_like", "share_of"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Its class takes half a second to import; whoever has one has imported it."""
    return hasattr(tensor, "to_local")


def local_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, if it is not sharded."""
    either: Any = tensor.detach()
    local: Tensor = either.to_local() if is_sharded(tensor) else either
    return local


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of another such tensor."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # see `is_sharded`

    sharded: Any = like
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    part = whole
    for dim, (size, start) in enumerate(zip(shape, offset)):
        part = part.narrow(dim, min(start, part.shape[dim] - size), size)
    return part.clone()  # a view would keep the whole


def sharded_like(share: Tensor, like: Tensor) -> Tensor:
    """This process's part as a tensor on the other's device, sharded if that is."""
    moved = share.to(like.device)
    if not is_sharded(like):
        return moved
    from torch.distributed.tensor import DTensor  # see `is_sharded`

    sharded: Any = like
    return DTensor.from_local(
        moved, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
