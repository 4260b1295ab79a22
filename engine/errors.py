"""What Redline raises, and nothing else.

    EngineError                 anything a user of the engine can mend
      ConfigError               a config that cannot be obeyed; also a ValueError
      LossScaleError            in fp16, an overflow with the loss scale at its minimum
      RangeTestError            a learning rate range test that cannot be run or read

Every message says where, what was given, what is allowed, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ConfigError", "EngineError", "LossScaleError", "Problem", "RangeTestError"]


class EngineError(Exception):
    """The engine was asked for something it cannot do; the message says what to do instead."""


class LossScaleError(EngineError):
    """Gradients are not finite, and no smaller loss scale is allowed."""


class RangeTestError(EngineError):
    """A learning rate range test cannot be run on this task, or its record cannot be read."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a config.

    Attributes:
        path: where it is, as in the JSON: ``optimizer.params.lr``; empty for the whole document.
        message: what was given, what is allowed, what to do.
        line: 1-based line in the document, or None for a config given as a dict.
        column: 1-based column, or None.
    """

    path: str
    message: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        where = f"{self.line}:{self.column}: " if self.line is not None else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


_SHOWN = 200  # problems in the text of a ConfigError


class ConfigError(EngineError, ValueError):
    """A config that cannot be obeyed, with every problem found in one reading.

    Args:
        problems: at least one.
        source: the file's name, or "config" for a dict.
    """

    def __init__(self, problems: list[Problem], source: str = "config") -> None:
        assert problems
        self.problems = tuple(problems)
        self.source = source
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{source}: {count}", *(f"  {problem}" for problem in problems[:_SHOWN])]
        super().__init__("\n".join(lines + ["  ..."] * (len(problems) > _SHOWN)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self.problems), self.source)
