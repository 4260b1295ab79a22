"""Which process this is, on which device, and how processes agree on a number.

torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE) makes the process group; without it there is one
process and no group at all. There is no launcher here: torchrun is the launcher, on one host or many.
"""

from __future__ import annotations

import atexit
import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EngineError
from engine.network import choose_interface
from engine.peers import explains_losses, meet, part
from engine.rendezvous import meet_in_store

__all__ = ["World", "can_reduce_on_host", "join_alone", "join_world", "make_side_group"]

T = TypeVar("T")

_timeout = timedelta(seconds=600)  # of the groups to come


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: this process, 0 to size - 1.
        local_rank: this process among those of its host.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, as a new tensor; a collective where size > 1."""
        if self.size == 1:
            return value
        total = self.sum(value)
        return total / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, as a new tensor; a collective where size > 1."""
        total = value.clone()
        if self.size > 1:
            _all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """A value of every process, by rank; a collective where size > 1, for small things that can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            _all_gather(values, value)
        return values


@explains_losses
def _all_reduce(value: Tensor) -> None:
    dist.all_reduce(value)


@explains_losses
def _all_gather(values: list[Any], value: Any) -> None:
    dist.all_gather_object(values, value)


def join_world(device: torch.device | str | None = None, *, timeout: float = 600.0) -> World:
    """Join the process group that torchrun (or the caller) laid out, or stay alone.

    Args:
        device: where to compute; None takes CUDA's device of the local rank where there is one, else
            the CPU.
        timeout: seconds to wait for the other processes, here and in every collective; a group that the caller
            made keeps its own.

    Raises:
        EngineError: the environment is half there; there are fewer GPUs than processes on the host; the other
            processes do not come in time.
    """
    global _timeout
    _timeout = timedelta(seconds=timeout)
    environment = _environment()
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = environment[1] if environment else rank
    elif environment:
        rank, local_rank, size = environment
    else:
        rank, local_rank, size = 0, 0, 1

    chosen = torch.device(device) if device is not None else _device_of(local_rank)
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank if size > 1 else torch.cuda.current_device())
        torch.cuda.set_device(chosen)
    fresh = size > 1 and not dist.is_initialized()
    if fresh:
        # Both backends: numbers about the run travel on the CPU, gradients on the device.
        _make_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", rank, size)
        atexit.register(_leave)
    if size > 1:
        meet(rank, size, fresh=fresh)
        if not fresh:  # the script's group, which the script ends
            atexit.unregister(part)
            atexit.register(part)
    return World(rank, local_rank, size, chosen)


def join_alone(world: World) -> None:
    """Make a process group for a single process that has none: torch's sharding wants one, to offload from one GPU."""
    if not dist.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        atexit.register(_leave)


def _make_group(backends: str, rank: int, size: int) -> None:
    """The process group."""
    choose_interface(size)
    try:
        store = meet_in_store(rank, size, _timeout)
        dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=_timeout)
    except RuntimeError as error:
        master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first, *_ = str(error).splitlines()
        seconds = _timeout.total_seconds()
        raise EngineError(
            f"process group: rank {rank} of {size} did not meet the others at {master} (redline.distributed_timeout is "
            f"{seconds:g} s): {first.rstrip('.')}; expected all {size} processes to be started with one "
            "MASTER_ADDR, which they can reach, and with a port that is open there and nobody else's; where a host has "
            "several networks, GLOO_SOCKET_IFNAME names the interface"
        ) from error


def make_side_group() -> Any:
    """A group of all processes on their CPUs, for collectives that must not mix with the training's; a collective.

    torch gives each group a timeout of its own; this one has that of :func:`join_world`.
    """
    return dist.new_group(backend="gloo", timeout=_timeout)


def can_reduce_on_host() -> bool:
    """Whether the process group takes tensors of the CPU, as one that a script made for NCCL alone does not."""
    group: Any = dist.group.WORLD
    return group is not None and any(device.type == "cpu" for device in group._device_types)


def _environment() -> tuple[int, int, int] | None:
    """Rank, local rank and world size as torchrun sets them, or None without torchrun."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if size > 1:
            _ = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return rank, int(os.environ.get("LOCAL_RANK", "0")), size
    except (KeyError, ValueError):
        given = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
        raise EngineError(
            f"environment: got {given}; expected all of them as torchrun sets them, or neither RANK nor WORLD_SIZE "
            "for a single process; start with `torchrun --nproc-per-node N script.py`"
        ) from None


def _device_of(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise EngineError(
            f"LOCAL_RANK {local_rank}: this host has {count} GPU(s); start at most {count} processes on it, or "
            'compute on the CPU with initialize(..., device="cpu")'
        )
    return torch.device("cuda", local_rank)


def _leave() -> None:
    if not dist.is_initialized():
        return
    wait = part()
    dist.destroy_process_group()
    gc.collect()
    wait()
