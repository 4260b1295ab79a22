"""The values of a config in force, each with its origin: the way back from what `load` makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from redline.config.document import Route, format_route
from redline.config.messages import shown
from redline.config.root import BATCH_KEYS, EngineConfig
from redline.config.schema import whole_schema
from redline.config.section import HONOURED, Section

__all__ = ["Value", "effective", "fingerprint", "origins"]


class Value(NamedTuple):
    """A value in force and its origin: "given", "default", "derived" or "auto"; "unread" for a key without effect."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{shown(self.value)} ({self.origin})"


def effective(config: EngineConfig) -> dict[str, Value]:
    """Every value of a config by its path: those in force, and those that were given and have no effect."""
    written, properties = config.as_written().settings, whole_schema()["properties"]
    values = {format_route(route): value for route, value in _in_force(config, config, (), HONOURED)}
    for name, value in written.items():
        if properties.get(name, {}).get("status", HONOURED) != HONOURED:
            values.update((format_route(route), Value(leaf, "unread")) for route, leaf in _leaves(value, (name,)))
    # A batch size that nothing tells yet has no value; one that was inferred is in the fields that are set.
    for name in BATCH_KEYS:
        origin = "auto" if config.is_auto((name,)) else "derived" if written.get(name) is None else "given"
        values[name] = Value(getattr(config, name) or None, origin)
    return values


def origins(config: EngineConfig) -> dict[str, str]:
    """Where each value in force comes from: "given", "default", "derived" or "auto", by its path."""
    return {path: value.origin for path, value in effective(config).items() if value.origin != "unread"}


def fingerprint(config: EngineConfig) -> dict[str, str]:
    """The values in force as text, by path: what ranks that train together must agree on."""
    found = effective(config).items()
    return {path: json.dumps(value.value, sort_keys=True) for path, value in found if value.origin != "unread"}


def _in_force(config: EngineConfig, section: Section, route: Route, status: str) -> Iterator[tuple[Route, Value]]:
    """The values of a section; a key has its section's status where it has none of its own."""
    fields = type(section).model_fields
    for name, value in section:
        place, extra = (*route, name), fields[name].json_schema_extra if name in fields else None
        own = str(extra.get("status", status)) if isinstance(extra, dict) else status
        if isinstance(value, Section) and list(value):
            yield from _in_force(config, value, place, own)
            continue
        auto, given = config.is_auto(place), name in section.model_fields_set
        origin = "auto" if auto else "given" if given else "default"
        value = list(value) if isinstance(value, tuple) else {} if isinstance(value, Section) else value  # as JSON
        for leaf, plain in _leaves(value, place):
            if own == HONOURED:
                yield leaf, Value(plain, origin)
            elif origin != "default":  # within a section that has an effect; nobody reads its default
                yield leaf, Value(plain, "unread")


def _leaves(value: Any, route: Route) -> Iterator[tuple[Route, Any]]:
    if isinstance(value, dict) and value:  # an empty one is a value, such as zeropp_loco_param's
        for key, item in value.items():
            yield from _leaves(item, (*route, key))
    else:
        yield route, value
