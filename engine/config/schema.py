"""The schema of the config: all that is known of every key, from the models and `refused.json`.

`whole_schema` is JSON Schema (draft 2020-12) with words of our own: `status`, `note`, `allowed`, `switch` and `on` for
a key, `aliases`, `auto`, `loose` and `retired` for a section; see `section`. `build_schema` makes of it the schema for
editors. That one accepts what `load_config` accepts, aside from what no schema can tell: rules across keys, duplicate
keys, and the parameters of classes that have no model here. A refused key may have the values that ask for nothing.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from redline.config.components import AUTO_PARAMS, COMPONENTS, Component
from redline.config.root import EngineConfig
from redline.config.section import FROM_DATA, HONOURED, NO_EFFECT, NOT_HERE, REFUSED, Schema, Section, options

__all__ = [
    "as_arguments", "build_schema", "examples", "home_of", "is_switched_off", "on_auto", "params_schema", "refuses",
    "schema_of", "section_of", "whole_schema",
]  # fmt: skip

# The groups of keys in `refused.json`: status, how the note starts, and what else holds for all of them.
_GROUPS: dict[str, tuple[str, str, Schema]] = {
    "no effect": (NO_EFFECT, "", {}),
    "not built yet": (REFUSED, "not built yet; ", {"switch": "enabled"}),
    "not planned": (REFUSED, "", {}),
    "removed by DeepSpeed": (
        REFUSED,
        "DeepSpeed has removed it, and refuses a config that has it; ",
        {"switch": "enabled", "on": True},
    ),
}
_OFF = [False, None, "auto", "none"]  # and 0, which equals False: what a switch says when it is off


@cache
def whole_schema() -> Schema:
    """The schema of all keys, except for the parameters of optimizers and schedules: see `params_schema`."""
    # The walk over a document, `explain` and the schema for editors all start from this one.
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

    for name, (status, note, common) in _GROUPS.items():
        for key, row in data[name].items():
            if isinstance(row, list):
                *row, why = row
                found = described(*row)
            else:
                why, inner = row.pop("note"), row.pop("section", "object")
                meaning = sections.get(inner, row)["description"]
                found = {"anyOf": [values(inner), {"enum": [False, None]}], "default": None, **common, **row}
                found["description"] = meaning
            schema["properties"][key] = {"status": status, "note": note + why, **found}
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


@cache
def schema_of(model: type[Section]) -> Schema:
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
    values = dict(params)
    for name, key in schema["properties"].items():
        value = values.get(name)
        if type(value) is int and any(option.get("type") == "number" for option in options(key)):
            values[name] = float(value)
        elif "prefixItems" in key and isinstance(value, list):
            values[name] = tuple(value)
    return values


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
    return _has_refused_values(key) and value not in _values_off(key) and not is_switched_off(key, value)


def is_switched_off(key: Schema, value: Any) -> bool:
    """Whether the value of a key with a switch inside asks for nothing: the section is off, or not there."""
    if isinstance(value, dict) and "switch" in key:
        return not value or value.get(key["switch"], key.get("on", False)) in _OFF
    return "switch" in key and value in _values_off(key)


def _has_refused_values(key: Schema) -> bool:
    return key.get("status") == REFUSED or "allowed" in key


def _values_off(key: Schema) -> list[Any]:
    values = [None, key.get("default"), *key.get("allowed", []), *([False] if _is_section(key) else [])]
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _written_off(key: Schema) -> Schema:
    """The same for editors: with 0 and 1 for false and true, which differ in JSON Schema; no section is 0."""
    values = _values_off(key)
    return {"enum": [*values, *(int(value) for value in values if isinstance(value, bool) and not _is_section(key))]}


def _is_section(key: Schema) -> bool:
    return any("$ref" in option or option.get("type") == "object" for option in options(key))


# -- the schema for editors ------------------------------------------------------------------------------


def build_schema() -> Schema:
    """The JSON Schema of a config, for editors."""
    whole = copy.deepcopy(whole_schema())
    definitions = whole.pop("$defs")
    for component in COMPONENTS.values():
        for model in component.models.values():
            definition = definitions[model.__name__] = copy.deepcopy(schema_of(model))
            if limits := _limits(definition):
                definition["allOf"] = limits
        _choose_params(component, definitions)
    whole["properties"] = {name: _limited(key) for name, key in whole["properties"].items()}
    # Last, since what is refused is told by words of our own, which are taken out here.
    for section in (whole, *definitions.values()):
        _publish(section)
    whole["properties"] = {"$schema": {"description": "The schema of this file, for editors."}, **whole["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "Redline config",
        "description": "A training run in DeepSpeed's JSON, as Redline reads it.",
        "$defs": dict(sorted(definitions.items())),
    }


def _choose_params(component: type[Component], definitions: Schema) -> None:
    """Tie a section's ``params`` to its ``type``."""
    section = definitions[component.__name__]
    # Names are offered, not imposed: torch has more, and so may the script that registers its own.
    section["properties"]["type"] |= {
        "anyOf": [{"enum": list(component.models)}, {"type": "string"}],
        "not": {"pattern": _any_case(component.not_built)},
    }
    section["allOf"] = []
    for name, model in component.models.items():
        named = {"pattern": _any_case([name])} if name in component.any_case else {"const": name}
        reference = {"$ref": f"#/$defs/{model.__name__}"}
        then: Schema = {"properties": {"params": {"anyOf": [reference, {"type": "null"}]}}}
        if "required" in definitions[model.__name__]:
            then = {"properties": {"params": reference}, "required": ["params"]}
        section["allOf"].append({"if": {"properties": {"type": named}, "required": ["type"]}, "then": then})


def _any_case(names: Iterable[str]) -> str:
    """A pattern for names in upper or lower case; JSON Schema's patterns have no flag for it."""
    letters = (
        "".join(f"[{each.upper()}{each}]" if each.isalpha() else each for each in name.lower()) for name in names
    )
    return f"^({'|'.join(letters)})$"


def _limited(key: Schema) -> Schema:
    """A key at the top without the values that are refused."""
    if key.get("status") == REFUSED and not _is_section(key):
        words = {word: item for word, item in key.items() if word not in ("anyOf", "type")}
        return {**_written_off(key), **words}
    if key.get("status") == REFUSED:
        section, *_ = key["anyOf"]
        return {**key, "anyOf": [{"enum": _values_off(key)}, {"allOf": [section, _switched_off(key)]}]}
    section = section_of(key)
    limits = _limits(section) if section else []
    if limits and "switch" in key:
        limits = [{"anyOf": [_switched_off(key), {"allOf": limits}]}]
    return {**key, "allOf": limits} if limits else key


def _switched_off(key: Schema) -> Schema:
    """`is_switched_off` of an object, as a schema."""
    off: Schema = {"properties": {key["switch"]: {"enum": [*_OFF, 0]}}}
    if key.get("on"):
        empty = {"properties": {}, "additionalProperties": False, **_COMMENTS}
        return {"anyOf": [empty, {**off, "required": [key["switch"]]}]}
    return off


def _limits(section: Schema) -> list[Schema]:
    """The values that refused keys within a section may have."""
    limits = []
    for name, key in section["properties"].items():
        inner = section_of(key)
        found = [_written_off(key)] if _has_refused_values(key) else _limits(inner) if inner else []
        limits += [{"properties": {name: limit}} for limit in found]
    return limits


_COMMENTS = {"patternProperties": {"^(_|//)": {"description": "A comment; not read."}}}
_TEXT = ("description", "default", "examples")
_OURS = ("status", "note", "allowed", "switch", "on")


def _with_digits(key: Schema) -> Schema:
    """A key that may be true or false, as `load` takes it: 1 and 0, too, unless it may be another number."""
    kinds = [option.get("type") for option in options(key)]
    if "boolean" not in kinds or "number" in kinds or "integer" in kinds or _is_section(key):
        return key
    if "anyOf" in key:
        return {**key, "anyOf": [_with_digits(option) for option in key["anyOf"]]}
    return {"enum": [True, False, 1, 0], **{word: item for word, item in key.items() if word != "type"}}


def _publish(section: Schema) -> None:
    """Make a section plain JSON Schema: with "auto", comments and other spellings where they are accepted."""
    properties = section["properties"]
    autos = [name for name in properties if on_auto(section, name) not in (None, NOT_HERE, FROM_DATA)]
    for name, key in properties.items():
        plain = _with_digits({word: item for word, item in key.items() if word not in _OURS})
        if key.get("status", HONOURED) != HONOURED:
            meaning = f"{key['description']} " if "description" in key else ""
            plain["description"] = f"{meaning}{key['status'].capitalize()}: {key['note']}."
        # Around the values alone: editors show the text of the property itself.
        if name in autos:
            text = {word: plain.pop(word) for word in _TEXT if word in plain}
            plain = {"anyOf": [plain, {"const": "auto"}], **text}
        properties[name] = plain
    spellings: dict[str, list[str]] = {}
    for alias, name in section.pop("aliases", {}).items():
        properties[alias] = {**properties[name], "description": f"Another spelling of {name}."}
        spellings.setdefault(name, [name]).append(alias)
    if spellings:  # of one key only one may be given
        pairs = [list(pair) for names in spellings.values() for pair in combinations(names, 2)]
        section["not"] = {"anyOf": [{"required": pair} for pair in pairs]}
    section.update(_COMMENTS)
    for trait in ("auto", "loose", "retired"):
        section.pop(trait, None)
