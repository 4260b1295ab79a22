"""A second look at what has a mistake: so that one mistake does not hide another.

A model that finds mistakes makes nothing. Here they are taken out of the value and it is looked at again, until what
is left is sound; a rule that reads something that was taken out is not counted.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from engine.config.parser import Route
from engine.config.section import REFUSAL, REPAIR, Section

__all__ = ["Judgement", "judge"]

S = TypeVar("S", bound=Section)


class Judgement(Generic[S]):
    """What is wrong with a value as a section.

    Attributes:
        sound: the section without what is wrong; None if nothing is left of it.
        mistakes: what is wrong, by route.
        refusals: what is valid DeepSpeed and not built here.
        unsound: the routes that `sound` does without.
    """

    def __init__(self) -> None:
        self.sound: S | None = None
        self.mistakes: dict[Route, str] = {}
        self.refusals: dict[Route, str] = {}
        self.unsound: set[Route] = set()

    def counts(self, reads: tuple[Route, ...]) -> bool:
        """Whether a rule counts that reads these routes."""
        return not any(route[: len(gone)] == gone for route in reads for gone in self.unsound)


def judge(model: type[S], value: Any, prefix: Route = ()) -> Judgement[S]:
    """Everything that is wrong with a value; `prefix` is the route to it."""
    found: Judgement[S] = Judgement()
    context = None
    while True:
        try:
            found.sound = model.model_validate(value, context=context)
            return found
        except ValidationError as error:
            lines = error.errors(include_url=False, include_input=False)
        before = len(found.unsound)
        gone = [_note(found, line, prefix) for line in lines]
        if any(len(route) == 0 for route in gone) or len(found.unsound) == before:
            return found
        value, context = _without(value, gone), REPAIR


def _note(found: Judgement[S], line: Any, prefix: Route) -> Route:
    """Keep one mistake; the route, within the value, of what has to go for the next look."""
    local: Route = line["loc"]
    route = (*prefix, *local)
    reads = tuple((*route[:-1], key) for key in line["ctx"]["reads"])
    if found.counts(reads or (route,)):
        (found.refusals if line["type"] == REFUSAL else found.mistakes).setdefault(route, line["ctx"]["message"])
    place = next((index for index, part in enumerate(local) if isinstance(part, int)), len(local))
    if local[-1:] == ("type",):  # what it would take is not known without it
        place = len(local) - 1
    found.unsound.add((*prefix, *local[:place]))
    return local[:place]


def _without(value: Any, routes: list[Route]) -> Any:
    """A copy of a value without these places."""
    if not isinstance(value, dict):
        return value
    inner: dict[Any, list[Route]] = {}
    for route in routes:
        inner.setdefault(route[0], []).append(route[1:])
    return {
        key: _without(item, inner[key]) if key in inner else item
        for key, item in value.items()
        if () not in inner.get(key, ())
    }
