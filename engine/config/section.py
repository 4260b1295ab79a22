"""What every section of the config is: a frozen, strict pydantic model with one field per key.

A field is the only home of its key: the annotation has its type and range; `key`, `unread` and `refused` add default,
meaning and what becomes of it. The checks, the JSON Schema, `redline explain`, messages and the docs are made
from the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from redline.config.messages import Schema

__all__ = [
    "FROM_DATA", "HONOURED", "NOT_HERE", "NO_EFFECT", "REFUSED", "TO_DEFAULT", "TO_NULL", "AutoSection", "Betas",
    "Conflict", "Count", "Fraction", "Index", "LooseSection", "NonNegative", "PerGroup", "Positive", "Ratio", "Section",
    "Text", "Whole", "key", "refused", "required", "section", "unread",
]  # fmt: skip

HONOURED: Final = "honoured"
NO_EFFECT: Final = "no effect"
REFUSED: Final = "refused"

# What becomes of "auto", which Hugging Face's integration fills in, where it has not been filled in.
TO_DEFAULT = "the default"
TO_NULL = "null, which takes the optimizer's"
NOT_HERE = "refused: nothing here tells it; give a number"
FROM_DATA = "from redline.epochs and the length of training_data; refused without them"

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
