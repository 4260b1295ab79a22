"""What a config is worth, as a value: `redline validate` prints it.

Exit codes: 0 runs as written, 1 is not valid, 3 is valid DeepSpeed and asks for what is not built here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.config.batch import BATCH_KEYS
from engine.config.document import Document, copy_document, format_route, read
from engine.config.foresee import foresee
from engine.config.load import Reading, Source, in_order, read_config
from engine.config.root import EngineConfig
from engine.config.support import HONOURED, KEYS, NO_EFFECT, REFUSED
from engine.config.table import Paint, paint_nothing, paint_on_terminal, rows_as_text
from engine.config.values import effective
from engine.config.words import shown
from engine.errors import ConfigError, Problem

__all__ = ["KeyStatus", "Report", "validate"]


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """What becomes of one key of the document: honoured, no effect or refused, and why."""

    path: str
    status: str
    note: str


@dataclass(frozen=True)
class Report:
    """Everything there is to say of a config.

    Attributes:
        source: the file's name, or "config".
        errors: what makes it invalid, in the order of the document.
        refusals: what is valid DeepSpeed and not built here.
        warnings: what runs, and will go wrong: the schedule leaves what its optimizer accepts.
        keys: the document's keys that are known, and refused ones further down.
        config: the part of it that is honoured; None if it is not valid.
    """

    source: str
    errors: list[Problem] = field(default_factory=list)
    refusals: list[Problem] = field(default_factory=list)
    keys: list[KeyStatus] = field(default_factory=list)
    config: EngineConfig | None = None
    warnings: list[Problem] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return not self.errors

    @property
    def runnable(self) -> bool:
        return self.valid and not self.refusals

    @property
    def exit_code(self) -> int:
        return 0 if self.runnable else 3 if self.valid else 1

    def to_json(self) -> dict[str, Any]:
        """The object that ``redline validate --json`` prints; warnings are among the keys, as their notes."""
        foreseen = [KeyStatus(problem.path, HONOURED, problem.message) for problem in self.warnings]
        return {
            "valid": self.valid,
            "runnable": self.runnable,
            "errors": [asdict(problem) for problem in self.errors],
            "keys": [asdict(key) for key in (*self.keys, *foreseen)],
            "resolved": self.config.model_dump(mode="json") if self.config and self.config.world_size else {},
        }

    def to_text(self, color: bool = False, *, width: int | None = None, whole: bool = False) -> str:
        """The same for people: every problem, every key, the batch.

        Args:
            color: for a terminal.
            width: columns of the terminal; None for a pipe.
            whole: every value of the config in force, too, with its origin.
        """
        return "\n".join(_lines(self, width, paint_on_terminal if color else paint_nothing, whole))


def validate(
    source: Source, *, world_size: int | None = None, policy: str | Path | dict[str, Any] | None = None
) -> Report:
    """Judge a config without running it.

    Args:
        source: a path, a dict or JSON text, as for `load_config`.
        world_size: processes that would train; default WORLD_SIZE, else 1.
        policy: a JSON Schema with rules of your own, as a path or a dict; the document is checked against it
            as it was written, before defaults, without comment keys. What breaks it is an error.

    Raises:
        ConfigError: the policy itself cannot be read, or is no JSON Schema.
    """
    rules = _read_policy(policy) if policy is not None else None
    try:
        reading = read_config(source, world_size)
    except ConfigError as error:
        return Report(error.source, list(error.problems))
    document, errors = reading.document, reading.mistakes
    if rules is not None:
        errors = in_order([*errors, *_breaches(document, *rules)])
    config = None if errors else reading.config
    foreseen = None if config is None else foresee(config)
    warnings = [] if foreseen is None else [document.problem(("scheduler", "params"), foreseen)]
    return Report(document.source, errors, reading.refusals, _keys(reading), config, warnings)


def _keys(reading: Reading) -> list[KeyStatus]:
    refused = {problem.path: problem.message for problem in reading.refusals}
    wrong = {problem.path for problem in reading.mistakes}
    found = []
    unscheduled = "optimizer" not in reading.document.settings
    for name in reading.document.settings:
        if (key := KEYS.get(name)) is None:
            continue
        off = key.switch is not None and key.is_off(reading.document.settings[name])
        if (off or key.status == REFUSED) and name not in refused and name not in wrong:
            found.append(KeyStatus(name, NO_EFFECT, "it switches nothing on"))
        else:
            note = f"{key.note}; initialize must get an optimizer" if name == "scheduler" and unscheduled else key.note
            found.append(KeyStatus(name, key.status, note))
        found += [KeyStatus(path, REFUSED, why) for path, why in refused.items() if path.startswith(f"{name}.")]
    return found


def _read_policy(policy: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    document = copy_document(policy) if isinstance(policy, dict) else read(Path(policy))
    if document.mistakes:
        problems = [document.problem(route, message) for route, message in document.mistakes.items()]
        raise ConfigError(problems, document.source)
    return document.value, "policy" if isinstance(policy, dict) else document.source


def _breaches(document: Document, policy: dict[str, Any], name: str) -> Iterator[Problem]:
    """What in a document a policy does not allow."""
    # Here, not above: only a policy needs it. Its types are in a package of their own, which may be missing.
    from jsonschema import Draft202012Validator, SchemaError, validators  # type: ignore[import-untyped,unused-ignore]
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    checker = validators.validator_for(policy, default=Draft202012Validator)
    try:
        checker.check_schema(policy)
        registry: Registry[Any] = Registry()  # an empty one: a policy is not fetched from the network
        for error in checker(policy, registry=registry).iter_errors(document.settings):
            yield document.problem(tuple(error.absolute_path), f"{shown(error.message)[1:-1]} ({name})")
    except SchemaError as error:
        where = format_route(tuple(error.absolute_path))
        raise ConfigError([Problem(where, f"no JSON Schema: {error.message}")], name) from None
    except (Unresolvable, re.error, RecursionError) as error:
        raise ConfigError([Problem("", f"cannot be applied: {error}")], name) from None


def _lines(report: Report, width: int | None, paint: Paint, whole: bool) -> Iterator[str]:
    yield paint(f"{report.source}: {_verdict(report)}", "head")
    for problem in (*report.errors, *report.refusals, *report.warnings):
        place = report.source if problem.line is None else f"{report.source}:{problem.line}:{problem.column}"
        yield "  " + ": ".join([paint(place, "problem"), *([problem.path] if problem.path else []), problem.message])
    if report.keys:
        yield ""
        rows = [(key.path, key.status, key.note) for key in report.keys]
        yield from rows_as_text(rows, ("key", "status", "note"), width, paint)
    config = report.config
    if config is not None and config.world_size:
        train, micro, steps = (getattr(config, key) for key in BATCH_KEYS)
        yield ""
        yield f"batch: {train} = {micro} a process x {steps} accumulated x world size {config.world_size}"
    if whole and config is not None:
        yield ""
        values = [(path, value.origin, shown(value.value)) for path, value in effective(config).items()]
        yield from rows_as_text(values, ("key", "origin", "value"), width, paint)


def _verdict(report: Report) -> str:
    if not report.valid:
        return "1 problem" if len(report.errors) == 1 else f"{len(report.errors)} problems"
    if report.runnable:
        return "valid; runs as written" + ("; 1 warning" if report.warnings else "")
    what = "something" if len(report.refusals) == 1 else f"{len(report.refusals)} things"
    return f"valid DeepSpeed, but asks for {what} that Redline does not have"
