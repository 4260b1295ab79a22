"""What a config comes to, for `redline validate`.

Exit codes: 0 runs as written, 1 is not valid, 3 is valid DeepSpeed and asks for what is not built here.
"""

from __future__ import annotations

import inspect
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from redline.config.components import OneCycleParams, SchedulerConfig
from redline.config.document import Document, copy_document, format_route, read
from redline.config.load import Reading, Source, in_order
from redline.config.messages import shown
from redline.config.root import BATCH_KEYS, EngineConfig
from redline.config.schema import is_switched_off, whole_schema
from redline.config.section import HONOURED, NO_EFFECT, REFUSED
from redline.config.values import effective
from redline.console import Paint, paint_nothing, rows_as_text
from redline.errors import ConfigError, Problem

__all__ = ["KeyStatus", "Report", "validate"]

POLICY_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """What becomes of one key of the document: honoured, no effect or refused, and why."""

    path: str
    status: str
    note: str


@dataclass(frozen=True)
class Report:
    """All that was found in a config.

    Attributes:
        source: the file's name, or "config".
        errors: what makes it invalid, in the order of the document.
        refusals: what is valid DeepSpeed and not built here.
        keys: the document's keys, and refused ones further down.
        config: the part of it that is honoured; None if it is not valid.
        warnings: what runs and will go wrong: the schedule leaves what its optimizer accepts.
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

    def to_text(self, width: int | None = None, paint: Paint = paint_nothing, *, whole: bool = False) -> str:
        """The same for people: every problem, every key, the batch.

        Args:
            width: columns of the terminal; None for a pipe.
            paint: color of a text by its kind.
            whole: every value of the config in force, too, with its origin.
        """
        return "\n".join(self._lines(width, paint, whole))

    def _lines(self, width: int | None, paint: Paint, whole: bool) -> Iterator[str]:
        yield paint(f"{self.source}: {self._verdict()}", "head")
        for problem in (*self.errors, *self.refusals, *self.warnings):
            place = self.source if problem.line is None else f"{self.source}:{problem.line}:{problem.column}"
            yield "  " + ": ".join([paint(place, "problem"), *filter(None, [problem.path]), problem.message])
        if self.keys:
            yield ""
            rows = [(key.path, key.status, key.note) for key in self.keys]
            yield from rows_as_text(rows, ("key", "status", "note"), width, paint)
        if self.config is not None and self.config.world_size:
            train, micro, steps = (getattr(self.config, key) for key in BATCH_KEYS)
            yield f"\nbatch: {train} = {micro} per rank x {steps} accumulated x world size {self.config.world_size}"
        if whole and self.config is not None:
            yield ""
            values = [(path, value.origin, shown(value.value)) for path, value in effective(self.config).items()]
            yield from rows_as_text(values, ("key", "origin", "value"), width, paint)

    def _verdict(self) -> str:
        if not self.valid:
            count = len(self.errors) + len(self.refusals)
            return "1 problem" if count == 1 else f"{count} problems"
        if self.runnable:
            return "valid; runs as written" + ("; 1 warning" if self.warnings else "")
        what = "something" if len(self.refusals) == 1 else f"{len(self.refusals)} things"
        return f"valid DeepSpeed, but asks for {what} that Redline does not have"


def validate(
    source: Source,
    *,
    world_size: int | None = None,
    num_samples: int | None = None,
    policy: str | Path | dict[str, Any] | None = None,
) -> Report:
    """Check a config without running it.

    Args:
        source: a path, a dict or JSON text, as for `load_config`.
        world_size: ranks that would train; default WORLD_SIZE, else 1.
        num_samples: of the training data, as for `load_config`.
        policy: a JSON Schema with rules of your own, as a path or a dict; the document is checked against it
            as it was written, before defaults, without comment keys. What breaks it is an error.

    Raises:
        ConfigError: the policy itself cannot be read, or is no JSON Schema.
    """
    # Read first: a broken policy is an error of its own, whatever the config is.
    rules = None if policy is None else copy_document(policy) if isinstance(policy, dict) else read(Path(policy))
    try:
        reading = Reading(source, world_size, num_samples)
    except ConfigError as error:
        return Report(error.source, list(error.problems))
    document, errors = reading.document, reading.mistakes
    if rules is not None:
        name = "policy" if isinstance(policy, dict) else rules.source
        errors = in_order([*errors, *_breaches(document, rules, name)])
    config = None if errors else reading.config
    foreseen = _foresee(config) if config else None
    warnings = [document.problem(("scheduler", "params"), foreseen)] if foreseen else []
    return Report(document.source, errors, reading.refusals, _keys(reading), config, warnings)


def _keys(reading: Reading) -> list[KeyStatus]:
    """The status of each key at the top, and of what is refused within it."""
    refused = {problem.path: problem.message for problem in reading.refusals}
    wrong = {problem.path for problem in reading.mistakes}
    settings, schema = reading.document.settings, whole_schema()
    found = []
    for name, value in settings.items():
        key = schema["properties"].get(schema["aliases"].get(name, name))
        if key is None:  # somebody else's key: it is refused, or an error that is listed already
            found += [KeyStatus(name, REFUSED, refused[name])] if name in refused else []
            continue
        inside = [KeyStatus(path, REFUSED, why) for path, why in refused.items() if path.startswith(f"{name}.")]
        status, note = key.get("status", HONOURED), key.get("note") or key["description"]
        if name in refused:
            status, note = REFUSED, refused[name]
        elif (status == REFUSED or is_switched_off(key, value)) and name not in wrong:
            status, note = NO_EFFECT, "it switches nothing on"
        elif name == "scheduler" and "optimizer" not in settings:
            note += "; initialize must get an optimizer"
        found += [KeyStatus(name, status, note), *inside]
    return found


def _breaches(document: Document, policy: Document, name: str) -> list[Problem]:
    """What in a document a policy does not allow."""
    # Here, not above: only a policy needs it. Its types are in a package of their own, which may be missing.
    from jsonschema import Draft202012Validator, SchemaError, validators  # type: ignore[import-untyped,unused-ignore]
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    if policy.mistakes:
        raise ConfigError([policy.problem(*mistake) for mistake in policy.mistakes.items()], policy.source)
    checker = validators.validator_for(policy.value, default=Draft202012Validator)
    try:
        checker.check_schema(policy.value)
        registry: Registry[Any] = Registry()  # an empty one: a policy is not fetched from the network
        with _time_limit(POLICY_TIMEOUT):
            errors = list(checker(policy.value, registry=registry).iter_errors(document.settings))
    except TimeoutError:
        slow = f"its patterns take longer than {POLICY_TIMEOUT:g} s on this config"
        cause = 'a repeat within a repeat, such as "(a+)+", takes exponential time: write it without one'
        problem = Problem("", f"{slow}; {cause}")
    except SchemaError as error:
        problem = Problem(format_route(tuple(error.absolute_path)), f"no JSON Schema: {error.message}")
    except (Unresolvable, re.error, RecursionError) as error:
        problem = Problem("", f"cannot be applied: {error}")
    else:
        return [document.problem(tuple(each.absolute_path), f"{shown(each.message)[1:-1]} ({name})") for each in errors]
    raise ConfigError([problem], name)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in this block after so many seconds; only where signals are handled, in the main thread on Unix."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _foresee(config: EngineConfig) -> str | None:
    """The first step at which the schedule leaves what optimizers accept, in words; None if there is none.

    Of DeepSpeed's five schedules only OneCycle's momentum can; so most configs are checked without torch. A registered
    class is not looked at, and a schedule that refuses its arguments is reported by `initialize`.
    """
    scheduler, optimizer = config.scheduler, config.optimizer
    if scheduler is None:
        return None
    params = scheduler.params
    grows = isinstance(params, OneCycleParams) and params.cycle_momentum and params.decay_mom_rate > 0
    if scheduler.type in SchedulerConfig.models and not grows:
        return None
    from redline.schedulers import Schedule, resolve  # here, not above: they import torch
    from redline.schedulers.schedule import NoOptimizer, find_violation

    # What a schedule reads of a parameter group; Adam's without an optimizer.
    group: dict[str, Any] = {"betas": (0.9, 0.999)} if optimizer is None else dict(optimizer.params)
    if optimizer is not None and optimizer.type not in optimizer.models:
        parameters = inspect.signature(optimizer.classes()[optimizer.type]).parameters
        group = {name: parameter.default for name, parameter in parameters.items()} | group
    if not isinstance(group.get("lr"), (float, int)):  # Muon's is null, and a required one has no default
        group["lr"] = 1e-3
    group = {name: group[name] for name in ("lr", "betas", "momentum") if name in group}
    arguments = scheduler.arguments()
    # A list has a value for each parameter group, a single value is that of all.
    num_groups = max((len(value) for value in arguments.values() if isinstance(value, (list, tuple))), default=1)
    cls: Any = resolve(scheduler.type)
    if issubclass(cls, Schedule):
        arguments["corrected"] = config.redline.schedules == "corrected"
    try:
        violation = find_violation(cls(NoOptimizer([dict(group) for _ in range(num_groups)]), **arguments))
    except (TypeError, ValueError):
        return None
    return None if violation is None else str(violation)
