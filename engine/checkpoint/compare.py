"""What a checkpoint and an engine have in common, and where they differ, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from engine.checkpoint.plain import unpack

__all__ = ["Names", "listed", "match_names", "schedule_changes", "setting_changes"]


class Names(NamedTuple):
    """How the names of a model and of a checkpoint go together.

    Attributes:
        sources: for each name of the model that the checkpoint has, under which name.
        missing: names of the model that the checkpoint does not have.
        unexpected: names of the checkpoint that the model does not have.
    """

    sources: dict[str, str]
    missing: list[str]
    unexpected: list[str]


def match_names(
    model: Iterable[str], saved: Iterable[str], model_aliases: Mapping[str, str], saved_aliases: Mapping[str, str]
) -> Names:
    """Match names, tied weights by any of theirs.

    Args:
        model: of the engine's model, each tensor once.
        saved: of the checkpoint, each tensor once.
        model_aliases: further names in the model, with the one in `model`.
        saved_aliases: further names when it was saved, with the one in `saved`.
    """
    model, saved = list(model), list(saved)
    stored = set(saved)
    others: dict[str, list[str]] = {}
    for alias, name in model_aliases.items():
        others.setdefault(name, []).append(alias)
    sources = {}
    for name in model:
        for each in (name, *others.get(name, ())):
            source = each if each in stored else saved_aliases.get(each)
            if source in stored:
                sources[name] = source
                break
    known = {*model, *model_aliases, *sources.values()}
    return Names(
        sources, [name for name in model if name not in sources], [name for name in saved if name not in known]
    )


def schedule_changes(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """How a schedule differs from the one in a checkpoint: by type, else by each parameter."""
    was, is_ = (None if each is None else each["type"] for each in (saved, now))
    if was != is_:
        return [f"type was {was or 'none'}, is {is_ or 'none'}"]
    if saved is None or now is None or saved["told_by"] != now["told_by"]:
        return []
    return setting_changes(saved["parameters"], now["parameters"])


def setting_changes(saved: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> list[str]:
    """Settings, packed as JSON has them, that differ: name, old and new value; those that only one side knows apart."""
    ignored = set(ignored)
    return [
        f"{key} was {_shown(value)}, is {_shown(now[key])}"
        for key, value in saved.items()
        if key in now and key not in ignored and value != now[key]
    ]


def _shown(packed: Any) -> str:
    try:
        return repr(unpack(packed, {}))
    except (KeyError, ValueError):
        return "a tensor"


def listed(names: Iterable[str], most: int = 5, sign: str = ", ") -> str:
    """Names, the first of many."""
    names = list(names)
    return sign.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
