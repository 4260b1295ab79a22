"""The page in a real browser: what is drawn, what a reader can do, how it looks on a phone, in the dark, on paper."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.range_test.contents import contents_of
from engine.range_test.page import write_page
from engine.range_test.smoothing import smooth
from tests.browser import Browser, find_browser
from tests.records import KINDS, make_result, make_run

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="there is no Chromium; install it with `apt install chromium`"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


def path_of(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.html"
    return path if path.exists() else write_page(KINDS[kind](), path)


RATE = "figure[data-chart=rate]"
LINES = f"[...document.querySelectorAll('{RATE} path.line[data-line]')].map(p => [p.dataset.line, p.getAttribute('d')])"
TIP = f"{RATE} .tip"
WORDS = f"(e => e.hidden ? null : e.innerText)(document.querySelector('{TIP}'))"


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_draws_all_charts_without_an_error_or_a_request(kind: str, browser: Browser, folder: Path) -> None:
    page = browser.open(path_of(kind, folder), width=360, height=740)
    assert page.errors == page.requests == []
    drawn = page.run("[...document.querySelectorAll('figure')].map(f => f.querySelectorAll('.plot svg').length)")
    assert drawn and set(drawn) == {1}
    assert "NaN" not in page.run("[...document.querySelectorAll('.plot')].map(p => p.innerHTML).join()")
    assert page.run("document.documentElement.scrollWidth") == 360, "it scrolls sideways on a phone"
    for name in ("raw", "whole", "log"):
        page.run(f"document.getElementById('{name}').click()")
    page.resize(1200, 900)
    assert page.run("document.documentElement.scrollWidth") == 1200
    assert "NaN" not in page.run("[...document.querySelectorAll('.plot')].map(p => p.innerHTML).join()")
    assert page.errors == page.requests == []


def test_the_smoothing_slider_draws_other_lines_and_back(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder))
    assert page.run("document.getElementById('beta').textContent") == "0.80"
    before = page.run(LINES)
    page.run("document.getElementById('smoothing').focus()")
    page.press("End")
    assert page.run("document.getElementById('beta').textContent") == "0.99"
    after = page.run(LINES)
    assert [name for name, _ in after] == [name for name, _ in before] == ["rate 5", "rate 50", "rate 500"]
    assert all(one != other for (_, one), (_, other) in zip(before, after))
    for _ in range(19):
        page.press("ArrowLeft")
    assert page.run(LINES) == before


@pytest.mark.parametrize("beta", [0.0, 0.8, 0.98])
def test_a_line_is_smoothed_as_the_analysis_smooths(beta: float, browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("one", folder))
    losses = [*make_run(50).losses, math.nan, 3.0, math.inf, 1.0]
    given = json.dumps([loss if math.isfinite(loss) else str(loss) for loss in losses])
    assert page.run(f"smooth({given}, {beta})") == pytest.approx(smooth(losses, beta), rel=1e-12)


def test_a_click_on_a_name_hides_its_run_in_every_chart_and_shows_it_again(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder))
    key = f"{RATE} .legend button[data-label='rate 50']"
    pressed = f"""document.querySelector("{key}").getAttribute('aria-pressed')"""
    drawn = "document.querySelectorAll('path.line[data-line=\"rate 50\"]').length"
    assert (page.run(pressed), page.run(drawn)) == ("true", 3)
    page.click(key)
    assert (page.run(pressed), page.run(drawn)) == ("false", 0)
    page.click(key)
    assert (page.run(pressed), page.run(drawn)) == ("true", 3)


def test_all_runs_may_be_hidden(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("tuning", folder))
    page.run("[...new Set([...document.querySelectorAll('.legend button')].map(b => b.dataset.label))]"
             ".forEach(n => document.querySelector(`.legend button[data-label='${n}']`).click())")  # fmt: skip
    assert page.errors == []
    assert page.run("document.querySelectorAll('path.line[data-line]').length") == 0
    assert "nothing to draw" in page.run(f"document.querySelector('{RATE}').textContent")


def test_pointing_at_a_curve_reads_it_out(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder))
    assert page.run(WORDS) is None
    x, y = page.middle(f"{RATE} svg")
    page.move(x, y)
    words = page.run(WORDS)
    assert re.fullmatch(r"rate \d+\nupdate \d+\nLR [\d.e-]+\nloss [\d.]+\nsmoothed [\d.]+", words)
    page.move(2, 2)
    assert page.run(WORDS) is None


def test_a_finger_reads_a_curve_out_and_the_words_stay(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder), width=360, height=740)
    x, y = page.middle(f"{RATE} svg")
    page.touch(x, y)
    assert "update" in page.run(WORDS)
    edges = page.run(f"(b => [b.left, b.right])(document.querySelector('{TIP}').getBoundingClientRect())")
    assert 0 <= edges[0] < edges[1] <= 360


def test_the_keyboard_reads_the_points_one_by_one_aloud(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder))
    spoken = "document.getElementById('spoken').textContent"
    page.run(f"document.querySelector('{RATE} svg').focus()")
    first = make_run(5, validated=True)
    page.press("ArrowRight")
    said = page.run(spoken)
    assert said.startswith("rate 5, update 0, LR 1e-4, loss ")
    assert said.endswith(", skipped: the loss scale was too high")
    assert f"{first.losses[0]:.4g}" in said
    page.press("ArrowRight")
    assert page.run(spoken).startswith("rate 5, update 1, LR 2e-4, ")
    page.press("ArrowDown")
    assert page.run(spoken).startswith("rate 50, update 1, ")
    page.press("End")
    assert page.run(spoken).startswith("rate 50, update 99, ")
    assert page.run(WORDS).startswith("rate 50\nupdate 99\n")
    page.press("Escape")
    assert page.run(WORDS) is None


def test_a_value_that_is_not_finite_is_read_out_as_it_is(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("nan", folder))
    page.run(f"document.querySelector('{RATE} svg').focus()")
    page.press("End")
    assert ", loss -inf, smoothed " in page.run("document.getElementById('spoken').textContent")


def test_rules_are_drawn_and_named_until_they_are_switched_off(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder))
    names = (
        f"[...document.querySelectorAll('{RATE} svg text.name, {RATE} svg text.ours-name')].map(e => e.firstChild.data)"
    )
    assert sorted(page.run(names)) == ["minimum / 10", "redline", "steepest", "valley"]
    page.click("#marks")
    assert page.run(names) == []


def test_no_two_names_of_rules_overlap_on_a_phone(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder), width=360, height=740)
    boxes = page.run(
        f"[...document.querySelectorAll('{RATE} svg text.name, {RATE} svg text.ours-name')]"
        ".map(e => { const b = e.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; })"
    )
    assert len(boxes) == 4
    for index, (left, right, top, bottom) in enumerate(boxes):
        assert left >= 0 and right <= 360
        for a, b, c, d in boxes[:index]:
            assert right <= a or b <= left or bottom <= c + 3 or d <= top + 3


def test_divergence_skipped_updates_and_the_suggestion_are_marked(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder))
    titles = page.run(f"[...document.querySelectorAll('{RATE} svg title')].map(e => e.textContent)")
    assert any(re.fullmatch(r"rate 500 diverged at update \d+, LR [\d.]+", title) for title in titles)
    assert "rate 5: update 7 was skipped" in titles
    assert page.run(f"document.querySelectorAll('{RATE} rect.span').length") == 1


def test_seeds_are_one_line_with_a_band_and_trials_have_a_winner(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("tuning", folder))
    assert page.run(f"document.querySelectorAll('{RATE} path.area').length") == 2
    assert page.run("document.querySelector('[data-chart=trials] path.best').dataset.line") == "OneCycle to 0.03"
    assert page.run("document.querySelectorAll('[data-chart=batch] path.points').length") == 2
    page.run(f"document.querySelector('{RATE} svg').focus()")
    page.press("End")
    assert page.run("document.getElementById('spoken').textContent").endswith(", 3 runs)")


def test_the_config_is_copied_with_a_clipboard_and_without(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("one", folder))
    page.run("document.addEventListener('copy', () => { window.taken = String(getSelection()); })")
    page.run("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.click("#copy")
    assert page.run("document.getElementById('copied').textContent") == "copied"
    config = KINDS["one"]().config
    assert json.loads(page.run("window.taken")) == json.loads(page.run("document.getElementById('json').textContent"))
    assert json.loads(page.run("window.taken")) == config
    page.run("Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined});"
             "document.execCommand = () => false")  # fmt: skip
    page.click("#copy")
    assert page.run("document.getElementById('copied').textContent") == "selected: press Ctrl+C"


def test_what_a_user_wrote_is_not_run(browser: Browser, folder: Path) -> None:
    nasty = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"
    contents = replace(contents_of(make_result(make_run(50, name=nasty), _note=nasty)), title=nasty)
    page = browser.open(write_page(contents, folder / "nasty.html"))
    x, y = page.middle(f"{RATE} svg")
    page.move(x, y)
    assert page.run(WORDS).startswith(nasty)
    assert page.run("window.hacked") is None
    assert page.run("document.title") == nasty
    assert page.errors == page.requests == []


def test_the_dark_scheme_is_dark_and_paper_is_white(browser: Browser, folder: Path) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page = browser.open(path_of("several", folder), dark=True)
    assert page.run(ground) == "rgb(18, 22, 28)"
    page.send("Emulation.setEmulatedMedia", media="print",
              features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    assert page.run(ground) == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.getElementById('controls')).display") == "none"
    assert browser.open(path_of("several", folder)).run(ground) == "rgb(246, 247, 249)"


def test_it_prints_on_a_few_pages_and_is_as_it_was_afterwards(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder), width=900)
    before = page.run(LINES)
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
    assert page.run(LINES) == before


def test_without_javascript_the_numbers_and_a_drawing_are_there(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("several", folder), script=False)
    page.send("Emulation.setScriptExecutionDisabled", value=False)  # for this test's own questions
    assert page.run("getComputedStyle(document.querySelector('.charts')).display") == "none"
    assert page.run("document.getElementById('controls').hidden") is True
    assert page.run("document.querySelectorAll('noscript polyline').length") == 3
    assert "cycle_max_lr" in page.run("document.body.innerText")


def test_everything_that_can_be_used_has_a_name_and_can_be_reached(browser: Browser, folder: Path) -> None:
    page = browser.open(path_of("tuning", folder))
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in tree:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value")
        if role in ("button", "slider", "checkbox", "application", "link", "table", "region"):
            assert name, f"a {role} has no name"
            roles.setdefault(role, []).append(name)
    assert {"button", "slider", "checkbox", "application", "link", "table", "region"} == set(roles)
    assert any(name.startswith("Training loss against the learning rate, for rate 5") for name in roles["application"])
    for _ in range(3):
        page.press("Tab")
    assert page.run("document.activeElement.id") == "raw"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
