"""Ranks that make different calls, noticed before their collectives are mixed up.

At ZeRO stage 3 a forward is a collective, so that a rank that evaluates one batch more than another, or that evaluates
alone, meets the collectives of another call: gloo aborts the process, NCCL waits. So the ranks tell each other, beside
their collectives, which call each of them begins: by a collective of its own before what is rare, and by a note in the
process group's store, which nobody waits for, before each forward to train.
"""

from __future__ import annotations

import ctypes
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from redline.distributed.failure import explains_failures, name_ranks
from redline.distributed.process_group import make_side_group
from redline.errors import EngineError

__all__ = ["CALLS", "EVALUATES", "TRAINS", "CallOrder"]

TRAINS, EVALUATES = "forward to train", "forward to evaluate"
CALLS = (TRAINS, EVALUATES, "evaluate", "save_checkpoint", "load_checkpoint", "full_state_dict")

_PATIENCE = timedelta(seconds=1)  # after which a rank that waits for the others reads whether they train


class CallOrder:
    """Compares what all ranks call. Those that begin a forward to train do not wait; those that wait look for them."""

    def __init__(self) -> None:
        self._group = make_side_group()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._number = 0  # calls that this rank has begun
        self._note_training()

    @explains_failures
    def begin(self, call: str) -> None:
        """Tell the other ranks that this one begins a call, one of the :data:`CALLS`.

        Raises:
            EngineError: on each rank that waits, which a forward to train does not: the ranks call different methods.
        """
        self._number += 1
        if call == TRAINS:
            self._note_training()
            return
        calls = list(torch.empty(self._size, 1, dtype=torch.int64))
        work = dist.all_gather(calls, torch.tensor([CALLS.index(call)]), group=self._group, async_op=True)
        self._wait(work, call)
        _compare(dict(enumerate(CALLS[int(each)] for each in calls)))

    def _wait(self, work: Any, call: str) -> None:
        while True:
            try:
                work.wait(_PATIENCE)
                return
            except RuntimeError:
                if work.is_completed():  # the collective has failed; else the patience is over
                    raise
            training = [rank for rank, number in enumerate(self._training_calls()) if number >= self._number]
            if training:
                # A gloo group whose last reference goes waits for its collectives, and this one never ends.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
                _compare({self._rank: call} | dict.fromkeys(training, TRAINS))

    def _note_training(self) -> None:
        _store().set(self._key(self._rank), str(self._number))

    def _training_calls(self) -> list[int]:
        """The number of each rank's last call that was a forward to train."""
        return [int(number) for number in _store().multi_get([self._key(rank) for rank in range(self._size)])]

    def _key(self, rank: int) -> str:
        return f"redline/calls/{self._group.group_name}/{rank}"


def _store() -> Any:
    # Looked up each time: a reference would keep the store's port open after the group is destroyed.
    return dist.distributed_c10d._get_default_store()


def _compare(calls: dict[int, str]) -> None:
    """Raise an EngineError where the ranks, by number, call different methods."""
    ranks: dict[str, list[int]] = {}
    for rank, call in sorted(calls.items()):
        ranks.setdefault(call, []).append(rank)
    if len(ranks) > 1:
        made = ", ".join(f"{name_ranks(those)} called {call}" for call, those in ranks.items())
        raise EngineError(
            f"{made}: at ZeRO stage 3 all ranks need the same number of batches, to train and to evaluate; use "
            "engine.evaluate() or a loader of engine.prepare(), and make other calls on all ranks"
        )
