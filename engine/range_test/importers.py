"""Range tests that other tools recorded: tables with a learning rate and a loss per row, read as curves.

CSV and TSV files with a header, pytorch-lr-finder's `history` and Lightning's `results` as JSON. Steps come from a
column of their own where there is one, else from the row; how the learning rate grows is inferred from its values.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
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

Rows = list[dict[str, Any]]


def read_curves(path: Path, *, lr_column: str | None = None, loss_column: str | None = None) -> tuple[Curve, ...]:
    """The range tests of a file: one, or one for each value of a column `run`.

    Args:
        path: .json, else a table separated by commas, semicolons or tabs.
        lr_column, loss_column: names of the columns with learning rate and loss; None looks for the usual names.

    Raises:
        RangeTestError: the file cannot be read, or has no such columns; the message lists those that it has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _json_rows(text) if path.suffix.lower() == ".json" else _table_rows(text)
        columns = _find_columns(list(dict.fromkeys(name for row in rows for name in row)), lr_column, loss_column)
        if len(rows) > MAX_ROWS:
            raise ValueError(f"has {len(rows):,} rows; at most {MAX_ROWS:,} can be read; leave out some")
        runs: dict[str, Rows] = {}
        for row in rows:
            runs.setdefault(str(row[columns["run"]]) if "run" in columns else path.stem, []).append(row)
        if curves := tuple(curve for name, run in runs.items() if (curve := _curve(name, run, columns)).losses):
            return curves
        raise ValueError("no row has both a learning rate and a loss")
    except (OSError, UnicodeDecodeError) as error:
        raise RangeTestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise RangeTestError(f"{path}: {error}") from error


def kind_of_growth(lrs: Sequence[float]) -> Kind | None:
    """How learning rates grow: whichever of differences and factors is more even; None if they fall somewhere.

    >>> kind_of_growth([1.0, 2.0, 3.0]), kind_of_growth([1.0, 2.0, 4.0]), kind_of_growth([1.0, 1.0])
    ('linear', 'exponential', 'fixed')
    """
    changes = [b - a for a, b in pairwise(lrs)]
    if any(change < -TINY * abs(lr) for change, lr in zip(changes, lrs)):
        return None
    if not changes or lrs[-1] <= lrs[0] * (1 + TINY):
        return "fixed"
    if min(lrs) <= 0:
        return "linear"
    factors = [math.log(b / a) for a, b in pairwise(lrs)]
    return "exponential" if _unevenness(factors) < _unevenness(changes) else "linear"


def _unevenness(values: Sequence[float]) -> float:
    return pstdev(values) / abs(fmean(values))


# -- rows and columns; a ValueError says what is wrong with the file -----------------------------------


def _json_rows(text: str) -> Rows:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    for key in ("results", "history"):
        if isinstance(value, dict) and isinstance(value.get(key), (dict, list)):
            value = value[key]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value
    lists = {key: each for key, each in value.items() if isinstance(each, list)} if isinstance(value, dict) else {}
    length = max(map(len, lists.values()), default=0)
    return [{key: each[k] for key, each in lists.items() if k < len(each)} for k in range(length)]


def _table_rows(text: str) -> Rows:
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    header, *rows = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
    names = [name.strip() for name in header]
    return [dict(zip(names, row)) for row in rows or [[""] * len(names)]]  # a row without values has the names


def _find_columns(names: Sequence[str], lr_column: str | None, loss_column: str | None) -> dict[str, str]:
    """The column for each purpose; those for learning rate and loss are required."""
    given = {"lr": lr_column, "loss": loss_column}
    plain = {_plain(name): name for name in reversed(names)}
    found: dict[str, str] = {}
    for purpose, usual in COLUMNS.items():
        known = [plain[name] for name in usual if name in plain]
        if purpose == "lr":  # Lightning's monitor appends the optimizer: lr-Adam
            known += [name for name in names if _plain(name).startswith("lr_")]
        if (wanted := given.get(purpose)) is not None:
            known = [wanted] if wanted in names else []
        found |= {purpose: known[0]} if known else {}
    words = {"lr": "column with a learning rate", "loss": "column with a loss"}
    missing = [f"column {given[each]!r}" if given[each] else words[each] for each in words if each not in found]
    if missing:
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


def _curve(name: str, rows: Rows, columns: dict[str, str]) -> Curve:
    points = list(_points(rows, columns))
    steps, lrs = [int(point["step"]) for point in points], [point["lr"] for point in points]
    kind = kind_of_growth(lrs)
    if kind is None:
        k = next(k for k in range(1, len(lrs)) if lrs[k] < lrs[k - 1] * (1 - TINY))
        fall = f"falls from {lrs[k - 1]:g} to {lrs[k]:g} at step {steps[k]}"
        raise ValueError(f"the learning rate {fall}; in a range test it grows")
    losses = tuple(point["loss"] for point in points)
    validation = tuple((k + 1, point["validation"]) for k, point in zip(steps, points) if "validation" in point)
    return Curve(name, _rate(lrs, kind), tuple(steps), tuple(lrs), losses, validation, kind)


def _points(rows: Rows, columns: dict[str, str]) -> Iterator[dict[str, float]]:
    """The values of each step; a logger may spread them over several rows."""
    steps: dict[float, dict[str, float]] = {}
    for index, row in enumerate(rows):
        values = {
            purpose: _number(row.get(name), f"{name} of row {index + 1}")
            for purpose, name in columns.items()
            if purpose != "run"
        }
        for purpose in ("lr", "step"):  # a loss may be infinite: the test has diverged
            if (value := values.get(purpose)) is not None and not math.isfinite(value):
                raise ValueError(f"{columns[purpose]} of row {index + 1} is {value}; expected a finite number")
        step = values.pop("step", None)
        point = steps.setdefault(index if step is None else step, {})
        for purpose, value in values.items():
            if value is None:
                continue
            if purpose in point:  # batches counted from 0 in each epoch are not steps; the rows are
                yield from _points(rows, {key: name for key, name in columns.items() if key != "step"})
                return
            point[purpose] = value
    for step, point in sorted(steps.items()):
        if "lr" in point and "loss" in point and step >= 0:
            yield {"step": step, **point}


def _number(cell: Any, where: str) -> float | None:
    """A cell as a number; None for an empty one."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {cell!r}; expected a number") from None


def _rate(lrs: Sequence[float], kind: Kind) -> float | None:
    """Growth per step, as `lr_range_test_step_rate` is with a step size of 1."""
    if kind == "fixed" or lrs[0] <= 0:
        return None if kind == "fixed" else math.inf
    steps, factor = len(lrs) - 1, lrs[-1] / lrs[0]
    return float(f"{(factor - 1) / steps if kind == 'linear' else factor ** (1 / steps) - 1:.4g}")
