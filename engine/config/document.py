"""A config as a document: a file, a text or a dict to a value, with the line and column of everything in it.

Owns how a document can be wrong as a document (no such file, encoding, syntax, what JSON cannot say) and how
a place in it is written; it does not know what any key means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config.parser import MAX_DEPTH, JsonSyntaxError, Parser, Route, is_text, position, shown_number
from engine.errors import ConfigError, Problem

__all__ = ["Document", "copy_document", "format_route", "is_comment", "parse", "read"]

_LARGEST = 1.7976931348623157e308  # a double's; what another reader of the file could not keep, it may not say
_JSON_HAS = "what JSON has: an object, a list, a string, a number, true, false or null"


@dataclass(frozen=True)
class Document:
    """A config as it was written.

    Attributes:
        value: the whole of it, comment keys included.
        source: the file's name, or "config".
        mistakes: what is wrong with it as a document though it could be read, by route.
        key_offsets: where in the text each key starts, by the route of its value; empty for a dict.
        value_offsets: where each value starts.
        line_ends: where each line of the text ends.
    """

    value: dict[str, Any]
    source: str = field(default="config", compare=False)
    mistakes: dict[Route, str] = field(default_factory=dict, compare=False)
    key_offsets: dict[Route, int] = field(default_factory=dict, compare=False, repr=False)
    value_offsets: dict[Route, int] = field(default_factory=dict, compare=False, repr=False)
    line_ends: list[int] = field(default_factory=list, compare=False, repr=False)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The value without what only comments: no setting, and so not judged."""
        settings: dict[str, Any] = _without_comments(self.value)
        settings.pop("$schema", None)
        return settings

    def locate(self, route: Route) -> tuple[int, int] | tuple[None, None]:
        """Line and column of a key (for an item of a list: of its value), or of what lacks it."""
        while route and route not in self.value_offsets:
            route = route[:-1]
        if route not in self.value_offsets:
            return None, None
        return position(self.key_offsets.get(route, self.value_offsets[route]), self.line_ends)

    def problem(self, route: Route, message: str) -> Problem:
        return Problem(format_route(route), message, *self.locate(route))


def read(path: Path) -> Document:
    """The document in a file.

    Raises:
        ConfigError: it cannot be read, or not as JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        reason = f"no such file (the working directory is {Path.cwd()})"
    except IsADirectoryError:
        reason = "is a directory; expected a JSON file"
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    else:
        return parse(_decode(data, str(path)), str(path))
    raise ConfigError([Problem("", reason)], str(path))


def parse(text: str, source: str = "config") -> Document:
    """The document in a text.

    Raises:
        ConfigError: it is not JSON, or its top level is not an object.
    """
    parser = Parser(text.removeprefix("\ufeff"))
    found = (parser.mistakes, parser.key_offsets, parser.value_offsets, parser.line_ends)
    try:
        return Document(parser.whole(), source, *found)
    except JsonSyntaxError as error:
        document = Document({}, source, *found)
        problems = [document.problem(*mistake) for mistake in document.mistakes.items()]
        message, offset = error.args
        raise ConfigError([*problems, Problem("", message, *position(offset, parser.line_ends))], source) from None


def copy_document(given: Mapping[Any, Any]) -> Document:
    """The document in a dict: a copy of it, with a mistake for each thing that JSON cannot say.

    A tuple counts as a list. What is not JSON's becomes null beside its mistake.
    """
    mistakes: dict[Route, str] = {}

    def copy(value: Any, route: Route, inside: tuple[int, ...]) -> Any:
        if isinstance(value, (Mapping, list, tuple)):
            if len(route) >= MAX_DEPTH or id(value) in inside:
                mistakes[route[:1]] = f"nested deeper than {MAX_DEPTH} levels, or inside itself"
                return None
            inside = (*inside, id(value))
        if isinstance(value, Mapping):
            for key in value:
                if not is_text(key):
                    mistakes[route] = f"got the key {key!a:.60} ({type(key).__name__}); expected strings as keys"
            return {str(key): copy(value[key], (*route, key), inside) for key in value if is_text(key)}
        if isinstance(value, (list, tuple)):
            return [copy(item, (*route, index), inside) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        if is_text(value):
            return str(value)
        if isinstance(value, (int, float)) and -_LARGEST <= value <= _LARGEST:
            return int(value) if isinstance(value, int) else float(value)
        if isinstance(value, (int, float)):
            mistakes[route] = f"got {shown_number(value)}; expected a finite number"
        else:
            kind = "half of a surrogate pair" if isinstance(value, str) else f"a Python {type(value).__name__}"
            mistakes[route] = f"got {kind}; expected {_JSON_HAS}"
        return None

    return Document(copy(given, (), ()), mistakes=mistakes)


def is_comment(key: str) -> bool:
    """Whether a key is a comment, as ``"_why"`` and ``"//lr"`` are: accepted anywhere and skipped."""
    return key.startswith(("_", "//"))


def format_route(route: Route) -> str:
    """A route as a message writes it.

    >>> format_route(("optimizer", "params", "betas", 1))
    'optimizer.params.betas[1]'
    >>> format_route(("a b", "c"))
    '["a b"].c'
    """
    text = ""
    for part in route:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_$][A-Za-z0-9_$-]{,59}", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part if len(part) <= 60 else part[:57] + '...')}]"
    return text


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"the byte 0x{data[error.start]:02x}"
        before = data[: error.start].decode("utf-8")
        line_ends = [match.start() for match in re.finditer("\n", before)]
        message = f"got {found}; expected UTF-8; save the file as UTF-8"
        raise ConfigError([Problem("", message, *position(len(before), line_ends))], source) from None


def _without_comments(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_comments(item) for key, item in value.items() if not is_comment(key)}
    return [_without_comments(item) for item in value] if isinstance(value, list) else value
