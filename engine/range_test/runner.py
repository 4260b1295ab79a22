"""The active range test: which runs it is made of. The rig makes them, the analysis reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.optim import Optimizer

from engine.engine import Engine
from engine.errors import RangeTestError
from engine.range_test.conditions import check, settings_of
from engine.range_test.contents import contents_of
from engine.range_test.progress import Progress
from engine.range_test.publish import publish
from engine.range_test.rates import own_rates, ratios_of
from engine.range_test.recorder import name_test
from engine.range_test.result import RangeTestResult
from engine.range_test.rig import Rig, Run
from engine.range_test.task import LossFn
from schedulers import LRRangeTest

__all__ = ["run_range_test"]

# Of the sets tried on a dozen small tasks, this one led to the best training with Adam and SGD alike.
DEFAULT_RATES = (5.0, 50.0, 500.0)
DEFAULT_MIN_LR = 1e-4
SWEEP_RATES = (1.5,)  # by equal factors: from 1e-7 to 10 in twenty times the step size
SWEEP_MIN_LR = 1e-7


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
    growth: Literal["linear", "exponential"] | None = None,
    steps: int = 200,
    baseline: float | bool = True,
    seeds: int = 1,
    batch_sizes: Sequence[int] | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
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
            default 5, 50 and 500, or 1.5 where the growth is exponential.
        min_lr: the first learning rate, one value (groups keep their ratios) or one per parameter group;
            default 1e-4, or 1e-7 where the growth is exponential.
        step_size: updates in which the learning rate grows by the run's rate times `min_lr`; default
            a twentieth of `steps`.
        staircase: grow in stairs of `step_size` updates; default False.
        growth: "linear" adds equal amounts, "exponential" multiplies by 1 + rate per `step_size`; default the config's
            ``redline.range_test.growth``.
        steps: updates of each run, at most.
        baseline: also run at this fixed learning rate; True takes the optimizer's own, False leaves it out.
        seeds: make every test this many times, with other random numbers and another order of the data.
        batch_sizes: test at these batch sizes, too, reached by gradient accumulation.
        sweep: values of `weight_decay` or `momentum` (the first of betas) to test with, too, one at a time.
        validations: how often to measure the validation loss in a run.
        train_steps: updates of the training that is planned, for which step sizes are suggested; default
            ten times `steps`.
        progress: show a bar; None shows one on a terminal and some lines elsewhere.

    Returns:
        Curves and suggestion, the same on every process. The suggestion is of the engine's own batch size and settings;
        that of others is at ``result.select(train_batch_size=..., settings=...)``.

    Raises:
        RangeTestError: the engine stands inside an update or has no optimizer; data or loss cannot be used.
    """
    _check_count("validations", validations)
    _check_count("seeds", seeds)
    if train_steps is not None:
        _check_count("train_steps", train_steps)
    rig = Rig(engine, data, loss, validation=validation)
    tests = _plan(engine, rates, min_lr, step_size, staircase, growth, steps)
    runs = [
        replace(run, validations=validations) for run in _all_runs(engine, tests, baseline, seeds, batch_sizes, sweep)
    ]
    ratios = ratios_of(tests.min_lrs)
    for run in runs:
        check(engine, run.train_batch_size, run.settings)
    with rig, Progress(sum(run.steps for run in runs), progress if engine.global_rank == 0 else False) as bar:
        curves = [rig.make(run, bar) for run in runs]
    planned = 10 * steps if train_steps is None else train_steps
    result = RangeTestResult.of(engine, curves, train_steps=planned, group_ratios=ratios)
    publish(engine, contents_of(result))
    return result


@dataclass(frozen=True, slots=True)
class _Tests:
    """Range tests with all that they have in common filled in."""

    min_lrs: list[float]  # first learning rate of each group
    rates: list[float]
    step_size: int
    staircase: bool
    growth: Literal["linear", "exponential"]
    steps: int

    def runs(self) -> Iterator[Run]:
        for rate in self.rates:
            yield Run(name_test(rate, self.growth), self.growth, self._schedule(self.min_lrs, rate), self.steps, rate)

    def fixed(self, lrs: list[float]) -> Run:
        """A run at a fixed learning rate, which is a test that does not grow."""
        return Run(f"fixed {lrs[0]:g}", "fixed", self._schedule(lrs, 0.0), self.steps, stops=False)

    def _schedule(self, lrs: list[float], rate: float) -> Callable[[Optimizer], LRRangeTest]:
        def make(optimizer: Optimizer) -> LRRangeTest:
            return LRRangeTest(optimizer, lrs, self.step_size, rate, self.staircase, growth=self.growth)

        return make


def _plan(
    engine: Engine,
    rates: Sequence[float] | None,
    min_lr: float | Sequence[float] | None,
    step_size: int | None,
    staircase: bool | None,
    growth: Literal["linear", "exponential"] | None,
    steps: int,
) -> _Tests:
    """What was given, or else the config says, or else is usual."""
    given = engine.lr_scheduler if isinstance(engine.lr_scheduler, LRRangeTest) else None
    if growth is None:
        growth = engine.config.redline.range_test.growth if given is None else given.growth
    if growth not in ("linear", "exponential"):
        raise RangeTestError(f'growth: got {growth!r}; expected "linear" or "exponential"')
    default_rates, default_min = (DEFAULT_RATES, DEFAULT_MIN_LR) if growth == "linear" else (SWEEP_RATES, SWEEP_MIN_LR)
    if min_lr is None:
        min_lr = default_min if given is None else given.min_lrs
    if step_size is None:
        step_size = max(1, steps // 20) if given is None else given.step_size
    if staircase is None:
        staircase = given is not None and given.staircase
    for name, value in (("steps", steps), ("step_size", step_size)):
        _check_count(name, value)
    min_lrs = _per_group(min_lr, own_rates(engine), "min_lr")
    rates = default_rates if rates is None else rates
    if bad := [rate for rate in rates if not 0 < rate < float("inf")]:
        raise RangeTestError(f"rates: got {bad[0]!r}; expected numbers > 0")
    return _Tests(min_lrs, [float(rate) for rate in rates], step_size, staircase, growth, steps)


def _all_runs(
    engine: Engine,
    tests: _Tests,
    baseline: float | bool,
    seeds: int,
    batch_sizes: Sequence[int] | None,
    sweep: Mapping[str, Sequence[float]] | None,
) -> Iterator[Run]:
    """The baseline, the tests as the engine is, then those with one thing changed; each with every seed."""
    if baseline is not False:
        base_lrs = own_rates(engine)
        yield tests.fixed(base_lrs if baseline is True else _per_group(float(baseline), base_lrs, "baseline"))
    elif not tests.rates:
        raise RangeTestError("rates: got none; give at least one")
    changes: list[dict[str, Any]] = [{}]
    for size in dict.fromkeys(batch_sizes or ()):
        if size != engine.train_batch_size():
            changes.append({"train_batch_size": size})
    for name, values in (sweep or {}).items():
        changes.extend(
            {"settings": {name: value}} for value in dict.fromkeys(values) if value != settings_of(engine, name)
        )
    for change in changes:
        for run in tests.runs():
            for seed in range(seeds):
                yield _named(replace(run, seed=seed, **change))


def _named(run: Run) -> Run:
    """The run, called by what sets it apart: ``rate 5, batch 256, seed 1``."""
    parts = [run.name]
    if run.train_batch_size is not None:
        parts.append(f"batch {run.train_batch_size}")
    parts.extend(f"{name} {value:g}" for name, value in run.settings.items())
    if run.seed:
        parts.append(f"seed {run.seed}")
    return replace(run, name=", ".join(parts))


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise RangeTestError(f"{name}: got {value!r}; expected an integer >= 1")


def _per_group(lr: float | Sequence[float], base_lrs: list[float], name: str) -> list[float]:
    """One rate as a rate for each group, in the ratios of the groups' own."""
    if isinstance(lr, Sequence):
        if len(lr) != len(base_lrs):
            raise RangeTestError(f"{name}: got {len(lr)} values for {len(base_lrs)} parameter groups; give one each")
        return [float(value) for value in lr]
    if not 0 < lr < float("inf"):
        raise RangeTestError(f"{name}: got {lr!r}; expected a number > 0")
    return [lr * ratio for ratio in ratios_of(base_lrs)]
