"""The JSON Schema of a config, for editors: `configs/schema.json`, and what `redline schema` prints.

It accepts what `load_config` accepts, aside from what no schema can tell: rules across keys, duplicate keys, and the
parameters of classes that have no model here. A refused key may have the values that ask for nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from itertools import combinations

from redline.config.components import COMPONENTS, Component
from redline.config.messages import Schema, options
from redline.config.schema import OFF, is_section, on_auto, restricted, schema_of, section_of, values_off, whole_schema
from redline.config.section import FROM_DATA, HONOURED, NOT_HERE, REFUSED

__all__ = ["build_schema"]

_COMMENTS = {"patternProperties": {"^(_|//)": {"description": "A comment; not read."}}}
_TEXT = ("description", "default", "examples")
_OUR_WORDS = {"status", "note", "allowed", "switch", "on"}


def build_schema() -> Schema:
    """The JSON Schema of a config."""
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
    patterns = (re.sub("[a-z]", lambda letter: f"[{letter[0].upper()}{letter[0]}]", name.lower()) for name in names)
    return f"^({'|'.join(patterns)})$"


# -- what is refused -------------------------------------------------------------------------------------


def _limited(key: Schema) -> Schema:
    """A key at the top without the values that are refused."""
    if key.get("status") == REFUSED and not is_section(key):
        return {**_written_off(key), **{word: item for word, item in key.items() if word not in ("anyOf", "type")}}
    if key.get("status") == REFUSED:
        return {**key, "anyOf": [{"enum": values_off(key)}, {"allOf": [key["anyOf"][0], _switched_off(key)]}]}
    section = section_of(key)
    limits = _limits(section) if section else []
    if limits and "switch" in key:
        limits = [{"anyOf": [_switched_off(key), {"allOf": limits}]}]
    return {**key, "allOf": limits} if limits else key


def _limits(section: Schema) -> list[Schema]:
    """The values that refused keys within a section may have."""
    limits = []
    for name, key in section["properties"].items():
        inner = section_of(key)
        found = [_written_off(key)] if restricted(key) else _limits(inner) if inner else []
        limits += [{"properties": {name: limit}} for limit in found]
    return limits


def _written_off(key: Schema) -> Schema:
    """`values_off` with 0 and 1 for false and true, which differ in JSON Schema; no section is 0."""
    values = values_off(key)
    return {"enum": [*values, *(int(value) for value in values if isinstance(value, bool) and not is_section(key))]}


def _switched_off(key: Schema) -> Schema:
    """`is_switched_off` of an object."""
    off: Schema = {"properties": {key["switch"]: {"enum": [*OFF, 0]}}}
    if key.get("on"):
        empty = {"properties": {}, "additionalProperties": False, **_COMMENTS}
        return {"anyOf": [empty, {**off, "required": [key["switch"]]}]}
    return off


# -- plain JSON Schema -----------------------------------------------------------------------------------


def _publish(section: Schema) -> None:
    """Make a section plain JSON Schema: with "auto", comments and other spellings where they are accepted."""
    properties = section["properties"]
    autos = [name for name in properties if on_auto(section, name) not in (None, NOT_HERE, FROM_DATA)]
    for name, key in properties.items():
        plain = _with_digits({word: item for word, item in key.items() if word not in _OUR_WORDS})
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


def _with_digits(key: Schema) -> Schema:
    """A key that may be true or false, as `load` takes it: 1 and 0, too, unless it may be another number."""
    kinds = {option.get("type") for option in options(key)}
    if "boolean" not in kinds or kinds & {"number", "integer"} or is_section(key):
        return key
    if "anyOf" in key:
        return {**key, "anyOf": [_with_digits(option) for option in key["anyOf"]]}
    return {"enum": [True, False, 1, 0], **{word: item for word, item in key.items() if word != "type"}}
