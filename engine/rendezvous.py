"""Where the processes of one start meet: a store that nobody has written into before them.

torchrun's agent keeps one store for all its restarts. What processes of an earlier start wrote there is still there:
the addresses of those that are dead, which gloo and NCCL would take for their peers' and be refused, so that a restart
fails now and then (pytorch/pytorch#135712). The number of restarts that torchrun tells is each host's own and parts
nothing. So rank zero gives each start a name of its own, and hands it to every process that asks by one of its own.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["agents_store", "meet_in_store"]

_c10d: Any = dist  # whose stubs do not list all that it has
_ASK = "redline/ask"
_ANSWER = "redline/answer"


def agents_store() -> bool:
    """Whether torchrun's agent holds the store; else rank zero's process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet_in_store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store of this start, once all processes have come; from torchrun's environment.

    Raises:
        RuntimeError: torch.distributed's; nobody answers in time, or not all have come.
    """
    store, *_ = next(iter(_c10d.rendezvous("env://", rank, size, timeout=timeout)))
    store.set_timeout(timeout)
    if not agents_store():
        return store
    own = uuid.uuid4().hex
    if rank == 0:
        _answer(store, own, size, timeout)
        return _c10d.PrefixStore(own, store)
    store.append(_ASK, f"{own}\n")
    name = store.get(f"{_ANSWER}/{own}").decode()  # waits for it
    store.add(f"{name}/came", 1)
    return _c10d.PrefixStore(name, store)


def _answer(store: Any, name: str, size: int, timeout: timedelta) -> None:
    """Tell this start's name to all who ask, those of earlier starts included, until all of this one have it."""
    deadline = time.monotonic() + timeout.total_seconds()
    store.append(_ASK, "\n")  # so that there is something to read
    answered = {""}
    while (came := store.add(f"{name}/came", 0)) < size - 1:
        for asking in store.get(_ASK).decode().splitlines():
            if asking not in answered:
                answered.add(asking)
                store.set(f"{_ANSWER}/{asking}", name)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{came + 1} of {size} processes came")
        time.sleep(0.01)
