"""The way in: a path, a dict or JSON text becomes an `EngineConfig`, or one error with everything wrong with it.

`Reading` walks a document along the schema, key by key: spelling, unknown keys, "auto", what is refused, types and
ranges. pydantic makes the config of what is sound. Last come the rules between keys.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from redline.config import root
from redline.config.components import COMPONENTS
from redline.config.document import ENDLESS, Document, Route, copy_document, looks_like_json, parse, read
from redline.config.messages import Schema, describe, faults, is_slip, options, shown, unknown_key
from redline.config.root import BATCH_KEYS, Batch, EngineConfig, World
from redline.config.schema import (
    as_arguments,
    examples,
    home_of,
    is_switched_off,
    on_auto,
    params_schema,
    refuses,
    section_of,
    whole_schema,
)
from redline.config.section import FROM_DATA, NOT_HERE, REFUSED, TO_NULL, Conflict, Section
from redline.errors import ConfigError, Problem

__all__ = ["Reading", "Source", "UnsupportedConfigError", "in_order", "load_config"]

Source = str | Path | Mapping[str, Any] | TextIO | Document | EngineConfig

_SEARCHED = 200  # unknown keys for which similar ones are looked for: a file with more is no config

_FILLED_IN = 'got "auto", which Hugging Face\'s integration fills in and nothing here can; give'
_NUM_STEPS = "a number, or redline.epochs, and training_data of a known length to initialize"


class UnsupportedConfigError(ConfigError):
    """A valid DeepSpeed config that asks for what is not built here, and has no other problem."""


def load_config(source: Source, *, world_size: int | None = None, num_samples: int | None = None) -> EngineConfig:
    """Read a config and fill in its batch sizes.

    Args:
        source: a path, a dict (it is copied), JSON text, an open text file, or a config that was loaded before.
        world_size: ranks that will train; default torchrun's WORLD_SIZE, else 1. A loaded config keeps its own.
        num_samples: of the training data, from which ``redline.epochs`` tells a ``total_num_steps`` that is "auto".

    Raises:
        UnsupportedConfigError: the config is valid, but asks for what is not built.
        ConfigError: the config is not valid. All problems of either kind are in the error.
    """
    if isinstance(source, EngineConfig) and source.world_size and world_size in (None, source.world_size):
        return source
    reading = Reading(source, world_size, num_samples)
    if reading.config is not None and not reading.refusals:
        return reading.config
    problems = in_order([*reading.mistakes, *reading.refusals])
    raise (ConfigError if reading.mistakes else UnsupportedConfigError)(problems, reading.document.source)


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """As they come in the document; those of a dict as they were found."""
    return sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0))


def _open(source: Any) -> Document:
    if isinstance(source, (Document, EngineConfig)):
        return source if isinstance(source, Document) else source.as_written()
    if isinstance(source, Mapping):
        return copy_document(source)
    if isinstance(source, io.TextIOBase):
        return parse(source.read(), getattr(source, "name", "config"))
    if isinstance(source, str) and looks_like_json(source):
        return parse(source)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and os.path.exists(source)):
        return read(Path(source))
    if isinstance(source, str):
        message = f'neither a file nor JSON text: nothing of this name in {Path.cwd()}, and JSON text starts with "{{"'
        raise ConfigError([Problem("", message)], shown(source))
    message = f"got a Python {type(source).__name__}; expected a path, a dict, JSON text or an EngineConfig"
    raise ConfigError([Problem("", message)])


class Reading:
    """A document and what was found in it.

    Attributes:
        document: as it was written.
        config: the part of it that is honoured; None if there are mistakes. Without a world size where its batch
            cannot be told.
        mistakes: what is wrong, in the order of the document.
        refusals: what is valid DeepSpeed and not built, likewise.

    Raises:
        ConfigError: there is no document to read: no such file, no JSON.
    """

    def __init__(self, source: Source, world_size: int | None, num_samples: int | None = None) -> None:
        from jsonschema import Draft202012Validator  # type: ignore[import-untyped,unused-ignore]

        self.document = _open(source)
        # By route; routes have the keys' own spelling until `_problems`.
        self._wrong: dict[Route, str] = dict(self.document.mistakes)
        if self._wrong.get(("steps_per_print",)) == ENDLESS:
            del self._wrong["steps_per_print",]  # null stands there, which is never, too
        self._refused: dict[Route, str] = {}
        self._unsound: set[Route] = set()  # what has a mistake, or no value; a rule that reads it does not count
        self._spelling: dict[Route, str] = {}  # how the document spells a key
        self._autos: set[Route] = set()
        self._validator = Draft202012Validator(whole_schema())

        found = root.find_world(world_size)
        world = found if isinstance(found, World) else None
        settings = self.document.settings
        self._num_steps = root.count_steps(settings, world, num_samples) if num_samples and world else None
        values = self._section(whole_schema(), settings, ())
        ours = {name: value for name, value in values.items() if name in EngineConfig.model_fields}
        config = EngineConfig.model_validate(ours)
        for keys, message in (*_within_sections(config), *root.conflicts(config, world)):
            self._note_conflict(self._wrong, keys, message)
        # After the mistakes: what contradicts another key is no request for a feature.
        for keys, message in root.unbuilt(config):
            self._note_conflict(self._refused, keys, message)
        batch = self._resolve_batch(config, world) if world else None
        self.mistakes = [*([] if world else [Problem("", str(found))]), *self._problems(self._wrong)]
        paths = {problem.path for problem in self.mistakes}
        self.refusals = [problem for problem in self._problems(self._refused) if problem.path not in paths]
        size = world.size if world and batch else None
        self.config = None if paths else config.resolved(self.document, frozenset(self._autos), batch, size)

    def _problems(self, found: dict[Route, str]) -> list[Problem]:
        """As the document spells the keys, in its order."""
        problems = []
        for route, message in found.items():
            written = (self._spelling.get(route[: depth + 1], part) for depth, part in enumerate(route))
            problems.append(self.document.problem(tuple(written), message))
        return in_order(problems)

    def _note_mistake(self, route: Route, message: str) -> None:
        self._wrong.setdefault(route, message)
        # An item that is wrong takes its list with it: what is left of it means something else.
        self._unsound.add(tuple(itertools.takewhile(lambda part: isinstance(part, str), route)))

    def _note_conflict(self, found: dict[Route, str], keys: str, message: str) -> None:
        reads: list[Route] = [tuple(key.split(".")) for key in keys.split()]
        if not any(route[: len(gone)] == gone for route in reads for gone in self._unsound):
            found.setdefault(reads[0], message)
            self._unsound.add(reads[0])

    def _resolve_batch(self, config: EngineConfig, world: World) -> Batch | None:
        if any(route[0] in BATCH_KEYS for route in self._wrong if route):
            return None
        given = {key: getattr(config, key) for key in BATCH_KEYS if key in config.model_fields_set}
        found = root.resolve_batch(given, world)
        if isinstance(found, Batch):
            return found
        auto = next((key for key in BATCH_KEYS if (key,) in self._autos), None)
        if auto and given.keys().isdisjoint(BATCH_KEYS[:2]):
            self._refused[auto,] = f"{_FILLED_IN} {' or '.join(BATCH_KEYS[:2])} a number"
        else:
            self._wrong[BATCH_KEYS[:1]] = found
        return None

    # -- the walk along the schema

    def _section(self, schema: Schema, value: dict[str, Any], route: Route, refusing: bool = True) -> dict[str, Any]:
        """A section as its model takes it: sound values under the keys' own names, no "auto".

        Args:
            refusing: whether what is not built is refused here; not in a section that is off or refused as a whole.
        """
        values: dict[str, Any] = {}
        for key, item in value.items():
            name = schema.get("aliases", {}).get(key, key)
            place, found = (*route, name), schema["properties"].get(name)
            if name != key and (name in value or name in values):
                self._note_mistake((*route, key), f"given next to {name}, which is the same; remove it")
                continue
            self._spelling[place] = key  # also where it is the same: a longer route may pass an alias
            if found is None and schema["additionalProperties"]:
                values[name] = item
            elif found is None:
                self._note_unknown(schema, key, route)
            elif item == "auto" and (outcome := on_auto(schema, name)):
                self._autos.add(place)
                if outcome == TO_NULL:
                    values[name] = None
                elif outcome == FROM_DATA and self._num_steps:
                    values[name] = self._num_steps
                elif outcome in (FROM_DATA, NOT_HERE):
                    self._refused[place] = f"{_FILLED_IN} {_NUM_STEPS if outcome == FROM_DATA else 'a number'}"
                    self._unsound.add(place)
            elif item is not None or name not in BATCH_KEYS or route:
                typed = self._value(found, item, place, refusing)
                values |= {} if place in self._unsound else {name: typed}
        for name in schema.get("required", ()):
            if name not in values and (*route, name) not in self._unsound:
                self._note_mistake((*route, name), f"missing; expected {describe(schema['properties'][name])}")
        if "if" in schema:
            self._check({**value, **values}, {word: schema[word] for word in ("if", "then")}, route)
        return {**examples(schema), **values}

    def _value(self, key: Schema, value: Any, route: Route, refusing: bool) -> Any:
        if refusing and refuses(key, value):
            self._refused[route] = key["note"] if isinstance(value, dict) else f"got {shown(value)}; {key['note']}"
        section = section_of(key)
        value = _typed(key, value, is_section=section is not None)
        if section is None or not isinstance(value, dict):
            self._check(value, key, route)
            return value
        if route[0] in COMPONENTS and len(route) == 1:
            return self._component(section, value, route)
        refusing = refusing and key.get("status") != REFUSED and not is_switched_off(key, value)
        for option in options(key):
            if isinstance(named := option.get("additionalProperties"), dict):  # sections by names of their own
                return {name: self._value(named, item, (*route, name), refusing) for name, item in value.items()}
        return self._section(section, value, route, refusing)

    def _check(self, value: Any, schema: Schema, route: Route) -> None:
        for error in self._validator.evolve(schema=schema).iter_errors(value):
            for place, message in faults(error):
                self._note_mistake((*route, *place), message)

    def _component(self, section: Schema, value: dict[str, Any], route: Route) -> dict[str, Any] | None:
        """The optimizer or the scheduler; None if its type cannot be used: what it takes is not known then."""
        component = COMPONENTS[str(route[0])]
        values = self._section(section, {key: item for key, item in value.items() if key != "params"}, route)
        if (*route, "type") in self._unsound:
            return None
        values["type"] = name = component.canonical(values["type"])
        if found := component.objection_to(name):
            message, refused = found
            (self._refused if refused else self._wrong)[(*route, "type")] = message
            return None
        schema, given, place = params_schema(component, name), value.get("params"), (*route, "params")
        self._check(given, section["properties"]["params"], place)
        params = examples(schema) if place in self._unsound else self._section(schema, given or {}, place)
        values["params"] = params if name in component.models else as_arguments(schema, params)
        return values

    def _note_unknown(self, section: Schema, key: str, route: Route) -> None:
        if len(self._wrong) + len(self._refused) > _SEARCHED:
            self._note_mistake((*route, key), "unknown key")
            return
        known = [*section["properties"], *([] if route else section["aliases"])]
        reason, home = section.get("retired", {}).get(key), home_of(key, route)
        # DeepSpeed ignores it in a loose section: only what looks like a typing error is a mistake there. The rest may
        # be meant for other readers of the file.
        if reason or (section.get("loose") and (home or not is_slip(key, known))):
            self._refused.setdefault((*route, key), reason or unknown_key(key, known, home))
        else:
            self._note_mistake((*route, key), unknown_key(key, known, home))


def _typed(key: Schema, value: Any, is_section: bool) -> Any:
    """A value in the type that is meant: a section's other spellings, 2e3 for an integer, 1 for true."""
    kinds = {option.get("type") for option in options(key)}
    if is_section and isinstance(value, bool):
        allowed = [word for option in options(key) for word in option.get("enum", [option.get("const")])]
        return value if "boolean" not in kinds and value not in allowed else {"stage": 1} if value else None
    if isinstance(value, float) and "integer" in kinds and "number" not in kinds and value.is_integer():
        return int(value)
    if not is_section and "boolean" in kinds and not kinds & {"integer", "number"} and value in (0, 1):
        return bool(value)
    return value


def _within_sections(section: Section, prefix: str = "") -> Iterator[Conflict]:
    """The rules within each section, the innermost first."""
    for name, value in section:
        if isinstance(value, Section):
            yield from _within_sections(value, f"{prefix}{name}.")
    for keys, message in section.conflicts():
        yield " ".join(f"{prefix}{key}" for key in keys.split()), message
