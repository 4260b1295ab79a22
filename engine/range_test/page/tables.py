"""The words and tables of the page, each with what a user wrote escaped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from engine.range_test.contents import Contents, groups_of
from engine.range_test.curve import Curve
from engine.range_test.page.data import MAX_POINTS, thinning
from engine.range_test.smoothing import smooth
from engine.range_test.suggestion import Refusal, Suggestion

__all__ = ["answer", "charts", "facts", "tables"]


def facts(contents: Contents) -> str:
    """What was measured with."""
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in contents.facts)


def answer(contents: Contents) -> str:
    """The suggestion, each number with its reason; or why there is none and what to do."""
    found = contents.answer
    notes = _list("Before you trust it", found.notes) + _list("What was left out", contents.left_out)
    if isinstance(found, Refusal):
        return (
            '<section class="answer refused" aria-labelledby="answer"><h2 id="answer">No suggestion</h2>'
            f'<p class="lead">{escape(found.reason)}</p><p><strong>What to do.</strong> {escape(found.remedy)}</p>'
            f"{notes}</section>"
        )
    rows = [
        (f"<code>{escape(key)}</code>", f"<b>{_short(value)}</b>", escape(found.reasons.get(key, "")))
        for key, value in found.params().items()
    ]
    return (
        '<section class="answer" aria-labelledby="answer"><h2 id="answer">Suggested 1Cycle</h2>'
        f'<p class="lead">From <b>{_short(found.cycle_min_lr)}</b> up to <b>{_short(found.cycle_max_lr)}</b> and back '
        f"in {contents.train_steps:,} updates{_beside(found)}</p>"
        f"{_table(('key', 'value', 'where it comes from'), rows, 'The suggested schedule', 'reasons')}{notes}</section>"
    )


def _list(title: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<h3>{title}</h3><ul class="notes">{items}</ul>' if items else ""


def _beside(found: Suggestion) -> str:
    """What else is known of the maximum."""
    return (
        f". The best maximum lies probably between {_short(found.low_lr)} and {_short(found.high_lr)}. "
        f"As a linear decay: start at <b>{_short(found.cycle_max_lr)}</b>."
    )


def charts(contents: Contents) -> str:
    """A place for each chart, with its heading and what it shows."""
    yellow = " Yellow: the suggested 1Cycle." if isinstance(contents.answer, Suggestion) else ""
    kind = "Validation" if any(curve.validation for curve in contents.curves) else "Training"
    halves = [
        ("loss", f"{kind} loss by update", "", ""),
        ("schedule", "Learning rate by update", "A cross: diverged there.", ""),
    ]
    if len(contents.batches) > 1:
        halves.append(("batch", "Boundaries by batch size", "The suggested maximum and minimum.", ""))
    for panel in dict.fromkeys(group.panel for group in groups_of(contents.curves, contents.train_batch_size)):
        if panel:
            halves.append(("panel", f"Loss by learning rate, by {panel.replace('_', ' ')}", "", panel))
    places = [_place("rate", "Loss by learning rate", f"Line: smoothed; dots: as measured.{yellow}")]
    for index, (chart, title, text, panel) in enumerate(halves):
        alone = index == len(halves) - 1 and index % 2 == 0
        places.append(_place(chart, title, text, "" if alone else "half", panel))
    if contents.search:
        text = "How far the loss of short trainings came; the line: the peak for the whole training."
        places.append(_place("search", "Search for the peak", text))
    if contents.trials:
        kind = "Validation" if any(trial.curve.validation for trial in contents.trials) else "Training"
        places.append(_place("trials", f"{kind} loss of the trials", "The widest line: the winner."))
    return "".join(places)


def _place(chart: str, title: str, text: str, size: str = "", panel: str = "") -> str:
    return (
        f'<figure class="{size}" data-chart="{chart}" data-panel="{escape(panel)}">'
        f'<figcaption><h3>{escape(title)}</h3><p>{escape(text)}</p></figcaption><div class="plot"></div>'
        '<div class="legend" role="group" aria-label="Runs to show"></div></figure>'
    )


def tables(contents: Contents) -> str:
    """What the charts show, as numbers."""
    parts = (_marks, _search, _trials, _batches, _config, _runs)
    return "".join(part(contents) for part in parts)


def _marks(contents: Contents) -> str:
    if not contents.marks:
        return ""
    rows = [
        (escape(mark.rule), "no answer" if mark.lr is None else f"<b>{_short(mark.lr)}</b>", escape(mark.why))
        for mark in contents.marks
    ]
    return _section(
        "rules", "What each rule says", _table(("rule", "LR", "why"), rows, "The rules' answers", "reasons")
    )


def _trials(contents: Contents) -> str:
    if not contents.trials:
        return ""
    rows = []
    for index, trial in enumerate(contents.trials):
        best = index == contents.winner
        end = "diverged" if trial.diverged else _short(trial.loss)
        star = '<span class="winner">winner</span>' if best else ""
        cells = (trial.curve.name, trial.schedule, _short(trial.lr), f"{len(trial.curve.steps):,}")
        rows.append((*map(escape, cells), f"<b>{end}</b> {star}" if best else end))
    head = ("trial", "schedule", "peak LR", "updates", "final loss")
    return _section("trials", "Trials", _table(head, rows, "Final losses of the trials"))


def _search(contents: Contents) -> str:
    if not contents.search:
        return ""
    validated = any(trial.curve.validation for trial, _ in contents.search)
    lowest = min(came for _, came in contents.search)
    rows = []
    for trial, came in sorted(contents.search, key=lambda each: each[0].lr):
        told = "diverged" if trial.diverged else f"{came:+.4g}"
        best = came == lowest and came < 0
        rows.append((_short(trial.lr), f"{len(trial.curve.steps):,}", f"<b>{told}</b>" if best else told))
    last = f"{'validation' if validated else 'later training'} loss, from the start"
    head = ("peak LR", "updates", last)
    return _section("search", "Search for the peak", _table(head, rows, "Short trainings, by their peak"))


def _batches(contents: Contents) -> str:
    rows = []
    for size, found in contents.batches:
        if isinstance(found, Suggestion):
            rows.append((f"{size:,}", _short(found.cycle_min_lr), f"<b>{_short(found.cycle_max_lr)}</b>"))
        else:
            rows.append((f"{size:,}", "none", escape(found.reason)))
    head = ("batch size", "minimum", "maximum")
    return _section("batches", "By batch size", _table(head, rows, "Boundaries by batch size")) if rows else ""


def _config(contents: Contents) -> str:
    if contents.config is None:
        return ""
    text = json.dumps(contents.config, indent=2, ensure_ascii=False)
    link = base64.b64encode((text + "\n").encode()).decode()
    name = escape(contents.config_name)
    return _section(
        "config",
        "The config to train with",
        '<div class="buttons"><button type="button" id="copy" hidden>Copy</button>'
        f'<a class="button" download="{name}" href="data:application/json;base64,{link}">Save {name}</a>'
        '<span id="copied" role="status"></span></div>'
        f'<pre tabindex="0" id="json" aria-label="The config">{escape(text)}</pre>',
    )


def _runs(contents: Contents) -> str:
    rows = [tuple(_run(curve)) for curve in contents.curves]
    if not rows:
        return ""
    head = ("run", "updates", "learning rate", "first loss", "lowest, smoothed", "at LR", "diverged at LR", "skipped")
    thinned = [curve.name for curve in contents.curves if thinning(curve) > 1]
    said = f"<p>Drawn are {MAX_POINTS:,} points at most of a run; thinned out: {escape(', '.join(thinned))}.</p>"
    return _section("runs", "The runs in numbers", _table(head, rows, "The runs") + (said if thinned else ""))


def _run(curve: Curve) -> Iterator[str]:
    yield escape(curve.name)
    yield f"{len(curve.steps):,}"
    low, high = (min(curve.lrs), max(curve.lrs)) if curve.lrs else (math.nan, math.nan)
    yield _short(low) if low == high else f"{_short(low)} to {_short(high)}"
    yield _short(curve.losses[0]) if curve.losses else ""
    smoothed = [(loss, lr) for loss, lr in zip(smooth(curve.losses), curve.lrs) if math.isfinite(loss)]
    best = min(smoothed, default=None)
    yield from ("", "") if best is None else (_short(best[0]), _short(best[1]))
    end = curve.diverged_at if curve.is_test else None
    yield "" if end is None else _short(curve.lrs[end])
    yield str(len(curve.skipped) or "")


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}-section" aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table; cells are HTML. On a phone each row stands alone, its cells named by `data-head`."""
    first = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{row[0]}</th>'
        + "".join(f'<td data-head="{escape(name)}">{cell}</td>' for name, cell in zip(head[1:], row[1:]))
        + "</tr>"
        for row in rows
    )
    return (
        f'<table class="{kind}"><caption class="hidden">{caption}</caption>'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
    )


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
