"""Ctrl-C and SIGTERM: all ranks act on a signal at the same step, whichever of them it came to.

Ranks that stopped one by one would wait for each other in whatever they do next. `SaveOnSigterm` saves a training run
and exits; `InterruptGuard` defers signals in code that must not be broken off, such as a range test.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from redline.callbacks import Callback
from redline.distributed.process_group import World, make_side_group
from redline.errors import EngineError
from redline.log import log

if TYPE_CHECKING:
    from redline.engine import Engine

__all__ = ["ONE_REQUEST", "InterruptGuard", "SaveOnSigterm", "save_on_sigterm"]

ONE_REQUEST = 1.0  # seconds in which repeated signals are one request: a terminal and torchrun each send Ctrl-C

_EXIT_CODE = 128 + int(signal.SIGTERM)  # a shell's code for a process that SIGTERM has ended
_INTERVAL = 0.25  # seconds between two exchanges
_MAX_STEPS = 64  # between two exchanges, so that steps that get slower do not delay the next one too far


def save_on_sigterm(engine: Engine) -> None:
    """Let SIGTERM save the engine and exit, if its config asks for it; a collective then.

    Raises:
        EngineError: not called from the main thread, the only one that may handle signals.
    """
    directory = engine.config.redline.checkpoint.save_on_sigterm
    if directory is None:
        return
    if threading.current_thread() is not threading.main_thread():
        raise EngineError(
            "redline.checkpoint.save_on_sigterm: Python handles signals in the main thread only, and initialize was "
            "called from another; call it there, or leave the key out"
        )
    path = Path(directory).absolute()  # the script may change its working directory
    callback = SaveOnSigterm(engine.world, path)
    if _callbacks:
        gc.collect()  # the engine of a notebook's cell that was run before
    for other in [other for other, each in _callbacks.items() if each.directory == path]:
        del _callbacks[other]  # one of the two checkpoints would replace the other
        log.warning(
            "redline.checkpoint.save_on_sigterm: two engines of this process have %s; SIGTERM saves the newer one "
            "only; give each a directory of its own", path,
        )  # fmt: skip
    _callbacks[engine] = callback
    engine.callbacks.append(callback)
    _handle_sigterm()


# Of this process, by engine. All are saved together, since the process exits for all.
_callbacks: weakref.WeakKeyDictionary[Engine, SaveOnSigterm] = weakref.WeakKeyDictionary()
_handler: Any = None  # the last one installed


def _handle_sigterm() -> None:
    """Handle SIGTERM, once in a process; a handler of the script's is called, too."""
    global _handler
    before = signal.getsignal(signal.SIGTERM)
    if before is _handler:
        return
    pid = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        # A forked child inherits the handler, and saves nothing.
        callbacks = list(_callbacks.values()) if os.getpid() == pid else []
        for callback in callbacks:
            callback.received = True
        if callable(before):
            before(number, frame)
        elif not callbacks and before != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    _handler = handle
    signal.signal(signal.SIGTERM, handle)


def _save_all() -> None:
    """Save every engine, and exit; a collective."""
    begin, failures = time.monotonic(), []
    for engine, callback in list(_callbacks.items()):
        try:
            callback.save(engine)
        except EngineError as error:  # the others may succeed
            failures.append(error)
    if failures:
        raise failures[0]
    _callbacks.clear()  # a script that catches the exit, and makes new engines, goes on with them
    log.warning("SIGTERM: saved in %.1f s; exiting with code %d", time.monotonic() - begin, _EXIT_CODE)
    raise SystemExit(_EXIT_CODE)


class SaveOnSigterm(Callback):
    """Saves a checkpoint at the step boundary after SIGTERM, on all ranks at the same one, and exits.

    torchrun, SLURM and Kubernetes send SIGTERM and, some 30 seconds later, SIGKILL. Which ranks get the first, and
    when, differs. So the ranks exchange whether it came, in an all-reduce that overlaps with the next step, about four
    times a second or once a step, whichever is rarer. Its result is the same on all ranks, and so is the step at which
    they stop.

    Several engines, as of a GAN, are saved at the same moment: at the end of the round, so that each continues with
    the steps that the others expect. The engine that was the last to take its first step ends a round; one that comes
    to its own next step first no longer waits for that.
    """

    def __init__(self, world: World, directory: Path) -> None:
        self.directory = directory
        self.received = False  # by this rank
        self.requested = False  # on all ranks
        self._has_stepped = False
        self._group: Any = make_side_group() if world.size > 1 else None
        # Whether SIGTERM came, and the seconds of a step; reduced to the maximum over all ranks.
        self._status = torch.zeros(2, dtype=torch.float64)
        self._work: Any = None  # the exchange in progress
        self._steps, self._interval = 0, 1  # since the last exchange, and until the next
        self._begin = time.monotonic()

    def on_step_end(self, engine: Engine) -> None:
        if not self._has_stepped and engine in _callbacks:
            _callbacks[engine] = _callbacks.pop(engine)  # in the order of first steps
        self._has_stepped, waited = True, self.requested
        self.requested = waited or (self.received if self._group is None else self._exchange())
        if not any(each.requested for each in (self, *_callbacks.values())):
            return
        gc.collect()  # engines that are gone, the same on all ranks
        stepping = [each for each in _callbacks.values() if each._has_stepped]
        if waited or self is stepping[-1]:
            _save_all()

    def save(self, engine: Engine) -> None:
        """Save into the directory; a collective."""
        log.warning("SIGTERM: saving after step %d into %s", engine.global_steps, self.directory)
        try:
            engine.wait_for_checkpoint()
        except EngineError as error:  # of an older checkpoint; this one may succeed
            log.error("%s", error)
        client_state = engine.client_state_on_sigterm
        engine.save_checkpoint(self.directory, client_state=None if client_state is None else client_state())
        engine.wait_for_checkpoint()

    def _exchange(self) -> bool:
        """Read the exchange that an earlier step began, and begin the next one when it is due."""
        self._steps += 1
        if self._work is not None:
            self._work.wait()
            self._work = None
            received, seconds = self._status.tolist()
            if received:
                return True
            # The same on all ranks, since the status is.
            self._interval = max(1, min(_MAX_STEPS, int(_INTERVAL / max(seconds, 1e-6))))
        if self._steps >= self._interval:
            now = time.monotonic()
            self._status[0], self._status[1] = float(self.received), (now - self._begin) / self._steps
            self._work = dist.all_reduce(self._status, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._steps, self._begin = 0, now
        return False


class InterruptGuard:
    """Defers signals to a step boundary, where all ranks stop together.

    The first signal is recorded in `received` for :meth:`requested`. Another one, unless it comes within a second, goes
    to the handler that the process had before: a second Ctrl-C interrupts at once. Python handles signals in the main
    thread only; in another one the guard knows only what other ranks received.

    Args:
        numbers: the signals.
        replaces: whether to handle signals that have another handler than Python's own for Ctrl-C. Signals that the
            process ignores stay ignored.
        defers: False to let signals act at once until :meth:`defer`.
    """

    def __init__(
        self, numbers: Sequence[int] = (signal.SIGINT,), *, replaces: bool = False, defers: bool = True
    ) -> None:
        self.received = 0  # number of the signal that this rank received; 0 for none
        self._received_at = 0.0
        self._numbers, self._replaces, self._defers = numbers, replaces, defers
        self._before: dict[int, Any] = {}  # handlers that this one replaces

    def install(self) -> None:
        """Handle the signals from here on."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._numbers:
            handler = signal.getsignal(number)
            # Ignored by nohup, and for background jobs of a shell.
            if handler is signal.default_int_handler or (self._replaces and handler != signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Handle the signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
        self._before.clear()

    def defer(self) -> None:
        """Defer signals from here on."""
        self._defers = True

    def requested(self, world: World) -> int:
        """The number of a signal that any rank received, the same on all; 0 for none. A collective."""
        if world.size == 1:
            return self.received
        votes = torch.tensor([float(self.received == number) for number in self._numbers], device=world.device)
        return next((number for number, vote in zip(self._numbers, world.sum(votes).tolist()) if vote), 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._defers:
            self._before[number](number, frame)
        elif not self.received:
            self.received, self._received_at = number, now
            self._on_request(number)
        elif now - self._received_at > ONE_REQUEST:
            self.remove()
            os.kill(os.getpid(), number)

    def _on_request(self, number: int) -> None:
        """Called in the signal handler when the first signal is recorded."""
