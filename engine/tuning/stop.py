"""Ctrl-C and SIGTERM as a wish: end at the next update, on all processes at the same one, and report what is known.

The first signal is noted; a second one, at least a second later (torchrun sends each on to its workers, which have had
it from the terminal already), ends at once. Where the next update does not come in time, because the update is long, a
loader hangs or another process is gone, a thread reports what is known: torchrun kills its workers after 30 seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from engine.distributed import World

__all__ = ["Stop", "Stopped"]

_ECHO = 1.0  # seconds within which another signal is the same one
_PATIENCE = 10.0  # seconds that the next update has to come
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked for the end; no Exception, so that nothing on the way takes it for a failure.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Stop:
    """A context in which SIGINT and SIGTERM are noted, for `look` to act on.

    In another thread than the main one, Python lets nobody handle signals; then this does nothing.

    Args:
        ends: whether the process may be ended where it does not come to its next update.
        patience: seconds that it has to come there.

    Attributes:
        report: called with the signal's number, in a thread, where the next update does not come in time.
    """

    def __init__(self, *, ends: bool = False, patience: float = _PATIENCE) -> None:
        self.report: Callable[[int], None] | None = None
        self._ends, self._patience = ends, patience
        self._received = 0
        self._at = 0.0
        self._acted = False
        self._before: dict[int, Any] = {}
        self._wakes: tuple[socket.socket, socket.socket] | None = None
        self._woken_before = -1

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells' background jobs want it
                self._before[number] = signal.signal(number, self._note)
        # Python runs a handler when the main thread comes back from C; this wakes a thread even if it never does.
        self._wakes = reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._wakes is None:
            return
        signal.set_wakeup_fd(self._woken_before)
        _, writer = self._wakes
        writer.close()  # which ends the thread
        self._wakes = None
        for number, before in self._before.items():
            # None: a handler that was not Python's.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def look(self, world: World) -> None:
        """End if any process was asked to; a collective where there are several.

        Raises:
            Stopped: on all processes alike.
        """
        asked = self._received
        if world.size > 1:
            votes = torch.zeros(2, dtype=torch.float32, device=world.device)  # SIGINT, SIGTERM
            if asked:
                votes[0 if asked == signal.SIGINT else 1] = 1
            interrupts, terminations = world.sum(votes).tolist()
            asked = signal.SIGINT if interrupts else signal.SIGTERM if terminations else 0
        if asked:
            self._acted = True
            raise Stopped(asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._at = number, now
            if os.environ.get("RANK", "0") == "0":
                name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
                # Not print: the signal may have come in the middle of one.
                os.write(2, f"\nredline: {name}: ending after this update; again ends at once\n".encode())
        elif now - self._at > _ECHO:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)

    def _watch(self, reader: socket.socket) -> None:
        first, number = 0.0, 0
        with reader:
            while True:
                try:
                    data = reader.recv(16)
                except TimeoutError:
                    self._late(number)
                    reader.settimeout(None)
                    continue
                now, come = time.monotonic(), [each for each in data if each in self._before]
                if not data:
                    return
                if come and not number:
                    first, number = now, come[0]
                    reader.settimeout(self._patience)
                elif come and now - first > _ECHO and self._ends:
                    os._exit(128 + come[0])

    def _late(self, number: int) -> None:
        """The next update has not come."""
        if self._acted:
            return
        report = self.report  # the main thread may take it away
        if report is not None:
            report(number)
        if self._ends:
            os._exit(128 + number)
