"""The way in: a path, a dict or JSON text becomes an `EngineConfig`, or one error with everything wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from engine.config.batch import BATCH_KEYS, World, find_world, resolve_batch
from engine.config.document import Document, copy_document, parse, read
from engine.config.judge import judge
from engine.config.optimizer import OptimizerConfig
from engine.config.parser import Route, looks_like_json
from engine.config.root import EngineConfig
from engine.config.rules import conflicts, misfits, unbuilt
from engine.config.scheduler import SchedulerConfig
from engine.config.section import Section, check, unknown_key
from engine.config.support import HONOURED, INSIDE, KEYS, REFUSED, Key
from engine.config.words import is_slip, shown
from engine.errors import ConfigError, Problem

__all__ = ["Reading", "Source", "UnsupportedConfigError", "in_order", "load_config", "read_config"]

Source = str | Path | Mapping[str, Any] | EngineConfig


class UnsupportedConfigError(ConfigError):
    """A valid DeepSpeed config that asks for what is not built here, and has no other problem."""


@dataclass(frozen=True)
class Reading:
    """A document and what was found in it.

    Attributes:
        config: the part of it that is honoured; None if there are mistakes. Without a world size where its batch
            cannot be told.
        mistakes: what is wrong, in the order of the document.
        refusals: what is valid DeepSpeed and not built, likewise.
    """

    document: Document
    config: EngineConfig | None
    mistakes: list[Problem]
    refusals: list[Problem]


def load_config(source: Source, *, world_size: int | None = None) -> EngineConfig:
    """Read a config and fill in its batch sizes.

    Args:
        source: a path, a dict (it is copied), JSON text, or a config that was loaded before.
        world_size: processes that will train; default torchrun's WORLD_SIZE, else 1. A loaded config keeps its own.

    Returns:
        The config in force; every value is given, a default or derived.

    Raises:
        UnsupportedConfigError: the config is valid, but asks for what is not built.
        ConfigError: the config is not valid. All problems of either kind are in the error.
    """
    if isinstance(source, EngineConfig) and source.world_size and world_size in (None, source.world_size):
        return source
    reading = read_config(source, world_size)
    if reading.config is not None and not reading.refusals:
        return reading.config
    problems = in_order([*reading.mistakes, *reading.refusals])
    raise (ConfigError if reading.mistakes else UnsupportedConfigError)(problems, reading.document.source)


def read_config(source: Source, world_size: int | None) -> Reading:
    """Read a config and find everything that is wrong with it or not built.

    Raises:
        ConfigError: there is no document to judge: no such file, no JSON.
    """
    document = _open(source)
    world = find_world(world_size)
    found = _sift(document, world)
    problems = [document.problem(route, message) for route, message in found.mistakes.items()]
    refusals = dict(found.refusals)

    config = found.config
    if isinstance(world, str):
        problems.append(Problem("", world))
        config = None
    elif config is None or any(route[:1] == (key,) for key in BATCH_KEYS for route in found.mistakes):
        config = None
    else:
        given = {key: getattr(config, key) for key in BATCH_KEYS if key in config.model_fields_set}
        batch = resolve_batch(given, world)
        auto = next((key for key in BATCH_KEYS if document.settings.get(key) == "auto"), None)
        if not isinstance(batch, str):
            config = config.resolved(batch, world.size, document)
        elif auto and given.keys().isdisjoint(BATCH_KEYS[:2]):
            refusals[auto,] = _NO_BATCH
            config = config.unresolved(document)
        else:
            problems.append(document.problem((BATCH_KEYS[0],), batch))
    refused = [document.problem(route, message) for route, message in refusals.items()]
    return Reading(document, None if problems else config, in_order(problems), in_order(refused))


_NO_BATCH = (
    'got "auto", which Hugging Face\'s integration fills in and nothing here can; '
    "give train_batch_size or train_micro_batch_size_per_gpu a number"
)


def _open(source: Any) -> Document:
    if isinstance(source, EngineConfig):
        return source.as_written()
    if isinstance(source, Mapping):
        return copy_document(source)
    if isinstance(source, os.PathLike):
        return read(Path(source))
    if not isinstance(source, str):
        message = f"got a Python {type(source).__name__}; expected a path, a dict, JSON text or an EngineConfig"
        raise ConfigError([Problem("", message)])
    if looks_like_json(source):
        return parse(source)
    if os.path.exists(source):
        return read(Path(source))
    shortened = source if len(source) <= 60 else f"{source[:57]}..."
    message = f'neither a file nor JSON text: nothing of this name in {Path.cwd()}, and JSON text starts with "{{"'
    raise ConfigError([Problem("", message)], json.dumps(shortened))


@dataclass
class _Found:
    """What a document comes to before its batch is resolved."""

    mistakes: dict[Route, str]
    refusals: dict[Route, str] = field(default_factory=dict)
    config: EngineConfig | None = None


def _sift(document: Document, world: World | str) -> _Found:
    """Every key judged: the honoured ones together, each other section by its model, the rest by the table."""
    found = _Found(dict(document.mistakes))
    honoured: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    unsound: set[Route] = set()
    for name, value in document.settings.items():
        key = KEYS.get(name)
        if key is None:
            home = _home(name)
            # DeepSpeed ignores it. What looks like a slip of the pen is a mistake; the rest may be meant for others.
            kind = found.mistakes if home is None and is_slip(name, KEYS) else found.refusals
            kind.setdefault((name,), unknown_key(name, KEYS, home))
            continue
        if key.status == HONOURED:
            if name not in BATCH_KEYS or value is not None:  # null is DeepSpeed's way to say: infer it
                honoured[name] = value
        elif isinstance(value, dict) and key.model is not None:
            judgement = judge(key.model, value, (name,))
            found.mistakes.update(judgement.mistakes)
            found.refusals.update(judgement.refusals)
            unsound |= judgement.unsound
            if judgement.sound is not None:
                sections[name] = judgement.sound
        elif objection := check(key.adapter, value)[1]:
            found.mistakes.setdefault((name,), objection)
            unsound.add((name,))
        else:
            scalars[name] = value
        _refuse(document, key, found)
    whole = judge(EngineConfig, honoured)
    found.config = whole.sound
    found.mistakes.update(whole.mistakes)
    found.refusals.update(whole.refusals)
    whole.unsound |= unsound
    if whole.sound is not None:
        for name, value in whole.sound:
            (sections if isinstance(value, Section) else scalars)[name] = value
        spelt = {field: alias for alias, field in EngineConfig.aliases.items() if alias in document.settings}
        fits = () if isinstance(world, str) else misfits(whole.sound, world)
        for reads, message in (*conflicts(whole.sound, sections, scalars), *fits):
            reads = tuple((spelt.get(str(route[0]), route[0]), *route[1:]) for route in reads)
            if whole.counts(reads):
                found.mistakes.setdefault(reads[0], message)
        for reads, message in unbuilt(whole.sound):
            if whole.counts(reads):
                found.refusals.setdefault(reads[0], message)
    return found


def _refuse(document: Document, key: Key, found: _Found) -> None:
    """Note it where a key, or one inside it, asks for what is not built."""
    value = document.settings[key.name]
    if (key.name,) in found.mistakes:
        return
    if key.status == REFUSED:
        if not key.is_off(value):
            found.refusals[key.name,] = key.note if key.is_section else f"got {shown(value)}; {key.note}"
        return
    if key.switch is not None and key.is_off(value):
        return
    for row in _refused_inside(key.name) if isinstance(value, dict) else ():
        route, inner = tuple(row.name.split(".")), value
        for part in route[1:]:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not row.is_off(inner) and route not in found.mistakes:
            found.refusals[route] = row.note if isinstance(inner, dict) else f"got {shown(inner)}; {row.note}"


@cache
def _refused_inside(name: str) -> tuple[Key, ...]:
    return tuple(row for row in INSIDE.values() if row.refuses and row.name.startswith(f"{name}."))


def _home(name: str) -> str | None:
    """Where a key belongs that stands at the top and is known further down."""
    if name == "max_grad_norm":
        return 'gradients are clipped by "gradient_clipping"; move the number there'
    for component in (OptimizerConfig, SchedulerConfig):
        if any(name in model.model_fields for model in component.models.values()):
            return f"it belongs in {component.kind}.params"
    for key in KEYS.values():
        model = key.model or EngineConfig.section(key.name)
        if model is not None and (name in model.model_fields or name in model.aliases):
            return f"it belongs in {key.name}"
    return None


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """As they come in the document; those of a dict as they were found."""
    return sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0))
