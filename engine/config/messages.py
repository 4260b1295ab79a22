"""What messages say of values and keys: worded from the JSON Schema of a key, the same for all of them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = [
    "Schema", "describe", "either", "faults", "is_slip", "nearest", "objection", "options", "shown", "unknown_key",
]  # fmt: skip

Schema = dict[str, Any]

_NOUNS = {
    "integer": "a whole number", "number": "a number", "string": "a string", "object": "an object: { ... }",
    "array": "a list", "null": "null",
}  # fmt: skip
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_NUMBER = re.compile(r"\s*[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\s*")


def objection(value: Any, schema: Schema) -> str:
    """The message about a value that its schema does not allow: what was given, what is allowed, what to do."""
    message = f"got {shown(value)}; expected {describe(schema)}"
    if "$comment" in schema:  # what else would do
        message += f", {schema['$comment']}"
    remedy = _remedy(value, schema)
    return f"{message}; {remedy}" if remedy else message


def faults(error: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """An error of jsonschema in our words; where several options fail, those of the one that is meant."""
    # An error of a branch that got further than the value's own type is about the branch that was meant.
    inner = [each for each in error.context or () if each.relative_path or each.validator == "required"]
    if inner:
        for each in inner:
            yield from faults(each)
    elif error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield (*error.absolute_path, name), f"missing; expected {describe(error.schema['properties'][name])}"
    else:
        yield tuple(error.absolute_path), objection(error.instance, error.schema)


def unknown_key(key: str, known: Iterable[str], elsewhere: str | None = None) -> str:
    """The message about a key that has no meaning where it was written."""
    known = list(known)
    if elsewhere:
        return f"unknown key here; {elsewhere}"
    if guess := nearest(key, known):
        return f'unknown key; did you mean "{guess}"?'
    if len(known) <= 12:
        return f"unknown key; known here: {', '.join(known) or 'none'}"
    return f"unknown key; rename it to {shown('_' + key)} if it is a comment"


def describe(schema: Schema) -> str:
    """The values that a schema allows, in words.

    >>> describe({"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]})
    'a number >= 0 or null'
    """
    return either(dict.fromkeys(word for option in options(schema) for word in _words(option)))


def options(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, ``anyOf`` and lists of types taken apart."""
    if "anyOf" in schema:
        return [option for each in schema["anyOf"] for option in options(each)]
    kinds = schema.get("type")
    return [{**schema, "type": kind} for kind in kinds] if isinstance(kinds, list) else [schema]


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def either(words: Iterable[str]) -> str:
    """``0, 1, 2 or 3``."""
    *rest, last = words
    return f"{', '.join(rest)} or {last}" if rest else last


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is closest to, if any is close."""
    by_lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower()[:60], by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def is_slip(name: str, known: Iterable[str]) -> bool:
    """Whether a name looks like a typing error: close to a known one, and of as many words."""
    guess = nearest(name, known)
    if guess is None or name.count("_") != guess.count("_"):
        return False
    return difflib.SequenceMatcher(None, name.lower()[:60], guess.lower()).ratio() >= 0.75


def _words(schema: Schema) -> list[str]:
    """The values of a schema without alternatives, in words; several if it lists them."""
    kind = "object" if "$ref" in schema else schema.get("type", "")
    if "const" in schema or "enum" in schema:
        return [shown(value) for value in schema.get("enum", [schema.get("const")])]
    if kind == "boolean":
        return ["true", "false"]
    if item := schema.get("items") or schema.get("prefixItems", [None])[0]:
        count = f"{len(schema['prefixItems'])} " if "prefixItems" in schema else ""
        items = describe(item).replace("number", "numbers", 1).replace("string", "strings", 1)
        return [f"a list of {count}{items.removeprefix('a ')}"]
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    example = f" such as {shown(schema['examples'][0])}" if kind == "string" and "examples" in schema else ""
    return [_NOUNS.get(kind, "a value") + (f" {' and '.join(bounds)}" if bounds else "") + example]


def _remedy(value: Any, schema: Schema) -> str | None:
    """What to do about a value, where its form tells what was meant."""
    choices = options(schema)
    kinds = {option.get("type") for option in choices}
    number = not kinds.isdisjoint(("integer", "number"))
    if value == "auto":
        wanted = "a number" if number else "true or false" if "boolean" in kinds else "a value"
        return f'"auto" is filled in by Hugging Face\'s integration; give {wanted}'
    if isinstance(value, str):
        if (number and _NUMBER.fullmatch(value)) or ("boolean" in kinds and value.lower() in ("true", "false")):
            return "remove the quotes"
        guess = nearest(value, [word for option in choices for word in option.get("enum", []) if isinstance(word, str)])
        return f'did you mean "{guess}"?' if guess else None
    return None
