"""Reports: a range test or a tuning as picture, page and terminal chart, and the files of its folder.

model       what a report shows, and its charts, as plain values
figure      pictures by matplotlib; `html` the page, its charts by plotly; `terminal` by plotext
schedule    a config's learning rate before any training
"""

from __future__ import annotations

from pathlib import Path

from redline.errors import RangeTestError
from redline.range_test.importers import read_curves
from redline.range_test.result import RangeTestResult
from redline.reports.figure import plot_report, save_figure
from redline.reports.html import PAGE_NAME, write_page
from redline.reports.model import Report, report_of
from redline.reports.terminal import draw_chart

__all__ = [
    "Report", "load_result", "plot_report", "report_of", "save_figure", "show_report", "write_charts", "write_report",
]  # fmt: skip

PICTURE_NAME = "range_test.png"


def write_report(result: RangeTestResult, directory: str | Path) -> str:
    """Write JSON, CSV, page, picture and suggested config into a folder; returns what was found and where it is.

    A missing matplotlib only costs the picture, and is reported.
    """
    folder = Path(directory)
    written = list(result.save(folder).values())
    charts, lines = write_charts(report_of(result), folder, PICTURE_NAME)
    names = ", ".join(path.name for path in (*written, *charts))
    return "\n".join([result.summary(), *lines, f"Written to {folder}: {names}"])


def write_charts(
    report: Report, folder: Path, picture_name: str, *, picture: bool = True
) -> tuple[list[Path], list[str]]:
    """Write page and, unless `picture` is False, picture; returns the files, and a line if matplotlib is missing."""
    drawn, lines = None, []
    try:
        if picture:
            drawn = save_figure(report, folder / picture_name)
    except RangeTestError as error:
        lines.append(f"No picture: {error}.")
    page = write_page(report, folder / PAGE_NAME, picture=drawn)
    return [page, *([drawn] if drawn is not None else [])], lines


def show_report(result: RangeTestResult, directory: str | Path) -> str:
    """Write the report; returns its lines below a chart for the terminal."""
    return f"{draw_chart(report_of(result))}\n\n{write_report(result, directory)}"


def load_result(
    source: str | Path,
    *,
    lr_column: str | None = None,
    loss_column: str | None = None,
    train_batch_size: int | None = None,
) -> RangeTestResult:
    """A range test from the folder that it wrote, or from a CSV, TSV or JSON file that another tool wrote.

    The columns of a file are found by their usual names if none are given; it does not tell its batch size.
    """
    path = Path(source)
    if not path.is_file() and path.suffix.lower() not in (".csv", ".tsv", ".json"):
        return RangeTestResult.load(path)
    curves = read_curves(path, lr_column=lr_column, loss_column=loss_column)
    train_steps = 10 * max(len(curve.steps) for curve in curves)
    return RangeTestResult(curves, {}, train_batch_size or 0, world_size=1, optimizer="", train_steps=train_steps)
