"""The active range test: which runs it is made of. The session makes them, `suggest` reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from redline.engine import Engine
from redline.errors import RangeTestError
from redline.log import log
from redline.range_test.recorder import name_test
from redline.range_test.result import RangeTestResult, publish
from redline.range_test.session import Progress, Run, Session, check_run, setting_of
from redline.range_test.task import LossFn, Mode
from redline.schedulers import LRRangeTest

__all__ = ["base_lrs", "lr_ratios", "run_range_test"]

Growth = Literal["linear", "exponential"]

# Rates and first learning rate. Of the sets tried on a dozen small tasks, the linear one led to the best training with
# Adam and SGD alike; the exponential one goes from 1e-7 to 10 in twenty times the step size.
DEFAULTS = {"linear": ((5.0, 50.0, 500.0), 1e-4), "exponential": ((1.5,), 1e-7)}


def run_range_test(
    engine: Engine,
    data: Any,
    loss: LossFn | None = None,
    *,
    validation: Any = None,
    mode: Mode = "min",
    rates: Sequence[float] | None = None,
    min_lr: float | Sequence[float] | None = None,
    max_lr: float | None = None,
    step_size: int | None = None,
    staircase: bool | None = None,
    growth: Growth | None = None,
    steps: int = 200,
    baseline: float | bool = True,
    seeds: int = 1,
    batch_sizes: Sequence[int] | None = None,
    sweep: Mapping[str, Sequence[float]] | None = None,
    validations: int = 20,
    train_steps: int | None = None,
    progress: bool | None = None,
) -> RangeTestResult:
    """Train for a while at each rate of growth, record, restore everything, and read the curves.

    On several ranks every one calls this with the same arguments. Arguments left out come from the config where it has
    an ``LRRangeTest``.

    Args:
        engine: between two optimizer steps.
        data: a dataset, tensors or arrays in a tuple or dict, or anything that yields micro-batches and can be iterated
            again.
        loss: ``loss(model, batch)`` to a scalar, or a criterion ``loss(output, target)``; None for a model whose output
            has a ``loss``.
        validation: data for a validation loss along the way, or a function ``metric(model)`` to a number; None for
            none.
        mode: whether a lower ("min") or a higher metric is better ("max"): then its negative is recorded.
        rates: growth of the learning rate per `step_size` steps, as multiples of `min_lr`, one run each, which are not
            learning rates themselves; default 5, 50 and 500, or 1.5 where the growth is exponential.
        min_lr: the first learning rate, one value (groups keep their ratios) or one per parameter group; default 1e-4,
            or 1e-7 where the growth is exponential.
        max_lr: in place of `rates` and `step_size`: one run, in which the learning rate of the first parameter group
            grows from `min_lr` to this one; exponentially unless `growth` says otherwise.
        step_size: optimizer steps in which the learning rate grows by the run's rate times `min_lr`; default a
            twentieth of `steps`.
        staircase: grow in stairs of `step_size` steps; default False.
        growth: "linear" adds equal amounts, "exponential" multiplies by 1 + rate per `step_size`; default the config's
            ``redline.range_test.growth``.
        steps: optimizer steps of each run, at most.
        baseline: also run at this fixed learning rate; True takes the optimizer's own, False leaves it out.
        seeds: make every test this many times, with other random numbers and another order of the data.
        batch_sizes: also test at these batch sizes, reached by gradient accumulation.
        sweep: also test with these values of `weight_decay` or `momentum` (the first of betas), one at a time.
        validations: how often to measure the validation loss in a run.
        train_steps: optimizer steps of the planned training, for which step sizes are suggested; default ten times
            `steps`.
        progress: show a bar; None shows one on a terminal and some lines elsewhere.

    Returns:
        Curves and suggestion, the same on every rank. The suggestion is that of the engine's own batch size and
        settings; that of others is at ``result.select(train_batch_size=..., settings=...)``.

    Raises:
        RangeTestError: the engine is inside an optimizer step or has no optimizer; data, loss or another argument
            cannot be used.
    """
    session = Session(engine, data, loss, validation=validation, mode=mode)
    _check_counts(steps=steps, seeds=seeds, validations=validations)
    given = engine.lr_scheduler if isinstance(engine.lr_scheduler, LRRangeTest) else None
    if growth is None and max_lr is not None:
        growth = "exponential"
    elif growth is None:
        growth = given.growth if given else engine.config.redline.range_test.growth
    if growth not in DEFAULTS:
        raise RangeTestError(f'growth: got {growth!r}; expected "linear" or "exponential"')
    default_rates, default_min_lr = DEFAULTS[growth]
    if min_lr is None:
        min_lr = given.min_lrs if given else default_min_lr
    own_lrs = base_lrs(engine)
    min_lrs = _per_group(min_lr, own_lrs, "min_lr")
    if max_lr is not None:
        if rates is not None or step_size is not None or staircase:
            raise RangeTestError("max_lr: the growth follows from min_lr and max_lr; leave out rates and step_size")
        if not min_lrs[0] < max_lr < math.inf:
            raise RangeTestError(f"max_lr: got {max_lr!r}; expected a number above min_lr, {min_lrs[0]:g}")
        rates, step_size, staircase = [max_lr / min_lrs[0] - 1], max(1, steps - 1), False
    rates = default_rates if rates is None else rates
    if bad := [rate for rate in rates if not 0 < rate < math.inf]:
        raise RangeTestError(f"rates: got {bad[0]!r}; expected numbers > 0")
    if not rates and baseline is False:
        raise RangeTestError("rates: got none; give at least one")
    if staircase is None:
        staircase = given is not None and given.staircase
    if step_size is None:
        step_size = given.step_size if given else max(1, steps // 20)
    train_steps = 10 * steps if train_steps is None else train_steps
    _check_counts(step_size=step_size, train_steps=train_steps)
    _check_growth(rates, growth, min_lrs[0], steps / step_size)

    ramp = partial(LRRangeTest, lr_range_test_step_size=step_size, lr_range_test_staircase=staircase, growth=growth)
    runs = []
    if baseline is not False:
        lrs = own_lrs if baseline is True else _per_group(float(baseline), own_lrs, "baseline")
        fixed = partial(ramp, lr_range_test_min_lr=lrs, lr_range_test_step_rate=0.0)
        runs.append(Run(f"fixed {lrs[0]:g}", "fixed", fixed, steps, stops=False, validations=validations))
    for label, change in _changes(engine, batch_sizes, sweep):
        for rate in map(float, rates):
            name = (name_test(rate, growth) if max_lr is None else f"sweep to {max_lr:g}") + label
            schedule = partial(ramp, lr_range_test_min_lr=min_lrs, lr_range_test_step_rate=rate)
            run = Run(name, growth, schedule, steps, rate, validations=validations, **change)
            runs += [run, *(replace(run, name=f"{name}, seed {seed}", seed=seed) for seed in range(1, seeds))]
    ratios = lr_ratios(min_lrs)
    for run in runs:
        check_run(engine, run.train_batch_size, run.settings)

    show = progress if engine.global_rank == 0 else False
    with session, Progress(sum(run.steps for run in runs), show=show) as bar:
        curves = [session.run(run, bar) for run in runs]
    result = RangeTestResult.of(engine, curves, train_steps=train_steps, group_ratios=ratios)
    publish(engine, {"RangeTest": curves}, result.suggestion)
    return result


def _changes(
    engine: Engine, batch_sizes: Sequence[int] | None, sweep: Mapping[str, Sequence[float]] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What differs from the engine's own batch size and settings, with its label: nothing, then one thing at a time."""
    yield "", {}
    for size in dict.fromkeys(batch_sizes or ()):
        if size != engine.train_batch_size():
            yield f", batch {size}", {"train_batch_size": size}
    for name, values in (sweep or {}).items():
        for value in dict.fromkeys(values):
            if value != setting_of(engine, name):
                yield f", {name} {value:g}", {"settings": {name: value}}


def _check_growth(rates: Sequence[float], growth: Growth, min_lr: float, step_sizes: float) -> None:
    """Warn of rates that hardly move the learning rate: they are probably meant as learning rates."""
    ends = [1 + rate * step_sizes if growth == "linear" else (1 + rate) ** step_sizes for rate in rates if rate < 1]
    if ends and min(ends) < 10:
        low, high = min(rates), max(rates)
        log.warning(
            "range test: rates are growth rates, not learning rates: with %g the learning rate ends at %.3g, near its "
            "start at %g; to test the learning rates from %g to %g give these as min_lr and max_lr",
            low, min_lr * min(ends), min_lr, low, high,
        )  # fmt: skip


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise RangeTestError(f"{name}: got {value!r}; expected an integer >= 1")


# -- learning rates of parameter groups ----------------------------------------------------------------


def base_lrs(engine: Engine) -> list[float]:
    """The optimizer's own learning rate of each group, before a schedule overwrote it."""
    lrs = getattr(engine.lr_scheduler, "base_lrs", None) or engine.get_lr()
    return [float(lr) for lr in lrs]


def lr_ratios(lrs: Sequence[float]) -> list[float]:
    """Each group's learning rate as a multiple of the first one's, which curves and suggestions show.

    A group whose learning rate is 0 keeps it. Where all are 0, all get the same.

    Raises:
        RangeTestError: the first one is 0 and another one is not, so that there is no ratio.

    >>> lr_ratios([0.1, 0.05, 0.0]), lr_ratios([0.0, 0.0])
    ([1.0, 0.5, 0.0], [1.0, 1.0])
    """
    first = lrs[0]
    if first:
        return [lr / first for lr in lrs]
    if any(lrs):
        raise RangeTestError(
            f"range test: the learning rates of the parameter groups are {', '.join(f'{lr:g}' for lr in lrs)}; "
            "expected the first one's above 0, since all others are multiples of it; if that group is not to be "
            "trained, freeze it with requires_grad_(False) and leave it out of the optimizer; else put another first"
        )
    return [1.0] * len(lrs)


def _per_group(lr: float | Sequence[float], base: list[float], name: str) -> list[float]:
    """One learning rate as one for each group, in the ratios of the groups' own."""
    if isinstance(lr, Sequence):
        if len(lr) != len(base):
            raise RangeTestError(f"{name}: got {len(lr)} values for {len(base)} parameter groups; give one each")
        return [float(value) for value in lr]
    if not 0 < lr < math.inf:
        raise RangeTestError(f"{name}: got {lr!r}; expected a number > 0")
    return [lr * ratio for ratio in lr_ratios(base)]
