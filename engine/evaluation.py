"""Evaluation on any number of ranks: each sample counts once, and no rank waits for another one's batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redline.data import Loader
from redline.device import map_tensors, widest_float
from redline.errors import EngineError
from redline.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from redline.engine import Engine

__all__ = ["evaluate", "in_step", "num_samples"]

Forward = Callable[["Engine", Any], Any]


def evaluate(engine: Engine, loader: Loader, metric: Any, forward: Forward | None = None) -> Any:
    """What `Engine.evaluate` returns, over the batches of a loader that gives each sample to one rank."""
    metric_object = hasattr(metric, "update") and hasattr(metric, "compute")
    if not metric_object and not callable(metric):
        raise EngineError(
            f"evaluate: got {type(metric).__name__} as the metric; expected a function of the model's output and the "
            "targets, or an object with update() and compute()"
        )
    totals = _Totals(engine)
    if metric_object and hasattr(metric, "reset"):
        metric.reset()
    training = [(module, module.training) for module in engine.modules()]
    random_numbers = random_state()
    engine.eval()
    try:
        with torch.no_grad():
            for batch, counts in in_step(engine, loader, loader.first_sample):
                arguments = (forward or _forward)(engine, batch)
                arguments = arguments if isinstance(arguments, tuple) else (arguments,)
                if not counts:
                    continue
                if metric_object:
                    metric.update(*arguments)
                else:
                    totals.add(metric(*arguments), num_samples(batch))
    finally:
        for module, flag in training:
            module.training = flag
        set_random_state(random_numbers)  # training goes on as if there had been no evaluation
    return metric.compute() if metric_object else totals.means()


def _forward(engine: Engine, batch: Any) -> tuple[Any, ...]:
    """The arguments of the metric for a batch of inputs and targets, or of named inputs."""
    if isinstance(batch, Mapping):
        return (engine(**batch),)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return engine(batch[0]), batch[1]
    raise EngineError(
        f"evaluate: got batches of type {type(batch).__name__}; expected (inputs, targets) or a dict of the model's "
        "arguments; for others give forward=, a function of engine and batch that returns the metric's arguments"
    )


def in_step(
    engine: Engine, loader: Iterable[Any], spare: Callable[[], Any] | None = None
) -> Iterator[tuple[Any, bool]]:
    """This rank's batches, and whether they count.

    Where a forward is a collective, as at ZeRO stage 3, a rank that has no batch left repeats its last one, until all
    have come to their end; one that never had any takes what `spare` returns.
    """
    if engine.world_size == 1 or not engine.shards_parameters:
        yield from ((batch, True) for batch in loader)
        return
    batches, batch = iter(loader), None
    while True:
        current = next(batches, None)
        if not engine.world.sum(torch.tensor(float(current is not None), device=engine.device)):
            return
        if current is not None:
            batch = current
        elif batch is None and spare is not None:
            batch = spare()
        yield batch, current is not None


class _Totals:
    """Sums of one number or of several named ones, over this rank's samples."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dtype = widest_float(engine.device)
        self._sums: dict[str, Tensor] = {}  # shape (2,): the sum over samples, and their number

    def add(self, values: Any, samples: int) -> None:
        named = values if isinstance(values, Mapping) else {"": values}
        for name, value in named.items():
            if not isinstance(value, (Tensor, float, int)):
                raise EngineError(
                    f"evaluate: the metric returned {type(value).__name__}; expected a number, the mean over the "
                    "batch, or a tensor with one value for each sample, or a dict of such"
                )
            value = torch.as_tensor(value, device=self._engine.device).to(self._dtype)  # nothing waits for the device
            count = len(value) if value.ndim else samples
            total = value.reshape(count, -1).mean(1).sum() if value.ndim else value * samples
            pair = torch.stack([total, total.new_tensor(count)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self) -> Any:
        """The means over the samples of all ranks; a collective."""
        everyone = self._engine.world.gather({name: pair.tolist() for name, pair in self._sums.items()})
        means = {}
        for name in dict.fromkeys(name for sums in everyone for name in sums):
            totals, counts = zip(*(sums[name] for sums in everyone if name in sums))
            means[name] = sum(totals) / sum(counts)
        if not means:
            raise EngineError("evaluate: the data have no sample; give at least one")
        return means[""] if list(means) == [""] else means


def num_samples(batch: Any) -> int:
    """The first dimension of the first tensor in a batch; 1 where there is none."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor) if tensor.ndim else 1)
        return tensor

    map_tensors(batch, note)
    return sizes[0] if sizes else 1
