"""A range test's folder: all of its files, and the lines that tell a person what they say."""

from __future__ import annotations

from pathlib import Path

from engine.errors import RangeTestError
from engine.range_test.chart import chart_of
from engine.range_test.contents import contents_of
from engine.range_test.foreign import read_curves
from engine.range_test.page import PAGE_NAME, write_page
from engine.range_test.picture import draw_range_test
from engine.range_test.result import RangeTestResult
from engine.range_test.smoothing import SMOOTHING

__all__ = ["PICTURE_NAME", "load_result", "show_report", "write_report"]

PICTURE_NAME = "range_test.png"


def write_report(result: RangeTestResult, directory: str | Path, *, beta: float = SMOOTHING) -> str:
    """Write JSON, CSV, page, picture and suggested config into a folder.

    A missing matplotlib costs the picture only, and is said.

    Args:
        result: what to report.
        directory: the folder; made if it is not there.
        beta: weight of the past in the smoothing of what is drawn, in [0, 1).

    Returns:
        What was found and where it lies, in lines for a person.
    """
    folder = Path(directory)
    written = result.save(folder)
    lines = [result.summary()]
    contents = contents_of(result, beta=beta)
    written["page"] = write_page(contents, folder / PAGE_NAME)
    try:
        written["picture"] = draw_range_test(contents, folder / PICTURE_NAME)
    except RangeTestError as error:
        lines.append(f"No picture: {error}.")
    names = ", ".join(path.name for path in written.values())
    return "\n".join([*lines, f"Written to {folder}: {names}"])


def show_report(result: RangeTestResult, directory: str | Path, *, beta: float = SMOOTHING) -> str:
    """Write the report; its lines below a chart for the terminal."""
    return f"{chart_of(contents_of(result, beta=beta))}\n\n{write_report(result, directory, beta=beta)}"


def load_result(
    source: str | Path,
    *,
    lr_column: str | None = None,
    loss_column: str | None = None,
    train_batch_size: int | None = None,
) -> RangeTestResult:
    """A range test from the folder that it wrote, or from a table that another tool wrote.

    Args:
        source: folder, or CSV or JSON file.
        lr_column: of a table; None looks for the common names.
        loss_column: likewise.
        train_batch_size: samples of an update that a table was measured with; None where nobody knows.

    Raises:
        RangeTestError: there is nothing there that can be read.
    """
    path = Path(source)
    if not path.is_file() and path.suffix.lower() not in (".csv", ".tsv", ".json"):
        return RangeTestResult.load(path)
    curves = read_curves(path, lr_column=lr_column, loss_column=loss_column)
    return RangeTestResult(
        curves=curves,
        config={},
        train_batch_size=train_batch_size or 0,
        world_size=1,
        optimizer="",
        train_steps=10 * max(len(curve.steps) for curve in curves),
    )
