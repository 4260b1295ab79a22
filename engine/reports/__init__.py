"""Reports: a range test or a tuning as picture, page and terminal chart, and the files of its folder.

model       what a report shows, and its charts, as plain values
figure      pictures by matplotlib; `html` the page, its charts by plotly; `terminal` by plotext
schedule    a config's learning rate before any training
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redline.errors import RangeTestError
from redline.range_test.curve import SMOOTHING
from redline.range_test.importers import read_curves
from redline.range_test.result import RangeTestResult
from redline.reports.figure import draw_panel_on, save_figure
from redline.reports.html import PAGE_NAME, write_page
from redline.reports.model import Report, report_of
from redline.reports.terminal import draw_chart

__all__ = [
    "Report", "load_result", "plot_report", "report_of", "save_figure", "show_report", "write_charts", "write_report",
]  # fmt: skip

PICTURE_NAME = "range_test.png"


def write_report(result: RangeTestResult, directory: str | Path, *, beta: float = SMOOTHING) -> str:
    """Write JSON, CSV, page, picture and suggested config into a folder, which is created.

    A missing matplotlib only costs the picture, and is reported. `beta` is the weight of the past in the smoothing of
    what is drawn, in [0, 1).

    Returns:
        What was found and where the files are, in lines for people.
    """
    folder = Path(directory)
    written = list(result.save(folder).values())
    charts, lines = write_charts(report_of(result, beta=beta), folder, PICTURE_NAME)
    names = ", ".join(path.name for path in (*written, *charts))
    return "\n".join([result.summary(), *lines, f"Written to {folder}: {names}"])


def write_charts(
    report: Report, folder: Path, picture_name: str, *, picture: bool = True
) -> tuple[list[Path], list[str]]:
    """Write page and, unless `picture` is False, the picture, for which matplotlib takes its time.

    Returns:
        The files, and a line for the picture if matplotlib is missing.
    """
    drawn, lines = None, []
    try:
        if picture:
            drawn = save_figure(report, folder / picture_name)
    except RangeTestError as error:
        lines.append(f"No picture: {error}.")
    page = write_page(report, folder / PAGE_NAME, picture=drawn)
    return [page, *([drawn] if drawn is not None else [])], lines


def show_report(result: RangeTestResult, directory: str | Path, *, beta: float = SMOOTHING) -> str:
    """Write the report; returns its lines below a chart for the terminal."""
    return f"{draw_chart(report_of(result, beta=beta))}\n\n{write_report(result, directory, beta=beta)}"


def plot_report(report: Report, path: str | Path | None, axes: Any = None) -> Any:
    """Draw all of a report into a file and return its path, or its main panel on axes and return these."""
    return draw_panel_on(axes, report) if path is None else save_figure(report, path)


def load_result(
    source: str | Path,
    *,
    lr_column: str | None = None,
    loss_column: str | None = None,
    train_batch_size: int | None = None,
) -> RangeTestResult:
    """A range test from the folder that it wrote, or from a table that another tool wrote.

    Args:
        source: folder, or CSV, TSV or JSON file.
        lr_column, loss_column: names of columns of a table; None looks for the usual ones.
        train_batch_size: samples per step that a table was measured with; None where it is unknown.

    Raises:
        RangeTestError: there is nothing that can be read.
    """
    path = Path(source)
    if not path.is_file() and path.suffix.lower() not in (".csv", ".tsv", ".json"):
        return RangeTestResult.load(path)
    curves = read_curves(path, lr_column=lr_column, loss_column=loss_column)
    train_steps = 10 * max(len(curve.steps) for curve in curves)
    return RangeTestResult(curves, {}, train_batch_size or 0, world_size=1, optimizer="", train_steps=train_steps)
