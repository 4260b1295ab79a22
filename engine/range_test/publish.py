"""A range test's curves in TensorBoard, Weights & Biases, CSV files and Comet: wherever the config writes training.

They have names of their own, ``RangeTest/rate 5/loss`` and ``.../lr``, against the update; short trainings of a tuning
are under ``Search/`` and ``Trials/``. What is charted of the training itself does not see them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.engine import Engine
from engine.range_test.contents import Contents
from engine.range_test.curve import Curve
from engine.range_test.suggestion import Suggestion
from engine.watch.monitor import Line, Monitor, Point, Record

__all__ = ["publish", "record_of"]


def publish(engine: Engine, contents: Contents) -> None:
    """Hand the curves to the engine's monitors; without monitors, and on ranks other than zero, nothing happens."""
    for observer in engine.observers:
        if isinstance(observer, Monitor):
            observer.show(record_of(contents))


def record_of(contents: Contents) -> Record:
    """A report as monitors take it."""
    curves = [("RangeTest", curve) for curve in contents.curves]
    curves += [("Search", trial.curve) for trial, _ in contents.search]
    curves += [("Trials", trial.curve) for trial in contents.trials]
    answer = contents.answer
    return Record(
        title="RangeTest",
        points=[point for group, curve in curves for point in _points(f"{group}/{curve.name}", curve)],
        lines=[_line(curve) for curve in contents.curves if curve.is_test],
        axes=("lr", "loss"),
        numbers=answer.params() if isinstance(answer, Suggestion) else {},
        text=_text(contents),
    )


def _points(name: str, curve: Curve) -> Iterator[Point]:
    for step, lr, loss in zip(curve.steps, curve.lrs, curve.losses):
        yield Point(f"{name}/loss", loss, step)
        yield Point(f"{name}/lr", lr, step)
    for updates, loss in curve.validation:
        yield Point(f"{name}/validation_loss", loss, updates)


def _line(curve: Curve) -> Line:
    known = [(lr, loss) for lr, loss in zip(curve.lrs, curve.losses) if math.isfinite(loss)]
    return Line(curve.name, [lr for lr, _ in known], [loss for _, loss in known])


def _text(contents: Contents) -> str:
    """The answer as Markdown."""
    answer = contents.answer
    if isinstance(answer, Suggestion):
        rows = [f"| `{key}` | {value:g} | {answer.reasons.get(key, '')} |" for key, value in answer.params().items()]
        said = ["| key | value | where it comes from |", "| --- | --- | --- |", *rows]
    else:
        said = [f"**No suggestion.** {answer.reason} {answer.remedy}"]
    return "\n".join([*said, "", *(f"- {note}" for note in (*answer.notes, *contents.left_out))]).rstrip()
