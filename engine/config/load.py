"""The way in: a path, a dict or JSON text becomes an `EngineConfig`, or one error with everything wrong with it.

A document is read in three steps. `Reading` walks it along the schema: spelling, unknown keys, "auto", what is
refused. pydantic makes the config of what is left; only where it cannot, or where a key has no model, jsonschema tells
everything that is wrong. Last come the rules between keys, on what is sound.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from redline.config.components import COMPONENTS
from redline.config.document import ENDLESS, Document, Route, copy_document, looks_like_json, parse, read
from redline.config.root import (
    BATCH_KEYS,
    Batch,
    EngineConfig,
    World,
    conflicts,
    count_steps,
    find_world,
    resolve_batch,
    unbuilt,
)
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
from redline.config.section import (
    FROM_DATA,
    NOT_HERE,
    REFUSED,
    TO_NULL,
    Conflict,
    Schema,
    Section,
    faults,
    is_slip,
    objection,
    options,
    shown,
    unknown_key,
)
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
        self.document = _open(source)
        # By route; routes have the keys' own spelling until `_problems`.
        self._wrong: dict[Route, str] = dict(self.document.mistakes)
        if self._wrong.get(("steps_per_print",)) == ENDLESS:
            del self._wrong["steps_per_print",]  # null stands there, which is never, too
        self._refused: dict[Route, str] = {}
        self._unsound: set[Route] = set()  # taken out for a mistake; a rule that reads it does not count
        self._spelling: dict[Route, str] = {}  # how the document spells a key
        self._autos: set[Route] = set()
        # The schema of the optimizer's and the schedule's parameters, with their values.
        self._params: dict[str, tuple[Schema, dict[str, Any]]] = {}

        found = find_world(world_size)
        world = found if isinstance(found, World) else None
        self._num_steps = count_steps(self.document.settings, world, num_samples) if num_samples and world else None
        config = self._find_everything(world)
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

    def _find_everything(self, world: World | None) -> EngineConfig:
        """The config without what is wrong."""
        values = self._section(whole_schema(), self.document.settings, ())
        config = _modelled(values)
        # Keys of refused.json have no model, nor have parameters that are checked against a signature.
        unmodelled = any("title" not in schema for schema, _ in self._params.values())
        unmodelled |= any(values[name] is not None for name in values.keys() - EngineConfig.model_fields.keys())
        # jsonschema takes longer to import than all of this: most configs never need it.
        if config is None or unmodelled:
            self._check(values)
        config = config or EngineConfig.model_validate(_ours(values))
        # Rules read a config that is sound, with defaults in the place of what is not.
        for keys, message in (*_within_sections(config), *conflicts(config, world)):
            self._note_conflict(self._wrong, keys, message)
        # After the mistakes: what contradicts another key is no request for a feature.
        for keys, message in unbuilt(config):
            self._note_conflict(self._refused, keys, message)
        return config

    def _note_conflict(self, found: dict[Route, str], keys: str, message: str) -> None:
        reads: list[Route] = [tuple(key.split(".")) for key in keys.split()]
        if not any(route[: len(gone)] == gone for route in reads for gone in self._unsound):
            found.setdefault(reads[0], message)
            self._unsound.add(reads[0])

    def _resolve_batch(self, config: EngineConfig, world: World) -> Batch | None:
        if any(route[0] in BATCH_KEYS for route in self._wrong if route):
            return None
        given = {key: getattr(config, key) for key in BATCH_KEYS if key in config.model_fields_set}
        found = resolve_batch(given, world)
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
        """A section as its model takes it: known keys under their own names, no "auto".

        Args:
            refusing: whether what is not built is refused here; not in a section that is off or refused as a whole.
        """
        values: dict[str, Any] = {}
        for key, item in value.items():
            name = schema.get("aliases", {}).get(key, key)
            place, found = (*route, name), schema["properties"].get(name)
            if name != key and (name in value or name in values):
                self._wrong[(*route, key)] = f"given next to {name}, which is the same; remove it"
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
                    values[name] = found["examples"][0]
            elif item is not None or name not in BATCH_KEYS or route:
                values[name] = self._value(found, item, place, refusing)
        return values

    def _value(self, key: Schema, value: Any, route: Route, refusing: bool) -> Any:
        if refusing and refuses(key, value):
            self._refused[route] = key["note"] if isinstance(value, dict) else f"got {shown(value)}; {key['note']}"
        section = section_of(key)
        if section is None or not isinstance(value, dict):
            return _plain(key, value, is_section=section is not None)
        if route[0] in COMPONENTS and len(route) == 1:
            return self._component(section, value, route)
        refusing = refusing and key.get("status") != REFUSED and not is_switched_off(key, value)
        if not any("additionalProperties" in option for option in options(key)):
            return self._section(section, value, route, refusing)
        named = {name: item for name, item in value.items() if isinstance(item, dict)}  # sections by names of their own
        return value | {name: self._section(section, item, (*route, name), refusing) for name, item in named.items()}

    def _component(self, section: Schema, value: dict[str, Any], route: Route) -> dict[str, Any] | None:
        """The optimizer or the scheduler; None if its type cannot be used: what it takes is not known then."""
        component = COMPONENTS[str(route[0])]
        values = self._section(section, {key: item for key, item in value.items() if key != "params"}, route)
        name, params = values.get("type"), value.get("params")
        if not isinstance(name, str):
            return values
        values["type"] = name = component.canonical(name)
        if found := component.objection_to(name):
            message, refused = found
            (self._refused if refused else self._wrong)[(*route, "type")] = message
            self._unsound.add(route)
            return None
        schema = params_schema(component, name)
        if params is None or isinstance(params, dict):
            params = self._section(schema, params or {}, (*route, "params"))
            self._params[component.kind] = (schema, params)
        else:
            self._wrong[(*route, "params")] = objection(params, schema)
            self._unsound.add((*route, "params"))
            params = examples(schema)
        values["params"] = params if name in component.models else as_arguments(schema, params)
        return values

    def _note_unknown(self, section: Schema, key: str, route: Route) -> None:
        if len(self._wrong) + len(self._refused) > _SEARCHED:
            self._wrong.setdefault((*route, key), "unknown key")
            return
        known = [*section["properties"], *([] if route else section["aliases"])]
        reason, home = section.get("retired", {}).get(key), home_of(key, route)
        # DeepSpeed ignores it in a loose section: only what looks like a typing error is a mistake there. The rest may
        # be meant for other readers of the file.
        foreign = section.get("loose") and (home or not is_slip(key, known))
        found = self._refused if reason or foreign else self._wrong
        found.setdefault((*route, key), reason or unknown_key(key, known, home))

    # -- types, ranges and what is missing

    def _check(self, values: dict[str, Any]) -> None:
        """Note everything that the schema does not allow, and take it out."""
        from jsonschema import Draft202012Validator  # type: ignore[import-untyped,unused-ignore]

        checks: list[tuple[Schema, Any, Route]] = [(whole_schema(), values, ())]
        checks += [(schema, params, (kind, "params")) for kind, (schema, params) in self._params.items()]
        for schema, value, prefix in checks:
            for error in list(Draft202012Validator(schema).iter_errors(value)):
                for route, message in faults(error):
                    self._wrong.setdefault((*prefix, *route), message)
                    # An item that is wrong takes its list with it: what is left of it means something else.
                    place = tuple(itertools.takewhile(lambda part: isinstance(part, str), route))
                    if not prefix and place[1:] == ("type",) and place[0] in COMPONENTS:
                        place = place[:1]  # what it would take is not known without its type
                    self._unsound.add((*prefix, *place))
                    holder = value
                    for part in place[:-1]:
                        holder = holder.get(part, {})
                    holder.pop(place[-1], None)
            value.update({**examples(schema), **value})


def _ours(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in EngineConfig.model_fields}


def _modelled(values: dict[str, Any]) -> EngineConfig | None:
    """The config of these values; None if they are not valid."""
    try:
        return EngineConfig.model_validate(_ours(values))
    except ValidationError:
        return None


def _plain(key: Schema, value: Any, is_section: bool) -> Any:
    """A value that is no object as a model takes it: a section's other spellings, 2e3 for an integer, 1 for true."""
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
