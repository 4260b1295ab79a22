"""What a message about a value is made of: what was given, what is allowed, what to do.

Allowed values are put into words from a field's JSON Schema, so that a message, the schema file and the
docs say one thing.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["describe", "either", "is_slip", "nearest", "objection", "shown"]

_NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "object": "an object: { ... }",
    "array": "a list",
    "null": "null",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_NUMBER = re.compile(r"\s*[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\s*")


def objection(value: Any, schema: dict[str, Any]) -> str:
    """What to tell someone who gave a value that its schema does not allow."""
    message = f"got {shown(value)}; expected {describe(schema)}"
    remedy = _remedy(value, schema)
    return f"{message}; {remedy}" if remedy else message


def describe(schema: dict[str, Any]) -> str:
    """The values that a schema allows, in words.

    >>> describe({"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]})
    'a number >= 0 or null'
    """
    return either(dict.fromkeys(word for option in _options(schema) for word in _words(option)))


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
    """Whether a name looks like a slip of the pen: close to a known one, and of as many words."""
    guess = nearest(name, known)
    if guess is None or name.count("_") != guess.count("_"):
        return False
    return difflib.SequenceMatcher(None, name.lower()[:60], guess.lower()).ratio() >= 0.75


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [option for each in schema["anyOf"] for option in _options(each)] if "anyOf" in schema else [schema]


def _words(schema: dict[str, Any]) -> list[str]:
    """The values of a schema without alternatives, in words; several if it lists them."""
    kind = "object" if "$ref" in schema else schema.get("type", "")
    if "const" in schema or "enum" in schema:
        return [shown(value) for value in schema.get("enum", [schema.get("const")])]
    if kind == "boolean":
        return ["true", "false"]
    if "prefixItems" in schema:
        return [f"a list of {len(schema['prefixItems'])} {_plural(describe(schema['prefixItems'][0]))}"]
    if "items" in schema:
        return [f"a list of {_plural(describe(schema['items']))}"]
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    example = f" such as {shown(schema['examples'][0])}" if kind == "string" and "examples" in schema else ""
    return [_NOUNS.get(kind, "a value") + (f" {' and '.join(bounds)}" if bounds else "") + example]


def _remedy(value: Any, schema: dict[str, Any]) -> str | None:
    """What to do about a value, where its form tells what was meant."""
    options = _options(schema)
    kinds = {option.get("type") for option in options}
    number = not kinds.isdisjoint(("integer", "number"))
    if value == "auto":
        wanted = "a number" if number else "true or false" if "boolean" in kinds else "a value"
        return f'"auto" is filled in by Hugging Face\'s integration; give {wanted}'
    if isinstance(value, str):
        if (number and _NUMBER.fullmatch(value)) or ("boolean" in kinds and value.lower() in ("true", "false")):
            return "remove the quotes"
        guess = nearest(value, [word for option in options for word in option.get("enum", []) if isinstance(word, str)])
        return f'did you mean "{guess}"?' if guess else None
    if "boolean" in kinds and value in (0, 1) and not isinstance(value, bool):
        return f"write {'true' if value else 'false'}"
    return None


def _plural(words: str) -> str:
    for noun in ("number", "string"):
        words = words.replace(noun, f"{noun}s", 1)
    return words.removeprefix("a ")
