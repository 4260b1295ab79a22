"""Parameters in full on every rank, what updates them sharded: ZeRO stages 1 and 2.

Each rank owns some rows of every parameter, as FSDP2 divides them (``torch.chunk`` along the first dimension), in fp32
and as a DTensor, so that checkpoints and optimizers see the same layout at every stage. Gradients are reduce-scattered
to the rank that owns their rows; after the optimizer step the rows are all-gathered, in the dtype of the computation.
Source of the method: the ZeRO paper (https://arxiv.org/abs/1910.02054), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from engine.gradients import Reduction
from engine.log import log

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["BUCKET_BYTES", "Sharding", "Show", "buckets_of", "make_mesh", "unfuse_on_shards"]

BUCKET_BYTES = 25 * 2**20  # of one collective; DDP's default

# torch 2.13 has new names for these, and warns of the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

Show = Callable[[str, int, Callable[[], Any]], Any]  # a collective's name, the bytes sent, and what runs it


class Sharding:
    """Which rank owns which rows.

    Args:
        mesh: of all ranks; with two axes the second one shards, and the first one replicates.
        device: where master params and optimizer state are: the model's device, or the CPU's memory when offloaded.
        pinned: whether offloaded memory is page-locked.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device, *, pinned: bool = False) -> None:
        from torch.distributed.tensor import Replicate, Shard  # it takes long to import, and stage 0 needs none of it

        self.mesh, self.device, self.pinned = mesh, device, pinned
        self.group = mesh.get_group(mesh.ndim - 1)
        self.replicas = mesh.get_group(0) if mesh.ndim > 1 else None
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self._placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        self.show: Show = lambda op, size, run: run()

    @staticmethod
    def divides(param: Tensor) -> bool:
        """Whether a parameter is divided; scalars, empty and complex ones are whole on every rank."""
        return param.ndim > 0 and param.numel() > 0 and not param.is_complex()

    def rows_of(self, param: Tensor) -> Tensor:
        """This rank's rows of a full tensor, as a view."""
        chunk = self._chunk(param)
        start = min(self.rank * chunk, param.shape[0])
        return param.detach()[start : min(start + chunk, param.shape[0])]

    def shard_of(self, full: Tensor) -> Tensor:
        """A DTensor with a copy of this rank's rows."""
        local = self.rows_of(full).to(self.device, copy=True).contiguous()
        if self.pinned and self.device.type == "cpu" and torch.cuda.is_available():
            local = local.pin_memory()
        return self.as_dtensor(local, full)

    def as_dtensor(self, local: Tensor, like: Tensor) -> Tensor:
        """This rank's rows as a DTensor of a full tensor's shape."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(like.shape, device="meta").stride()
        sharded: Tensor = DTensor.from_local(
            local, self.mesh, self._placements, run_check=False, shape=like.shape, stride=stride
        )
        return sharded

    def _chunk(self, tensor: Tensor) -> int:
        """The rows of all ranks but the last ones."""
        return -(-tensor.shape[0] // self.size)

    def reduce_scatter(
        self, gradients: Sequence[Tensor], extra: Tensor, reduction: Reduction
    ) -> tuple[Callable[[], None], list[Tensor], Tensor]:
        """Start to sum gradients over the ranks, for each rank its rows.

        Args:
            gradients: full ones, on the model's device.
            extra: numbers of this rank that are summed in the same collective, shape (n,).
            reduction: how the ranks' gradients become one.

        Returns:
            A function that waits, the rows of each gradient (valid afterwards), and the sum of `extra`.
        """
        dense = [each.contiguous() for each in gradients]
        if len(extra):
            dense.append(extra.to(dense[0].dtype).repeat(self.size))  # each rank's rows of it are all of it
        sizes = [self._chunk(each) * (each.numel() // each.shape[0]) for each in dense]
        whole = torch.empty(self.size, sum(sizes), dtype=reduction.dtype, device=dense[0].device)
        torch._chunk_cat(dense, dim=0, num_chunks=self.size, out=whole)
        del dense
        if reduction.before != 1.0:
            whole.mul_(reduction.before)
        mine = torch.empty(sum(sizes), dtype=whole.dtype, device=whole.device)
        work = self.show(
            "reduce_scatter",
            whole.nbytes,
            lambda: _reduce_scatter(mine, whole.view(-1), group=self.group, async_op=True),
        )

        def wait() -> None:
            work.wait()
            if self.replicas is not None:
                self.show("all_reduce", mine.nbytes, lambda: dist.all_reduce(mine, group=self.replicas))
            if reduction.after != 1.0:
                mine.mul_(reduction.after)

        flat = torch.split(mine, sizes)
        rows = [part[: own.numel()].view(own.shape) for part, own in zip(flat, map(self.rows_of, gradients))]
        return wait, rows, flat[-1] if len(extra) else extra

    def gather(self, model: Sequence[Tensor], masters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Write sharded master params into the model; the others, which are whole, are returned in pairs."""
        sharded: list[tuple[Tensor, Tensor]] = []
        whole: tuple[list[Tensor], list[Tensor]] = [], []
        for param, master in zip(model, masters):
            if hasattr(master, "_local_tensor"):
                sharded.append((param, master._local_tensor))
            else:
                whole[0].append(param)
                whole[1].append(master)
        for bucket in buckets_of(sharded, lambda pair: (pair[0].dtype, pair[0].nbytes)):
            self._gather(bucket)
        return whole

    def _gather(self, bucket: Sequence[tuple[Tensor, Tensor]]) -> None:
        sizes = [self._chunk(param) * (param.numel() // param.shape[0]) for param, _ in bucket]
        first = bucket[0][0]
        mine = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        places = [flat[: rows.numel()].view_as(rows) for flat, (_, rows) in zip(torch.split(mine, sizes), bucket)]
        torch._foreach_copy_(places, [rows for _, rows in bucket])
        every = torch.empty(self.size * len(mine), dtype=mine.dtype, device=mine.device)
        self.show("all_gather", mine.nbytes, lambda: _all_gather(every, mine, group=self.group))
        for (param, _), part in zip(bucket, torch.split(every.view(self.size, -1), sizes, dim=1)):
            rows = part.reshape(-1, *param.shape[1:])
            param.copy_(rows[: param.shape[0]])


def buckets_of(items: Sequence[Any], kind_and_bytes: Callable[[Any], tuple[Any, int]]) -> Iterator[list[Any]]:
    """Items in the order given, as many of one kind at a time as fill a bucket."""
    open_buckets: dict[Any, tuple[list[Any], int]] = {}
    for item in items:
        kind, size = kind_and_bytes(item)
        bucket, total = open_buckets.get(kind, ([], 0))
        if bucket and total + size > BUCKET_BYTES:
            yield bucket
            bucket, total = [], 0
        bucket.append(item)
        open_buckets[kind] = bucket, total + size
    yield from (bucket for bucket, _ in open_buckets.values())


def make_mesh(device: torch.device, world_size: int, group: int) -> DeviceMesh:
    """All ranks in a row; or, with groups of `group` ranks that each shard a whole model, in rows of that size."""
    from torch.distributed.device_mesh import init_device_mesh

    if 0 < group < world_size:
        return init_device_mesh(device.type, (world_size // group, group), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world_size,))


def unfuse_on_shards(optimizer: Optimizer) -> None:
    """Leave sharded parameters to torch's plain kernels, but for Adam's: the other fused ones don't take DTensors."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in optimizer.param_groups:
        if group.get("fused") and type(optimizer).__module__.startswith("torch."):
            log.info("%s: torch's fused kernel does not take sharded parameters; the plain one is used",
                     type(optimizer).__name__)  # fmt: skip
            group["fused"] = None
