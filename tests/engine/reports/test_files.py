"""The folder of a report and the lines that summarize it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from redline.reports import write_report
from tests.records import make_result, make_run


def test_a_folder_has_the_record_the_page_the_picture_and_the_config(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = write_report(make_result(make_run(50)), tmp_path / "out")
    assert text.splitlines()[0].startswith("Suggested OneCycle for 1000 steps")
    assert text.splitlines()[-1] == (
        f"Written to {tmp_path / 'out'}: range_test.json, range_test.csv, one_cycle.json, report.html, range_test.png"
    )
    refused = write_report(make_result(make_run(None)), tmp_path)
    assert refused.startswith("No suggestion. ")
    assert refused.endswith(": range_test.json, range_test.csv, report.html, range_test.png")


def test_without_matplotlib_all_but_the_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    *_, why, files = write_report(make_result(make_run(50)), tmp_path).splitlines()
    assert why == "No picture: a picture needs matplotlib; install it with `pip install 'redline[plot]'`."
    assert files.endswith(": range_test.json, range_test.csv, one_cycle.json, report.html")
