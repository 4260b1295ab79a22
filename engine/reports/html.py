"""The page: one HTML file that needs no network, to be read in any browser, on a phone and on paper.

Words and tables are written here and need no JavaScript. Charts are drawn by plotly (the extra `report`), whose script
is embedded; without it, and without JavaScript, the picture takes their place.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from redline.errors import RangeTestError
from redline.range_test.curve import Curve, smooth
from redline.range_test.result import write_text
from redline.range_test.suggest import Refusal, Suggestion
from redline.reports.figure import picture_of
from redline.reports.model import OWN_RULE, Line, Panel, Report, Trial, color_of, dash_of, panels_of

__all__ = ["PAGE_NAME", "REMEDY", "charts_as_json", "render_cell", "render_page", "write_page"]

PAGE_NAME = "report.html"
REMEDY = (
    "The charts of the page are a picture: install plotly for interactive ones with `pip install 'redline[report]'`"
)

HEADINGS = {
    "OneCycle": "Suggested 1Cycle", "WarmupDecayLR": "Suggested linear decay", "own": "The config's own schedule",
    "WarmupCosineLR": "Suggested cosine decay", "WarmupStableDecayLR": "Suggested warm-up, stable phase and decay",
}  # fmt: skip
WIDE = ("rate", "search", "trials")  # panels over the full width
BORDERS = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "double"}  # a dash in CSS
MAX_POINTS = 2000  # of a run; a longer one is thinned
BETAS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # the positions of the smoothing slider

HEIGHT, ROW = 330, 17  # pixels of the axes, and of the name of a rule above them
SPAN, EDGE, OWN, GRAY = "#F0E442", "#A08000", "#D7263D", "#808080"  # readable on a light and on a dark ground
CLEAR = "rgba(0,0,0,0)"
RULE = "rule"  # shapes and annotations that the page can hide

Json = dict[str, Any]


def write_page(report: Report, path: Path, *, picture: Path | None = None) -> Path:
    """Write the page, atomically; its folder is created.

    `picture` is a PNG of the same charts, for a reader without JavaScript; None for none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_page(report, b"" if picture is None else picture.read_bytes()))
    return path


def render_page(report: Report, picture: bytes = b"") -> str:
    """The page as HTML; `picture` is a PNG."""
    try:
        from plotly.offline import get_plotlyjs

        plotly = str(get_plotlyjs())
    except ImportError:
        plotly = ""
    image = ""
    if picture:
        source = base64.b64encode(picture).decode()
        image = f'<img class="picture" alt="The charts, as a picture" src="data:image/png;base64,{source}">'
    parts = {
        "title": escape(report.title),
        "facts": "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts),
        "answer": _answer(report),
        "picture": f"<noscript>{image}</noscript>" if plotly else image,
        "charts": "".join(map(_chart, panels_of(report))) + _thinned(report) if plotly else f"<p>{escape(REMEDY)}</p>",
        "tables": "".join(part(report) for part in (_rules, _trials, _batches, _config, _runs)),
        "plotly": plotly,
        "data": _embedded(charts_as_json(report)) if plotly else "null",
    }
    template = files("redline.reports").joinpath("page.html").read_text(encoding="utf-8")
    # In one pass: a user's text may look like a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def render_cell(report: Report) -> str:
    """The answer and the picture as HTML for a notebook, which has styles of its own."""
    try:
        source = base64.b64encode(picture_of(report)).decode()
        picture = (
            f'<img alt="The charts" style="max-width: 100%; background: #fff" src="data:image/png;base64,{source}">'
        )
    except RangeTestError as error:
        picture = f"<p>{escape(str(error))}</p>"
    facts = ", ".join(f"{escape(name)} {escape(value)}" for name, value in report.facts)
    return f"<p><b>{escape(report.title)}</b>: {facts}</p>{_answer(report)}{picture}"


def _embedded(value: object) -> str:
    """JSON for a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- words and tables; cells are HTML ------------------------------------------------------------------


def _answer(report: Report) -> str:
    """The suggestion, each number with its reason; or why there is none and what to do."""
    answer, config, notes = report.answer, report.config or {}, ""
    for title, sentences in (("Before you rely on it", answer.notes), ("What was left out", report.left_out)):
        if sentences:
            items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            notes += f'<h3>{title}</h3><ul class="notes">{items}</ul>'
    if isinstance(answer, Refusal):
        kind, heading = "answer refused", "No suggestion"
        words = f'<p class="lead">{escape(answer.reason)}</p>'
        words += f"<p><strong>What to do.</strong> {escape(answer.remedy)}</p>"
    else:
        kind, heading = "answer", HEADINGS.get(report.schedule, f"Suggested {report.schedule}")
        words = _lead(report, answer)
        params = config["scheduler"].get("params", {}) if config.get("scheduler") else {"lr": config["_tune"]["lr"]}
        reasons = config["_range_test"]["reasons"]
        rows = [
            (f"<code>{escape(key)}</code>", f"<b>{escape(_short(value))}</b>", escape(reasons.get(key, "")))
            for key, value in params.items()
        ]
        words += _table(("key", "value", "where it comes from"), rows, "The suggested schedule", "reasons")
    return f'<section class="{kind}" aria-labelledby="answer"><h2 id="answer">{heading}</h2>{words}{notes}</section>'


def _lead(report: Report, answer: Suggestion) -> str:
    """The schedule in a sentence."""
    low, steps = _short(answer.cycle_min_lr), f"in {report.train_steps:,} steps"
    high = _short((report.config or {}).get("_tune", {}).get("lr", answer.cycle_max_lr))
    words = {
        "OneCycle": f"From <b>{low}</b> up to <b>{high}</b> and back {steps}. A linear decay starts at <b>{high}</b>.",
        "WarmupDecayLR": f"From <b>{high}</b> down to zero {steps}, after a short warm-up.",
        "own": f"With its learning rate: <b>{high}</b> {steps}.",
    }
    return f'<p class="lead">{words.get(report.schedule, f"With a peak of <b>{high}</b> {steps}.")}</p>'


def _rules(report: Report) -> str:
    lrs = ["no answer" if mark.lr is None else f"<b>{_short(mark.lr)}</b>" for mark in report.marks]
    rows = [(escape(mark.rule), lr, escape(mark.why)) for mark, lr in zip(report.marks, lrs)]
    return _section("rules", "The answers of several rules", ("rule", "LR", "why"), rows, "reasons")


def _trials(report: Report) -> str:
    found = sorted(report.search, key=lambda trial: (trial.steps, trial.lr))
    longest = [each for each in found if each.steps == found[-1].steps and not each.diverged]
    best = found.index(min(longest, key=lambda trial: trial.loss)) if longest else None
    search = _table_of(found, best, "lowest")
    trials = _table_of(report.trials, report.winner, "winner")
    head = ("trial", "schedule", "peak LR", "steps", "final loss")
    return _section("search", "Search for the peak", head, search) + _section("trials", "Trials", head, trials)


def _table_of(trials: Sequence[Trial], best: int | None, mark: str) -> list[tuple[str, ...]]:
    rows = []
    for index, trial in enumerate(trials):
        loss = "diverged" if trial.diverged else _short(trial.loss)
        loss = f'<b>{loss}</b> <span class="winner">{mark}</span>' if index == best else loss
        rows.append((*map(escape, (trial.curve.name, trial.schedule, _short(trial.lr), f"{trial.steps:,}")), loss))
    return rows


def _batches(report: Report) -> str:
    rows = []
    for size, answer in report.batches:
        if isinstance(answer, Refusal):
            rows.append((f"{size:,}", "none", escape(answer.reason)))
        else:
            rows.append((f"{size:,}", _short(answer.cycle_min_lr), f"<b>{_short(answer.cycle_max_lr)}</b>"))
    return _section("batches", "By batch size", ("batch size", "minimum", "maximum"), rows)


def _config(report: Report) -> str:
    if report.config is None:
        return ""
    text = json.dumps(report.config, indent=2, ensure_ascii=False)
    link = base64.b64encode((text + "\n").encode()).decode()
    name = escape(report.config_name)
    return (
        '<section aria-labelledby="config"><h2 id="config">The config to train with</h2>'
        '<div class="buttons"><button type="button" id="copy" hidden>Copy</button>'
        f'<a class="button" download="{name}" href="data:application/json;base64,{link}">Save {name}</a>'
        '<span id="copied" role="status"></span></div>'
        f'<pre tabindex="0" id="json" aria-label="The config">{escape(text)}</pre></section>'
    )


def _runs(report: Report) -> str:
    head = ("run", "steps", "learning rate", "first loss", "lowest, smoothed", "at LR", "diverged at LR", "skipped")
    return _section("runs", "The runs in numbers", head, [tuple(_run(curve)) for curve in report.curves])


def _run(curve: Curve) -> Iterator[str]:
    yield escape(curve.name)
    yield f"{len(curve.steps):,}"
    low, high = (min(curve.lrs), max(curve.lrs)) if curve.lrs else (math.nan, math.nan)
    yield _short(low) if low == high else f"{_short(low)} to {_short(high)}"
    yield _short(curve.losses[0]) if curve.losses else ""
    best = min((pair for pair in zip(smooth(curve.losses), curve.lrs) if math.isfinite(pair[0])), default=None)
    yield from ("", "") if best is None else map(_short, best)
    end = curve.diverged_at if curve.is_test else None
    yield "" if end is None else _short(curve.lrs[end])
    yield str(len(curve.skipped) or "")


def _section(name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A section with a table; nothing without rows."""
    if not rows:
        return ""
    table = _table(head, rows, title, kind)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{table}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table. On a phone each row is a block whose cells are named by `data-head`."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = ""
    for first, *others in rows:
        cells = "".join(f'<td data-head="{escape(name)}">{cell}</td>' for name, cell in zip(head[1:], others))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<table class="{kind}"><caption class="hidden">{caption}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    if isinstance(value, str | bool):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# -- charts: a place for each in the page, and what plotly draws there ---------------------------------


def _chart(panel: Panel) -> str:
    """A chart's heading, its place, and the names of its runs, each a button."""
    label = escape(f"{panel.title}, for {', '.join(line.label for line in panel.lines)}. Arrow keys read the points.")
    keys = ""
    for line in panel.lines:
        name, stroke = escape(line.label), f"3px {BORDERS[dash_of(line.look)]} {color_of(line.look)}"
        keys += f'<button type="button" data-run="{name}" aria-pressed="true">'
        keys += f'<i style="border-top:{stroke}"></i>{name}</button>'
    return (
        f'<figure class="{"wide" if panel.name in WIDE else ""}" data-panel="{panel.name}">'
        f"<figcaption><h3>{escape(panel.title)}</h3><p>{escape(panel.caption)}</p></figcaption>"
        f'<div class="plot" tabindex="0" role="application" aria-label="{label}"></div>'
        f'<div class="legend" role="group" aria-label="Runs to show">{keys}</div></figure>'
    )


def _thinned(report: Report) -> str:
    names = [curve.name for curve in report.curves if len(curve.steps) > MAX_POINTS]
    note = f"At most {MAX_POINTS:,} points of a run are drawn; thinned: {', '.join(names)}."
    return f'<p class="wide">{escape(note)}</p>' if names else ""


def charts_as_json(report: Report) -> Json:
    """What the page's script needs: for each panel traces, layout, and its lines at each position of the slider.

    A number that is not finite is None, which plotly draws as a gap.
    """
    betas = sorted({*BETAS, report.beta})
    at_each = [panels_of(report, beta=beta) for beta in betas]
    charts = []
    for index, panel in enumerate(panels_of(report)):
        smoothed = None
        if any(line.raw for line in panel.lines):  # what the slider changes: nothing of the values as measured
            lines = [[trace for line in panels[index].lines for trace in _traces(line)] for panels in at_each]
            smoothed = [[None if trace["meta"]["kind"] == "raw" else trace["y"] for trace in each] for each in lines]
        traces = [trace for line in panel.lines for trace in _traces(line)]
        bounds = {"bounds": None if panel.y.log else panel.y.bounds, "logBounds": _log_bounds(panel)}
        charts.append({"data": [*traces, *_signs(panel)], "smoothed": smoothed, "layout": _layout(panel), **bounds})
    return {"betas": betas, "start": betas.index(report.beta), "charts": charts}


def _traces(line: Line) -> Iterator[Json]:
    """A line's band, its values as measured, and itself; always in this order, each with the line's label."""
    every = max(1, math.ceil(len(line.x) / MAX_POINTS))
    color, x = color_of(line.look), list(line.x[::every])
    if line.low:
        outline = [*line.high[::every], *reversed(line.low[::every])]
        fill: Json = {"fill": "toself", "fillcolor": color, "opacity": 0.2, "line": {"width": 0}, "mode": "lines"}
        yield _trace(line.label, "band", [*x, *reversed(x)], outline, hoverinfo="skip", **fill)
    if line.raw:
        xs, ys = ([value for run in line.raw for value in run[axis][::every]] for axis in (0, 1))
        dots = {"color": color, "size": 4, "opacity": 0.3}
        yield _trace(line.label, "raw", xs, ys, hoverinfo="skip", mode="markers", marker=dots)
    words = [f"{name} %{{customdata[{k}]:.4~g}}" for k, (name, _) in enumerate(line.details)]
    yield _trace(
        line.label,
        "line",
        x,
        line.y[::every],
        names=[*(name for name, _ in line.details), line.value],
        mode="lines+markers" if line.has_knots else "lines",
        line={"color": color, "width": 3.6 if line.is_best else 2.2, "dash": dash_of(line.look)},
        customdata=[_values(row) for row in zip(*(values[::every] for _, values in line.details))],
        hovertemplate="<br>".join(["<b>%{meta.run}</b>", *words, f"{line.value} %{{y:.4~g}}<extra></extra>"]),
    )


def _signs(panel: Panel) -> Iterator[Json]:
    """Crosses for divergences and triangles for skipped steps; those at an edge on a second axis from 0 to 1."""
    for sign in panel.signs:
        color = color_of(sign.look)
        common: Json = {"text": f"{sign.line}: {sign.text}", "hoverinfo": "text"}
        if sign.y is None:
            common["yaxis"] = "y2"
        if sign.y is None and sign.diverged:
            dots = {"color": color, "width": 1.4, "dash": "dot"}
            yield _trace(sign.line, "sign", [sign.x] * 2, [0, 1], mode="lines", line=dots, **common)
        symbol, size, edge = ("x", 10, 0.96) if sign.diverged else ("triangle-up", 8, 0.02)
        marker = {"symbol": symbol, "size": size, "color": color}
        y = edge if sign.y is None else sign.y
        yield _trace(sign.line, "sign", [sign.x], [y], mode="markers", marker=marker, **common)


def _trace(run: str, kind: str, x: Iterable[float], y: Iterable[float], names: Sequence[str] = (), **more: Any) -> Json:
    meta = {"run": run, "kind": kind, "names": names}  # for the page's script
    return {"type": "scatter", "meta": meta, "x": _values(x), "y": _values(y), **more}


def _layout(panel: Panel) -> Json:
    common = {"gridcolor": "rgba(128,128,128,0.2)", "zeroline": False, "exponentformat": "e", "automargin": True}
    axes: Json = {
        name: {**common, "title": {"text": axis.title, "standoff": 8}, "type": "log" if axis.log else "linear"}
        for name, axis in (("xaxis", panel.x), ("yaxis", panel.y))
    }
    if panel.name == "batch":
        axes["xaxis"]["tickvals"] = list(panel.lines[0].x)
    flags = list(_flags(panel))
    top = 14 + ROW * len(flags)
    return {
        **axes,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": [*_spans(panel), *(shape for shape, _ in flags)],
        "annotations": [name for _, name in flags],
        "height": HEIGHT + top + 44,
        "margin": {"l": 62, "r": 12, "t": top, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "hoverdistance": -1,  # the nearest point, however far
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "modebar": {"bgcolor": CLEAR, "color": GRAY, "activecolor": EDGE},
        "font": {"color": GRAY, "size": 12},
    }


def _spans(panel: Panel) -> Iterator[Json]:
    """The suggested range as an area."""
    if panel.span is not None:
        (low, high), (along, across) = panel.span, ("y", "x") if panel.span_on_y else ("x", "y")
        place = {f"{along}0": low, f"{along}1": high, f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
        line = {"color": EDGE, "width": 1.5}
        yield {"type": "rect", "layer": "below", **place, "fillcolor": SPAN, "opacity": 0.28, "line": line}


def _flags(panel: Panel) -> Iterator[tuple[Json, Json]]:
    """The rules' answers as lines, each with its name above the chart, in a row of its own: so they fit any width."""
    xs = [x for line in panel.lines for x in line.x if x > 0] or [math.inf]
    shown = [(mark.lr, mark) for mark in panel.marks if mark.lr and min(xs) <= mark.lr <= max(xs)]
    # Near the right edge a flag points to the left. Flags to the right climb from right to left, then those to the left
    # from left to right, so that few lines cross a name; the page gives names an opaque ground.
    near = min(xs) * (max(xs) / min(xs)) ** 0.6 if shown else 0.0
    shown.sort(key=lambda pair: (pair[0] > near, -pair[0] if pair[0] <= near else pair[0]))
    for row, (lr, mark) in enumerate(shown):
        color, text, stroke = GRAY, mark.rule, {"color": GRAY, "width": 1.2, "dash": "dash"}
        if mark.rule == OWN_RULE:
            color, text, stroke = OWN, f"<b>{mark.rule}</b>", {"color": OWN, "width": 1.8}
        top = 1 + ROW * (row + 0.9) / HEIGHT
        line = {"type": "line", "name": RULE, "yref": "paper", "x0": lr, "x1": lr, "y0": 0, "y1": top, "line": stroke}
        words = {"name": RULE, "text": text, "hovertext": f"{mark.rule}: {lr:.4g}. {mark.why}"}
        across = {"x": math.log10(lr), "xanchor": "left" if lr <= near else "right"}  # a shape takes the value itself
        place = {**across, "yref": "paper", "y": 1, "yanchor": "bottom", "yshift": ROW * row}
        yield line, {**words, **place, "showarrow": False, "font": {"color": color}, "bgcolor": CLEAR}


def _log_bounds(panel: Panel) -> list[float] | None:
    """The range of a logarithmic loss axis, in powers of ten; None where a line is not above 0."""
    lowest = min((y for line in panel.lines for y in line.y if math.isfinite(y)), default=0.0)
    if panel.y.bounds is None or panel.y.log or lowest <= 0:
        return None
    return [math.log10(lowest / 1.15), math.log10(max(panel.y.bounds[1], lowest * 1.15))]


def _values(values: Iterable[float]) -> Sequence[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
