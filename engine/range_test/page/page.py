"""Puts a page together: the template, its style and scripts, the tables, and the numbers that the scripts draw.

Numbers and words are written by Python, and hold without JavaScript; curves are drawn where the page is read.
"""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from engine.range_test.contents import Contents
from engine.range_test.page.data import data_of
from engine.range_test.page.sketch import sketch
from engine.range_test.page.tables import answer, charts, facts, tables

__all__ = ["PAGE_NAME", "render_page", "write_page"]

PAGE_NAME = "report.html"

_SCRIPTS = ("reading.js", "scale.js", "chart.js", "page.js")


def write_page(contents: Contents, path: Path) -> Path:
    """Write the page; beside and renamed, so that a full disk leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(render_page(contents), encoding="utf-8")
    return beside.replace(path)


def render_page(contents: Contents) -> str:
    """The page as HTML."""
    parts = {
        "title": escape(contents.title),
        "style": _file("page.css"),
        "facts": facts(contents),
        "answer": answer(contents),
        "charts": charts(contents),
        "sketch": sketch(contents),
        "tables": tables(contents),
        "data": embedded(data_of(contents)),
        "script": "\n".join(_file(name) for name in _SCRIPTS),
    }
    # In one pass: what a user wrote may look like a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def embedded(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return files("engine.range_test.page").joinpath(name).read_text(encoding="utf-8")
