"""The ranks that save or load together: what fails on one of them fails on all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from redline.distributed.failure import explain_failure, name_ranks
from redline.errors import EngineError

__all__ = ["RankGroup"]

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
        failure = ""
        try:
            value = function()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, EngineError) else error
            failure = _message(error)  # it travels, and not the exception, which may not be picklable
        results: list[Any] = [(value, failure)] * self.world_size
        if self.world_size > 1:
            self._all_gather(results, (value, failure))
        ranks_by_failure: dict[str, list[int]] = {}
        for rank, (_, text) in enumerate(results):
            if text:
                ranks_by_failure.setdefault(text, []).append(rank)
        if ranks_by_failure:
            texts = [
                text if len(ranks) == self.world_size else f"{name_ranks(ranks)}: {text}"
                for text, ranks in ranks_by_failure.items()
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
