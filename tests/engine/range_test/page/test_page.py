"""The page as a text: whole without JavaScript, closed to what users write, small, and alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from engine.range_test.contents import Contents, contents_of
from engine.range_test.page import render_page, write_page
from engine.range_test.page.data import data_of
from engine.range_test.page.page import embedded
from tests.records import KINDS, make_result, make_run, tuning

VOID = {"meta", "link", "input", "br"}
NASTY = '</script><img src=x onerror="alert(1)"> & {{data}} \\u003c <!-- \u2028'


class Reader(HTMLParser):
    """Elements and text; an element that is not closed in its turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
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


def data_in(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_record_makes_a_well_formed_page(kind: str) -> None:
    contents: Contents = KINDS[kind]()
    page = render_page(contents)
    reader = Reader(page)
    assert [attributes["lang"] for tag, attributes in reader.seen if tag == "html"] == ["en"]
    assert sum(tag == "h1" for tag, _ in reader.seen) == sum(tag == "main" for tag, _ in reader.seen) == 1
    assert contents.title in reader.text
    assert [group["label"] for group in data_in(page)["groups"]] or not contents.curves
    assert not re.search(r"\{\{\w+\}\}", page)


def test_a_page_asks_for_nothing_and_forbids_that_it_does() -> None:
    page = render_page(tuning())
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    for tag, attributes in Reader(page).seen:
        assert "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"


def test_what_a_user_wrote_is_text_and_nothing_else() -> None:
    curve = make_run(50, name=NASTY, settings=((NASTY, 1.0),))
    plain = make_run(5)
    contents = replace(contents_of(make_result(curve, plain, _note=NASTY)), title=NASTY, left_out=(NASTY,))
    page = render_page(replace(contents, facts=((NASTY, NASTY),), config_name=f"{NASTY}.json"))
    reader = Reader(page)
    assert "img" not in [tag for tag, _ in reader.seen]
    assert sum(tag == "script" for tag, _ in reader.seen) == 2
    assert {group["label"] for group in data_in(page)["groups"]} == {NASTY, "rate 5"}
    assert "onerror" in reader.text


def test_embedded_json_ends_no_script_and_comes_back_as_it_was() -> None:
    value = {"a": "</script><!--", "b": ["&amp;", "\u2028"]}
    assert not set("<>&\u2028") & set(embedded(value))
    assert json.loads(embedded(value)) == value


def test_numbers_that_json_does_not_know_come_as_words() -> None:
    curve = replace(make_run(5, updates=4), losses=(1.0, math.nan, math.inf, -math.inf), validation=((0, math.nan),))
    run = data_of(contents_of(make_result(curve)))["groups"][0]["runs"][0]
    assert run["losses"] == [1.0, "nan", "inf", "-inf"]
    assert run["validation"] == [[0, "nan"]]


def test_numbers_stand_in_tables_for_a_reader_without_javascript() -> None:
    text = Reader(render_page(tuning())).text
    for words in ("Suggested 1Cycle", "cycle_max_lr", "steepest 0.008", "last stable no answer No test diverged."):
        assert words in text
    assert "OneCycle to 0.03 OneCycle 0.03 100 0.35 winner" in text
    assert "fixed 0.1 fixed 0.1 100 diverged" in text
    assert "What was left out The fast test was left out: the budget was 18 updates." in text
    assert '"type": "OneCycle"' in text


def test_a_refusal_stands_where_the_suggestion_would() -> None:
    reader = Reader(render_page(KINDS["flat"]()))
    assert "No suggestion The loss does not fall by more than its batch noise" in reader.text
    assert "What to do. Let the test end higher" in reader.text
    assert "config" not in [attributes.get("id") for _, attributes in reader.seen]


def test_a_long_run_is_thinned_out_and_the_page_says_so() -> None:
    page = render_page(KINDS["long"]())
    runs = [group["runs"][0] for group in data_in(page)["groups"]]
    assert [(len(run["losses"]), run["every"], run["updates"]) for run in runs] == [(1667, 3, 5001), (1999, 1, 1999)]
    assert "Drawn are 2,000 points at most of a run; thinned out: rate 0.01." in Reader(page).text


def test_steps_that_do_not_count_from_0_are_kept() -> None:
    curve = replace(make_run(5, updates=3), steps=(2, 4, 7))
    run = data_of(contents_of(make_result(curve)))["groups"][0]["runs"][0]
    assert run["steps"] == [2, 4, 7]
    assert "every" not in run


def test_ten_runs_of_a_thousand_updates_take_less_than_300_kb(tmp_path: Path) -> None:
    contents = contents_of(make_result(*(make_run(rate, updates=1000, best=99.0) for rate in range(1, 11))))
    assert 100_000 < write_page(contents, tmp_path / "new" / "report.html").stat().st_size < 300_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_looks_begin_anew_in_each_panel_and_a_baseline_is_grey() -> None:
    groups = data_of(tuning())["groups"]
    assert [(group["panel"], group["look"], len(group["runs"])) for group in groups] == [
        ("", 0, 3),
        ("", 1, 3),
        ("batch size", 0, 3),
        ("weight_decay", 0, 3),
        ("batch size", 1, 1),
        ("batch size", 2, 1),
        ("weight_decay", 1, 1),
        ("weight_decay", 2, 1),
        ("weight_decay", 3, 1),
    ]
    looks = [group["look"] for group in data_of(KINDS["several"]())["groups"]]
    assert looks == [-1, 0, 1, 2]
    assert [trial["look"] for trial in data_of(tuning())["trials"]] == [0, 1, 2]
