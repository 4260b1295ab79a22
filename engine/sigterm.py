"""SIGTERM as a scheduler's request: save at the next step boundary, on all processes at the same one, and leave.

torchrun, SLURM and Kubernetes send SIGTERM and, some 30 seconds later, SIGKILL. Which processes get the first, and
when, differs; so the processes tell each other, in a reduction that goes on beside the next update, about four times a
second or once an update, whichever is rarer. What it says is the same for all, and so is the update that they stop at.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from engine.distributed import World, make_side_group
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["EXIT_CODE", "Sigterm", "save_on_sigterm"]

EXIT_CODE = 128 + int(signal.SIGTERM)  # a shell's for a process that SIGTERM has ended: no success, no crash
_INTERVAL = 0.25  # seconds between two exchanges
_MOST_UPDATES = 64  # between two exchanges, lest updates that grow slower put the next one off too far


def save_on_sigterm(engine: Engine) -> None:
    """Let SIGTERM save the engine, if its config asks for it; a collective then.

    Raises:
        EngineError: not called from the main thread, the only one that may handle signals.
    """
    folder = engine.config.redline.checkpoint.save_on_sigterm
    if folder is None:
        return
    if threading.current_thread() is not threading.main_thread():
        raise EngineError(
            "redline.checkpoint.save_on_sigterm: Python handles signals in the main thread only, and initialize was "
            "called from another; call it there, or leave the key out"
        )
    sigterm = Sigterm(engine.world, folder)
    sigterm.install()
    engine.after_update = sigterm.look


class Sigterm:
    """Whether SIGTERM has come to any process, as all of them know it.

    Args:
        world: the processes.
        folder: where to save.
    """

    def __init__(self, world: World, folder: str) -> None:
        self.received = False  # by this process
        self._folder = folder
        self._group: Any = make_side_group() if world.size > 1 else None
        self._said = torch.zeros(2, dtype=torch.float64)  # whether a signal came; seconds an update took; the largest
        self._work: Any = None  # the exchange under way
        self._updates, self._interval = 0, 1  # since the last exchange, and until the next
        self._begin = time.monotonic()

    def install(self) -> None:
        """Handle SIGTERM, before what handled it so far; another SIGTERM changes nothing."""
        before = signal.getsignal(signal.SIGTERM)
        reference, pid = weakref.ref(self), os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            sigterm = reference()
            if sigterm is not None and os.getpid() == pid:
                sigterm.received = True
                if callable(before):
                    before(number, frame)
            elif callable(before):  # the engine is gone, or this is a child, which has inherited the handler
                before(number, frame)
            elif before != signal.SIG_IGN:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, handle)

    def look(self, engine: Engine) -> None:
        """At a step boundary: save and leave, if all know that one of them is to."""
        if self.received if self._group is None else self._exchange():
            log.warning("SIGTERM: saving after update %d into %s", engine.global_steps, self._folder)
            begin = time.monotonic()
            try:
                engine.wait_for_checkpoint()
            except EngineError as error:  # of an older checkpoint; this one may do better
                log.error("%s", error)
            state = engine.client_state_on_sigterm
            engine.save_checkpoint(self._folder, client_state=None if state is None else state())
            engine.wait_for_checkpoint()
            log.warning("SIGTERM: saved in %.1f s; leaving with exit code %d", time.monotonic() - begin, EXIT_CODE)
            raise SystemExit(EXIT_CODE)

    def _exchange(self) -> bool:
        """Read the exchange that was begun an update ago, and begin the next when it is due."""
        self._updates += 1
        if self._work is not None:
            self._work.wait()
            self._work = None
            asked, seconds = self._said.tolist()
            if asked:
                return True
            # The same on all processes, since the numbers are.
            self._interval = max(1, min(_MOST_UPDATES, int(_INTERVAL / max(seconds, 1e-6))))
        if self._updates >= self._interval:
            now = time.monotonic()
            self._said[0], self._said[1] = float(self.received), (now - self._begin) / self._updates
            self._work = dist.all_reduce(self._said, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._updates, self._begin = 0, now
        return False
