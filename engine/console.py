"""What the terminal shows: one progress bar and one table, both drawn by rich.

rich is imported when the first of them is drawn, so that a training run without a terminal does not load it. Where
there is no terminal a bar becomes a few log lines, and a table one line for each row.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from redline.log import log

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

__all__ = ["Paint", "ProgressBar", "paint_nothing", "paint_on_terminal", "rows_as_text", "shows_bars", "terminal"]

REFRESH_EVERY = 0.1  # seconds between two updates of a bar
NOTEBOOK_WIDTH = 110  # columns


def _notebook_display() -> Callable[..., Any] | None:
    """IPython's `display` in a notebook; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return ipython.display.display if ipython is not None and hasattr(shell, "kernel") else None


def shows_bars() -> bool:
    """Whether there is a place for a bar: a terminal, or a notebook."""
    return _notebook_display() is not None or sys.stderr.isatty()


class ProgressBar:
    """A progress bar on standard error, or in the output of a notebook's cell.

    Args:
        total: units to come; None where that is not known.
        unit: what is counted; "B" for bytes, which are shown in KiB, MiB and so on.
        show: True for a bar, False for nothing, None for a bar on a terminal or in a notebook and log lines elsewhere.
        log_lines: whether there is a log line for each tenth of `total` where there is no bar.
        background: whether the bar closes when another one opens, a notebook's cell ends or the process exits, for a
            loop whose end nobody announces.
    """

    _in_background: ProgressBar | None = None  # the one that is open

    def __init__(
        self,
        total: int | None,
        *,
        unit: str = "step",
        show: bool | None = None,
        log_lines: bool = True,
        background: bool = False,
    ) -> None:
        self.total, self.done = total, 0  # the total may be changed at any time
        self._latest: tuple[str, Callable[[], str]] = "", str  # description and values
        self._shown_at = 0.0
        self._logged = 0  # of `done`, in log lines
        self._log_lines = log_lines and show is not False
        self._bar: Any = None
        self._cell: Any = None  # the bar's place in a notebook
        if show or (show is None and shows_bars()):
            self._log_lines = False
            if ProgressBar._in_background is not None:
                ProgressBar._in_background.close()
            self._open(unit, _notebook_display())
            if background:
                ProgressBar._in_background = self
                atexit.register(self.close)
                if self._cell is not None:
                    sys.modules["IPython"].get_ipython().events.register("post_run_cell", self._close_with_cell)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def advance(self, count: int = 1, description: str = "", values: Callable[[], str] = str) -> None:
        """Count units that are done.

        Args:
            count: how many.
            description: what is being done.
            values: gives what to show with it; called only when the bar or a log line is due.
        """
        self.done += count
        self._latest = description, values
        if self._bar is not None:
            if time.perf_counter() - self._shown_at >= REFRESH_EVERY:
                self._refresh()
        elif self._log_lines and self.done - self._logged >= self._tenth:
            self._logged = self.done
            log.info("%s", self.format_line(description, values()))

    def skip(self, count: int) -> None:
        """Count units that will not come: a run has ended early."""
        self.done += count
        self._logged = self.done - self.done % self._tenth

    def write(self, message: str) -> None:
        """Print a line that stays, above the bar."""
        if self._cell is not None:
            print(message)
        elif self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        elif self._log_lines:
            log.info("%s", message)

    def format_line(self, description: str, values: str) -> str:
        """Text of a log line."""
        return f"{description}: {values}"

    @property
    def is_open(self) -> bool:
        """Whether there is a bar that has not been closed."""
        return self._bar is not None

    def close(self) -> None:
        """Leave the bar on the terminal as it is at the end."""
        if self._bar is None:
            return
        if ProgressBar._in_background is self:
            ProgressBar._in_background = None
            atexit.unregister(self.close)
        self._refresh()
        self._bar.stop()
        self._bar = None
        for handler, stream in self._handlers:
            handler.setStream(stream)

    def _close_with_cell(self, *_: Any) -> None:
        sys.modules["IPython"].get_ipython().events.unregister("post_run_cell", self._close_with_cell)
        self.close()

    @property
    def _tenth(self) -> int:
        return max(1, (self.total or 0) // 10)

    def _refresh(self) -> None:
        description, values = self._latest
        texts = {"description": description, "values": values()}
        self._bar.update(self._task, completed=self.done, total=self.total, refresh=self._cell is None, **texts)
        if self._cell is not None:
            with self._bar.console.capture() as captured:
                self._bar.console.print(self._bar.get_renderable())
            self._cell.update({"text/plain": captured.get().rstrip()}, raw=True)
        self._shown_at = time.perf_counter()

    def _open(self, unit: str, display: Callable[..., Any] | None) -> None:
        from rich.console import Console
        from rich.progress import Progress

        if display is not None:  # rich's own display there needs ipywidgets, and is lost when the notebook is saved
            console = Console(file=io.StringIO(), width=NOTEBOOK_WIDTH, no_color=True, force_jupyter=False)
            self._bar, self._handlers = Progress(*_columns(unit), console=console, auto_refresh=False), []
            self._task = self._bar.add_task("", total=self.total, values="")
            self._cell = display({"text/plain": ""}, raw=True, display_id=True)
            return
        self._handlers = [(handler, handler.stream) for handler in _console_handlers()]
        stdout, stderr = sys.stdout, sys.stderr
        # Without rich's refresh thread, which a data loader would fork. What is printed to a file stays there.
        self._bar = Progress(
            *_columns(unit), console=Console(stderr=True), auto_refresh=False, redirect_stdout=stdout.isatty()
        )
        self._task = self._bar.add_task("", total=self.total, values="")
        self._bar.start()
        # rich has put streams in the place of these, whose lines appear above the bar; handlers hold the old ones.
        for handler, stream in self._handlers:
            handler.setStream(sys.stderr if stream is stderr else sys.stdout)


def _columns(unit: str) -> Iterator[ProgressColumn]:
    """Description, bar, count, time and values."""
    from rich import progress

    yield progress.TextColumn("{task.description}", markup=False)
    yield progress.BarColumn(bar_width=24)
    if unit == "B":
        yield progress.DownloadColumn(binary_units=True)
        yield progress.TransferSpeedColumn()
    else:
        yield progress.MofNCompleteColumn()
        yield progress.TextColumn(unit)
    yield progress.TimeElapsedColumn()
    yield progress.TimeRemainingColumn()
    yield progress.TextColumn("{task.fields[values]}", markup=False)


def _console_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Handlers that print to the terminal, the application's or ours."""
    for name in (None, "redline", "redline.schedulers"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
                yield handler


# -- tables ----------------------------------------------------------------------------------------------

Paint = Callable[[str, str], str]  # a text and its kind, to the text with or without ANSI color

_COLORS = {"honoured": 32, "no effect": 33, "refused": 31, "problem": 31, "head": 1}  # ANSI codes by kind


def paint_nothing(text: str, kind: str) -> str:
    """The text without color."""
    return text


def paint_on_terminal(text: str, kind: str) -> str:
    """The text in the color of its kind."""
    code = _COLORS.get(kind)
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def terminal() -> tuple[int | None, Paint]:
    """The width of the terminal, None for a pipe or a file; and how texts are colored there."""
    if not sys.stdout.isatty():
        return None, paint_nothing
    return shutil.get_terminal_size().columns, paint_nothing if os.environ.get("NO_COLOR") else paint_on_terminal


def rows_as_text(
    rows: Sequence[Sequence[str]],
    heads: Sequence[str],
    width: int | None = None,
    paint: Paint = paint_nothing,
    *,
    numbers: bool = False,
) -> Iterator[str]:
    """Lines of a table, indented by two.

    Args:
        rows: one cell for each head.
        heads: of the columns; shown on a terminal, and with `numbers`.
        width: columns of the terminal, which the widest columns are folded to; None for one line for each row.
        paint: color of a cell, by its own text.
        numbers: align all columns but the first to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    has_rule = width is not None and (sys.stdout.encoding or "").lower().startswith("utf")
    table = Table(
        box=box.SIMPLE_HEAD if has_rule else None,
        show_header=width is not None or numbers,
        header_style="",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if has_rule else 2, 0, 0),  # the box adds a space
    )
    for index, head in enumerate(heads):
        table.add_column(
            Text.from_ansi(paint(head, "head")),
            justify="right" if numbers and index else "left",
            no_wrap=width is None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text.from_ansi(paint(cell, cell)) for cell in row))
    text = io.StringIO()
    # Color is in the cells already, or not; a width that nothing is cut off at stands for none.
    console = Console(file=text, width=width - 2 if width else 10_000, force_terminal=True, color_system="standard",
                      no_color=False, legacy_windows=False)  # fmt: skip
    console.print(table)
    yield from (f"  {line}".rstrip() for line in text.getvalue().splitlines())
