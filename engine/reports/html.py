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
from dataclasses import replace
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
    """Write the page; `picture` is a PNG of the same charts, for a reader without JavaScript."""
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
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = f'<img class="picture" alt="The charts, as a picture" src="{source}">' if picture else ""
    parts = {
        "title": escape(report.title),
        "facts": "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts),
        "answer": _answer(report),
        "picture": f"<noscript>{image}</noscript>" if plotly else image,
        "charts": "".join(map(_chart, panels_of(report))) + _thinned(report) if plotly else f"<p>{escape(REMEDY)}</p>",
        "tables": _tables(report),
        "plotly": plotly,
        "data": _embedded(charts_as_json(report)) if plotly else "null",
    }
    template = files("redline.reports").joinpath("page.html").read_text(encoding="utf-8")
    # In one pass: a user's text may look like a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def render_cell(report: Report) -> str:
    """The answer and the picture as HTML for a notebook, which has styles of its own."""
    try:
        source = f"data:image/png;base64,{base64.b64encode(picture_of(report)).decode()}"
        picture = f'<img alt="The charts" style="max-width: 100%; background: #fff" src="{source}">'
    except RangeTestError as error:
        picture = f"<p>{escape(str(error))}</p>"
    facts = ", ".join(f"{escape(name)} {escape(value)}" for name, value in report.facts)
    return f"<p><b>{escape(report.title)}</b>: {facts}</p>{_answer(report)}{picture}"


def _embedded(value: object) -> str:
    """JSON for a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- words and tables ----------------------------------------------------------------------------------


def _answer(report: Report) -> str:
    """The suggestion, each number with its reason; or why there is none and what to do."""
    answer, config = report.answer, report.config or {}
    if isinstance(answer, Refusal):
        kind, heading = "answer refused", "No suggestion"
        words = f'<p class="lead">{escape(answer.reason)}</p>'
        words += f"<p><strong>What to do.</strong> {escape(answer.remedy)}</p>"
    else:
        kind, heading = "answer", HEADINGS.get(report.schedule, f"Suggested {report.schedule}")
        params = config["scheduler"].get("params", {}) if config.get("scheduler") else {"lr": config["_tune"]["lr"]}
        reasons = config["_range_test"]["reasons"]
        rows = [(key, _short(value), reasons.get(key, "")) for key, value in params.items()]
        words = _lead(report, answer)
        words += _table("The suggested schedule", ("key", "value", "where it comes from"), rows, "reasons")
    for title, sentences in (("Before you rely on it", answer.notes), ("What was left out", report.left_out)):
        if sentences:
            items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            words += f'<h3>{title}</h3><ul class="notes">{items}</ul>'
    return f'<section class="{kind}" aria-labelledby="answer"><h2 id="answer">{heading}</h2>{words}</section>'


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


def _tables(report: Report) -> str:
    """What else was found, in sections."""
    rules = [(each.rule, "no answer" if each.lr is None else _short(each.lr), each.why) for each in report.marks]
    search = sorted(report.search, key=lambda trial: (trial.steps, trial.lr))
    ended = [each for each in search if each.steps == search[-1].steps and not each.diverged]
    lowest = search.index(min(ended, key=lambda trial: trial.loss)) if ended else None
    batches = [
        (f"{size:,}", "none", answer.reason)
        if isinstance(answer, Refusal)
        else (f"{size:,}", _short(answer.cycle_min_lr), _short(answer.cycle_max_lr))
        for size, answer in report.batches
    ]
    trial_head = ("trial", "schedule", "peak LR", "steps", "final loss")
    run_head = ("run", "steps", "learning rate", "first loss", "lowest, smoothed", "at LR", "diverged at LR", "skipped")
    return "".join(
        (
            _section("rules", "The answers of several rules", ("rule", "LR", "why"), rules, "reasons"),
            _section("search", "Search for the peak", trial_head, map(_trial, search), "", (lowest, "lowest")),
            _section("trials", "Trials", trial_head, map(_trial, report.trials), "", (report.winner, "winner")),
            _section("batches", "By batch size", ("batch size", "minimum", "maximum"), batches),
            _config(report),
            _section("runs", "The runs in numbers", run_head, map(_run, report.curves)),
        )
    )


def _trial(trial: Trial) -> tuple[str, ...]:
    loss = "diverged" if trial.diverged else _short(trial.loss)
    return trial.curve.name, trial.schedule, _short(trial.lr), f"{trial.steps:,}", loss


def _run(curve: Curve) -> tuple[str, ...]:
    low, high = (min(curve.lrs), max(curve.lrs)) if curve.lrs else (math.nan, math.nan)
    best = min((pair for pair in zip(smooth(curve.losses), curve.lrs) if math.isfinite(pair[0])), default=())
    end = curve.diverged_at if curve.is_test else None
    return (
        curve.name,
        f"{len(curve.steps):,}",
        _short(low) if low == high else f"{_short(low)} to {_short(high)}",
        _short(curve.losses[0]) if curve.losses else "",
        *(map(_short, best) if best else ("", "")),
        "" if end is None else _short(curve.lrs[end]),
        str(len(curve.skipped) or ""),
    )


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


def _section(name: str, title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *style: Any) -> str:
    """A section with a table; nothing without rows."""
    table = _table(title, head, rows, *style)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{table}</section>' if table else ""


def _table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    style: str = "",
    best: tuple[int | None, str] = (None, ""),
) -> str:
    """A table. On a phone each row is a block whose cells are named by `data-head`; `best` marks a row by its index."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = ""
    for index, (first, *others) in enumerate(rows):
        cells = [f'<td data-head="{name}">{escape(cell)}</td>' for name, cell in zip(head[1:], others)]
        if index == best[0]:
            cells[-1] = cells[-1].replace("</td>", f' <span class="winner">{best[1]}</span></td>')
        body += f'<tr><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>'
    return body and (
        f'<table class="{style}"><caption class="hidden">{caption}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    if isinstance(value, str | bool):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# -- charts: a place for each in the page, and what plotly draws there ---------------------------------


def _thinned(report: Report) -> str:
    names = [curve.name for curve in report.curves if len(curve.steps) > MAX_POINTS]
    note = escape(f"At most {MAX_POINTS:,} points of a run are drawn; thinned: {', '.join(names)}.")
    return f'<p class="wide">{note}</p>' if names else ""


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


def charts_as_json(report: Report) -> Json:
    """What the page's script needs: for each panel traces, layout, and its lines at each position of the slider.

    A number that is not finite is None, which plotly draws as a gap.
    """
    betas = sorted({*BETAS, report.beta})
    charts = []
    for panel, *smoothed in zip(panels_of(report), *(panels_of(replace(report, beta=beta)) for beta in betas)):
        has_raw = any(line.raw for line in panel.lines)
        chart = {
            "data": [trace for line in panel.lines for trace in _traces(line)] + [*_signs(panel)],
            "smoothed": [_smoothed_values(each) for each in smoothed] if has_raw else None,
            "layout": _layout(panel),
            "bounds": None if panel.y.log else panel.y.bounds,
            "logBounds": _log_bounds(panel),
        }
        charts.append(chart)
    return {"betas": betas, "start": betas.index(report.beta), "charts": charts}


def _smoothed_values(panel: Panel) -> list[Any]:
    """The y of each trace; None for the values as measured, which the slider does not change."""
    traces = (trace for line in panel.lines for trace in _traces(line))
    return [None if trace["meta"]["kind"] == "raw" else trace["y"] for trace in traces]


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
    spans: list[Json] = []  # the suggested range, as an area
    if panel.span is not None:
        (low, high), (along, across) = panel.span, "yx" if panel.span_on_y else "xy"
        place = {f"{along}0": low, f"{along}1": high, f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
        line = {"color": EDGE, "width": 1.5}
        spans.append({"type": "rect", "layer": "below", **place, "fillcolor": SPAN, "opacity": 0.28, "line": line})
    flags = list(_flags(panel))
    top = 14 + ROW * len(flags)
    return {
        **axes,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": [*spans, *(shape for shape, _ in flags)],
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
