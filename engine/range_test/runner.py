"""The active range test: which runs it is made of. The rig makes them, the analysis reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from engine.engine import Engine
from engine.errors import RangeTestError
from engine.range_test.analysis import Kind
from engine.range_test.progress import Progress
from engine.range_test.result import RangeTestResult
from engine.range_test.rig import Rig, Run
from engine.range_test.task import LossFn
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
    _check_count("validations", validations)
    if train_steps is not None:
        _check_count("train_steps", train_steps)
    rig = Rig(engine, data, loss, validation=validation)
    runs, min_lrs = _plan(engine, rates, min_lr, step_size, staircase, steps, baseline, validations)
    with rig, Progress(len(runs) * steps, progress if engine.global_rank == 0 else False) as bar:
        curves = [rig.make(run, bar) for run in runs]
    planned = 10 * steps if train_steps is None else train_steps
    return RangeTestResult.of(engine, curves, train_steps=planned, group_ratios=_ratios(min_lrs))


def _plan(
    engine: Engine,
    rates: Sequence[float] | None,
    min_lr: float | Sequence[float] | None,
    step_size: int | None,
    staircase: bool | None,
    steps: int,
    baseline: float | bool,
    validations: int,
) -> tuple[list[Run], list[float]]:
    """The runs of a test, all arguments filled in, and each group's first learning rate."""
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

    def run(name: str, kind: Kind, lrs: list[float], rate: float | None) -> Run:
        # A fixed learning rate is a test that does not grow.
        def schedule(optimizer: Optimizer) -> LRRangeTest:
            return LRRangeTest(optimizer, lrs, step_size, rate or 0.0, staircase)

        return Run(name, kind, schedule, steps, rate, stops=rate is not None, validations=validations)

    runs = []
    if baseline is not False:
        fixed = base_lrs if baseline is True else _per_group(float(baseline), base_lrs, "baseline")
        runs.append(run(f"fixed {fixed[0]:g}", "fixed", fixed, None))
    min_lrs = _per_group(min_lr, base_lrs, "min_lr")
    for rate in DEFAULT_RATES if rates is None else rates:
        if not 0 < rate < float("inf"):
            raise RangeTestError(f"rates: got {rate!r}; expected numbers > 0")
        runs.append(run(f"rate {rate:g}", "linear", min_lrs, float(rate)))
    if not runs:
        raise RangeTestError("rates: got none; give at least one")
    return runs, min_lrs


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
