"""The engine's log: standard `logging`, spoken by rank zero only.

Nothing is set up at import. `configure` gives the logger a plain handler when the application has
none, so that what a user asked for (`steps_per_print`) is seen without any set-up of their own.
"""

from __future__ import annotations

import logging
import os

__all__ = ["configure", "log"]

log = logging.getLogger("engine")


def configure() -> None:
    """Make rank zero's messages visible and the other ranks' silent; safe to call again."""
    for logger in (log, logging.getLogger("schedulers")):
        if _is_rank_zero not in logger.filters:
            logger.addFilter(_is_rank_zero)
        if logger.hasHandlers():
            continue
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def _is_rank_zero(record: logging.LogRecord) -> bool:
    return os.environ.get("RANK", "0") == "0"
