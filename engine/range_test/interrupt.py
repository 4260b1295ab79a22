"""Ctrl-C during a test: on several processes all leave at the same update, whichever of them it came to.

Processes that leave one by one would wait for each other in whatever they do next, training or a report. And nothing
breaks into the putting back of the engine's state.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from engine.distributed import World

__all__ = ["Interrupt"]

_ONE_REQUEST = (
    2.0  # seconds within which several signals are one: a terminal's, and then torchrun's for the same Ctrl-C
)


class Interrupt:
    """SIGINT, held back until all processes can act on it together.

    A process that has a handler of its own, or runs in another thread than the main one, keeps it; it still leaves
    when another process is told to.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._since: float | None = None  # when it came
        self._before: Any = None
        self._holds = world.size > 1

    def install(self) -> None:
        """Handle SIGINT from here on."""
        python_s = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if python_s and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._came)

    def hold(self) -> None:
        """Let nothing break in from here on."""
        self._holds = True

    def remove(self) -> None:
        """Handle SIGINT as before."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def raise_own(self) -> None:
        """Act on a signal that came to this process and that nobody has acted on yet.

        Raises:
            KeyboardInterrupt: there was one.
        """
        if self._since is not None:
            self._since = None
            raise KeyboardInterrupt

    def look(self) -> None:
        """At the end of an update; a collective where there are several processes.

        Raises:
            KeyboardInterrupt: on all processes, if it has come to one.
        """
        if self._world.size == 1:
            return
        came = torch.tensor(float(self._since is not None), device=self._world.device)
        if self._world.sum(came).item():
            self._since = None
            raise KeyboardInterrupt

    def _came(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._holds and (self._since is None or now - self._since < _ONE_REQUEST):
            self._since = self._since or now
            return
        raise KeyboardInterrupt
