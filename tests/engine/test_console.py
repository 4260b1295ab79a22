"""The progress bar, and the lines in its place; the table on a terminal and in a pipe."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from redline.console import ProgressBar, paint_on_terminal, rows_as_text
from tests.terminal import on_terminal


def count_to(total: int, bar: ProgressBar) -> None:
    for step in range(total):
        bar.advance(1, "run", lambda step=step: f"step {step}")  # type: ignore[misc]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> io.StringIO:
    """Standard error that is no terminal."""
    caplog.set_level(logging.INFO, logger="redline")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_without_a_terminal_each_tenth_is_a_log_line(pipe: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    with ProgressBar(20) as bar:
        count_to(5, bar)
        bar.skip(6)
        count_to(2, bar)
        bar.write("the run ended early")
    assert caplog.messages == ["run: step 1", "run: step 3", "run: step 0", "the run ended early"]
    assert pipe.getvalue() == ""


@pytest.mark.parametrize("options", [{"show": False}, {"log_lines": False}])
def test_it_can_be_silent(options: dict[str, bool], pipe: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    with ProgressBar(20, **options) as bar:
        count_to(20, bar)
        bar.write("the run ended early")
    assert (caplog.messages, pipe.getvalue()) == ([], "")


def test_on_a_terminal_there_is_a_bar_and_lines_stay_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with ProgressBar(20, unit="run") as bar:
        count_to(10, bar)
        bar.write("[a line]")
    assert sys.stderr is terminal
    line, last = terminal.screen()[-3:-1]
    assert line == "[a line]"
    assert last.startswith("run ") and last.split()[2:4] == ["10/20", "run"] and last.endswith("step 9")


def test_in_a_notebook_the_bar_is_text_in_one_place_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    class Place:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    ipython = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=None), display=SimpleNamespace(display=lambda *_, **__: Place())
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)  # type: ignore[arg-type]
    with ProgressBar(20) as bar:
        count_to(20, bar)
        bar.write("the run ended early")
    assert shown[-1].startswith("run ") and "20/20 step" in shown[-1] and shown[-1].endswith("step 19")
    assert capsys.readouterr() == ("the run ended early\n", "")


def test_values_are_asked_for_only_when_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    asked = []
    with ProgressBar(1000) as bar:
        for step in range(1000):
            bar.advance(1, "run", lambda step=step: str(asked.append(step)))  # type: ignore[misc, func-returns-value]
    assert 1 <= len(asked) < 500


def test_bytes_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with ProgressBar(3 * 2**20, unit="B") as bar:
        bar.advance(2**20)
    assert "1.0/3.0 MiB" in terminal.getvalue()


ROWS = [("a", "honoured", "one two three four five six")]
HEADS = ("key", "status", "note")


def test_a_table_is_one_line_a_row_in_a_pipe_and_folded_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(rows_as_text(ROWS, HEADS)) == ["  a  honoured  one two three four five six"]
    on_terminal(monkeypatch, "stdout")
    lines = list(rows_as_text(ROWS, HEADS, 40, paint_on_terminal))
    assert lines[0] == "  \x1b[1mkey\x1b[0m  \x1b[1mstatus\x1b[0m    \x1b[1mnote\x1b[0m"
    assert lines[2:] == ["  a    \x1b[32mhonoured\x1b[0m  one two three four five", " " * 17 + "six"]


def test_numbers_are_aligned_to_the_right_under_their_heads() -> None:
    assert list(rows_as_text([("a", "1.5"), ("[b]", "10.25")], ("", "ms"), numbers=True)) == [
        "          ms",
        "  a      1.5",
        "  [b]  10.25",
    ]
