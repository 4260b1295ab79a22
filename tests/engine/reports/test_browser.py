"""The page in a real browser: what is drawn, what a reader can do, how it looks on a phone, in the dark, on paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redline.reports import report_of
from redline.reports.html import write_page
from tests.browser import Browser, Page, find_browser
from tests.records import KINDS, make_result, make_run

pytest.importorskip("plotly", reason="the extra `report` is not installed")
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="there is no Chromium; install it with `apt install chromium`"
)

RATE = "figure[data-panel=rate]"
PLOT = f"document.querySelector('{RATE} .plot')"
SPOKEN = "document.getElementById('spoken').textContent"
HOVER = f"[...document.querySelectorAll('{RATE} .hoverlayer tspan.line')].map(e => e.textContent)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    pages = []

    def open_page(kind: str, **options: Any) -> Page:
        pages.append(browser.open(write_page(KINDS[kind](), tmp_path / f"{kind}.html"), **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


def drawn(page: Page, kind: str = "line") -> list[Any]:
    """Run and y of the traces of a kind that are shown in the chart by learning rate."""
    return list(page.run(f"{PLOT}.data.filter(t => t.visible && t.meta.kind === '{kind}').map(t => [t.meta.run, t.y])"))


@pytest.mark.parametrize("kind", ["several", "tuning", "flat", "only nan", "nothing", "one update", "long"])
def test_every_page_draws_all_charts_without_an_error_or_a_request(kind: str, open_page: Any) -> None:
    page = open_page(kind, width=360, height=740)
    assert page.errors == page.requests == []
    charts = page.run("[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('.main-svg').length)")
    assert charts and all(charts)
    assert page.run("document.documentElement.scrollWidth") == 360, "it scrolls sideways on a phone"
    for name in ("raw", "whole", "log"):
        page.run(f"document.getElementById('{name}').click()")
    page.resize(1200, 900)
    assert page.run("document.documentElement.scrollWidth") == 1200
    assert page.errors == page.requests == []


def test_the_slider_smooths_and_the_boxes_show_and_hide(open_page: Any) -> None:
    page = open_page("several")
    beta = "document.getElementById('beta').textContent"
    before = drawn(page)
    assert (page.run(beta), [name for name, _ in before]) == ("0.80", ["rate 5", "rate 50", "rate 500"])
    page.run("document.getElementById('smoothing').focus()")
    page.press("End")
    assert page.run(beta) == "0.98"
    assert all(one != other for one, other in zip(before, drawn(page)))
    for _ in range(3):
        page.press("ArrowLeft")
    assert drawn(page) == before
    notes = f"{PLOT}.layout.annotations.length"
    assert (len(drawn(page, "raw")), page.run(notes)) == (3, 4)
    page.click("#raw")
    page.click("#rules")
    assert (len(drawn(page, "raw")), page.run(notes)) == (0, 0)
    _, high = page.run(f"{PLOT}.layout.yaxis.range")
    page.click("#whole")
    assert page.run(f"{PLOT}.layout.yaxis.range[1]") > high
    page.click("#whole")
    page.click("#log")
    assert page.run(f"{PLOT}.layout.yaxis.type") == "log"


def test_a_click_on_a_name_hides_its_run_in_every_chart_and_shows_it_again(open_page: Any) -> None:
    page = open_page("several")
    key = f"{RATE} .legend button[data-run='rate 50']"
    count = (
        "[...document.querySelectorAll('.plot')].map(p => p.data.filter("
        "t => t.visible && t.meta.kind === 'line' && t.meta.run === 'rate 50').length).join()"
    )
    for pressed, counts in (("true", "1,1,1"), ("false", "0,0,0"), ("true", "1,1,1")):
        assert page.run(f"""document.querySelector("{key}").getAttribute('aria-pressed')""") == pressed
        assert page.run(count) == counts
        page.click(key)


def test_pointing_at_a_curve_reads_it_out(open_page: Any) -> None:
    page = open_page("several")
    x, y = page.middle(f"{RATE} .plot")
    page.move(x, y)
    words = page.run(f"new Promise(done => (function look() {{ const words = {HOVER};"
                     "words.length ? done(words) : requestAnimationFrame(look); })())")  # fmt: skip
    assert re.fullmatch(r"rate \d+", words[0])
    assert [word.split()[0] for word in words[1:]] == ["step", "LR", "loss", "smoothed"]


def test_the_keyboard_reads_the_points_one_by_one_aloud(open_page: Any) -> None:
    page = open_page("several")
    page.run(f"{PLOT}.focus()")
    first = make_run(5, validated=True)
    page.press("ArrowRight")
    assert page.run(SPOKEN).startswith(f"rate 5, step 0, LR 0.0001, loss {first.losses[0]:.4g}, smoothed")
    page.press("ArrowRight")
    assert page.run(SPOKEN).startswith("rate 5, step 1, LR 0.0002, ")
    page.press("ArrowDown")
    assert page.run(SPOKEN).startswith("rate 50, step 1, ")
    page.press("End")
    assert page.run(SPOKEN).startswith("rate 50, step 99, ")
    page.press("Escape")
    assert page.run(HOVER) == []


def test_divergence_skipped_steps_the_suggestion_seeds_and_the_winner_are_marked(open_page: Any) -> None:
    page = open_page("several")
    signs = page.run(f"{PLOT}.data.filter(t => t.meta.kind === 'sign').map(t => t.text)")
    assert any(re.fullmatch(r"rate 500: diverged at step \d+, LR [\d.]+", sign or "") for sign in signs)
    assert "rate 5: step 7 was skipped: the loss scale was too high" in signs
    assert page.run(f"{PLOT}.layout.shapes.filter(s => s.type === 'rect').length") == 1
    label = "[...document.querySelectorAll('.annotation tspan')].find((each) => each.textContent === 'redline')"
    assert page.run(f"getComputedStyle({label}).fill") == "rgb(200, 16, 46)", "red among the gray names of other rules"
    page = open_page("tuning")
    assert len(drawn(page, "band")) == 2
    widths = page.run("document.querySelector('[data-panel=trials] .plot').data.map(t => [t.meta.run, t.line?.width])")
    assert max((width, run) for run, width in widths if width)[1] == "OneCycle to 0.03"


def test_the_config_is_copied_with_a_clipboard_and_without(open_page: Any) -> None:
    page = open_page("one")
    page.run("document.addEventListener('copy', () => { window.taken = String(getSelection()); })")
    page.run("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.click("#copy")
    assert page.run("document.getElementById('copied').textContent") == "copied"
    assert json.loads(page.run("window.taken")) == KINDS["one"]().config
    page.run("document.execCommand = () => false")
    page.click("#copy")
    assert page.run("document.getElementById('copied').textContent") == "selected: press Ctrl+C"


def test_what_a_user_wrote_is_not_run(browser: Browser, tmp_path: Path) -> None:
    nasty = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"
    report = replace(report_of(make_result(make_run(50, name=nasty), _note=nasty)), title=nasty)
    page = browser.open(write_page(report, tmp_path / "nasty.html"))
    page.run(f"{PLOT}.focus()")
    page.press("ArrowRight")
    assert page.run("window.hacked") is None
    assert page.run("document.title") == nasty
    assert page.errors == page.requests == []


def test_the_dark_scheme_is_dark_and_paper_is_white(open_page: Any) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page = open_page("several", dark=True)
    assert page.run(ground) == "rgb(18, 22, 28)"
    page.send("Emulation.setEmulatedMedia", media="print",
              features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    assert page.run(ground) == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.getElementById('controls')).display") == "none"


def test_it_prints_on_a_few_pages_and_is_the_same_afterwards(open_page: Any) -> None:
    page = open_page("several", width=900)
    width = f"{PLOT}.querySelector('.main-svg').clientWidth"
    before = page.run(width)
    page.run("addEventListener('beforeprint', () => { window.onPaper = " + width + "; })")
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
    assert (page.run("window.onPaper"), page.run(width)) == (690, before)


def test_without_javascript_the_numbers_and_the_picture_are_there(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    path = write_page(KINDS["several"](), tmp_path / "a.html", picture=tmp_path / "a.png")
    page = browser.open(path, script=False)
    page.send("Emulation.setScriptExecutionDisabled", value=False)  # for this test's own questions
    assert page.run("getComputedStyle(document.querySelector('.charts')).display") == "none"
    assert page.run("document.getElementById('controls').hidden") is True
    assert page.run("document.querySelectorAll('noscript img').length") == 1
    assert "cycle_max_lr" in page.run("document.body.innerText")


def test_everything_that_can_be_used_has_a_name_and_can_be_reached(open_page: Any) -> None:
    page = open_page("tuning")
    roles: dict[str, list[str]] = {}
    for node in page.send("Accessibility.getFullAXTree")["nodes"]:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value")
        if role in ("button", "slider", "checkbox", "application", "link", "table", "region"):
            assert name, f"a {role} has no name"
            roles.setdefault(role, []).append(name)
    assert {"button", "slider", "checkbox", "application", "link", "table", "region"} == set(roles)
    assert any(name.startswith("Training loss by learning rate, for rate 5") for name in roles["application"])
    for _ in range(3):
        page.press("Tab")
    assert page.run("document.activeElement.id") == "raw"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
