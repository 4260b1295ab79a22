"""The JSON Schema (draft 2020-12) of the config, from the models and the status table.

It says yes and no to what `load_config` says yes and no to, apart from what no schema can tell: rules
across keys, duplicate keys, and the names and parameters of classes that have no model here (torch's other
classes, registered ones). A key that is refused is allowed the values that switch nothing on.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from engine.config.batch import BATCH_KEYS
from engine.config.catalog import models
from engine.config.component import Component
from engine.config.optimizer import OptimizerConfig
from engine.config.root import EngineConfig
from engine.config.scheduler import SchedulerConfig
from engine.config.section import NOT_HERE, Section
from engine.config.support import HONOURED, INSIDE, KEYS, NO_EFFECT, REFUSED, Key

__all__ = ["build_schema"]

JsonSchema = dict[str, Any]

_COMMENTS = {"^(_|//)": {"description": "A comment; not read."}}


def build_schema() -> JsonSchema:
    """The schema of a whole config."""
    schema = _schema_of(EngineConfig)
    definitions = schema.pop("$defs")
    definitions.pop("Section")  # what `params` is before its type is known
    for component in (OptimizerConfig, SchedulerConfig):
        _choose_params(component, definitions)
    properties: JsonSchema = {"$schema": {"description": "The schema that an editor checks this file against."}}
    for key in KEYS.values():
        if key.name in EngineConfig.aliases:
            continue
        if key.status == HONOURED:
            limits = _limits_inside(key.name)
            if key.switch is not None and limits:
                limits = [{"anyOf": [*_off_schema(key), {"allOf": limits}]}]
            properties[key.name] = schema["properties"][key.name] | ({"allOf": limits} if limits else {})
            continue
        if key.model is not None:
            section = _schema_of(key.model)
            definitions |= section.pop("$defs", {}) | {key.model.__name__: section}
        properties[key.name] = _table_schema(key)
    for name in BATCH_KEYS:
        given = properties[name]
        del given["default"]  # the model's stands for "not inferred yet"
        bounds = {word: given.pop(word) for word in ("type", "minimum")}
        properties[name] = {"anyOf": [bounds, {"type": "null"}], **given}
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Redline config",
        "description": "A training run in DeepSpeed's JSON, as Redline reads it.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": dict(sorted(definitions.items())),
    }
    _allow_spellings(EngineConfig, whole)
    for model in models():
        _allow_spellings(model, definitions[model.__name__])
    _allow_comments(whole)
    return whole


class _Untitled(GenerateJsonSchema):
    """pydantic's generator without a title for each property that only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schema_of(model: type[BaseModel]) -> JsonSchema:
    return model.model_json_schema(schema_generator=_Untitled)


def _choose_params(component: type[Component], definitions: JsonSchema) -> None:
    """Tie a section's ``params`` to its ``type``."""
    section = definitions[component.__name__]
    # Names are offered, not imposed: torch has more, and so may the script that registers its own.
    section["properties"]["type"] |= {
        "anyOf": [{"enum": list(component.models)}, {"type": "string"}],
        "not": {"pattern": _any_case(component.not_built)},
    }
    section["properties"]["params"] = {"type": ["object", "null"], "description": "Parameters of the type."}
    section["allOf"] = []
    for name, model in component.models.items():
        params = definitions[model.__name__] = _schema_of(model)
        named = {"pattern": _any_case([name])} if name in component.any_case else {"const": name}
        reference = {"$ref": f"#/$defs/{model.__name__}"}
        then: JsonSchema = {"properties": {"params": {"anyOf": [reference, {"type": "null"}]}}}
        if "required" in params:
            then = {"properties": {"params": reference}, "required": ["params"]}
        section["allOf"].append({"if": {"properties": {"type": named}, "required": ["type"]}, "then": then})


def _any_case(names: Iterable[str]) -> str:
    """A pattern for names in upper or lower case; JSON Schema's patterns have no flag for it."""
    letters = (
        "".join(f"[{each.upper()}{each}]" if each.isalpha() else each for each in name.lower()) for name in names
    )
    return f"^({'|'.join(letters)})$"


def _table_schema(key: Key) -> JsonSchema:
    """A key outside the honoured ones: any value of its type, or if it is refused those that switch nothing on."""
    status = "Refused" if key.status == REFUSED else "No effect"
    text = {"description": f"{status}: {key.note}.", "default": key.default}
    if not key.is_section:
        schema = key.adapter.json_schema() if key.status == NO_EFFECT else {"enum": _values_off(key)}
        return {**schema, **text}
    section: JsonSchema = {"$ref": f"#/$defs/{key.model.__name__}"} if key.model else {"type": "object"}
    limits = _off_schema(key) if key.status == REFUSED else _limits_inside(key.name)
    return {"anyOf": [{"enum": _values_off(key)}, {"allOf": [section, *limits]} if limits else section], **text}


def _values_off(key: Key) -> list[Any]:
    values = [None, key.default, *key.off, *([False] if key.is_section else [])]
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _off_schema(key: Key) -> list[JsonSchema]:
    """`Key.is_off` of an object, as a schema."""
    off: JsonSchema = {"properties": {key.switch or "": {"enum": [False, None, 0, "auto", "none"]}}}
    if key.on:
        empty = {"properties": {}, "additionalProperties": False}  # but for comments
        return [{"anyOf": [empty, {**off, "required": [key.switch]}]}]
    return [off]


def _limits_inside(name: str) -> list[JsonSchema]:
    """The values that keys within a section may have though they are refused."""
    limits = []
    for key in INSIDE.values():
        if key.refuses and key.name.startswith(f"{name}."):
            limit: JsonSchema = {"enum": _values_off(key)}
            for part in reversed(key.name.split(".")[1:]):
                limit = {"properties": {part: limit}}
            limits.append(limit)
    return limits


def _allow_spellings(model: type[Section], schema: JsonSchema) -> None:
    """Let a section have "auto" and other spellings of its keys where its model takes them."""
    properties = schema["properties"]
    for name in model.model_fields:
        if model.on_auto(name) not in (None, NOT_HERE):
            text = {word: properties[name].pop(word) for word in _TEXT if word in properties[name]}
            properties[name] = {"anyOf": [properties[name], {"const": "auto"}], **text}
    for alias, name in model.aliases.items():
        properties[alias] = {**properties[name], "description": f"Another spelling of {name}."}
    twice = [{"required": pair} for pair in _pairs(model.aliases)]
    if twice:
        schema["not"] = {"anyOf": twice}


def _pairs(aliases: dict[str, str]) -> list[list[str]]:
    """The spellings of one key that cannot stand side by side."""
    spellings: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        spellings.setdefault(name, [name]).append(alias)
    return [list(pair) for names in spellings.values() for pair in combinations(names, 2)]


_TEXT = ("description", "default", "examples")


def _allow_comments(schema: Any) -> None:
    """Let every object that limits its keys have some that are comments, as the reader does."""
    if isinstance(schema, dict):
        if schema.get("additionalProperties", True) is not True:
            schema["patternProperties"] = _COMMENTS
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            _allow_comments(item)
