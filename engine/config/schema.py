"""The schema of the config: all that is known of every key, from the models and `refused.json`.

It is JSON Schema (draft 2020-12) with words of our own: `status`, `note`, `allowed`, `switch` and `on` for a key,
`aliases`, `auto`, `loose` and `retired` for a section; see `section`. Documents are read along it; `explain`, the docs
and the schema for editors are made from it.
"""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from redline.config.components import AUTO_PARAMS, COMPONENTS, Component
from redline.config.messages import Schema, options
from redline.config.root import EngineConfig
from redline.config.section import REFUSED, Section

__all__ = [
    "OFF", "as_arguments", "examples", "home_of", "is_section", "is_switched_off", "on_auto", "params_schema",
    "refuses", "restricted", "schema_of", "section_of", "values_off", "whole_schema",
]  # fmt: skip

OFF = [False, None, "auto", "none"]  # and 0, which equals False: what a switch says when it is off


@cache
def whole_schema() -> Schema:
    """The schema of all keys, except for the parameters of optimizers and schedules: see `params_schema`."""
    schema = EngineConfig.model_json_schema(schema_generator=_Untitled)
    data = json.loads(Path(__file__).with_name("refused.json").read_text(encoding="utf-8"))
    sections = data["sections"]

    def values(kind: str | list[Any]) -> Schema:
        """A kind: a list of values, a type or a section; with a "?" also null."""
        if isinstance(kind, list):
            return {"enum": kind}
        name = kind.removesuffix("?")
        value = {"$ref": f"#/$defs/{name}"} if name in sections else data["types"].get(name, {"type": name})
        return {"anyOf": [value, {"type": "null"}]} if kind.endswith("?") else value

    def described(kind: str | list[Any], default: Any, meaning: str) -> Schema:
        return {**values(kind), "default": default, "description": meaning}

    for group in data["groups"]:
        status, prefix, keys = (group.pop(word) for word in ("status", "note", "keys"))
        for key, row in keys.items():
            if isinstance(row, list):
                *row, why = row
                found = described(*row)
            else:
                why, inner = row.pop("note"), row.pop("section", "object")
                value = {"anyOf": [values(inner), {"enum": [False, None]}], "default": None}
                found = {**value, **group, **row, "description": sections.get(inner, row)["description"]}
            schema["properties"][key] = {"status": status, "note": prefix + why, **found}
    for name, section in sections.items():
        if "retired" in section:
            section["retired"] = dict.fromkeys(*section["retired"])
        keys = {key: described(*row) for key, row in section.pop("keys").items()}
        schema["$defs"][name] = {"type": "object", **section, "properties": keys, "additionalProperties": False}
    return schema


class _Untitled(GenerateJsonSchema):
    """pydantic's generator without a title for each property that only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


# -- the parameters of a class ---------------------------------------------------------------------------


@cache
def schema_of(model: type[Section]) -> Schema:
    """The schema of the parameters that have a model."""
    return model.model_json_schema(schema_generator=_Untitled)


def params_schema(component: type[Component], name: str) -> Schema:
    """The schema of the parameters of an optimizer or a schedule: its model's, or made from its constructor."""
    if name in component.models:
        return schema_of(component.models[name])
    _, *parameters = inspect.signature(component.classes()[name]).parameters.values()  # the first is the engine's
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return {
        "type": "object",
        "properties": {each.name: _schema_of_parameter(each) for each in named},
        "additionalProperties": any(each.kind is each.VAR_KEYWORD for each in parameters),
        "required": [each.name for each in named if each.default is each.empty],
        "auto": AUTO_PARAMS,
    }


def _schema_of_parameter(parameter: inspect.Parameter) -> Schema:
    """What a parameter takes, from its name, its annotation or its default; anything if these do not tell."""
    if parameter.name in ("lr", "weight_decay", "momentum"):
        return {"type": "number", "minimum": 0}
    if parameter.name == "betas":
        items = [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}] * 2
        return {"type": "array", "prefixItems": items, "minItems": 2, "maxItems": 2}
    declared, default = parameter.annotation, parameter.default
    if declared in (int, "int"):
        return {"type": "integer"}
    if declared in (bool, "bool") or isinstance(default, bool):
        return {"type": "boolean"}
    if declared in (float, "float") or isinstance(default, (int, float)):
        return {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
    return {"type": "string"} if isinstance(default, str) else {}


def examples(schema: Schema) -> dict[str, Any]:
    """A sound value for each parameter that is required; one without an example has no model that checks it."""
    return {name: schema["properties"][name].get("examples", [None])[0] for name in schema.get("required", [])}


def as_arguments(schema: Schema, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters that no model converts: 1 is 1.0 where a float is expected, betas are a tuple."""

    def converted(key: Schema, value: Any) -> Any:
        if type(value) is int and any(option.get("type") == "number" for option in options(key)):
            return float(value)
        return tuple(value) if "prefixItems" in key and isinstance(value, list) else value

    return {name: converted(schema["properties"].get(name, {}), value) for name, value in params.items()}


# -- what is known of a key ------------------------------------------------------------------------------


def home_of(name: str, route: tuple[str | int, ...]) -> str | None:
    """Where a key belongs that is known further down; looked up at the top, and next to ``params``."""
    for component in COMPONENTS.values():
        if route in ((), (component.kind,)) and any(name in model.model_fields for model in component.models.values()):
            return f"{'move it into' if route else 'it belongs in'} {component.kind}.params"
    for key, schema in whole_schema()["properties"].items() if not route else ():
        section = section_of(schema)
        if section is not None and (name in section["properties"] or name in section.get("aliases", {})):
            return f"it belongs in {key}"
    return None


def section_of(key: Schema) -> Schema | None:
    """The schema of the section that a key may be; of the sections in it where it maps names to sections."""
    for option in options(key):
        if "$ref" in option:
            section: Schema = whole_schema()["$defs"][option["$ref"].rpartition("/")[2]]
            return section
        if isinstance(option.get("additionalProperties"), dict):
            return section_of(option["additionalProperties"])
    return None


def on_auto(section: Schema, name: str) -> str | None:
    """What becomes of "auto" as the value of a key; None where it is a value like any other, or none."""
    found = section["properties"].get(name)
    if found is None or any("auto" in each.get("enum", [each.get("const")]) for each in options(found)):
        return None
    auto = section.get("auto", {})
    outcome: str | None = auto.get(name, auto.get("*"))
    return outcome


def refuses(key: Schema, value: Any) -> bool:
    """Whether a value of the right type asks for what is not built."""
    return restricted(key) and value not in values_off(key) and not is_switched_off(key, value)


def is_switched_off(key: Schema, value: Any) -> bool:
    """Whether the value of a key with a switch inside asks for nothing: the section is off, or not there."""
    if isinstance(value, dict) and "switch" in key:
        return not value or value.get(key["switch"], key.get("on", False)) in OFF
    return "switch" in key and value in values_off(key)


def restricted(key: Schema) -> bool:
    """Whether some values of a key are refused."""
    return key.get("status") == REFUSED or "allowed" in key


def values_off(key: Schema) -> list[Any]:
    """The values of a key that ask for nothing."""
    values = [None, key.get("default"), *key.get("allowed", []), *([False] if is_section(key) else [])]
    return [value for index, value in enumerate(values) if value not in values[:index]]


def is_section(key: Schema) -> bool:
    """Whether a key may be an object."""
    return any("$ref" in option or option.get("type") == "object" for option in options(key))
