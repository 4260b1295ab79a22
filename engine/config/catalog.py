"""Every key there is, by its path: what it means, what it takes, what becomes of it.

Puts the models and the table together, for `redline explain`, the schema and the reference in the docs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.config.component import Component
from engine.config.optimizer import OptimizerConfig
from engine.config.root import EngineConfig
from engine.config.scheduler import SchedulerConfig
from engine.config.section import Section, sections_in
from engine.config.support import KEYS, REFUSED, row_of
from engine.config.words import describe, shown

__all__ = ["Entry", "catalog", "models"]

_NONE = object()


@dataclass(frozen=True)
class Entry:
    """One key.

    Attributes:
        path: as in a message: "fp16.enabled"; "optimizer.params.lr (Adam, AdamW)" for a key of some types only.
        meaning: one sentence.
        values: the type and the range, in words.
        default: as JSON; empty for a key that must be given, or has no default.
        status: honoured, no effect or refused.
        note: why; empty if that is its section's.
        auto: what becomes of "auto"; empty where it is an error.
    """

    path: str
    meaning: str
    values: str
    default: str
    status: str
    note: str
    auto: str = ""

    @property
    def key(self) -> str:
        """The path without the types that it is for."""
        return self.path.partition(" ")[0]


@cache
def catalog() -> dict[str, Entry]:
    """All keys, in the order of the table."""
    return {entry.path: entry for entry in _entries()}


@cache
def models() -> tuple[type[Section], ...]:
    """Every model of a section, the parameters' included."""
    found: dict[type[Section], None] = {}

    def add(model: type[Section]) -> None:
        if model in found:
            return
        found[model] = None
        for each in model.model_fields.values():
            for inner in sections_in(each.annotation):
                add(inner)

    roots = [model for component in (OptimizerConfig, SchedulerConfig) for model in component.models.values()]
    for model in (EngineConfig, *roots, *(key.model for key in KEYS.values() if key.model)):
        add(model)
    return tuple(model for model in found if model not in (EngineConfig, Section))


def _entries() -> Iterator[Entry]:
    fields = _properties(EngineConfig)
    for key in KEYS.values():
        name = EngineConfig.aliases.get(key.name, key.name)
        schema = fields[name] if name in fields else key.adapter.json_schema()
        section = key.model or EngineConfig.section(key.name)
        meaning = key.meaning or schema.get("description") or (section.__doc__ or "").partition("\n")[0]
        default = key.default if name not in fields or name.endswith(("size", "steps", "gpu")) else _NONE
        values = describe(schema)
        if default is _NONE:
            default = schema.get("default", _NONE)
        auto = EngineConfig.on_auto(key.name) or ""
        note = key.note
        yield Entry(key.name, meaning, values, _default(default), key.status, note, auto)
        if section is not None:
            yield from _inside(section, key.name)


def _inside(model: type[Section], path: str, types: str = "") -> Iterator[Entry]:
    for name, schema in _properties(model).items():
        if issubclass(model, Component) and name == "params":
            for params, names in _params(model).items():
                yield from _inside(params, f"{path}.params", f" ({', '.join(names)})")
            continue
        yield _entry(model, name, schema, path, types)
        for inner in sections_in(model.model_fields[name].annotation):
            mapped = "" if schema.get("type") != "object" and "additionalProperties" not in str(schema) else ".NAME"
            yield from _inside(inner, f"{path}.{name}{mapped}", types)
    for alias, name in model.aliases.items():
        entry = _entry(model, name, _properties(model)[name], path, types)
        yield Entry(f"{path}.{alias}{types}", f"Another spelling of {name}.", *_rest(entry))


def _entry(model: type[Section], name: str, schema: dict[str, Any], path: str, types: str) -> Entry:
    place = f"{path}.{name}"
    row = row_of(place)
    assert row is not None
    note = row.note if row.name == place or row.status == REFUSED else ""
    default = schema.get("default", _NONE)
    auto = model.on_auto(name) or ""
    meaning = schema.get("description", "")
    return Entry(place + types, meaning, describe(schema), _default(default), row.status, note, auto)


def _rest(entry: Entry) -> tuple[str, str, str, str, str]:
    return entry.values, entry.default, entry.status, entry.note, entry.auto


def _params(component: type[Component]) -> dict[type[Section], list[str]]:
    """The parameters' models, each with the types that it is for."""
    found: dict[type[Section], list[str]] = {}
    for name, model in component.models.items():
        found.setdefault(model, []).append(name)
    return found


@cache
def _properties(model: type[Section]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return properties


def _default(value: Any) -> str:
    """As JSON; a section's is long, and each of its keys has an entry of its own."""
    if isinstance(value, dict) and value:
        return "its keys' defaults"
    return "" if value is _NONE else shown(value)
