"""Range tests that other tools recorded: tables with a learning rate and a loss per row, read as curves.

CSV and TSV files with a header, pytorch-lr-finder's `history` and Lightning's `results` as JSON. Steps come from a
column of their own where there is one, else from the row; how the learning rate grows is inferred from its values.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from redline.errors import RangeTestError
from redline.range_test.curve import Curve, Kind

__all__ = ["kind_of_growth", "read_curves"]

# The usual names of each column, the likeliest first; compared in lower case and without punctuation.
COLUMNS: dict[str, tuple[str, ...]] = {
    "lr": ("lr", "learning_rate", "learningrate", "lrs", "train_lr", "train_learning_rate", "lr_0", "lr_group_0"),
    "loss": ("loss", "train_loss", "training_loss", "losses", "loss_train", "train_loss_step", "batch_loss"),
    "validation": ("validation_loss", "val_loss", "valid_loss", "eval_loss", "test_loss"),
    "step": ("step", "global_step", "iteration", "iter", "update", "batch", "batch_idx"),
    "run": ("run",),
}
MAX_ROWS = 200_000  # a range test has some hundred
TINY = 1e-6  # changes of a learning rate below this share of it are rounding

Row = Mapping[str, Any]


def read_curves(path: Path, *, lr_column: str | None = None, loss_column: str | None = None) -> tuple[Curve, ...]:
    """The range tests of a JSON file or a table: one, or one for each value of a column `run`.

    Columns for learning rate and loss that are not named are found by their usual names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names, rows = _read_json(text) if path.suffix.lower() == ".json" else _read_table(text)
        columns = _find_columns(names, {"lr": lr_column, "loss": loss_column})
        if len(rows) > MAX_ROWS:
            raise ValueError(f"has {len(rows):,} rows; at most {MAX_ROWS:,} can be read; leave out some")
        run_column = columns.pop("run", None)
        runs: dict[str, list[Row]] = {}
        for row in rows:
            runs.setdefault(path.stem if run_column is None else str(row[run_column]), []).append(row)
        curves = [_curve(name, _points(run, columns)) for name, run in runs.items()]
        if not any(curve.losses for curve in curves):
            raise ValueError("no row has both a learning rate and a loss")
        return tuple(curve for curve in curves if curve.losses)
    except (OSError, UnicodeDecodeError) as error:
        raise RangeTestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise RangeTestError(f"{path}: {error}") from error


def kind_of_growth(lrs: Sequence[float]) -> Kind | None:
    """How learning rates grow: whichever of differences and factors is more even; None if they fall somewhere.

    >>> kind_of_growth([1.0, 2.0, 3.0]), kind_of_growth([1.0, 2.0, 4.0]), kind_of_growth([1.0, 1.0])
    ('linear', 'exponential', 'fixed')
    """
    if any(b < a - TINY * abs(a) for a, b in pairwise(lrs)):
        return None
    if not lrs or lrs[-1] <= lrs[0] * (1 + TINY):
        return "fixed"
    if min(lrs) <= 0:
        return "linear"

    def unevenness(values: Sequence[float]) -> float:
        return pstdev(values) / abs(fmean(values))

    differences = [b - a for a, b in pairwise(lrs)]
    factors = [math.log(b / a) for a, b in pairwise(lrs)]
    return "exponential" if unevenness(factors) < unevenness(differences) else "linear"


# -- names of columns and rows; a ValueError says what is wrong with the file --------------------------


def _read_json(text: str) -> tuple[list[str], list[Row]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    for key in ("results", "history"):
        if isinstance(value, dict) and isinstance(value.get(key), (dict, list)):
            value = value[key]
    if isinstance(value, dict):  # a list for each column
        columns = {key: each for key, each in value.items() if isinstance(each, list)}
        return list(columns), [dict(zip(columns, cells)) for cells in zip_longest(*columns.values())]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return list(dict.fromkeys(name for row in value for name in row)), value
    return [], []


def _read_table(text: str) -> tuple[list[str], list[Row]]:
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    header, *rows = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
    names = [name.strip() for name in header]
    return names, [dict(zip_longest(names, row[: len(names)])) for row in rows]


def _find_columns(names: Sequence[str], given: Mapping[str, str | None]) -> dict[str, str]:
    """The column for each purpose; those for learning rate and loss are required."""
    plain = {_plain(name): name for name in reversed(names)}
    found: dict[str, str] = {}
    for purpose, usual in COLUMNS.items():
        known = [plain[name] for name in usual if name in plain]
        if purpose == "lr":  # Lightning's monitor appends the optimizer: lr-Adam
            known += [name for name in names if _plain(name).startswith("lr_")]
        if (wanted := given.get(purpose)) is not None:
            known = [name for name in names if name == wanted]
        found |= {purpose: known[0]} if known else {}
    words = {"lr": "column with a learning rate", "loss": "column with a loss"}
    if missing := [f"column {given[each]!r}" if given[each] else words[each] for each in words if each not in found]:
        raise ValueError(
            f"has no {' and '.join(missing)}; its columns are {', '.join(map(repr, names)) or 'none'}. Expected a "
            'table with a header, such as lr,loss, or JSON such as {"lr": [...], "loss": [...]}; name other columns '
            "with --lr-column and --loss-column"
        )
    return found


def _plain(name: str) -> str:
    """A name in lower case, words separated by one underscore.

    >>> _plain("train/Learning Rate"), _plain("trainLoss")
    ('train_learning_rate', 'train_loss')
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


# -- curves --------------------------------------------------------------------------------------------


def _curve(name: str, points: Mapping[int, Mapping[str, float]]) -> Curve:
    lrs, losses = (tuple(point[key] for point in points.values()) for key in ("lr", "loss"))
    kind = kind_of_growth(lrs)
    if kind is None:
        a, b, step = next((a, b, step) for a, b, step in zip(lrs, lrs[1:], [*points][1:]) if b < a * (1 - TINY))
        raise ValueError(f"the learning rate falls from {a:g} to {b:g} at step {step}; in a range test it grows")
    validation = tuple((step + 1, point["validation"]) for step, point in points.items() if "validation" in point)
    rate = None
    if kind != "fixed":  # growth per step, as `lr_range_test_step_rate` is with a step size of 1
        factor, steps = lrs[-1] / lrs[0] if lrs[0] > 0 else math.inf, len(lrs) - 1
        rate = float(f"{(factor - 1) / steps if kind == 'linear' else factor ** (1 / steps) - 1:.4g}")
    return Curve(name, rate, tuple(points), lrs, losses, validation, kind)


def _points(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[int, dict[str, float]]:
    """What is known of each step; a logger may spread it over several rows."""
    points: dict[float, dict[str, float]] = {}
    for index, row in enumerate(rows):
        values = {
            purpose: _number(row[name], f"{name} of row {index + 1}", is_loss=purpose in ("loss", "validation"))
            for purpose, name in columns.items()
            if row.get(name) is not None and str(row[name]).strip()
        }
        point = points.setdefault(values.pop("step", index), {})
        if point.keys() & values.keys():  # batches counted from 0 in each epoch are not steps; the rows are
            return _points(rows, {key: name for key, name in columns.items() if key != "step"})
        point |= values
    return {int(step): point for step, point in sorted(points.items()) if step >= 0 and {"lr", "loss"} <= point.keys()}


def _number(cell: Any, where: str, *, is_loss: bool) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {cell!r}; expected a number") from None
    if not (is_loss or math.isfinite(value)):  # a loss may be infinite: the test has diverged
        raise ValueError(f"{where} is {value}; expected a finite number")
    return value
