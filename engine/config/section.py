"""What every section of the config is: a frozen, strict pydantic model that words its own mistakes.

Owns the number types of the language and the form in which a mistake leaves a model: a pydantic error of
type MISTAKE (or REFUSAL: valid DeepSpeed that is not built here) whose ``ctx`` has the finished message, at
the route in the JSON, with no union tags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from engine.config.parser import Route
from engine.config.words import describe, is_slip, nearest, objection, shown

__all__ = [
    "MISTAKE", "NOT_HERE", "OR_OFF", "OR_SWITCH", "REFUSAL", "REPAIR", "TO_DEFAULT", "TO_NULL", "Betas", "Count",
    "Fraction", "Index", "Integer", "Loose", "NonNegative", "PerGroup", "Positive", "Rare", "Ratio", "Section", "Whole",
    "adapter_of", "check", "failure", "finished", "literals", "sections_in", "unknown_key", "wrong",
]  # fmt: skip

MISTAKE, REFUSAL = "mistake", "refusal"
REPAIR = "repair"  # the context of a second look: what is required and has a mistake is at its example

# What becomes of "auto", which Hugging Face's integration fills in, where nobody has filled it in.
TO_DEFAULT = "the default"
TO_NULL = "null, which takes the optimizer's"
NOT_HERE = "refused: nothing here tells it; give a number"

T = TypeVar("T")


def _integral(value: Any) -> Any:
    """JSON Schema's reading: 2e3 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _frozen(value: Any) -> Any:
    """JSON has lists, and no tuples."""
    return tuple(value) if isinstance(value, list) else value


Integer = Annotated[int, BeforeValidator(_integral)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_integral)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_integral)]
Index = Annotated[int, Field(ge=-1), BeforeValidator(_integral)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(_frozen)]


class _OrOff:
    """Lets a section be false, which is null: DeepSpeed's configs switch sections off so."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_off, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        (section, null) = handler(schema)["anyOf"]
        return {"anyOf": [section, {"const": False}, null]}


def _off(value: Any) -> Any:
    return None if value is False else value


OR_OFF = _OrOff()


class _OrSwitch:
    """Lets ZeRO be true, which is stage 1: an older spelling of DeepSpeed's; false is null."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_switched, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        (section, null) = handler(schema)["anyOf"]
        return {"anyOf": [section, {"type": "boolean"}, null]}


def _switched(value: Any) -> Any:
    return {"stage": 1} if value is True else _off(value)


OR_SWITCH = _OrSwitch()
PerGroup: TypeAlias = T | Annotated[tuple[T, ...], Field(min_length=1), BeforeValidator(_frozen)]


class Section(BaseModel):
    """An object of the config; subclasses are one JSON section each.

    Attributes:
        aliases: older or other spellings of keys, with the name of the field.
        auto: the keys that may be "auto", with what becomes of it; "*" stands for all keys of the section.
        loose: whether DeepSpeed lets keys pass here that it does not know. One that is no slip of the pen is then
            refused, and not a mistake.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # "model_info" is a key
    )

    aliases: ClassVar[dict[str, str]] = {}
    auto: ClassVar[dict[str, str]] = {}
    loose: ClassVar[bool] = False

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Keys of this section that cannot be obeyed together, and why; the first is where it is said."""
        yield from ()

    @classmethod
    def misplaced(cls, key: str) -> str | None:
        """Where a key that is not known in this section belongs, for a message."""
        return None

    @classmethod
    def refused(cls, key: str) -> str | None:
        """Why a key that this section does not have is refused, and not a mistake: configs have it, rightly once."""
        return None

    @classmethod
    def on_auto(cls, key: str) -> str | None:
        """What becomes of "auto" as the value of a key; None where it is no value."""
        key = cls.aliases.get(key, key)
        if key not in cls.model_fields or "auto" in literals(cls.model_fields[key].annotation):
            return None
        return cls.auto.get(key, cls.auto.get("*"))

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        found: list[InitErrorDetails] = []
        spelt: dict[str, str] = {}
        if isinstance(value, dict):
            value, spelt = _renamed(cls, value, found)
            value = _without_auto(cls, value, found)
            if info.context == REPAIR or found:
                value = {**_examples(cls), **value}
        try:
            section = handler(value)
        except ValidationError as error:
            found += _mistakes(cls, error)
        else:
            for reads, message in section.contradictions() if not found else ():
                found.append(finished(MISTAKE, reads[:1], message, reads))
        if found:
            raise failure([_as_spelt(each, spelt) for each in found])
        return section


class Rare(Section):
    """A section that few configs have: its validator is made when the first one does."""

    model_config = ConfigDict(defer_build=True)


class Loose(Rare):
    """A rare section in which DeepSpeed lets keys pass that it does not know."""

    loose: ClassVar[bool] = True


def _renamed(
    cls: type[Section], value: dict[Any, Any], found: list[InitErrorDetails]
) -> tuple[dict[Any, Any], dict[str, str]]:
    """A value with the fields' own names, and how those were spelt that were spelt otherwise."""
    spelt = {cls.aliases[key]: key for key in value if key in cls.aliases}
    for name, key in spelt.items():
        if name in value:
            found.append(finished(MISTAKE, (key,), f"given beside {name}, which is the same; remove it"))
    spelt = {name: key for name, key in spelt.items() if name not in value}
    twice = {key for key in value if key in cls.aliases and spelt.get(cls.aliases[key]) != key}
    return {cls.aliases.get(key, key): item for key, item in value.items() if key not in twice}, spelt


def _without_auto(cls: type[Section], value: dict[Any, Any], found: list[InitErrorDetails]) -> dict[Any, Any]:
    """A value without the keys that are "auto" where that may be."""
    kept = {}
    for key, item in value.items():
        outcome = cls.on_auto(key) if item == "auto" else None
        if outcome is None:
            kept[key] = item
        elif outcome == TO_NULL:
            kept[key] = None
        elif outcome == NOT_HERE:
            message = 'got "auto", which Hugging Face\'s integration fills in and nothing here can; give a number'
            found.append(finished(REFUSAL, (key,), message))
    return kept


def _examples(cls: type[Section]) -> dict[str, Any]:
    """A sound value for each required key that has one."""
    return {name: each.examples[0] for name, each in cls.model_fields.items() if each.is_required() and each.examples}


def _as_spelt(mistake: InitErrorDetails, spelt: dict[str, str]) -> InitErrorDetails:
    route = mistake.get("loc", ())
    if route and route[0] in spelt:
        mistake["loc"] = (spelt[str(route[0])], *route[1:])
    return mistake


def literals(annotation: Any) -> tuple[Any, ...]:
    """The words that an annotation lists, unions included."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in literals(part))


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The models of sections that an annotation names, unions included."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def wrong(kind: str, message: str, reads: tuple[str, ...] = ()) -> PydanticCustomError:
    """What a field's validator raises: a MISTAKE or a REFUSAL, in its final words."""
    return PydanticCustomError(kind, "{message}", {"message": message, "reads": reads})


def finished(kind: str, route: Route, message: str, reads: tuple[str, ...] = ()) -> InitErrorDetails:
    """The same, on its way to the top; a mistake about several keys of a section names those that it reads."""
    return InitErrorDetails(type=wrong(kind, message, reads), loc=route, input=None)


def failure(mistakes: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data("config", mistakes)


@cache
def adapter_of(annotation: Any) -> TypeAdapter[Any]:
    """A judge of single values, as strict as a section."""
    return TypeAdapter(annotation, config=Section.model_config)


def check(adapter: TypeAdapter[Any], value: Any) -> tuple[Any, str | None]:
    """A value as its type has it, and what is wrong with it in words, if anything is."""
    try:
        return adapter.validate_python(value), None
    except ValidationError:
        return value, objection(value, adapter.json_schema())


def unknown_key(key: str, known: Iterable[str], elsewhere: str | None = None) -> str:
    """What to tell someone who wrote a key that means nothing where it stands."""
    if elsewhere:
        return f"unknown key here; {elsewhere}"
    known = list(known)
    guess = nearest(key, known)
    if guess:
        return f'unknown key; did you mean "{guess}"?'
    if len(known) <= 12:
        return f"unknown key; known here: {', '.join(known) or 'none'}"
    return f"unknown key; rename it to {shown('_' + key)} if it is a comment"


def _mistakes(cls: type[Section], error: ValidationError) -> list[InitErrorDetails]:
    """pydantic's errors in our words: one for each value, union tags gone."""
    found: dict[Route, InitErrorDetails] = {}
    for line in error.errors(include_url=False):
        kind, route, value = line["type"], line["loc"], line["input"]
        if kind in (MISTAKE, REFUSAL):
            found[route] = finished(kind, route, line["ctx"]["message"], line["ctx"]["reads"])
        elif not route:
            found[route] = finished(MISTAKE, route, objection(value, {"type": "object"}))
        elif kind == "extra_forbidden":
            key = str(route[-1])
            refusal, elsewhere = cls.refused(key), cls.misplaced(key)
            foreign = cls.loose and not elsewhere and not is_slip(key, cls.model_fields)
            message = refusal or unknown_key(key, cls.model_fields, elsewhere)
            found[route] = finished(REFUSAL if refusal or foreign else MISTAKE, route, message)
        else:
            schema = cls.model_json_schema()["properties"][route[0]]
            if kind == "missing" and len(route) == 1:
                found[route] = finished(MISTAKE, route, f"missing; expected {describe(schema)}")
                continue
            items = [part for part in route[1:] if isinstance(part, int) and kind != "missing"]
            if items:  # the fault is an item's: what else was said of the whole list is beside the point
                found.pop(route[:1], None)
                schema = _item_schema(schema, items[0])
            elif any(other[0] == route[0] for other in found):
                continue
            place = (route[0], *items)
            found[place] = finished(MISTAKE, place, objection(value, schema))
    return list(found.values())


def _item_schema(schema: dict[str, Any], index: Any) -> dict[str, Any]:
    for option in schema.get("anyOf", [schema]):
        if "prefixItems" in option:
            option = {"items": option["prefixItems"][index]}
        if "items" in option:
            return dict(option["items"])
    return {}
