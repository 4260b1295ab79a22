"""How far a file has been written: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Counts bytes.

    Args:
        total: bytes to come.
        name: what is written.
        show: False for nothing; else a bar if standard error is a terminal and tqdm is there.
    """

    def __init__(self, total: int, name: str, show: bool) -> None:
        self._bar: Any = None
        if show and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                desc=name,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """So many bytes more."""
        if self._bar is not None:
            self._bar.update(count)
