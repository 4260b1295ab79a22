"""Collectives of gradients and parameters in buckets; which rank owns which rows at ZeRO stages 1 and 2.

At these stages parameters are full on every rank, and what updates them is sharded: each rank owns some rows of every
parameter, as FSDP2 divides them (``torch.chunk`` along the first dimension), in fp32 and as a DTensor, so that
checkpoints and optimizers see the same layout at every stage. Gradients are reduce-scattered to the rank that owns
their rows; after the optimizer step the rows are all-gathered, in the dtype of the computation. Source of the method:
the ZeRO paper (https://arxiv.org/abs/1910.02054), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from redline.gradients import Reduction

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["RunCollective", "Sharding", "all_reduce", "buckets_of", "make_mesh"]

_BUCKET_BYTES = 25 * 2**20  # of one collective; DDP's default

# torch 2.13 has new names for these, and warns of the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

RunCollective = Callable[[str, int, Callable[[], Any]], Any]  # a collective's name, the bytes sent, and what runs it


def buckets_of(items: Sequence[Any], kind_and_bytes: Callable[[Any], tuple[Any, int]]) -> Iterator[list[Any]]:
    """Group items of one kind into buckets, in the order given."""
    open_buckets: dict[Any, tuple[list[Any], int]] = {}
    for item in items:
        kind, size = kind_and_bytes(item)
        bucket, total = open_buckets.get(kind, ([], 0))
        if bucket and total + size > _BUCKET_BYTES:
            yield bucket
            bucket, total = [], 0
        bucket.append(item)
        open_buckets[kind] = bucket, total + size
    yield from (bucket for bucket, _ in open_buckets.values())


def all_reduce(
    gradients: Sequence[Tensor | None],
    params: Sequence[Tensor],
    reduction: Reduction,
    status: Tensor,
    sparse_params: Container[Tensor] = frozenset(),
) -> tuple[list[Tensor], Tensor]:
    """Reduce full gradients over the ranks, in buckets; a collective.

    Gradients of this rank that are None count as zeros; those of `sparse_params` are sparse on every rank. `status` are
    numbers that are summed with them, shape (n,).

    Returns:
        The reduced gradients, in the dtype of the collective and the layout of their parameters; the sums of `status`.
    """
    reduced: list[Any] = [None] * len(params)
    dense = [index for index, param in enumerate(params) if not sparse_params or param not in sparse_params]
    # Backward makes gradients in about the reverse of the order of the parameters.
    buckets = list(buckets_of(dense[::-1], lambda i: (_dtype_of(params[i], reduction), params[i].nbytes))) or [[]]
    futures = []
    for bucket in buckets:
        extra = status if bucket is buckets[-1] else status[:0]  # goes with the last one
        dtype = _dtype_of(params[bucket[0]], reduction) if bucket else reduction.dtype
        sizes = [params[index].numel() for index in bucket]
        flat = torch.empty(sum(sizes) + len(extra), dtype=dtype, device=status.device)
        *parts, tail = torch.split(flat, [*sizes, len(extra)])
        views = [
            part.as_strided(params[index].shape, _dense_strides(params[index]), part.storage_offset())
            for index, part in zip(bucket, parts)
        ]
        given = [(view, gradients[index]) for view, index in zip(views, bucket)]
        zeros = [view for view, gradient in given if gradient is None]
        copied = [(view, each.to_dense() if each.is_sparse else each) for view, each in given if each is not None]
        if zeros:
            torch._foreach_zero_(zeros)
        if copied:
            torch._foreach_copy_([view for view, _ in copied], [gradient for _, gradient in copied])
        tail.copy_(extra)
        futures.append(reduction.start(torch.view_as_real(flat) if dtype.is_complex else flat))
        for index, view in zip(bucket, views):
            reduced[index] = view
    for future in futures:
        future.wait()
    for index, param in enumerate(params):
        if reduced[index] is None:
            gradient = gradients[index]
            reduced[index] = reduction.reduce_sparse(sparse_zeros(param) if gradient is None else gradient)
    return reduced, (tail.real if tail.is_complex() else tail) / (reduction.before * reduction.after)


def _dtype_of(param: Tensor, reduction: Reduction) -> torch.dtype:
    """The dtype of a gradient's collective: the config's, or the parameter's own where that is complex or fp64."""
    wider = param.is_complex() or param.dtype is torch.float64
    return param.dtype if wider and reduction.dtype is torch.float32 else reduction.dtype


def _dense_strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's strides where its elements fill their memory, one each; else those of a contiguous tensor."""
    return param.stride() if param.is_contiguous() else torch.empty_like(param, device="meta").stride()


def sparse_zeros(param: Tensor) -> Tensor:
    """The gradient of an embedding that was not used: no rows."""
    rows = torch.empty(1, 0, dtype=torch.long), param.new_empty(0, *param.shape[1:])
    return torch.sparse_coo_tensor(*rows, param.shape, device=param.device, check_invariants=False)


def make_mesh(device: torch.device, world_size: int, group: int) -> DeviceMesh:
    """A mesh of all ranks; with two axes where groups of `group` ranks each shard a full model."""
    from torch.distributed.device_mesh import init_device_mesh

    if 0 < group < world_size:
        return init_device_mesh(device.type, (world_size // group, group), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world_size,))


class Sharding:
    """Which rank owns which rows.

    Of a mesh with two axes the second one shards and the first one replicates. Master params and optimizer state are on
    `device`: the model's, or the CPU when they are offloaded, to page-locked memory if `pinned`.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device, *, pinned: bool = False) -> None:
        from torch.distributed.tensor import Replicate, Shard  # slow to import, and not needed at stage 0

        self.device, self.group = device, mesh.get_group(mesh.ndim - 1)
        self.run_collective: RunCollective = lambda op, size, run: run()
        self._mesh, self._pinned = mesh, pinned
        self._replicas = mesh.get_group(0) if mesh.ndim > 1 else None
        self._size, self._rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self._placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]

    @staticmethod
    def divides(param: Tensor) -> bool:
        """Whether a parameter is sharded; scalars, empty and complex ones are full on every rank."""
        return param.ndim > 0 and param.numel() > 0 and not param.is_complex()

    def rows_of(self, param: Tensor) -> Tensor:
        """This rank's rows of a full tensor, as a view."""
        chunk = -(-param.shape[0] // self._size)
        return param.detach()[self._rank * chunk : (self._rank + 1) * chunk]

    def shard_of(self, full: Tensor) -> Tensor:
        """A DTensor with a copy of this rank's rows."""
        local = self.rows_of(full).to(self.device, copy=True).contiguous()
        if self._pinned and self.device.type == "cpu" and torch.cuda.is_available():
            local = local.pin_memory()
        return self.as_dtensor(local, full)

    def as_dtensor(self, local: Tensor, like: Tensor) -> Tensor:
        """This rank's rows as a DTensor of a full tensor's shape."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(like.shape, device="meta").stride()
        sharded: Tensor = DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=like.shape, stride=stride
        )
        return sharded

    def _num_elements(self, tensor: Tensor) -> int:
        """The elements of a rank's rows, but for the last ranks, which may have fewer."""
        return -(-tensor.shape[0] // self._size) * (tensor.numel() // tensor.shape[0])

    def reduce_scatter(
        self,
        gradients: Sequence[Tensor | None],
        params: Sequence[Tensor],
        masters: Sequence[Tensor],
        reduction: Reduction,
        status: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Sum full gradients over the ranks, for each rank its rows; a collective.

        Arguments are those of :func:`all_reduce`. The parameters' own gradients are freed.

        Returns:
            This rank's rows, each in the dtype and on the device of its master param, and the sums of `status`.
        """
        rows: list[Any] = [None] * len(params)
        under_way: list[tuple[list[int], Callable[[], None], list[Tensor]]] = []

        def finish_first() -> None:
            bucket, wait, own = under_way.pop(0)
            wait()
            for index, part in zip(bucket, own):
                rows[index] = part.to(self.device, masters[index].dtype)

        # What is sent together depends on the parameters alone, and not on what a loss has reached.
        size = reduction.dtype.itemsize
        buckets = list(buckets_of(range(len(params)), lambda i: (params[i].dtype, params[i].numel() * size)))
        for bucket in buckets:
            given = [gradients[index] for index in bucket]
            dtype = next((each.dtype for each in given if each is not None), None)
            dense = [
                torch.zeros_like(params[index], dtype=dtype)
                if each is None
                else each.to_dense()
                if each.is_sparse
                else each
                for index, each in zip(bucket, given)
            ]
            wait, own, sums = self._start(dense, status if bucket is buckets[-1] else status[:0], reduction)
            under_way.append((bucket, wait, own))
            for index in bucket:
                params[index].grad = None
            if len(under_way) > 1:  # the full copies of a bucket take memory
                finish_first()
        finish_first()
        return rows, sums / (reduction.before * reduction.after)

    def _start(
        self, dense: list[Tensor], extra: Tensor, reduction: Reduction
    ) -> tuple[Callable[[], None], list[Tensor], Tensor]:
        """Start a bucket; returns a function that waits, the rows of each gradient, and the sum of `extra`."""
        parts = [each.contiguous() for each in dense]
        dtype = _dtype_of(parts[0], reduction)
        if len(extra):
            parts.append(extra.to(parts[0].dtype).repeat(self._size))  # each rank's rows of it are all of it
        sizes = [self._num_elements(each) for each in parts]
        full = torch.empty(self._size, sum(sizes), dtype=dtype, device=parts[0].device)
        torch._chunk_cat(parts, dim=0, num_chunks=self._size, out=full)
        del parts
        reduction.own.add(full)
        if reduction.before != 1.0:
            full.mul_(reduction.before)
        mine = torch.empty(sum(sizes), dtype=full.dtype, device=full.device)
        run = partial(_reduce_scatter, mine, full.view(-1), group=self.group, async_op=True)
        work = self.run_collective("reduce_scatter", full.nbytes, run)

        def wait() -> None:
            work.wait()
            if self._replicas is not None:
                self.run_collective("all_reduce", mine.nbytes, lambda: dist.all_reduce(mine, group=self._replicas))
            if reduction.after != 1.0:
                mine.mul_(reduction.after)

        flat = torch.split(mine, sizes)
        own = [part[: rows.numel()].view(rows.shape) for part, rows in zip(flat, map(self.rows_of, dense))]
        return wait, own, flat[-1] if len(extra) else extra

    def gather(self, model: Sequence[Tensor], masters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Copy sharded master params to the model; returns model and master params that are full."""
        pairs: list[tuple[Tensor, Any]] = list(zip(model, masters))
        sharded = [(param, master._local_tensor) for param, master in pairs if hasattr(master, "_local_tensor")]
        for bucket in buckets_of(sharded, lambda pair: (pair[0].dtype, pair[0].nbytes)):
            first, sizes = bucket[0][0], [self._num_elements(param) for param, _ in bucket]
            mine = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
            places = [flat[: rows.numel()].view_as(rows) for flat, (_, rows) in zip(torch.split(mine, sizes), bucket)]
            torch._foreach_copy_(places, [rows for _, rows in bucket])
            every = torch.empty(self._size * len(mine), dtype=mine.dtype, device=mine.device)
            self.run_collective("all_gather", mine.nbytes, partial(_all_gather, every, mine, group=self.group))
            for (param, _), part in zip(bucket, torch.split(every.view(self._size, -1), sizes, dim=1)):
                param.copy_(part.reshape(-1, *param.shape[1:])[: param.shape[0]])
        full = [(param, master) for param, master in pairs if not hasattr(master, "_local_tensor")]
        return [param for param, _ in full], [master for _, master in full]
