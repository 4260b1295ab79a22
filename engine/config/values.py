"""The values of a config in force, each with its origin: the way back from what `load` makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from redline.config.document import format_route
from redline.config.explain import catalog
from redline.config.messages import shown
from redline.config.root import BATCH_KEYS, EngineConfig
from redline.config.section import HONOURED

__all__ = ["Difference", "Value", "differences", "effective", "fingerprint", "origins"]


class Value(NamedTuple):
    """A value in force and its origin: "given", "default", "derived" or "auto"; "unread" for a key without effect."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{shown(self.value)} ({self.origin})"


def effective(config: EngineConfig) -> dict[str, Value]:
    """Every value of a config by its path: those in force, and those that were given and have no effect."""
    statuses = {entry.key: entry.status for entry in catalog().values()}
    given = {route for route, _ in _leaves(config.model_dump(exclude_unset=True))}
    written, values = config.as_written().settings, {}
    for route, value in _leaves(config.model_dump(mode="json")):
        # A key has its section's status where it has none of its own.
        known = next(route[:depth] for depth in range(len(route), 0, -1) if ".".join(route[:depth]) in statuses)
        origin = "auto" if config.is_auto(route) else "given" if route in given else "default"
        if statuses[".".join(known)] == HONOURED:
            values[format_route(route)] = Value(value, origin)
        elif origin != "default":  # nobody reads the default of a key without effect
            values[format_route(route)] = Value(value, "unread")
    for name, value in written.items():
        if statuses.get(name, HONOURED) != HONOURED:
            values |= {format_route(route): Value(leaf, "unread") for route, leaf in _leaves(value, (name,))}
    # A batch size that nothing tells yet has no value; one that was inferred is in the fields that are set.
    for name in BATCH_KEYS:
        origin = "auto" if config.is_auto((name,)) else "derived" if written.get(name) is None else "given"
        values[name] = Value(getattr(config, name) or None, origin)
    return values


def _leaves(value: Any, route: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:  # an empty one is a value, such as zeropp_loco_param's
        for key, item in value.items():
            yield from _leaves(item, (*route, key))
    else:
        yield route, value


def origins(config: EngineConfig) -> dict[str, str]:
    """Where each value in force comes from: "given", "default", "derived" or "auto", by its path."""
    return {path: value.origin for path, value in effective(config).items() if value.origin != "unread"}


def fingerprint(config: EngineConfig) -> dict[str, str]:
    """The values in force as text, by path: what ranks that train together must agree on."""
    found = effective(config).items()
    return {path: json.dumps(value.value, sort_keys=True) for path, value in found if value.origin != "unread"}


class Difference(NamedTuple):
    """A path whose value differs in two configs; None where a config does not have it."""

    path: str
    first: Value | None
    second: Value | None


def differences(first: EngineConfig, second: EngineConfig) -> list[Difference]:
    """Where two configs in force are not the same; where a value comes from does not count.

    What only follows from another difference is left out: a value that is derived in both, and the defaults of a type
    that one of them has.
    """
    one, other = effective(first), effective(second)
    found = [Difference(path, one.get(path), other.get(path)) for path in {**one, **other}]
    return [each for each in found if not _is_same(each.first, each.second)]


def _is_same(first: Value | None, second: Value | None) -> bool:
    if first is None or second is None:
        return (first or second or Value(None, "default")).origin == "default"
    return first.origin == second.origin == "derived" or json.dumps(first.value) == json.dumps(second.value)
