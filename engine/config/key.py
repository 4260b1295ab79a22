"""One key of the config: what becomes of it, and when it changes nothing.

The keys themselves are in `support`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, TypeAdapter

from engine.config.section import Section, adapter_of

__all__ = ["HONOURED", "NO_EFFECT", "REFUSED", "SECTION", "Key", "Status"]

HONOURED: Final = "honoured"
NO_EFFECT: Final = "no effect"
REFUSED: Final = "refused"
Status = Literal["honoured", "no effect", "refused"]


def _no_zero(value: Any) -> Any:
    if not isinstance(value, bool):  # 0 equals False, and is none in JSON
        raise ValueError("expected false")
    return value


SECTION = dict[str, Any] | Annotated[Literal[False], BeforeValidator(_no_zero)]

_OFF = (False, None, "auto", "none")  # and 0, which equals False: what a switch says when it is off


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: the key, or the path of one within a section.
        status: honoured, no effect or refused.
        note: why, and for a refused key what to use instead.
        default: DeepSpeed's.
        type: the values that DeepSpeed takes, null apart; for a section those beside an object; a key that is
            honoured has its type in its model, one within a section in the section's.
        section: the model of a section, as "module:Class" in `engine.config.sections`.
        switch: for a section, the key inside it that switches it on; without one a section that is refused or has no
            effect has none of its own, and what is refused inside it is refused in any case.
        on: whether the section is on when it is there without its switch.
        off: other values than the default that change nothing; of a key that is honoured, all that are not refused.
        meaning: one sentence; where there is a model, that has it.
    """

    name: str
    status: Status
    note: str = ""
    default: Any = None
    type: Any = None
    section: str = ""
    switch: str | None = None
    on: bool = False
    off: tuple[Any, ...] = ()
    meaning: str = ""

    def is_off(self, value: Any) -> bool:
        """Whether a value of the right type changes nothing: null, the default, or a section that is off."""
        if isinstance(value, dict) and self.switch is not None:
            return not value or value.get(self.switch, self.on) in _OFF
        return value is None or value in (self.default, *self.off) or (self.is_section and value is False)

    @property
    def refuses(self) -> bool:
        """Whether some values are refused."""
        return self.status == REFUSED or bool(self.off)

    @property
    def is_section(self) -> bool:
        return self.type is SECTION

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Judge of the type."""
        return adapter_of(self.type | None)

    @cached_property
    def model(self) -> type[Section] | None:
        """The section's model, read on first use; None where there is none."""
        if not self.section:
            return None
        module, _, name = self.section.partition(":")
        model: type[Section] = getattr(import_module(f"engine.config.sections.{module}"), name)
        return model
