"""Ranks that make different calls, noticed before their collectives are mixed up.

At ZeRO stage 3 a forward is a collective, so that a rank that evaluates one batch more than another, or that evaluates
alone, meets the collectives of another call: gloo aborts the process, NCCL waits. So the ranks tell each other, beside
their collectives, which call each of them begins.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from redline.distributed.failure import explains_failures, name_ranks
from redline.distributed.process_group import make_side_group
from redline.errors import EngineError

__all__ = ["CALLS", "EVALUATES", "TRAINS", "CallOrder"]

TRAINS, EVALUATES = "forward to train", "forward to evaluate"
CALLS = (TRAINS, EVALUATES, "evaluate", "save_checkpoint", "load_checkpoint", "full_state_dict")


class CallOrder:
    """Compares what all ranks call. A forward to train does not wait for that: the next call does."""

    def __init__(self) -> None:
        self._group = make_side_group()
        self._sent: tuple[Any, list[Tensor]] | None = None  # the last call's, if it is still to be compared

    def begin(self, call: str) -> None:
        """Tell the other ranks that this one begins a call, one of the :data:`CALLS`.

        Raises:
            EngineError: on each rank that waits for it: they have called different methods.
        """
        self._compare()
        calls = list(torch.empty(dist.get_world_size(self._group), 1, dtype=torch.int64))
        number = torch.tensor([CALLS.index(call)])
        self._sent = dist.all_gather(calls, number, group=self._group, async_op=True), calls
        if call != TRAINS:
            self._compare()

    def _compare(self) -> None:
        sent, self._sent = self._sent, None
        if sent is None:
            return
        work, calls = sent
        explains_failures(work.wait)()
        ranks: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks.setdefault(CALLS[int(call)], []).append(rank)
        if len(ranks) > 1:
            made = ", ".join(f"{name_ranks(those)} called {call}" for call, those in ranks.items())
            raise EngineError(
                f"{made}: at ZeRO stage 3 all ranks need the same number of batches, to train and to evaluate; use "
                "engine.evaluate() or a loader of engine.prepare(), and make other calls on all ranks"
            )
