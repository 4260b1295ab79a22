"""The documentation site: its first page is the README, links to the source show the source, docstrings are Markdown.

A module of hooks for mkdocs, and an extension of griffe, which reads the docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]

# What the API page shows, by heading.
API = {
    "Train": ["redline.start.initialize", "redline.engine.Engine", "redline.callbacks"],
    "Find a learning rate": [
        "redline.tuning.tune",
        "redline.tuning.Tuning",
        "redline.range_test.run_range_test",
        "redline.range_test.RangeTestResult",
    ],
    "Configs": ["redline.config.load_config"],
    "Schedules": ["redline.schedulers"],
    "Errors": ["redline.errors"],
}

_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/: the README, the changelog, the API, and the source that pages link to."""
    api = ["# API reference", ""]
    for heading, names in API.items():
        api += [f"## {heading}", "", *(f"::: {name}\n" for name in names)]
    pages = {"api.md": "\n".join(api)}
    for path, name in (("README.md", "index.md"), ("CHANGELOG.md", "changelog.md")):
        pages[name] = _from_root((ROOT / path).read_text())
    linked = set()
    for text in (*pages.values(), *(path.read_text() for path in (ROOT / "docs").glob("*.md"))):
        linked |= {match[1].removeprefix("../") for match in _LINK.finditer(text) if _is_source(match[1])}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for name in sorted(linked):
        files.append(File.generated(config, f"source/{name}.txt", content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to the source lead to its copy in the site."""
    return _LINK.sub(
        lambda match: f"](source/{match[1].removeprefix('../')}.txt)" if _is_source(match[1]) else match[0], markdown
    )


class MarkdownDocstrings(Extension):
    """Makes Markdown of docstrings: doctests become code, roles such as ``:func:`` go."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":(?:attr|class|func|meth|mod):(?=`)", "", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^>>> (?:.+\n?)+", "```pycon\n\\g<0>\n```\n", text, flags=re.MULTILINE)


def _from_root(text: str) -> str:
    """A page of the repository's root as one of docs/."""

    def moved(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')}{anchor})"
        return f"](../{path}{anchor})"

    return _LINK.sub(moved, text)


def _is_source(link: str) -> bool:
    return link.startswith("../") and (ROOT / link.removeprefix("../")).is_file()
