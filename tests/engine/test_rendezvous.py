"""Processes of one start meet in a store of their own, whatever those of an earlier one have left in the agent's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from engine.rendezvous import meet_in_store

SIZE = 3


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store of torchrun's agent, and the environment of its workers."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield server


def meet(late: int, seconds: float = 20.0, missing: tuple[int, ...] = ()) -> dict[int, Any]:
    """What each rank of a start gets, one of them a little later than the others: a store, or an error."""
    got: dict[int, Any] = {}

    def come(rank: int) -> None:
        try:
            time.sleep(0.3 if rank == late else 0.0)
            got[rank] = meet_in_store(rank, SIZE, timedelta(seconds=seconds))
        except RuntimeError as error:
            got[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(SIZE) if rank not in missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("late", range(SIZE))
def test_what_an_earlier_start_wrote_is_not_seen(late: int, agent: Any) -> None:
    first = meet(late)
    first[0].set("address of rank 0", "that of a dead process")
    assert all(store.get("address of rank 0") == b"that of a dead process" for store in first.values())
    second = meet(late)
    assert not any(store.check(["address of rank 0"]) for store in second.values())
    second[1].set("address of rank 1", "new")
    assert all(store.get("address of rank 1") == b"new" for store in second.values())
    assert not first[0].check(["address of rank 1"])


@pytest.mark.parametrize("missing", range(SIZE))
def test_who_does_not_come_is_waited_for_within_the_timeout(missing: int, agent: Any) -> None:
    meet(late=1)
    begin = time.monotonic()
    got = meet(late=1, seconds=1.0, missing=(missing,))
    assert time.monotonic() - begin < 10
    if missing == 0:
        assert all(isinstance(each, RuntimeError) for each in got.values())
    else:
        assert str(got[0]) == "2 of 3 processes came"
