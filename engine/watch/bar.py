"""A bar on the terminal while a script goes through ``engine.training_dataloader``."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.engine import Engine
from engine.errors import EngineError

__all__ = ["Bar", "Glance", "wants_bar"]

EVERY = 0.2  # seconds between two looks at the numbers


def wants_bar(engine: Engine) -> bool:
    """Whether an engine is to show a bar: ``redline.progress``, or, if that is null, a terminal with tqdm.

    Raises:
        EngineError: the config wants a bar, and tqdm is not there.
    """
    wanted = engine.config.redline.progress
    if wanted is False or engine.training_dataloader is None or engine.global_rank != 0:
        return False
    there = importlib.util.find_spec("tqdm") is not None
    if wanted and not there:
        raise EngineError("redline.progress: it needs tqdm; install it with `pip install 'redline[progress]'`")
    return there and (wanted is True or sys.stderr.isatty())


class Bar:
    """One bar for each pass over the loader: epoch, batches, and the last update's rate and loss on this process.

    What the log prints meanwhile stands above the bar.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loss, self._rate = Glance(), Glance()
        self._last: Tensor | None = None
        self._shown = 0.0
        assert engine.training_dataloader is not None
        engine.training_dataloader.through.append(self._pass)

    def updated(self, engine: Engine) -> None:
        self._last = engine.loss

    def _pass(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A pass over the loader, shown."""
        if not self._engine.observers:  # a range test, which has a bar of its own
            yield from batches
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        loader = self._engine.training_dataloader
        assert loader is not None
        try:
            total: int | None = len(loader)
        except TypeError:  # an iterable dataset does not tell
            total = None
        with (
            logging_redirect_tqdm(_loggers_with_console()),
            tqdm(total=total, unit="batch", dynamic_ncols=True, file=sys.stderr) as bar,
        ):
            for batch in batches:
                bar.set_description_str(f"epoch {loader.epoch + 1}", refresh=False)  # known once the pass has begun
                yield batch
                self._show(bar)
                bar.update()
            self._show(bar, at_once=True)

    def _show(self, bar: Any, at_once: bool = False) -> None:
        now = time.perf_counter()
        if self._last is None or (now - self._shown < EVERY and not at_once):
            return
        self._shown = now
        numbers = {"lr": self._rate.at(self._engine.get_lr()[0]), "loss": self._loss.at(self._last)}
        text = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
        bar.set_postfix_str(text, refresh=at_once)


class Glance:
    """Reads a number from the device without ever waiting: it may be the one before."""

    def __init__(self) -> None:
        self._value: float | None = None
        self._coming: tuple[Tensor, Any] | None = None

    def at(self, tensor: Tensor | float | None) -> float | None:
        """The newest value that is there; None before the first, and for None."""
        if tensor is None:
            return None
        if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
            return float(tensor)
        if self._coming is not None and self._coming[1].query():
            self._value, self._coming = float(self._coming[0]), None
        if self._coming is None:
            host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor.detach().reshape(()), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._coming = host, event
        return self._value


def _loggers_with_console() -> list[logging.Logger]:
    """Those whose lines would go through the bar: the application's, or ours."""
    loggers = [logging.getLogger(name) for name in (None, "engine", "schedulers")]
    console = (sys.stdout, sys.stderr)
    return [
        logger
        for logger in loggers
        if any(isinstance(each, logging.StreamHandler) and each.stream in console for each in logger.handlers)
    ]
