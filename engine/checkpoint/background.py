"""Checkpoints that are written while training goes on: the copy that stops it, and the thread that writes."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.distributed import make_side_group
from engine.errors import EngineError
from engine.log import log

__all__ = ["Background"]


class Background:
    """Writes one checkpoint at a time.

    The thread is no daemon: an interpreter that exits waits for it. What went wrong in it is raised by the next
    `check` or `wait`, or said at exit.

    Args:
        world_size: number of processes; several talk in a group of their own, so that the thread's collectives and the
            training's do not mix. Making it is a collective.
    """

    def __init__(self, world_size: int) -> None:
        self.group: Any = make_side_group() if world_size > 1 else None
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        atexit.register(_say_failure, weakref.ref(self))

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in CPU memory, which is kept for the next time: new memory costs as much as the copying."""
        before, self._buffers = self._buffers, {}
        for key, tensor in tensors.items():
            buffer = before.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        torch._foreach_copy_(list(self._buffers.values()), list(tensors.values()), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers

    def start(self, write: Callable[[], None]) -> None:
        """Let the thread write; the one before is done."""
        assert self._thread is None and self.failure is None

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self.failure = error

        self._thread = threading.Thread(target=run, name="save_checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint under way, if there is one.

        Raises:
            EngineError: it, or the one before, could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in a checkpoint that is done; once."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            raise EngineError(f"{failure} (while training went on: async_save)") from failure


def _say_failure(reference: weakref.ref[Background]) -> None:
    background = reference()
    if background is not None and background.failure is not None:
        log.error("the last checkpoint was not written: %s", background.failure)
