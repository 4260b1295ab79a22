"""What a key means, in text, for `redline explain` and the docs."""

from __future__ import annotations

import fnmatch
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from redline.config.components import COMPONENTS
from redline.config.messages import Schema, describe, nearest, options, shown
from redline.config.schema import on_auto, schema_of, section_of, whole_schema
from redline.config.section import HONOURED, REFUSED
from redline.config.zero import LETTERS, STAGES
from redline.console import Paint, paint_nothing, rows_as_text
from redline.errors import EngineError

__all__ = ["STAGE_HEADS", "Entry", "catalog", "explain", "top_keys"]

_HEADS = ("key", "status", "default", "values")
STAGE_HEADS = ("stage", "sharded", "reshard_after_forward", "sent per step", "memory per rank")


class Entry(NamedTuple):
    """One key."""

    path: str  # as in a message: "fp16.enabled"; "optimizer.params.lr (Adam, AdamW)" for a key of some types only
    meaning: str
    values: str  # the type and the range, in words
    default: str  # as JSON; empty for a key that is required
    status: str
    note: str  # why; empty if that is its section's
    auto: str  # what becomes of "auto"; empty where it is an error

    @property
    def key(self) -> str:
        """The path without the types that it is for."""
        return self.path.partition(" ")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.key.rpartition(".")[2]


@cache
def catalog() -> dict[str, Entry]:
    """All keys by path, each section after its key."""
    return {entry.path: entry for entry in _entries(whole_schema(), "", HONOURED, "")}


def top_keys() -> list[Entry]:
    """The keys at the top."""
    return [entry for entry in catalog().values() if "." not in entry.path]


def _entries(section: Schema, path: str, status: str, note: str, types: str = "") -> Iterator[Entry]:
    """The keys of a section, and what is in them; without a status of its own a key has its section's."""
    spellings = {name: [name] for name in section["properties"]}
    for alias, name in section.get("aliases", {}).items():
        spellings[name].append(alias)
    for name, key in section["properties"].items():
        if path in COMPONENTS and name == "params":
            yield from _params(path, status)
            continue
        own = key.get("status", status)
        why = key.get("note", "") or (note if own == REFUSED else "")
        # A section's default is long, and each of its keys has an entry of its own.
        default = shown(key["default"]) if "default" in key else ""
        default = "its keys' defaults" if isinstance(key.get("default"), dict) and key["default"] else default
        for spelling in spellings[name]:
            place = f"{path}.{spelling}" if path else spelling
            meaning = key.get("description", "") if spelling == name else f"Another spelling of {name}."
            yield Entry(place + types, meaning, describe(key), default, own, why, on_auto(section, name) or "")
            inner = section_of(key)
            if inner and (spelling == name or not path):
                is_map = any("additionalProperties" in option for option in options(key))
                yield from _entries(inner, f"{place}.NAME" if is_map else place, own, why, types)


def _params(kind: str, status: str) -> Iterator[Entry]:
    """The parameters of all types, those of one model together."""
    models = COMPONENTS[kind].models
    for model in dict.fromkeys(models.values()):
        names = ", ".join(name for name in models if models[name] is model)
        yield from _entries(schema_of(model), f"{kind}.params", status, "", f" ({names})")


# -- redline explain -------------------------------------------------------------------------------------


def explain(query: str = "", width: int | None = None, paint: Paint = paint_nothing) -> str:
    """All about a key, a section, or a pattern such as "zero_optimization.offload*"; "" lists what is at the top.

    Args:
        query: a path; its last part is enough where no key at the top has that name. Where no key has it, all whose
            last part or type contains it are listed.
        width: columns of the terminal; None for a pipe.
        paint: color of a status.

    Raises:
        EngineError: there is no such key; the message has the nearest.
    """
    entries, word = list(catalog().values()), query.lower()
    if not query:
        rows = [(entry.path, entry.status, entry.meaning) for entry in top_keys()]
        return "\n".join(rows_as_text(rows, ("key", "status", "meaning"), width, paint))
    found = [entry for entry in entries if entry.key == query]
    if not found and "." not in query:
        found = [entry for entry in entries if entry.name == query]
    if not found:
        listed = [entry for entry in entries if fnmatch.fnmatchcase(entry.key, query)]
        if not listed and len(word) > 2:
            names = [(entry, f"{entry.name} {entry.path.partition(' ')[2]}".lower()) for entry in entries]
            listed = [entry for entry, text in names if word in text]
        if not listed:
            raise EngineError(f"{shown(query)}: unknown key; {_hint(query)}")
        return _listed(listed, width, paint)
    texts = ["\n".join(_one(entry, paint)) for entry in found]
    if found[0].key == "zero_optimization.stage":
        texts.append("\n".join(_stages(width, paint)))
    if inside := [entry for entry in entries if entry.key.startswith(f"{query}.")]:
        texts.append(_listed(inside, width, paint))
    return "\n\n".join(texts)


def _hint(query: str) -> str:
    paths = {entry.key: entry for entry in reversed(catalog().values())}
    names = {entry.name: path for path, entry in paths.items()}
    # Or a misspelled last part, of any section.
    guess = nearest(query, paths) or names.get(nearest(query.rpartition(".")[2], names) or "")
    return f'did you mean "{guess}"?' if guess else "redline explain lists the keys at the top"


def _one(entry: Entry, paint: Paint) -> Iterator[str]:
    yield paint(entry.path, "head")
    yield f"  {entry.meaning}"
    yield f"  values   {entry.values}"
    yield f"  default  {entry.default or 'none; it must be given'}"
    if entry.auto:
        yield f'  "auto"   {entry.auto}'
    yield f"  status   {paint(entry.status, entry.status)}" + (f": {entry.note}" if entry.note else "")


def _stages(width: int | None, paint: Paint) -> Iterator[str]:
    """What each stage of ZeRO is here."""
    rows = STAGES if width else (STAGE_HEADS, *STAGES)  # in a pipe, too: letters need their heads
    yield from rows_as_text(rows, STAGE_HEADS, width, paint)
    yield ""
    yield from textwrap.wrap(LETTERS, width or 120, initial_indent="  ", subsequent_indent="  ")


def _listed(entries: list[Entry], width: int | None, paint: Paint) -> str:
    rows = [(entry.path, entry.status, entry.default or "-", entry.values) for entry in entries]
    return "\n".join(rows_as_text(rows, _HEADS, width, paint))
