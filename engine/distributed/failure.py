"""Errors that name the rank that was lost, when a collective fails.

torch.distributed reports a lost rank as the address of a closed socket, or as a timeout in milliseconds. Here the
remaining ranks use the process group's store: each writes that it is alive, waits a moment for the others, and names
those that are missing, or that wrote why they exited. Nothing is done until a collective fails.

A rank that has no connection to the lost one goes on waiting for its neighbors, and writes nothing either. So every
rank has a port that its kernel answers for as long as the process lives: among silent ranks, those whose port is closed
are the lost ones.

On GPUs NCCL's watchdog ends the process with a message of its own when a peer's socket closes or the group's timeout
expires. Whatever fails in a call there (gloo's collectives on the CPU, a store, an NCCL call) is handled here.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial, wraps
from typing import Any, TypeVar

import torch.distributed as dist

from redline.errors import EngineError

__all__ = ["address_towards", "call_within", "explain_failure", "explains_failures", "follow_steps", "has_agent_store",
           "join_peers", "leave_peers", "name_ranks"]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])

_LAST_READ = 15.0  # seconds that rank 0 keeps the store open at most
_GRACE = 5.0  # seconds that the others have to write that they are alive
_HERE = "is there"
_AGAIN = "see its output for the cause; restart all ranks from the last checkpoint"
_SAME_WORK = "all need the same number of micro-batches, and must make the same calls in the same order"
_STORE_ERRORS = (RuntimeError, ValueError, OSError)


class _Peers:
    """The other ranks of the group, seen from one of them."""

    def __init__(self, rank: int, size: int, *, fresh: bool) -> None:
        self.rank, self.size = rank, size
        self.engine: Callable[[], Any] = lambda: None  # whose steps an error counts
        self._notes: dict[int, str] = {}  # what each rank wrote
        self._hosts: dict[int, str] = {}
        self._ports: dict[int, tuple[str, int]] = {}  # that a living rank's kernel answers for
        self._noted = False
        self._closed: list[int] = []  # silent ranks whose port is closed
        self._lost: set[int] = set()
        # The script's own store may hold what the ranks of an earlier start have written.
        name = [""] if fresh else [uuid.uuid4().hex]
        if not fresh:
            dist.broadcast_object_list(name)
        self._key = f"redline/peers/{name[0]}"
        host = getattr(_bottom_store(), "host", "")
        address = address_towards(host) or ""
        if address.startswith("127."):  # this rank is on the store's host, which others may know by another address
            address = host
        if ":" in address:  # IPv6: without a port to probe, this rank counts as one that may be alive
            address = ""
        own_host_only = host == "localhost" or host.startswith("127.")
        self.listener = socket.create_server((host if own_host_only else "", 0), backlog=4096)  # accepts nothing
        self._write(f"@{socket.gethostname()} {address} {self.listener.getsockname()[1]}")

    def explain(self, error: RuntimeError, call: str) -> EngineError:
        """An error that names the lost ranks; waits some seconds for the others."""
        self._note(f"{_HERE} in {call}" if call else _HERE)
        store_answers = _talks_within(_GRACE + 2, self._wait_for_notes)
        engine = self.engine()
        where = "start" if engine is None else f"step {engine.global_steps}"
        return EngineError(f"{where}: {self._name_lost(str(error), call, store_answers)}")

    def leave(self) -> Callable[[], None]:
        """Write to the store why this rank exits; returns what keeps it open for the others, if this rank has to."""
        reason, engine = getattr(sys, "last_value", None), self.engine()
        done = "" if engine is None else f" after {engine.global_steps} steps"
        failed = f"exited{done}: {type(reason).__name__}: {str(reason)[:300]}"
        self._note(f"ended its script{done}" if reason is None else failed)
        self.listener.close()
        with suppress(*_STORE_ERRORS):
            if reason is not None and self.rank == 0 and not has_agent_store():
                return partial(self._keep_open, _store())
        return _nothing

    def _keep_open(self, store: Any) -> None:
        """Wait until the others have read why; those without a connection to the lost rank notice it one by one."""
        deadline = time.monotonic() + _LAST_READ
        with suppress(*_STORE_ERRORS):
            while time.monotonic() < deadline and len(self._lost | self._notes.keys()) < self.size:
                time.sleep(0.1)
                self._read(store)
        time.sleep(2.0)  # the last one is reading

    def _note(self, text: str) -> None:
        """Write the state of this rank, once."""
        if not self._noted:
            self._noted = True
            _talks_within(_GRACE, lambda: self._write(" ".join(text.split())))

    def _write(self, text: str) -> None:
        # The store is looked up each time: a reference to it would keep its port open after the group is destroyed.
        with suppress(*_STORE_ERRORS):
            _store().append(self._key, f"{self.rank} {text}\n")

    def _read(self, store: Any) -> None:
        for line in store.get(self._key).decode().splitlines():
            rank, _, text = line.partition(" ")
            if text.startswith("@"):
                self._hosts[int(rank)], address, port = text[1:].split(" ")
                if address:
                    self._ports[int(rank)] = address, int(port)
            else:
                self._notes[int(rank)] = text

    def _wait_for_notes(self) -> None:
        """Read until all ranks have written, a moment has passed since the cause was known, or the time is over."""
        store = _store()
        deadline, next_probe = time.monotonic() + _GRACE, time.monotonic() + 0.2
        while time.monotonic() < deadline and len(self._notes) < self.size:
            self._read(store)
            if time.monotonic() > next_probe:  # rarely: probes stay in the backlog of their port
                next_probe += 1
                silent = [rank for rank in sorted(self._ports) if rank not in self._notes]
                self._closed = [rank for rank in silent if not _answers(*self._ports[rank])]
            if self._closed or not all(text.startswith(_HERE) for text in self._notes.values()):
                deadline = min(deadline, time.monotonic() + 1)
            time.sleep(0.1)

    def _name_lost(self, error: str, call: str, store_answers: bool) -> str:
        """The sentence that names the lost ranks."""
        notes = {rank: self._notes.get(rank, "") for rank in range(self.size) if rank != self.rank}
        reported = {rank: text for rank, text in notes.items() if text and not text.startswith(_HERE)}
        silent = [rank for rank, text in notes.items() if not text]
        waited = re.search(r"waiting (\d+)ms", error)
        how = f" after {int(waited[1]) / 1000:g} s of waiting (redline.distributed_timeout)" if waited else ""
        if reported:
            reasons = "; ".join(f"{self._named([rank])} {text}" for rank, text in reported.items())
            ended = all(text.startswith("ended") for text in reported.values())
            return f"lost contact{how}: {reasons}; {_SAME_WORK if ended else _AGAIN}"
        if not store_answers and 0 in silent and not has_agent_store():
            with_it = f"{how}, and the store with it: it has died or exited, or is unreachable"
            return f"lost {self._named([0])}{with_it}; {_AGAIN}"
        if not store_answers and not self._notes:
            return f"lost contact{how} with the others and with the store: the network or the store's host is down"
        if silent:
            lost = [rank for rank in silent if rank in self._closed] or silent
            self._lost = set(lost)
            words = ("it has", "was", "is") if len(lost) == 1 else ("they have", "were", "are")
            fate = "no answer: {} died, {} stopped, or {} unreachable or busy".format(*words)
            if call.endswith("_checkpoint") and not self._closed:  # these may train on, if the save is asynchronous
                fate += f"; or {call} was not called there"
            return f"lost {self._named(lost)}{how}: {fate}; {_AGAIN}"
        ranks: dict[str, list[int]] = {}
        for rank, text in sorted(self._notes.items()):
            ranks.setdefault(text.removeprefix(_HERE).removeprefix(" in "), []).append(rank)
        calls = ", ".join(f"{name_ranks(those)} called {each}" for each, those in ranks.items() if each)
        calls = f": {calls}" if len(ranks) > 1 else ""
        return f"a collective failed{how}, though all ranks are alive{calls}; {_SAME_WORK}"

    def _named(self, ranks: Sequence[int]) -> str:
        hosts = sorted({self._hosts[rank] for rank in ranks if rank in self._hosts})
        several = len(set(self._hosts.values())) > 1
        return name_ranks(ranks) + (f" on {', '.join(hosts)}" if several and hosts else "")


_peers: _Peers | None = None


def join_peers(rank: int, size: int, *, fresh: bool) -> None:
    """Register the ranks of the default group; `fresh`: nobody else has written into the group's store."""
    global _peers
    if _peers is not None:
        _peers.listener.close()
    _peers = _Peers(rank, size, fresh=fresh)


def follow_steps(engine: Any) -> None:
    """Take the step number of error messages from this engine's `global_steps`."""
    if _peers is not None:
        _peers.engine = weakref.ref(engine)


def leave_peers() -> Callable[[], None]:
    """Leave the group, and tell the others why; returns what to call once it is destroyed, as `_Peers.leave` does."""
    global _peers
    peers, _peers = _peers, None
    return _nothing if peers is None else peers.leave()


def _nothing() -> None: ...


def _close_in_child() -> None:
    # A worker of a data loader would answer in place of its parent, which may be dead.
    if isinstance(_peers, _Peers):
        _peers.listener.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def explain_failure(error: BaseException, call: str = "") -> None:
    """Raise an EngineError that names the rank that was lost, if this error comes from that; else return.

    For the `except` block around collectives. Where the ranks have made different calls, the error names them.

    Args:
        call: the engine's method that the script has called.
    """
    if _peers is None or not isinstance(error, RuntimeError):
        return
    # gloo's errors have no class of their own; they begin with the place in its source.
    if isinstance(error, dist.DistError) or re.search(r"\bgloo/\S+\.(cc|h):\d+\]", str(error)):
        raise _peers.explain(error, call) from error


def explains_failures(function: F) -> F:
    """Decorate a function that runs collectives: where one fails, an EngineError names the lost rank."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            explain_failure(error)
            raise

    return call  # type: ignore[return-value]


def has_agent_store() -> bool:
    """Whether torchrun's agent holds the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Any:
    """The default group's store; OSError if nobody listens there, where torch would print a long traceback."""
    bottom = _bottom_store()
    if hasattr(bottom, "host"):
        socket.create_connection((bottom.host, bottom.port), timeout=_GRACE / 2).close()
    return dist.distributed_c10d._get_default_store()


def _bottom_store() -> Any:
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):  # a prefix of keys
        store = store.underlying_store
    return store


def address_towards(host: str) -> str | None:
    """This host's address on the way to another; nothing is sent."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as trial:
            trial.connect(address)
            return str(trial.getsockname()[0])
    except OSError:
        return None


def _answers(address: str, port: int) -> bool:
    """Whether a rank's port is open, as far as is known: a full backlog, a firewall, a lost host tell nothing of it."""
    try:
        socket.create_connection((address, port), timeout=0.5).close()
    except OSError as error:
        return not isinstance(error, ConnectionError)
    return True


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call a function that may hang; its result or exception, or a TimeoutError."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError:  # at exit Python 3.12 starts no threads any more
        run()
    if not wait([outcome], seconds).done:
        raise TimeoutError
    return outcome.result()


def _talks_within(seconds: float, talk: Callable[[], Any]) -> bool:
    """Access the store, which may be gone or hang; returns whether that finished in time."""
    try:
        call_within(seconds, talk)
    except _STORE_ERRORS:
        return False
    return True


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 0``, ``ranks 1, 3-7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
