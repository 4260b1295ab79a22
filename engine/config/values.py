"""The config in force: every value with where it comes from, and how two configs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from engine.config.batch import BATCH_KEYS
from engine.config.document import format_route
from engine.config.parser import Route
from engine.config.root import EngineConfig
from engine.config.section import Section
from engine.config.support import HONOURED, KEYS, row_of
from engine.config.words import shown

__all__ = ["Difference", "Value", "differences", "effective", "fingerprint", "origins"]


class Value(NamedTuple):
    """A value in force and its origin: "given", "default", "derived" or "auto"; "unread" for a key without effect."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{shown(self.value)} ({self.origin})"


class Difference(NamedTuple):
    """A path whose value two configs have differently; None where a config does not have it."""

    path: str
    first: Value | None
    second: Value | None


def effective(config: EngineConfig) -> dict[str, Value]:
    """Every value of a config by its path: those in force, and those that were given and have no effect."""
    document = config.as_written()
    values = dict(_in_force(config, document.settings))
    for name, value in document.settings.items():
        if KEYS[name].status != HONOURED:
            for route, leaf in _leaves(value, (name,)):
                values[format_route(route)] = Value(leaf, "unread")
    return values


def origins(config: EngineConfig) -> dict[str, str]:
    """Where each value in force comes from: "given", "default", "derived" or "auto", by its path."""
    values = dict(_in_force(config, config.as_written().settings))
    return {path: value.origin for path, value in values.items() if value.origin != "unread"}


def differences(first: EngineConfig, second: EngineConfig) -> list[Difference]:
    """Where two configs in force are not the same; where a value comes from does not count."""
    one, other = effective(first), effective(second)
    found = []
    for path in dict.fromkeys([*one, *other]):
        pair = one.get(path), other.get(path)
        if pair[0] is None or pair[1] is None or _text(pair[0].value) != _text(pair[1].value):
            found.append(Difference(path, *pair))
    return found


def fingerprint(config: EngineConfig) -> dict[str, str]:
    """The values in force as text, by path: what processes that train together must agree on."""
    return {path: _text(value.value) for path, value in effective(config).items() if value.origin != "unread"}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _in_force(config: EngineConfig, written: dict[str, Any]) -> Iterator[tuple[str, Value]]:
    for route, value in _leaves(config.model_dump(mode="json"), ()):
        batch = route[0] in BATCH_KEYS
        given = _written(config, route, written)
        if given == "auto" and value != "auto":
            origin = "auto"
        elif given is not _NOTHING and not (batch and given is None):
            origin = "given"
        else:
            origin = "derived" if batch else "default"
        row = row_of(".".join(map(str, route)))
        if row is None or row.status == HONOURED:
            yield format_route(route), Value(None if batch and value == 0 else value, origin)
        elif origin != "default":  # within a section that has an effect; nobody reads its default
            yield format_route(route), Value(value, "unread")


_NOTHING = object()


def _written(section: Any, route: Route, written: Any) -> Any:
    """What a document has at a route, under any spelling."""
    for part in route:
        spellings = [part]
        if isinstance(section, Section):
            spellings += [alias for alias, name in section.aliases.items() if name == part]
        if written is True:  # ZeRO's older spelling
            written = {"stage": 1}
        found = [written[each] for each in spellings if each in written] if isinstance(written, dict) else []
        if not found:
            return _NOTHING
        section, written = getattr(section, str(part), None), found[0]
    return written


def _leaves(value: Any, route: Route) -> Iterator[tuple[Route, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*route, key))
    else:
        yield route, value
