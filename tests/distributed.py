"""Runs one function on several ranks, as torchrun would, and brings its answers back.

    def work(x):                                     # at module level: the ranks import it by name
        torch.distributed.init_process_group("gloo")
        ...
        return value

    values = run_ranks(work, 2, x)                   # [value of rank 0, value of rank 1]

    with ranks(2) as pool:                           # the same, for many short calls
        pool.run(work, x)

Ranks are real processes with torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and others)
and one thread each. Making a process group is the function's own business; it is destroyed after the call.

The ranks come from a pool. They have imported torch once, serve one call after the other and are put into a clean
state after each (`tests.rank`), so that a call takes tens of milliseconds. When one hangs or dies, the pool is killed
and made anew. ``fresh=True`` is for what needs processes of its own, such as a rank that dies on purpose: they are
forked for the call and end with it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import rank

__all__ = ["Ranks", "RanksFailed", "ranks", "run_ranks"]

_TIMEOUT = 600.0  # a hang is to be told from a busy machine
_GRACE_SECONDS = 3.0  # after a first failure the other ranks may still tell theirs


class RanksFailed(AssertionError):
    """At least one rank raised, died or did not answer in time; the message holds what each of them said."""


def run_ranks(
    target: Callable[..., Any], world_size: int, *args: Any, timeout: float = _TIMEOUT, fresh: bool = False
) -> list[Any]:
    """Call ``target(*args)`` on ``world_size`` ranks and return what they returned, by rank.

    Args:
        target: a module-level function, picklable by name; its result must be picklable.
        world_size: number of ranks, 1 or more.
        args: positional arguments, the same for every rank.
        timeout: seconds until all ranks must have answered, start-up included.
        fresh: whether to fork the ranks for this call instead of taking the pool's. Rank 0 then holds the store of the
            process group; otherwise this process does, as torchrun's agent does.

    Raises:
        RanksFailed: with the traceback of every rank that raised and the fate of the others.
    """
    work = pickle.dumps((target, args))
    if fresh:
        port = _free_port()
        environments = [_environment(each, world_size, port) for each in range(world_size)]
        processes = [_Process(each, once=True) for each in range(world_size)]
        try:
            call = _Call(processes, timeout)
            call.run(work, environments)
        finally:
            for process in processes:
                process.kill()
    else:
        # The store is there before its port is told: no other process can take the port in between.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        environments = [_environment(each, world_size, store.port) | agent for each in range(world_size)]
        call = _Call(_pool.first(world_size), timeout)
        try:
            call.run(work, environments)
        finally:
            if call.under_way:
                _pool.kill()
    return call.result()


class Ranks:
    """A number of the pool's ranks, for many calls.

    Args:
        world_size: number of ranks, 1 or more.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def run(self, target: Callable[..., Any], *args: Any, timeout: float = _TIMEOUT) -> list[Any]:
        """:func:`run_ranks` on these ranks; each call has a process group of its own."""
        return run_ranks(target, self.world_size, *args, timeout=timeout)


@contextmanager
def ranks(world_size: int) -> Iterator[Ranks]:
    """The first ranks of the pool, started before the first call, so that all calls take about the same time."""
    _pool.first(world_size)
    yield Ranks(world_size)


# -- processes -------------------------------------------------------------------------------------------------------


class _Process:
    """The process of a rank, forked from a server that has imported torch, and the connection to it.

    Args:
        number: the rank.
        once: whether it serves a single call.
    """

    def __init__(self, number: int, *, once: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(rank.IMPORTED)
        self.connection, its_end = context.Pipe()
        self._dump, its_dump = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=rank.serve, args=(its_end, its_dump, once), name=f"rank {number}", daemon=True
        )
        self.is_used_up = False  # and ends, or has ended
        self._process.start()
        its_end.close()  # so that this end notices when the process is gone
        its_dump.close()

    def can_serve(self) -> bool:
        return not self.is_used_up and self._process.is_alive()

    def exit_code(self) -> int | None:
        """The exit code of a process that has closed its connection."""
        self._process.join()
        return self._process.exitcode

    def where(self) -> str:
        """The tracebacks of all threads; written even while the process waits in a collective."""
        text = b""
        with suppress(OSError):
            os.kill(self._process.pid or 0, rank.DUMP_SIGNAL)
            while self._dump.poll(1.0 if text else 30.0):  # it comes in pieces
                text += os.read(self._dump.fileno(), 1 << 16)
        return text.decode(errors="replace") or "(it writes no traceback)"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()
        self._dump.close()


class _Pool:
    """The processes that serve this process's calls."""

    def __init__(self) -> None:
        self._processes: list[_Process] = []
        self._owner = os.getpid()

    def first(self, number: int) -> list[_Process]:
        """The first ranks, started where there are none yet."""
        if self._owner != os.getpid():  # the ranks are the parent's, which this process was forked from
            self._processes, self._owner = [], os.getpid()
        for each, process in enumerate(self._processes):
            if not process.can_serve():
                process.kill()
                self._processes[each] = _Process(each)
        self._processes += [_Process(each) for each in range(len(self._processes), number)]
        return self._processes[:number]

    def kill(self) -> None:
        """End all processes, whatever they are doing; the next call makes new ones."""
        if self._owner == os.getpid():
            for each in self._processes:
                each.kill()
        self._processes = []


_pool = _Pool()
atexit.register(_pool.kill)


# -- one call --------------------------------------------------------------------------------------------------------


class _Call:
    """One call of a function on each of some processes.

    Args:
        processes: of the ranks.
        timeout: seconds until all of them must have answered.

    Attributes:
        under_way: the ranks that still run the function, or have not cleaned up after it.
    """

    def __init__(self, processes: Sequence[_Process], timeout: float) -> None:
        self._processes = processes
        self._deadline = time.monotonic() + timeout
        self._values: dict[int, bytes] = {}
        self._faults: dict[int, str] = {}
        self.under_way = set(range(len(processes)))

    def run(self, work: bytes, environments: Sequence[dict[str, str]]) -> None:
        """Let each process do the work in its environment; return when all are done or a fault has had its grace."""
        folder = os.getcwd()
        for process, environment in zip(self._processes, environments):
            with suppress(BrokenPipeError):  # it has died; what it says below is the end of the connection
                process.connection.send_bytes(pickle.dumps((environment, folder, work)))
        while self.under_way:
            connections = {self._processes[each].connection: each for each in self.under_way}
            ready = wait(list(connections), max(0.0, self._deadline - time.monotonic()))
            if not ready:
                self._time_is_up()
                return
            for connection in ready:
                self._hear(connections[connection])  # type: ignore[index]

    def result(self) -> list[Any]:
        """The values by rank.

        Raises:
            RanksFailed: there is no value of some rank.
        """
        if not self._faults:
            return [pickle.loads(self._values[each]) for each in range(len(self._processes))]
        for each in range(len(self._processes)):
            if each not in self._values:
                self._faults.setdefault(each, "had given no answer when another failed")
        size = len(self._processes)
        raise RanksFailed("\n".join(f"rank {each} of {size} {fate}" for each, fate in self._faults.items()))

    def _hear(self, number: int) -> None:
        process = self._processes[number]
        try:
            message = process.connection.recv()
        except (EOFError, ConnectionResetError):
            answer = "no answer" if number not in self._values else "before it had cleaned up"
            self._fault(number, f"died with exit code {process.exit_code()} and {answer}")
            self.under_way.discard(number)
            return
        if isinstance(message, bool):
            process.is_used_up = not message
            self.under_way.discard(number)
            return
        value, traceback = message
        if traceback is None:
            self._values[number] = value
        else:
            self._fault(number, f"raised\n{traceback}")

    def _fault(self, number: int, fate: str) -> None:
        self._faults.setdefault(number, fate)
        self._deadline = min(self._deadline, time.monotonic() + _GRACE_SECONDS)

    def _time_is_up(self) -> None:
        if not self._faults:
            for each in sorted(self.under_way):
                late = "gave no answer in time" if each not in self._values else "answered, and did not end in time"
                self._faults[each] = f"{late}; it is here:\n{self._processes[each].where()}"


def _environment(number: int, world_size: int, port: int) -> dict[str, str]:
    """All of a rank's environment: this process's, and torchrun's."""
    torchrun = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **torchrun}


def _free_port() -> int:
    """One that no connection of another process is given by chance before rank 0 listens on it."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, given.read_text().split()) if given.exists() else (0, 0)
    ports = [port for port in range(10_000, 60_000) if not first <= port <= last] or range(10_000, 60_000)
    while True:
        port = secrets.choice(ports)  # tests that run beside this one have the seeds of `random` in common
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
