"""Range tests that other tools recorded: tables with a learning rate and a loss in each row, read as curves.

CSV and TSV files with a header, pytorch-lr-finder's `history` and Lightning's `results` as JSON. Steps come from a
column of their own where there is one, else from the row; how the learning rate grows is seen from its values.
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

from engine.errors import RangeTestError
from engine.range_test.curve import Curve, Kind

__all__ = ["kind_of_growth", "read_curves"]

# By what a column is for, the names that it goes by, the likeliest first; compared in lower case and without signs.
NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("lr", "learning_rate", "learningrate", "lrs", "train_lr", "train_learning_rate", "lr_0", "lr_group_0"),
    "loss": ("loss", "train_loss", "training_loss", "losses", "loss_train", "train_loss_step", "batch_loss"),
    "validation": ("validation_loss", "val_loss", "valid_loss", "eval_loss", "test_loss"),
    "step": ("step", "global_step", "iteration", "iter", "update", "batch", "batch_idx"),
    "run": ("run",),
}
TINY = 1e-6  # changes of a learning rate below this share of it are rounding

Rows = list[dict[str, Any]]


def read_curves(path: Path, *, lr_column: str | None = None, loss_column: str | None = None) -> tuple[Curve, ...]:
    """The range tests of a file: one, or one for each name in a column `run`.

    Args:
        path: .json, else a table with commas, semicolons or tabs.
        lr_column: name of the learning rate's column; None looks for the common names.
        loss_column: likewise of the training loss.

    Raises:
        RangeTestError: the file cannot be read, or has no such columns; the message names those that it has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RangeTestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    names, rows = _json_rows(text, path) if path.suffix.lower() == ".json" else _table_rows(text, path)
    columns = _find_columns(names, path, {"lr": lr_column, "loss": loss_column})
    runs: dict[str, Rows] = {}
    for row in rows:
        runs.setdefault(str(row[columns["run"]]) if "run" in columns else path.stem, []).append(row)
    curves = tuple(_curve(name, run, columns, path) for name, run in runs.items())
    return tuple(curve for curve in curves if curve.losses) or _refuse_empty(path)


def kind_of_growth(lrs: Sequence[float]) -> Kind | None:
    """How learning rates grow: whichever of differences and factors is the more even; None if they fall somewhere.

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


# -- files -------------------------------------------------------------------------------------------


def _json_rows(text: str, path: Path) -> tuple[list[str], Rows]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RangeTestError(f"{path}: is no JSON ({error})") from error
    for key in ("results", "history"):
        if isinstance(value, dict) and isinstance(value.get(key), (dict, list)):
            value = value[key]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return list(dict.fromkeys(name for row in value for name in row)), value
    lists = {key: each for key, each in value.items() if isinstance(each, list)} if isinstance(value, dict) else {}
    if not lists:
        raise RangeTestError(f'{path}: expected {{"lr": [...], "loss": [...]}} or a list of rows')
    length = max(map(len, lists.values()))
    return list(lists), [{key: each[k] for key, each in lists.items() if k < len(each)} for k in range(length)]


def _table_rows(text: str, path: Path) -> tuple[list[str], Rows]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise RangeTestError(f"{path}: is empty")
    delimiter = max(",;\t", key=lines[0].count)
    header, *rows = csv.reader(lines, delimiter=delimiter)
    if all(_is_number(cell) for cell in header):
        raise RangeTestError(f"{path}: its first line holds numbers; expected the names of columns, such as lr,loss")
    names = [name.strip() for name in header]
    return names, [dict(zip(names, row)) for row in rows]


def _find_columns(there: Sequence[str], path: Path, given: dict[str, str | None]) -> dict[str, str]:
    """The column for each purpose; those for learning rate and loss must be there."""
    found: dict[str, str] = {}
    for purpose, names in NAMES.items():
        wanted = given.get(purpose)
        if wanted is None:
            plain = {_plain(name): name for name in reversed(there)}
            known = [plain[name] for name in names if name in plain]
            if purpose == "lr":  # Lightning's monitor names the optimizer: lr-Adam
                known += [name for name in there if _plain(name).startswith("lr_")]
            found |= {purpose: known[0]} if known else {}
        elif wanted in there:
            found[purpose] = wanted
    missing = [purpose for purpose in ("lr", "loss") if purpose not in found]
    if missing:
        asked = " and ".join(f"column {given[each]!r}" if given[each] else f"{_WORDS[each]}" for each in missing)
        raise RangeTestError(
            f"{path}: has no {asked}; its columns are {', '.join(map(repr, there)) or 'none'}. "
            "Name them with --lr-column and --loss-column"
        )
    return found


_WORDS = {"lr": "column with a learning rate", "loss": "column with a loss"}


def _plain(name: str) -> str:
    """A name in lower case, words apart by one underscore.

    >>> _plain("train/Learning Rate"), _plain("trainLoss")
    ('train_learning_rate', 'train_loss')
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


# -- curves ------------------------------------------------------------------------------------------


def _curve(name: str, rows: Rows, columns: dict[str, str], path: Path) -> Curve:
    points = list(_points(rows, columns, path))
    lrs = tuple(point["lr"] for point in points)
    kind = kind_of_growth(lrs)
    if kind is None:
        k = next(k for k in range(1, len(lrs)) if lrs[k] < lrs[k - 1] * (1 - TINY))
        raise RangeTestError(
            f"{path}: the learning rate falls from {lrs[k - 1]:g} to {lrs[k]:g} at step {points[k]['step']:g}; "
            "in a range test it grows"
        )
    return Curve(
        name=name,
        rate=_rate(lrs, kind),
        steps=tuple(int(point["step"]) for point in points),
        lrs=lrs,
        losses=tuple(point["loss"] for point in points),
        validation=tuple((int(p["step"]) + 1, p["validation"]) for p in points if p.get("validation") is not None),
        kind=kind,
    )


def _rate(lrs: Sequence[float], kind: Kind) -> float | None:
    """Growth per update, as `lr_range_test_step_rate` is with a step size of 1."""
    if kind == "fixed" or lrs[0] <= 0:
        return None if kind == "fixed" else math.inf
    updates, factor = len(lrs) - 1, lrs[-1] / lrs[0]
    return float(f"{(factor - 1) / updates if kind == 'linear' else factor ** (1 / updates) - 1:.4g}")


def _points(rows: Rows, columns: dict[str, str], path: Path) -> Iterator[dict[str, float]]:
    """What is known of each step; a logger may spread it over several rows."""
    steps: dict[float, dict[str, float]] = {}
    for index, row in enumerate(rows):
        step = _value(row, columns.get("step"), index, path)
        there = steps.setdefault(index if step is None else step, {})
        for purpose in ("lr", "loss", "validation"):
            value = _value(row, columns.get(purpose), index, path)
            if value is None:
                continue
            if purpose in there:  # batches that are counted anew in each epoch are no steps: the rows are
                yield from _points(rows, {key: name for key, name in columns.items() if key != "step"}, path)
                return
            if purpose == "lr" and not math.isfinite(value):
                raise RangeTestError(f"{path}: {columns['lr']} of row {index + 1} is {value}; expected a finite number")
            there[purpose] = value
    for step, values in sorted(steps.items()):
        if "lr" in values and "loss" in values and step >= 0:
            yield {"step": step, **values}


def _value(row: dict[str, Any], column: str | None, index: int, path: Path) -> float | None:
    """A cell as a number; None for an empty one."""
    cell = None if column is None else row.get(column)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise RangeTestError(f"{path}: {column} of row {index + 1} is {cell!r}; expected a number") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_empty(path: Path) -> tuple[Curve, ...]:
    raise RangeTestError(f"{path}: no row has both a learning rate and a loss")
