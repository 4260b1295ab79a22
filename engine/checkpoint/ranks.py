"""How processes save and load as one: what goes wrong on one of them is said on all, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from engine.errors import EngineError
from engine.peers import explains_losses, name_ranks

__all__ = ["Ranks"]

T = TypeVar("T")


@explains_losses
def _all_gather(values: list[Any], value: Any, group: Any) -> None:
    dist.all_gather_object(values, value, group=group)


@dataclass(frozen=True)
class Ranks:
    """The processes that save or load together.

    Attributes:
        rank: this one.
        size: how many.
        group: in which they talk; None for the default one.
    """

    rank: int
    size: int
    group: Any = None

    def agree(self, doing: str, do: Callable[[], T]) -> list[T]:
        """Do something on every process; what each one's came to, by rank. A collective.

        Raises:
            EngineError: it failed on at least one; on all of them, with the same words.
        """
        value: T | None = None
        cause: Exception | None = None
        try:
            value = do()
        except Exception as error:
            cause = error
        said: list[tuple[T, str | None]] = self._gather(doing, (value, None if cause is None else words(cause)))
        faults: dict[str, list[int]] = {}
        for rank, (_, fault) in enumerate(said):
            if fault is not None:
                faults.setdefault(fault, []).append(rank)
        if faults:
            raise EngineError(f"{doing}: {self._sentence(faults)}") from (
                cause.__cause__ if isinstance(cause, EngineError) else cause
            )
        return [value for value, _ in said]

    def _gather(self, doing: str, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            try:
                _all_gather(values, value, self.group)
            except EngineError as error:
                raise EngineError(f"{doing}: {error}") from error.__cause__
            except (RuntimeError, ValueError) as error:
                # torch's DistError is a RuntimeError; so is what it raises when the other side has hung up.
                raise EngineError(f"{doing}: another process has gone, or no longer answers: {error}") from error
        return values

    def _sentence(self, faults: dict[str, list[int]]) -> str:
        if len(faults) == 1 and len(next(iter(faults.values()))) == self.size:
            return next(iter(faults))
        return "; ".join(f"{name_ranks(ranks)}: {fault}" for fault, ranks in faults.items())


def words(error: Exception) -> str:
    """An error as part of a sentence."""
    if isinstance(error, EngineError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
