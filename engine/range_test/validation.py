"""What short runs are validated on: data, in large batches, or a function of the model.

Batch norm is validated with running statistics that are computed anew from the last batches: after a few dozen steps
those of the training are still a mixture with the initial ones, and a sound model would look diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from redline.device import to_device, widest_float
from redline.engine import Engine
from redline.errors import RangeTestError
from redline.evaluation import in_step, num_samples
from redline.random_state import random_state, set_random_state
from redline.range_test.task import Mode, is_metric, loader_of, scalar_of
from redline.run_state import capture_module

__all__ = ["Validation"]

LARGER = 8  # micro-batches in a batch of validation data, which needs no memory for gradients


class Validation:
    """Measures an engine's current model, and restores whatever it changes for that.

    `given` is the data, or ``metric(model)``; of a metric that is better the higher it is the negative is measured.
    """

    def __init__(self, engine: Engine, loss: Callable[[nn.Module, Any], Tensor], given: Any, mode: Mode) -> None:
        self._engine, self._loss, self._given = engine, loss, given
        self._metric = given if is_metric(given) else None
        if mode not in ("min", "max") or (mode == "max" and self._metric is None):
            raise RangeTestError(f'mode: got {mode!r}; expected "min", or "max" with a function as validation')
        self._sign = -1.0 if mode == "max" else 1.0
        self.loader: Iterable[Any] | None = None
        self.limit(math.inf)
        norms = (module for module in engine.modules() if isinstance(module, _BatchNorm))
        self.norms = [module for module in norms if module.track_running_stats]

    def __bool__(self) -> bool:
        """Whether there is anything to validate on."""
        return self._given is not None

    def limit(self, samples: float) -> None:
        """Read no more than so many samples, over all ranks; of a loader, up to the end of a batch."""
        self._most = samples / self._engine.world.size  # on this rank
        if self._given is not None and self._metric is None:
            size = LARGER * self._engine.train_micro_batch_size_per_gpu()
            size = size if self._most > size else math.ceil(self._most)
            self.loader = loader_of(self._given, self._engine.world, micro_batch=size, for_validation=True)

    def measure(self, recent: Sequence[Any], own: Sequence[Any] = ()) -> tuple[float, float, float]:
        """The loss or metric, lower is better, the loss on `own`, and the samples that were read, over all ranks.

        `recent` are the last micro-batches of the run, for batch norm. `own` are some that it was trained on; the loss
        on none, and that next to a metric, is nan.
        """
        refreshed = len(recent) * self._engine.train_micro_batch_size_per_gpu() * self._engine.world.size
        with self._evaluating(recent):
            if self._metric is None:
                loss, samples = self._mean_loss(self._batches(), getattr(self.loader, "first_sample", None))
                own_loss, own_samples = self._mean_loss(own) if own else (math.nan, 0.0)
                return loss, own_loss, samples + own_samples + refreshed
            value = self._metric(self._engine)
        try:
            return self._sign * float(value), math.nan, refreshed
        except (TypeError, ValueError):
            raise RangeTestError(f"validation: the function returned {value!r}; expected a number") from None

    def _mean_loss(self, data: Iterable[Any], spare: Callable[[], Any] | None = None) -> tuple[float, float]:
        """The mean loss over batches, over samples and ranks, and the number of samples."""
        engine = self._engine
        total = torch.zeros(2, dtype=widest_float(engine.device), device=engine.device)  # of losses, of samples
        for batch, counts in in_step(engine, data, spare):
            loss, size = scalar_of(self._loss(engine, batch)).to(total), num_samples(batch)
            if counts:
                total += torch.stack([loss * size, total.new_tensor(size)])
        loss_sum, samples = engine.world.sum(total).tolist()
        if not samples:
            raise RangeTestError(
                "validation: it yields no sample; is it empty, smaller than a batch with drop_last, or readable only "
                "once? Give a dataset or a loader with samples, or leave it out"
            )
        return loss_sum / samples, samples

    def _batches(self) -> Iterator[Any]:
        """This rank's batches on the device, within the limit."""
        seen = 0
        for batch in self.loader or ():
            yield to_device(batch, self._engine.device)
            seen += num_samples(batch)
            if seen >= self._most:
                return

    @contextmanager
    def _evaluating(self, recent: Sequence[Any]) -> Iterator[None]:
        """Evaluation mode without gradients, and batch norm's statistics as the present weights have them.

        Random numbers are afterwards as before: a run must not depend on how often it is validated.
        """
        engine, random = self._engine, random_state()
        training = [(module, module.training) for module in engine.modules()]
        norms = self.norms if recent else []
        restore = [capture_module(norm) for norm in norms]
        engine.eval()
        try:
            with torch.no_grad():
                for norm in norms:
                    norm.train()
                    norm.reset_running_stats()
                    norm.momentum = None  # a mean over the batches
                for batch in recent if norms else ():
                    self._loss(engine, batch)
                for norm in norms:
                    norm.eval()
                yield
        finally:
            set_random_state(random)
            for each in restore:
                each()
            for module, flag in training:
                module.training = flag
