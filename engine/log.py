"""The log: standard `logging`, on rank 0 only, but for what concerns one rank (`extra={"from_any_rank": True}`).

Nothing is set up at import. `configure` gives the logger a plain handler when the application has none, so that what a
user asked for (`steps_per_print`) is shown without any set-up.
"""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["configure", "log"]

log = logging.getLogger("redline")


def configure() -> None:
    """Show rank 0's messages and silence the other ranks'; calling it again changes nothing."""
    for logger in (log, logging.getLogger("redline.schedulers")):  # a filter holds for its own logger only
        if _is_rank_zero not in logger.filters:
            logger.addFilter(_is_rank_zero)
    if log.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def _is_rank_zero(record: logging.LogRecord) -> bool:
    if getattr(record, "from_any_rank", False):
        return True
    dist = sys.modules.get("torch.distributed")  # for a process group that the script, srun or mpirun has made
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"
