"""What became of the other processes: a broken collective, said in words.

torch.distributed reports a lost process as the address of a closed socket, or as so many milliseconds. Here those
that are left call the roll in the process group's store: each writes down that it is there, waits a moment for the
others, and names those that are missing, or that wrote why they left. Nothing is done while all goes well.

On GPUs NCCL's collectives do not fail in the call: NCCL's watchdog ends the process, with a message of its own,
when a peer's socket closes or the group's timeout is over. What fails in a call there (gloo's collectives on the
CPU, a store, an NCCL call) comes here.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from engine.errors import EngineError
from engine.rendezvous import agents_store

__all__ = ["Peers", "explains_losses", "follow", "meet", "name_ranks", "part"]

F = TypeVar("F", bound=Callable[..., Any])

_GRACE = 5.0  # seconds that the others have to say that they are there
_HERE = "is there"
_HAS_READ = "="
_AGAIN = "what it printed may say more; start all processes again, from the last checkpoint"
_SAME_WORK = "all need the same number of micro-batches, and must make the same calls in the same order"


class _Counts(Protocol):
    """What knows how far training has come."""

    global_steps: int


class Peers:
    """The other processes of the group, as one of them knows them."""

    def __init__(self, rank: int, size: int, *, fresh: bool) -> None:
        self.rank, self.size = rank, size
        self._with_rank_zero = not agents_store()  # the store goes when that goes
        # The script's own store may hold what processes of an earlier start have written, which are dead.
        name = [""] if fresh else [uuid.uuid4().hex]
        if not fresh:
            dist.broadcast_object_list(name)
        self._key = f"redline/roll/{name[0]}"
        self._engine: Callable[[], _Counts | None] = lambda: None
        self._noted = False
        self._write(f"@{socket.gethostname()}")

    def follow(self, engine: _Counts) -> None:
        """Count updates by this engine."""
        self._engine = weakref.ref(engine)

    def explain(self, error: RuntimeError) -> EngineError:
        """Who is lost, as far as the others can tell; waits some seconds for them."""
        self._note(_HERE)
        roll = self._call_roll()
        engine = self._engine()
        where = "start" if engine is None else f"update {engine.global_steps}"
        return EngineError(f"{where}: {self._who(roll, str(error))}")

    def leave(self) -> Callable[[], None]:
        """Leave word for those that stay.

        Returns:
            What is to be called when the connections are closed, which is when the others begin to ask: it keeps the
            store, where this process has it, until they have read.
        """
        reason = getattr(sys, "last_value", None)
        engine = self._engine()
        done = "" if engine is None else f" after {engine.global_steps} updates"
        if reason is None:
            self._note(f"ended its script{done}")
            return lambda: None
        patience = _GRACE / 2 if self._noted else _GRACE  # the others call the roll at about the same time
        self._note(f"has left{done}: {type(reason).__name__}: {str(reason)[:300]}")
        if self._with_rank_zero and self.rank == 0:
            with suppress(RuntimeError, ValueError, OSError):
                store = _store()
                return lambda: self._wait_for_readers(store, patience)
        return lambda: None

    def _wait_for_readers(self, store: Any, patience: float) -> None:
        roll, deadline = _Roll(), time.monotonic() + patience
        while len(roll.readers | {self.rank}) < self.size and time.monotonic() < deadline:
            time.sleep(0.1)
            roll.read(store.get(self._key).decode())

    def _note(self, text: str) -> None:
        """Write what became of this process, once."""
        if not self._noted:
            self._noted = True
            _within(_GRACE, lambda: self._write(" ".join(text.split())))

    def _write(self, text: str) -> None:
        # The store is asked for anew each time: one that is held here would keep its port when the group is gone.
        with suppress(RuntimeError, ValueError, OSError):
            _store().append(self._key, f"{self.rank} {text}\n")

    def _call_roll(self) -> _Roll:
        """What each rank wrote, once all have, or one has told the cause, or their time is over."""
        roll = _Roll()

        def read() -> None:
            store = _store()
            deadline = time.monotonic() + _GRACE
            while time.monotonic() < deadline:
                roll.read(store.get(self._key).decode())
                if len(roll.notes) == self.size:
                    break
                if any(text != _HERE for text in roll.notes.values()):
                    deadline = min(deadline, time.monotonic() + 1)
                time.sleep(0.1)

        roll.is_whole = _within(_GRACE + 2, read)
        if roll.is_whole:
            _within(_GRACE, lambda: self._write(_HAS_READ))
        return roll

    def _who(self, roll: _Roll, error: str) -> str:
        """The sentence that names the lost."""
        told = {rank: text for rank, text in roll.notes.items() if text != _HERE and rank != self.rank}
        silent = [rank for rank in range(self.size) if rank not in roll.notes and rank != self.rank]
        waited = re.search(r"waiting (\d+)ms", error)
        how = f" after {int(waited[1]) / 1000:g} s of waiting (redline.distributed_timeout)" if waited else ""
        if told:
            said = "; ".join(f"{roll.named([rank])} {text}" for rank, text in sorted(told.items()))
            if all(text.startswith("ended") for text in told.values()):
                return f"lost contact{how}: {said}; {_SAME_WORK}"
            return f"lost contact{how}: {said}; {_AGAIN}"
        if not roll.is_whole and self._with_rank_zero and 0 in silent:
            return f"lost {roll.named([0])}{how}, and the store with it: it has died or left, or is cut off; {_AGAIN}"
        if not roll.is_whole and not roll.notes:
            return f"lost contact{how} with the others and with the store: the network, or the store's host, is gone"
        if silent:
            words = ("it has", "was", "is") if len(silent) == 1 else ("they have", "were", "are")
            fate = "no answer: {} died, {} stopped, or {} cut off or busy elsewhere".format(*words)
            return f"lost {roll.named(silent)}{how}: {fate}; {_AGAIN}"
        return f"a collective failed{how}, though all processes are there; {_SAME_WORK}"


class _Roll:
    """What the processes wrote into the store, as far as it could be read."""

    def __init__(self) -> None:
        self.notes: dict[int, str] = {}
        self.hosts: dict[int, str] = {}
        self.readers: set[int] = set()  # who has read the others' notes
        self.is_whole = False  # whether the store answered to the end

    def read(self, lines: str) -> None:
        for line in lines.splitlines():
            rank, _, text = line.partition(" ")
            if text == _HAS_READ:
                self.readers.add(int(rank))
            else:
                (self.hosts if text.startswith("@") else self.notes)[int(rank)] = text

    def named(self, ranks: Sequence[int]) -> str:
        hosts = sorted({self.hosts[rank][1:] for rank in ranks if rank in self.hosts})
        several = len(set(self.hosts.values())) > 1
        return name_ranks(ranks) + (f" on {', '.join(hosts)}" if several and hosts else "")


_peers: Peers | None = None


def meet(rank: int, size: int, *, fresh: bool) -> Peers:
    """The processes of the default group; whether nobody but these has written into its store."""
    global _peers
    _peers = Peers(rank, size, fresh=fresh)
    return _peers


def follow(engine: _Counts) -> None:
    """Count updates by this engine, in what is said of a loss."""
    if _peers is not None:
        _peers.follow(engine)


def part() -> Callable[[], None]:
    """Leave the others, for good; see :meth:`Peers.leave`."""
    global _peers
    peers, _peers = _peers, None
    return peers.leave() if peers is not None else lambda: None


def explains_losses(function: F) -> F:
    """Let a function that talks to other processes raise an EngineError where that fails."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if _peers is None or not _is_torchs(error):
                raise
            raise _peers.explain(error) from error

    return call  # type: ignore[return-value]


def _is_torchs(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or re.search(r"\bgloo\b", str(error), re.IGNORECASE) is not None


def _store() -> Any:
    """The default group's store; OSError if nobody listens there, of which torch would say more than is wanted."""
    store: Any = dist.distributed_c10d._get_default_store()
    bottom = store
    while hasattr(bottom, "underlying_store"):  # a prefix of keys
        bottom = bottom.underlying_store
    if hasattr(bottom, "host"):
        socket.create_connection((bottom.host, bottom.port), timeout=_GRACE / 2).close()
    return store


def _within(seconds: float, talk: Callable[[], Any]) -> bool:
    """Talk to the store, which may be gone or hang; whether it came to an end in time."""
    done = threading.Event()

    def run() -> None:
        try:
            talk()
            done.set()
        except (RuntimeError, ValueError, OSError):
            pass

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # at exit Python 3.12 starts no threads any more
        run()
    else:
        thread.join(seconds)
    return done.is_set()


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
