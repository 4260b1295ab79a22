"""Joining the group of ranks: this rank, its device, the other ranks' addresses, and collectives for a few numbers.

A group that the script has made counts as it is. Otherwise the launcher's environment makes one: torchrun's, or that of
srun, mpirun or mpiexec next to MASTER_ADDR and MASTER_PORT. Without any there is one rank and no group. There is no
launcher here.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from redline.distributed.failure import (
    address_towards,
    call_within,
    explains_failures,
    has_agent_store,
    join_peers,
    leave_peers,
)
from redline.errors import EngineError
from redline.log import log

__all__ = ["World", "can_reduce_on_host", "join_alone", "join_world", "launched_ranks", "make_side_group"]

T = TypeVar("T")

_GRACE = 5.0  # seconds, after which torch has kept to no timeout
_timeout = timedelta(seconds=600)  # of groups that are made later
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # numbers about the run travel on the CPU, gradients do not

# Launchers that start ranks and give no address: the variables of rank, number of ranks, and rank on the host. A shell
# or batch script of SLURM has SLURM_NTASKS, too; only a step of srun has the number of its own tasks.
_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
_TORCHRUN = "`torchrun --nproc-per-node N script.py`"


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that train together, seen from one of them."""

    rank: int  # this one, 0 to size - 1
    local_rank: int  # this one among those of its host
    size: int  # number of ranks
    device: torch.device  # where this rank computes

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, as a new tensor; a collective where size > 1."""
        return value if self.size == 1 else self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, as a new tensor; a collective where size > 1."""
        total = value.clone()
        if self.size > 1:
            explains_failures(dist.all_reduce)(total)
        return total

    def gather(self, value: T) -> list[T]:
        """The value of every rank; a collective where size > 1, for small things that can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            explains_failures(dist.all_gather_object)(values, value)
        return values


def join_world(device: torch.device | str | None = None, *, timeout: float = 600.0) -> World:
    """Join the process group of the caller or the launcher; without one, return a world of one rank.

    Args:
        device: where to compute; None takes CUDA's device of the local rank where there is one, on one rank Apple's
            GPU, else the CPU.
        timeout: seconds to wait for the other ranks, here and in every collective; not of a group that the caller made.

    Raises:
        EngineError: the environment is incomplete; there are fewer GPUs than ranks on the host; the other ranks do not
            join in time.
    """
    global _timeout
    _timeout = timedelta(seconds=timeout)
    own_group = _has_group()
    rank, local_rank, size = _place_in_group() if own_group else _place_by_launcher()
    chosen = torch.device(device) if device is not None else _device_of(local_rank, size)
    if chosen.type == "mps" and size > 1:
        raise EngineError(
            f"device: got mps on {size} ranks, and torch has no collectives there; train on one rank, or on the CPU "
            'with initialize(..., device="cpu")'
        )
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank if size > 1 else torch.cuda.current_device())
        torch.cuda.set_device(chosen)
    if size > 1:
        leave: Callable[[], Any] = leave_peers  # the script's group, which the script ends
        if not own_group:
            _make_group(_BACKENDS["cuda" if chosen.type == "cuda" else "cpu"], rank, size)
            leave = _leave
        join_peers(rank, size, fresh=not own_group)
        atexit.unregister(leave)
        atexit.register(leave)
    return World(rank, local_rank, size, chosen)


def join_alone(world: World) -> None:
    """Make a process group for a single rank: torch's sharding needs one, to offload from one GPU."""
    if not dist.is_initialized():
        backends = _BACKENDS["cuda" if world.device.type == "cuda" else "cpu"]
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        atexit.register(_leave)


def make_side_group() -> Any:
    """A gloo group of all ranks, for collectives that must not mix with those of training; a collective.

    torch gives each group a timeout of its own; this one has that of :func:`join_world`.
    """
    return dist.new_group(backend="gloo", timeout=_timeout)


def can_reduce_on_host() -> bool:
    """Whether the process group takes CPU tensors; one that a script made for NCCL alone does not."""
    group: Any = dist.group.WORLD
    return group is not None and any(device.type == "cpu" for device in group._device_types)


def launched_ranks() -> int | None:
    """The number of ranks before they have joined; None where WORLD_SIZE tells it, or nothing does."""
    if _has_group():
        return dist.get_world_size()
    return None if "WORLD_SIZE" in os.environ or (found := _find_launcher()) is None else found[3]


def _leave() -> None:
    if dist.is_initialized():
        keep_open = leave_peers()
        dist.destroy_process_group()
        gc.collect()
        keep_open()  # now that their connections are closed, the others read why


# -- which rank this is ------------------------------------------------------------------------------------------------


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _place_in_group() -> tuple[int, int, int]:
    """Rank, local rank and number of ranks in the script's own group."""
    rank, count = dist.get_rank(), torch.cuda.device_count()
    names = ("LOCAL_RANK", *(each[2] for each in _LAUNCHERS.values()))
    given = [int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()]
    return rank, given[0] if given else rank % count if count else rank, dist.get_world_size()


def _place_by_launcher() -> tuple[int, int, int]:
    """Rank, local rank and number of ranks by the environment."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
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
                f"for a single process; start with {_TORCHRUN}"
            ) from None
    found = _find_launcher()
    if found is None:
        return 0, 0, 1
    name, rank, local_rank, size = found
    if "MASTER_ADDR" not in os.environ or not os.environ.get("MASTER_PORT", "").isdecimal():
        raise EngineError(
            f"environment: {name} started {size} ranks, and nothing tells where they meet; start with {_TORCHRUN}, "
            "set MASTER_ADDR and MASTER_PORT to a host and a free port of rank 0, or set RANK=0 and WORLD_SIZE=1 if "
            "each trains alone"
        )
    return rank, local_rank, size


def _find_launcher() -> tuple[str, int, int, int] | None:
    """The launcher that started several ranks, this one's rank and local rank, and their number."""
    for name, variables in _LAUNCHERS.items():
        rank, size, local_rank = (os.environ.get(each, "") for each in variables)
        if rank.isdecimal() and size.isdecimal() and int(size) > 1:
            return name, int(rank), int(local_rank) if local_rank.isdecimal() else int(rank), int(size)
    return None


def _device_of(local_rank: int, size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("mps" if size == 1 and torch.backends.mps.is_available() else "cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise EngineError(
            f"LOCAL_RANK {local_rank}: this host has {count} GPU(s); start at most {count} ranks on it, or "
            'compute on the CPU with initialize(..., device="cpu")'
        )
    return torch.device("cuda", local_rank)


# -- where the ranks meet ----------------------------------------------------------------------------------------------


def _make_group(backends: str, rank: int, size: int) -> None:
    _choose_interface(size)
    try:
        store = _meet_in_store(rank, size, _timeout)
        dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=_timeout)
    except RuntimeError as error:
        master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise EngineError(
            f"process group: rank {rank} of {size} did not meet the others at {master} (redline.distributed_timeout is "
            f"{_timeout.total_seconds():g} s): {str(error).splitlines()[0].rstrip('.')}; expected all {size} ranks to "
            "be started with one MASTER_ADDR that they can reach, and with a MASTER_PORT that is open there and "
            "unused; where a host has several networks, GLOO_SOCKET_IFNAME names the interface"
        ) from error


def _meet_in_store(rank: int, size: int, timeout: timedelta) -> Any:
    """A store at MASTER_ADDR and MASTER_PORT that nobody has written into before, once all ranks have come.

    torchrun's agent keeps one store for all its restarts. The addresses that ranks of an earlier start wrote there
    would be taken for those of living ones (pytorch/pytorch#135712), and the number of restarts is each host's own. So
    rank 0 names each start, and tells the name to every rank that asks.

    Raises:
        RuntimeError: torch.distributed's; nobody answers in time, or not all have come.
    """
    meet: Any = dist.rendezvous  # type: ignore[attr-defined]
    try:
        # torch waits for ever for another program that accepts the connection.
        wait = timeout.total_seconds() + _GRACE
        store = call_within(wait, lambda: next(iter(meet("env://", rank, size, timeout=timeout)))[0])
    except TimeoutError:
        silent = "something accepts connections there and does not answer, as another program would"
        raise dist.DistStoreError(silent) from None
    store.set_timeout(timeout)
    if not has_agent_store():
        return store
    own, ask, answer = uuid.uuid4().hex, "redline/ask", "redline/answer"
    if rank != 0:
        store.append(ask, f"{own}\n")
        name = store.get(f"{answer}/{own}").decode()  # waits for it
        store.add(f"{name}/came", 1)
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + timeout.total_seconds()
    store.append(ask, "\n")  # so that there is something to read
    answered = {""}
    while (came := store.add(f"{own}/came", 0)) < size - 1:
        for asking in store.get(ask).decode().splitlines():  # those of earlier starts, too
            if asking not in answered:
                answered.add(asking)
                store.set(f"{answer}/{asking}", own)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{came + 1} of {size} processes came")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)  # type: ignore[attr-defined]


def _choose_interface(size: int) -> None:
    """Name gloo an interface, in the environment, where several hosts would otherwise meet on loopback addresses.

    gloo tells the other hosts the address that this host's name has on the host itself. Where that is a loopback
    address, as Debian's installer writes into /etc/hosts, or there is none, each host would look for the others on
    itself, until the timeout.
    """
    variable = "GLOO_SOCKET_IFNAME"
    several_hosts = size > int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if not several_hosts or variable in os.environ or not sys.platform.startswith("linux"):
        return
    mine = _address_of_name()
    if mine is not None and not _is_loopback(mine):
        return
    master = os.environ["MASTER_ADDR"]
    interfaces = {address: name for name, address in _interfaces().items() if not _is_loopback(address)}
    name = interfaces.get(address_towards(master) or "")
    if name is None and len(interfaces) == 1:
        (name,) = interfaces.values()
    found = f"this host's name, {socket.gethostname()}, is {mine or 'no address'} here"
    if name is None:
        known = ", ".join(f"{name} ({address})" for address, name in interfaces.items()) or "none"
        raise EngineError(
            f"network: {found} and MASTER_ADDR {master} is this host itself, so that nothing tells which address the "
            f"other hosts can reach; interfaces: {known}; set {variable} to the name of the right one"
        )
    os.environ[variable] = name
    log.info("network: %s, which other hosts cannot reach; gloo uses %s, towards MASTER_ADDR", found, name)


def _address_of_name() -> str | None:
    """What gloo takes by itself: the first address of this host's name that can be bound."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind(address)
            except OSError:
                continue
            return str(address[0])
    return None


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    import fcntl  # not there on Windows

    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(any_socket, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(reply[20:24])
    return addresses


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
