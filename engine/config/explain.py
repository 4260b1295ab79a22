"""What a key means, in text: for `redline explain`, and for the reference in the docs."""

from __future__ import annotations

import fnmatch
import textwrap
from collections.abc import Iterator

from engine.config.catalog import Entry, catalog
from engine.config.sections.zero import LETTERS, STAGES
from engine.config.support import KEYS
from engine.config.table import Paint, paint_nothing, rows_as_text
from engine.config.words import nearest, shown
from engine.errors import EngineError

__all__ = ["STAGE_HEADS", "explain", "reference"]

_HEADS = ("key", "status", "default", "values")
STAGE_HEADS = ("stage", "shared out", "reshard_after_forward", "sent per update", "memory per process")


def explain(query: str = "", width: int | None = None, paint: Paint = paint_nothing) -> str:
    """All about a key, a section, or a pattern such as "zero_optimization.offload*"; "" lists what is at the top.

    Args:
        query: a path; its last part is enough where no key at the top has that name.
        width: columns of the terminal; None for a pipe.
        paint: color of a status.

    Raises:
        EngineError: there is no such key; the message has the nearest.
    """
    entries = list(catalog().values())
    if not query:
        heads = ("key", "status", "meaning")
        rows = [(name, catalog()[name].status, catalog()[name].meaning) for name in KEYS]
        return "\n".join(rows_as_text(rows, heads, width, paint))
    if any(mark in query for mark in "*?["):
        found = [entry for entry in entries if fnmatch.fnmatchcase(entry.key, query)]
        return "\n".join(_list(_or_miss(found, query), width, paint))
    found = [entry for entry in entries if entry.key == query]
    if not found and "." not in query:
        found = [entry for entry in entries if entry.key.rpartition(".")[2] == query]
    texts = ["\n".join(_one(entry, paint)) for entry in _or_miss(found, query)]
    if found[0].key == "zero_optimization.stage":
        texts.append("\n".join(_stages(width, paint)))
    inside = [entry for entry in entries if entry.key.startswith(f"{query}.")]
    if inside:
        texts.append("\n".join(_list(inside, width, paint)))
    return "\n\n".join(texts)


def _or_miss(found: list[Entry], query: str) -> list[Entry]:
    if found:
        return found
    paths = [entry.key for entry in catalog().values()]
    guess = nearest(query, paths)
    if guess is None:
        names = {path.rpartition(".")[2]: path for path in reversed(paths)}
        guess = names.get(nearest(query.rpartition(".")[2], names) or "")
    hint = f'did you mean "{guess}"?' if guess else "redline explain lists the keys at the top"
    raise EngineError(f"{shown(query)}: unknown key; {hint}")


def _one(entry: Entry, paint: Paint) -> Iterator[str]:
    yield paint(entry.path, "head")
    yield f"  {entry.meaning}"
    yield f"  values   {entry.values}"
    yield f"  default  {entry.default or 'none; it must be given'}"
    if entry.auto:
        yield f'  "auto"   {entry.auto}'
    yield f"  status   {paint(entry.status, entry.status)}" + (f": {entry.note}" if entry.note else "")


def _stages(width: int | None, paint: Paint) -> Iterator[str]:
    """What each stage of ZeRO comes to."""
    rows = STAGES if width else (STAGE_HEADS, *STAGES)  # in a pipe, too: letters need their heads
    yield from rows_as_text(rows, STAGE_HEADS, width, paint)
    yield ""
    yield from textwrap.wrap(LETTERS, width or 120, initial_indent="  ", subsequent_indent="  ")


def _list(entries: list[Entry], width: int | None, paint: Paint) -> Iterator[str]:
    rows = [(entry.path, entry.status, entry.default or "-", entry.values) for entry in entries]
    return rows_as_text(rows, _HEADS, width, paint)


# -- the reference ---------------------------------------------------------------------------------------

_INTRODUCTION = """\
# Keys of the config

<!-- Written by scripts/write_docs.py from the models and the status table; do not edit. -->

The config is DeepSpeed's JSON: its keys, nesting, defaults and spelling. Every key of DeepSpeed 0.19.8 is
**honoured**, has **no effect** (harmless here; the reason is given), or is **refused** (it would change the training
and is not built; what to use instead is given). A refused section that is switched off refuses nothing. A key that is
in none of these tables is an error, unless it starts with `_` or `//`: that is a comment.

`redline explain KEY` prints a row of these tables, `redline validate CONFIG` what becomes of a config.

## "auto"

Hugging Face's integration lets a config say `"auto"` and fills it in from the script's own arguments. Where nobody
has, it comes to this; anywhere else it is an error. The origin of such a value is `auto` in the config in force
(`redline validate --effective CONFIG`).

| key | comes to |
|---|---|
"""


def reference() -> str:
    """The reference of all keys, in Markdown."""
    lines = [f"| {_code(entry.path)} | {entry.auto} |" for entry in _autos()]
    sections = [_INTRODUCTION + "\n".join(lines)]
    entries = list(catalog().values())
    tops = [catalog()[name] for name in KEYS]
    sections.append("## At the top\n\n" + _markdown([(entry, entry.path) for entry in tops]))
    for top in tops:
        inside = [entry for entry in entries if entry.key.startswith(f"{top.path}.")]
        if inside:
            text = f"## {top.path}\n\n{top.meaning} {top.status.capitalize()}: {top.note}.\n\n"
            sections.append(text + _markdown([(entry, entry.path.removeprefix(f"{top.path}.")) for entry in inside]))
    return "\n\n".join(sections) + "\n"


def _autos() -> Iterator[Entry]:
    """Keys that may be "auto"; a whole section that may comes as one row."""
    entries = [entry for entry in catalog().values() if entry.auto and not entry.meaning.startswith("Another spelling")]
    whole = {"fp16", "bf16", "bfloat16", "zero_optimization", "tensor_parallel", "compile", "weight_quantization"}
    whole |= {"tensorboard", "wandb", "csv_monitor", "comet"}
    seen = set()
    for entry in entries:
        top = entry.key.partition(".")[0]
        if top not in whole:
            yield entry
        elif top not in seen:
            seen.add(top)
            yield Entry(f"{top}.*", "", "", "", "", "", entry.auto)


def _markdown(rows: list[tuple[Entry, str]]) -> str:
    lines = ["| key | values | default | status | meaning |", "|---|---|---|---|---|"]
    for entry, name in rows:
        meaning = entry.meaning + (f" {entry.note[0].upper()}{entry.note[1:]}." if entry.note else "")
        default = _code(entry.default) if entry.default else "required"
        lines.append(f"| {_code(name)} | {_cell(entry.values)} | {default} | {entry.status} | {_cell(meaning)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    path, _, types = text.partition(" (") if text[:1].isalpha() else (text, "", "")
    return f"`{path}`" + (f" ({types}" if types else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
