"""The active range test: short runs at growing rates on a live engine, which is then as it was before.

Each run starts from the same weights, optimizer state, random numbers and batches, goes through the
engine's own step, and stops when its loss has diverged: on all processes at the same update, since
they decide on the mean of their losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from engine.data import to_device
from engine.engine import Engine
from engine.errors import RangeTestError
from engine.range_test.analysis import Curve, DivergenceDetector
from engine.range_test.progress import Progress
from engine.range_test.recorder import Recorder
from engine.range_test.result import RangeTestResult
from engine.range_test.snapshot import Snapshot
from engine.range_test.task import LossFn, batches, loss_of, training_batches, validation_batches
from schedulers import LRRangeTest

__all__ = ["run_range_test"]

# Of the sets tried on a dozen small tasks, this one led to the best training with Adam and SGD alike.
DEFAULT_RATES = (5.0, 50.0, 500.0)
DEFAULT_MIN_LR = 1e-4


def run_range_test(
    engine: Engine,
    data: Any,
    loss: LossFn,
    *,
    validation: Any = None,
    rates: Sequence[float] | None = None,
    min_lr: float | Sequence[float] | None = None,
    step_size: int | None = None,
    staircase: bool | None = None,
    steps: int = 200,
    baseline: float | bool = True,
    validations: int = 20,
    train_steps: int | None = None,
    progress: bool | None = None,
) -> RangeTestResult:
    """Train for a while at each rate of growth, record, put everything back, and read the curves.

    On several processes every one calls this with the same arguments. Arguments left out come from the
    config where it has an ``LRRangeTest``.

    Args:
        engine: at the beginning of an update.
        data: a dataset, a tuple of tensors, or anything that yields micro-batches again and again.
        loss: ``loss(model, batch)`` to a scalar, or a criterion ``loss(output, target)``.
        validation: data for a validation loss along the way; None for none.
        rates: growth of the learning rate per `step_size` updates, as multiples of `min_lr`, one run each;
            default 5, 50 and 500.
        min_lr: the first learning rate, one value (groups keep their ratios) or one per parameter group;
            default 1e-4.
        step_size: updates in which the learning rate grows by the run's rate times `min_lr`; default
            a twentieth of `steps`.
        staircase: grow in stairs of `step_size` updates; default False.
        steps: updates of each run, at most.
        baseline: also run at this fixed learning rate; True takes the optimizer's own, False leaves it out.
        validations: how often to measure the validation loss in a run.
        train_steps: updates of the training that is planned, for which step sizes are suggested; default
            ten times `steps`.
        progress: show a bar; None shows one on a terminal and some lines elsewhere.

    Returns:
        Curves and suggestion, the same on every process.

    Raises:
        RangeTestError: the engine stands inside an update or has no optimizer; data or loss cannot be used.
    """
    _check_idle(engine)
    _check_count("validations", validations)
    if train_steps is not None:
        _check_count("train_steps", train_steps)
    plan = _Plan.of(engine, rates, min_lr, step_size, staircase, steps, baseline)
    micro_batch = engine.train_micro_batch_size_per_gpu()
    source = training_batches(data, engine.world, micro_batch=micro_batch)
    held_out = None if validation is None else validation_batches(validation, engine.world, micro_batch=micro_batch)
    compute_loss = loss_of(loss)

    snapshot = Snapshot(engine, source, held_out)
    curves: list[Curve] = []
    try:
        with Progress(len(plan.runs) * steps, progress if engine.global_rank == 0 else False) as bar:
            for run in plan.runs:
                snapshot.restore()
                plan.install(run, engine)
                validate = _Validation(engine, held_out, compute_loss, every=max(1, steps // validations))
                curves.append(_run(engine, batches(source, engine.device), compute_loss, run, steps, validate, bar))
    finally:
        snapshot.restore()
        if engine.micro_steps == 0:
            engine.renew_parallel()
    planned = 10 * steps if train_steps is None else train_steps
    return RangeTestResult.of(engine, curves, train_steps=planned, group_ratios=_ratios(plan.runs[-1].min_lrs))


@dataclass(frozen=True, slots=True)
class _Run:
    name: str
    rate: float | None  # None: at a fixed learning rate
    min_lrs: list[float]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The runs of a test, all arguments filled in."""

    runs: list[_Run]
    step_size: int
    staircase: bool

    @classmethod
    def of(
        cls,
        engine: Engine,
        rates: Sequence[float] | None,
        min_lr: float | Sequence[float] | None,
        step_size: int | None,
        staircase: bool | None,
        steps: int,
        baseline: float | bool,
    ) -> _Plan:
        given = engine.lr_scheduler if isinstance(engine.lr_scheduler, LRRangeTest) else None
        base_lrs = _base_lrs(engine)
        if min_lr is None:
            min_lr = DEFAULT_MIN_LR if given is None else given.min_lrs
        if step_size is None:
            step_size = max(1, steps // 20) if given is None else given.step_size
        if staircase is None:
            staircase = given is not None and given.staircase
        for name, value in (("steps", steps), ("step_size", step_size)):
            _check_count(name, value)
        runs = []
        if baseline is not False:
            fixed = base_lrs if baseline is True else _per_group(float(baseline), base_lrs, "baseline")
            runs.append(_Run(f"fixed {fixed[0]:g}", None, fixed))
        min_lrs = _per_group(min_lr, base_lrs, "min_lr")
        for rate in DEFAULT_RATES if rates is None else rates:
            if not 0 < rate < float("inf"):
                raise RangeTestError(f"rates: got {rate!r}; expected numbers > 0")
            runs.append(_Run(f"rate {rate:g}", float(rate), min_lrs))
        if not runs:
            raise RangeTestError("rates: got none; give at least one")
        return cls(runs, step_size, staircase)

    def install(self, run: _Run, engine: Engine) -> None:
        """Give the engine this run's schedule and a record of its own."""
        assert engine.optimizer is not None
        # A fixed learning rate is a test that does not grow.
        engine.lr_scheduler = LRRangeTest(
            engine.optimizer, run.min_lrs, self.step_size, run.rate or 0.0, self.staircase
        )
        engine.recorder = Recorder(engine.world)
        engine.observers = []
        engine.after_update = None
        engine._finite = None  # a test is there to diverge


def _run(
    engine: Engine,
    data: Iterator[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    run: _Run,
    steps: int,
    validate: _Validation,
    bar: Progress,
) -> Curve:
    """One run, from the weights as they are."""
    recorder = engine.recorder
    assert isinstance(recorder, Recorder)
    detector = DivergenceDetector()
    validate(0)
    for step in range(steps):
        lr = float(engine.get_lr()[0])
        for batch in islice(data, engine.gradient_accumulation_steps()):
            engine.backward(loss(engine, batch))
            engine.step()
        value = recorder.last_loss()
        bar.update(run.name, step, lr, value)
        validate(step + 1)
        if detector.update(value) and run.rate is not None:
            bar.say(f"{run.name}: diverged at step {step}, learning rate {lr:.3g}")
            bar.skip(steps - step - 1)
            break
    return recorder.curve(run.name, run.rate)


class _Validation:
    """The mean loss over the held-out data, measured every so many updates."""

    def __init__(
        self, engine: Engine, data: Iterable[Any] | None, loss: Callable[[nn.Module, Any], Tensor], every: int
    ) -> None:
        self._engine, self._data, self._loss, self._every = engine, data, loss, every

    def __call__(self, updates: int) -> None:
        if self._data is None or updates % self._every:
            return
        engine = self._engine
        training = [(module, module.training) for module in engine.modules()]
        engine.eval()
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # sum of losses, number of samples
        with torch.no_grad():
            for batch in self._data:
                batch = to_device(batch, engine.device)
                size = _samples(batch)
                total += torch.stack([self._loss(engine, batch).double() * size, total.new_tensor(size)])
        for module, flag in training:
            module.training = flag
        loss_sum, samples = engine.world.sum(total)
        engine.record_validation(loss_sum / samples)


def _check_idle(engine: Engine) -> None:
    if engine.optimizer is None:
        raise RangeTestError('range test: the engine has no optimizer; give the config an "optimizer" section')
    inside = engine._unfinished.micro_batches != 0
    if inside or any(parameter.grad is not None for parameter in engine.parameters()):
        raise RangeTestError(
            "range test: the engine is inside an update and would lose its gradients; run the test before training or "
            "right after a step() that ended an update"
        )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise RangeTestError(f"{name}: got {value!r}; expected an integer >= 1")


def _base_lrs(engine: Engine) -> list[float]:
    """The optimizer's own rate of each group, before a schedule wrote over it."""
    lrs = getattr(engine.lr_scheduler, "base_lrs", None) or engine.get_lr()
    return [float(lr) for lr in lrs]


def _per_group(lr: float | Sequence[float], base_lrs: list[float], name: str) -> list[float]:
    """One rate as a rate for each group, in the ratios of the groups' own."""
    if isinstance(lr, Sequence):
        if len(lr) != len(base_lrs):
            raise RangeTestError(f"{name}: got {len(lr)} values for {len(base_lrs)} parameter groups; give one each")
        return [float(value) for value in lr]
    if not 0 < lr < float("inf"):
        raise RangeTestError(f"{name}: got {lr!r}; expected a number > 0")
    first = base_lrs[0]
    return [lr * (base / first) if first else lr for base in base_lrs]


def _ratios(lrs: list[float]) -> list[float]:
    """Each group's rate as a multiple of the first one's."""
    return [lr / lrs[0] if lrs[0] else 1.0 for lr in lrs]


def _samples(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of the first tensor in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((_samples(part) for part in parts if isinstance(part, (Tensor, Mapping, tuple, list))), 1)
