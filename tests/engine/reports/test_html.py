"""The page as a text: complete without JavaScript, safe from what users write, and alone."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from redline.reports import report_of
from redline.reports.html import REMEDY, _embedded, charts_as_json, render_page, write_page
from redline.reports.model import Report
from tests.records import KINDS, make_result, make_run, tuning

VOID = {"meta", "link", "input", "br", "img"}
NASTY = '</script><b onerror="alert(1)"> & {{data}} \\u003c <!-- \u2028'
PLOTLY = re.compile(r"<script>/\*\*\n\* plotly\.js.*?</script>", re.DOTALL)


class Reader(HTMLParser):
    """Elements and text; an element that is not closed in its turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(PLOTLY.sub("", text))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "long"])
def test_every_kind_of_record_makes_a_well_formed_page(kind: str) -> None:
    report: Report = KINDS[kind]()
    page = render_page(report)
    reader = Reader(page)
    assert [attributes["lang"] for tag, attributes in reader.seen if tag == "html"] == ["en"]
    assert sum(tag == "h1" for tag, _ in reader.seen) == sum(tag == "main" for tag, _ in reader.seen) == 1
    assert report.title in reader.text
    assert not re.search(r"\{\{\w+\}\}", PLOTLY.sub("", page))
    json.dumps(charts_as_json(report), allow_nan=False)


def test_a_page_asks_for_nothing_and_forbids_that_it_does() -> None:
    page = render_page(tuning(), b"png")
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"'<]+", PLOTLY.sub("", page))) == set()
    for tag, attributes in Reader(page).seen:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert tag != "link" or attributes["href"] == "data:,"


def test_what_a_user_wrote_is_text_and_nothing_else() -> None:
    curve = make_run(50, name=NASTY, settings=((NASTY, 1.0),))
    report = replace(report_of(make_result(curve, make_run(5), _note=NASTY)), title=NASTY, left_out=(NASTY,))
    page = render_page(replace(report, facts=((NASTY, NASTY),), config_name=f"{NASTY}.json"))
    reader = Reader(page)
    assert not any("onerror" in attributes for _, attributes in reader.seen)
    assert "onerror" in reader.text
    value = {"a": "</script><!--", "b": ["&amp;", "\u2028"]}
    assert not set("<>&\u2028") & set(_embedded(value)) and json.loads(_embedded(value)) == value


def test_numbers_are_in_tables_for_a_reader_without_javascript() -> None:
    text = Reader(render_page(tuning())).text
    for words in ("Suggested 1Cycle", "cycle_max_lr", "steepest 0.008", "last stable no answer No test diverged."):
        assert words in text
    assert "OneCycle to 0.03 OneCycle 0.03 100 0.35 winner" in text
    assert "fixed 0.1 fixed 0.1 100 diverged" in text
    assert "What was left out The fast test was left out: the budget was 18 updates." in text
    assert '"type": "OneCycle"' in text


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0.02}},
            "Suggested linear decay From 0.02 down to zero in",
        ),
        (
            {"type": "WSD", "params": {"peak_lr": 0.02}},
            "Suggested WSD With a peak of 0.02 in 1,000 steps. The suggested schedule",
        ),
        (None, "The config's own schedule With its learning rate: 0.02 in 1,000 steps. The suggested schedule"),
    ],
)
def test_the_headline_is_what_the_config_has(scheduler: Any, words: str) -> None:
    tune = {"lr": 0.02, "schedule": scheduler["type"] if scheduler else "own"}
    config = {"scheduler": scheduler, "_tune": tune, "_range_test": {"reasons": {"lr": "A reason."}}}
    page = render_page(replace(tuning(), config=config))
    assert words in Reader(page).text and "lr 0.02" in Reader(page).text and "1Cycle" not in PLOTLY.sub("", page)


def test_a_refusal_is_where_the_suggestion_would_be() -> None:
    reader = Reader(render_page(KINDS["flat"]()))
    assert "No suggestion The loss does not fall by more than its batch noise" in reader.text
    assert "What to do. Let the test end higher" in reader.text
    assert "json" not in [attributes.get("id") for _, attributes in reader.seen]


def test_without_plotly_there_are_the_picture_and_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    (tmp_path / "a.png").write_bytes(b"png")
    path = write_page(tuning(), tmp_path / "new" / "report.html", picture=tmp_path / "a.png")
    assert [each.name for each in path.parent.iterdir()] == ["report.html"] and path.stat().st_size < 60_000
    reader = Reader(path.read_text())
    assert [attributes["src"] for tag, attributes in reader.seen if tag == "img"] == ["data:image/png;base64,cG5n"]
    assert "noscript" not in [tag for tag, _ in reader.seen[-80:]]
    assert REMEDY in reader.text and "cycle_max_lr" in reader.text


# -- the charts' numbers -------------------------------------------------------------------------------


def lines_of(report: Report, kind: str = "line") -> list[dict[str, Any]]:
    return [trace for trace in charts_as_json(report)["charts"][0]["data"] if trace["meta"]["kind"] == kind]


def test_a_long_run_is_thinned_and_the_page_tells() -> None:
    pytest.importorskip("plotly", reason="the extra `report` is not installed")
    report = KINDS["long"]()
    assert [len(line["x"]) for line in lines_of(report)] == [1667, 1999]
    text = Reader(render_page(report)).text
    assert "At most 2,000 points of a run are drawn; thinned: rate 0.01." in text


def test_numbers_that_are_not_finite_are_gaps() -> None:
    curve = replace(make_run(5, updates=4), losses=(1.0, math.nan, math.inf, -math.inf))
    report = report_of(make_result(curve))
    (raw,), (line,) = lines_of(report, "raw"), lines_of(report)
    assert raw["y"] == [1.0, None, None, None]
    assert line["y"] == [1.0] * 4, "smoothed"


def test_each_position_of_the_slider_has_the_lines_of_its_smoothing() -> None:
    report = replace(KINDS["several"](), beta=0.6)
    value = charts_as_json(report)
    assert value["betas"][value["start"]] == 0.6
    chart = value["charts"][0]
    for beta, smoothed in zip(value["betas"], chart["smoothed"]):
        expected = charts_as_json(replace(report, beta=beta))["charts"][0]["data"]
        kinds = [trace["meta"]["kind"] for trace in expected[: len(smoothed)]]
        assert smoothed == [
            None if kind == "raw" else trace["y"] for kind, trace in zip(kinds, expected[: len(smoothed)])
        ]
    assert value["charts"][1]["smoothed"] is None, "validation losses are not smoothed"


def test_rules_have_a_row_each_above_the_chart() -> None:
    layout = charts_as_json(KINDS["several"]())["charts"][0]["layout"]
    flags = {note["text"]: (10 ** note["x"], note["xanchor"], note["yshift"]) for note in layout["annotations"]}
    assert [name for name in flags] == ["minimum / 10", "steepest", "valley", "<b>redline</b>"]
    assert len({row for _, _, row in flags.values()}) == 4
    assert flags["<b>redline</b>"][:2] == (pytest.approx(3.2e-2), "right")
