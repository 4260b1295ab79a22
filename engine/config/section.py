"""What every section of the config is, a frozen, strict pydantic model with one field per key, and keys in words.

A field is the only home of its key: the annotation has its type and range; `key`, `unread` and `refused` add default,
meaning and what becomes of it. The checks, the JSON Schema, `redline explain` and the docs are made from the fields;
messages are worded from the JSON Schema of a key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Final, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

__all__ = [
    "FROM_DATA", "HONOURED", "NOT_HERE", "NO_EFFECT", "REFUSED", "TO_DEFAULT", "TO_NULL", "AutoSection", "Betas",
    "Conflict", "Count", "Fraction", "Index", "LooseSection", "NonNegative", "PerGroup", "Positive", "Ratio", "Schema",
    "Section", "Text", "Whole", "describe", "either", "faults", "is_slip", "key", "nearest", "objection", "options",
    "refused", "required", "section", "shown", "unknown_key", "unread",
]  # fmt: skip

HONOURED: Final = "honoured"
NO_EFFECT: Final = "no effect"
REFUSED: Final = "refused"

# What becomes of "auto", which Hugging Face's integration fills in, where it has not been filled in.
TO_DEFAULT = "the default"
TO_NULL = "null, which takes the optimizer's"
NOT_HERE = "refused: nothing here tells it; give a number"
FROM_DATA = "from redline.epochs and the length of training_data; refused without them"

Schema = dict[str, Any]
# Keys that cannot be obeyed together, with spaces between them: "bf16.enabled fp16.enabled"; and the message. It is
# reported at the first key, and counts only if no key has a mistake of its own.
Conflict = tuple[str, str]

T = TypeVar("T")
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=-1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
# JSON has lists and no tuples: the container is converted, its items stay strict.
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
PerGroup: TypeAlias = T | Annotated[tuple[T, ...], Field(min_length=1, strict=False)]


def key(default: Any, meaning: str, note: str = "", **extra: Any) -> Any:
    """A field for a key that does what it says.

    Args:
        default: DeepSpeed's.
        meaning: one sentence, with the unit.
        note: how it is done here.
        extra: for the schema; `allowed`, if there, has the only values besides null and the default that are built.
    """
    return Field(default=default, description=meaning, json_schema_extra={"note": note, **extra} if note else extra)


def required(meaning: str, example: Any) -> Any:
    """A field for a key that must be given."""
    return Field(description=meaning, examples=[example])


def unread(default: Any, meaning: str, why: str) -> Any:
    """A field for a key without effect, and why that is harmless."""
    return key(default, meaning, why, status=NO_EFFECT)


def refused(default: Any, meaning: str, why: str, *allowed: Any) -> Any:
    """A field for a key that is not built; null, the default and the allowed values ask for nothing."""
    return key(default, meaning, why, status=REFUSED, allowed=list(allowed))


def section(meaning: str, note: str = "", off: Schema | None = None, **extra: Any) -> Any:
    """A field for a section at the top.

    Args:
        meaning: one sentence.
        note: how it is done here.
        off: other values than an object or null; default false, which is null.
        extra: for the schema; `switch` names the key inside without which nothing inside is refused.
    """

    def extend(schema: Schema) -> None:
        # Between the section and null. The model never sees it: `load` has made it null by then.
        schema["anyOf"].insert(1, off or {"const": False})
        schema.update({"note": note, **extra} if note else extra)

    return Field(default=None, description=meaning, json_schema_extra=extend)


class Section(BaseModel):
    """An object of the config; subclasses are one JSON section each.

    Attributes:
        aliases: older or other spellings of keys, with the name of the field.
        auto: the keys that may be "auto", with what becomes of it; "*" stands for all keys of the section.
        loose: whether DeepSpeed accepts unknown keys here. One that is no typing error is then refused, not a mistake.
        retired: keys that configs still have although DeepSpeed no longer knows them, with what to do instead; refused.
    """

    # Most sections are only used inside `EngineConfig`, which builds them.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    aliases: ClassVar[dict[str, str]] = {}
    auto: ClassVar[dict[str, str]] = {}
    loose: ClassVar[bool] = False
    retired: ClassVar[dict[str, str]] = {}

    def conflicts(self) -> Iterator[Conflict]:
        """The keys of this section that cannot be obeyed together."""
        yield from ()

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        # Into the section's own schema, which may be a reference by now: `load` walks documents along it.
        schema = handler.resolve_ref_schema(reference := handler(core))
        traits = {"aliases": cls.aliases, "auto": cls.auto, "loose": cls.loose, "retired": cls.retired}
        schema.update({name: trait for name, trait in traits.items() if trait})
        return reference


class LooseSection(Section):
    """A section in which DeepSpeed accepts unknown keys."""

    loose: ClassVar[bool] = True


class AutoSection(Section):
    """A section in which every key may be "auto"."""

    auto: ClassVar[dict[str, str]] = {"*": TO_DEFAULT}


# -- keys in words ---------------------------------------------------------------------------------------

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
