"""The ranks that save or load together, and the thread that writes a checkpoint while training continues."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from redline.distributed.failure import explain_failure, name_ranks
from redline.distributed.process_group import make_side_group
from redline.errors import EngineError
from redline.log import log

__all__ = ["AsyncWriter", "RankGroup"]

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """Runs one operation on all ranks: what fails on one rank raises the same error on all, and no rank hangs.

    Attributes:
        operation: what a user called, for messages: ``save_checkpoint``.
        group: the process group; None for the default one.
    """

    operation: str
    rank: int
    world_size: int
    group: Any = None

    def run(self, function: Callable[[], T]) -> list[T]:
        """Call a function on every rank, and return the value of each, by rank; a collective.

        Raises:
            EngineError: it failed on at least one rank; the same message on all.
        """
        value: T | None = None
        cause: BaseException | None = None
        failure: str | None = None
        try:
            value = function()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, EngineError) else error
            failure = _message(error)  # it travels, and not the exception, which may not be picklable
        results: list[Any] = [(value, failure)] * self.world_size
        if self.world_size > 1:
            self._all_gather(results, (value, failure))
        failures: dict[str, list[int]] = {}
        for rank, (_, text) in enumerate(results):
            if text is not None:
                failures.setdefault(text, []).append(rank)
        if failures:
            texts = [
                text if len(ranks) == self.world_size else f"{name_ranks(ranks)}: {text}"
                for text, ranks in failures.items()
            ]
            raise EngineError(f"{self.operation}: {'; '.join(texts)}") from cause
        return [value for value, _ in results]

    def _all_gather(self, values: list[Any], value: Any) -> None:
        try:
            dist.all_gather_object(values, value, group=self.group)
        except (RuntimeError, ValueError) as error:
            try:
                explain_failure(error, self.operation)
            except EngineError as explained:
                raise EngineError(f"{self.operation}: {explained}") from error
            # torch's DistError is a RuntimeError; so is what it raises when the other side has closed.
            raise EngineError(f"{self.operation}: another rank has ended or does not answer: {error}") from error


def _message(error: Exception) -> str:
    if isinstance(error, EngineError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


class AsyncWriter:
    """Writes one checkpoint at a time in a thread.

    An interpreter that exits waits for the thread. Its error is raised by the next `check` or
    `wait`, or logged at exit. Several ranks communicate in a group of their own, so that the thread's collectives and
    the training's do not mix; making it is a collective.
    """

    def __init__(self, world_size: int) -> None:
        self.group: Any = make_side_group() if world_size > 1 else None
        self._saving: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        # A weak reference: the exit function must not keep the buffers alive.
        atexit.register(self._log_error, weakref.ref(self))

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to CPU memory, which is kept for the next time: new memory costs as much as the copying."""
        before, self._buffers = self._buffers, {}
        for key, tensor in tensors.items():
            buffer = before.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        # One launch for all tensors, and one wait for the device at the end.
        torch._foreach_copy_(list(self._buffers.values()), list(tensors.values()), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers

    def start(self, write: Callable[[], None]) -> None:
        """Call a function in the thread; the one before has ended."""
        pool = ThreadPoolExecutor(1, "save_checkpoint")
        self._saving = pool.submit(write)
        pool.shutdown(wait=False)  # the thread ends after this one

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if there is one; EngineError if it could not be written."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            raise EngineError(f"{error} (while training continued: async_save)") from error

    def check(self) -> None:
        """Raise the error of a checkpoint that has ended; once."""
        if self._saving is not None and self._saving.done():
            self.wait()

    @staticmethod
    def _log_error(reference: weakref.ref[AsyncWriter]) -> None:
        writer = reference()
        if writer is not None and writer._saving is not None and (error := writer._saving.exception()) is not None:
            log.error("the last checkpoint was not written: %s", error)
