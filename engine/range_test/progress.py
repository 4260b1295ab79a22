"""The progress of a range test: a bar on a terminal, a few lines elsewhere, on rank zero only."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from engine.log import log

__all__ = ["Progress"]


class Progress:
    """Shows run, step, rate and loss.

    Args:
        total: updates to come, over all runs.
        show: a bar (True), nothing (False), or a bar on a terminal and a line per tenth elsewhere (None). Without tqdm
            the lines take the bar's place.
    """

    def __init__(self, total: int, show: bool | None) -> None:
        self._total = total
        self._done = 0
        self._bar = _bar(total) if show or (show is None and sys.stderr.isatty()) else None
        self._lines = self._bar is None and show is not False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, run: str, step: int, lr: float, loss: float) -> None:
        """One update is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_description(run, refresh=False)
            self._bar.set_postfix_str(f"step {step}, lr {lr:.3g}, loss {loss:.4g}", refresh=False)
            self._bar.update()
        elif self._lines and self._done % max(1, self._total // 10) == 0:
            log.info("%s: step %d, lr %.3g, loss %.4g", run, step, lr, loss)

    def skip(self, steps: int) -> None:
        """These updates will not come: the run has ended early."""
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)

    def say(self, message: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        elif self._lines:
            log.info("%s", message)


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        log.info("no progress bar: install one with `pip install 'redline[progress]'`")
        return None
    return tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr)
