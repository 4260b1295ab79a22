"""A config as a document: a file, text or dict becomes a value with the line and column of everything in it.

Standard JSON (RFC 8259) plus what DeepSpeed's reader accepts: comments (``#``, ``//``, ``/* */``) and trailing commas.
A file that is no JSON is read as Hjson, as DeepSpeed reads all files, by the package of that name.
This file knows how a document can be malformed; it does not know what any key means.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from redline.errors import ConfigError, Problem

__all__ = ["ENDLESS", "Document", "Route", "copy_document", "format_route", "looks_like_json", "parse", "read"]

Route = tuple[str | int, ...]  # the keys and indices that lead to a value: ("optimizer", "params", "betas", 0)

_MAX_DEPTH = 100
_MAX_LENGTH = 2_000_000  # characters, or bytes of a file: some hundred times the longest config
_MAX_NUMBER = 1.7976931348623157e308  # a double's; other readers of the file could not keep a larger one
# Its last alternative matches anything: no text is searched twice, so that reading takes linear time.
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|(?:\#|//)[^\n]*|/\*(?s:.*?)\*/)
    | (?P<mark>[{}\[\],:])
    | (?P<string>"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")
    | (?P<word>[\w.+-]+)
    | (?P<stray>(?s:.))""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<fraction>(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_SURROGATE = re.compile("[\ud800-\udfff]")
ENDLESS = "got Infinity; expected a finite number"  # the mistake of a number that a key for counts may have
_LITERALS = {"true": True, "false": False, "null": None}
# How messages call some tokens.
_STRAYS = {
    '"': "a string that its line does not close", "'": "a single quote", "/": "an unclosed comment",
    "": "the end of the file", "True": "True, which JSON writes true", "False": "False, which JSON writes false",
    "None": "None, which JSON writes null",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A config as it was written.

    Attributes:
        value: all of it, comment keys included.
        source: the file's name, or "config".
        mistakes: what is wrong with it as a document although it could be read, by route.
        offsets: where each key (for the items of a list: each value) starts in the text; empty for a dict.
        line_ends: where each line of the text ends.
    """

    value: dict[str, Any]
    source: str = field(default="config", compare=False)
    mistakes: dict[Route, str] = field(default_factory=dict, compare=False)
    offsets: dict[Route, int] = field(default_factory=dict, compare=False, repr=False)
    line_ends: list[int] = field(default_factory=list, compare=False, repr=False)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The value without comment keys and ``$schema``."""
        settings: dict[str, Any] = _without_comments(self.value)
        settings.pop("$schema", None)
        return settings

    def locate(self, route: Route) -> tuple[int, int] | tuple[None, None]:
        """Line and column of a key, or of the object in which it is missing; None for a dict."""
        while route and route not in self.offsets:
            route = route[:-1]
        return _position(self.offsets[route], self.line_ends) if route in self.offsets else (None, None)

    def problem(self, route: Route, message: str) -> Problem:
        return Problem(format_route(route), message, *self.locate(route))


_TOO_LONG = Problem("", f"it is longer than {_MAX_LENGTH:,} bytes, and no config is; is it something else?")


def read(path: Path) -> Document:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, or is neither JSON nor Hjson.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LENGTH + 1)  # not all of it: it may be a model, or a device that never ends
        text = data.decode("utf-8") if len(data) <= _MAX_LENGTH else ""
    except FileNotFoundError:
        problem = Problem("", f"no such file (the working directory is {Path.cwd()})")
    except IsADirectoryError:
        problem = Problem("", "is a directory; expected a JSON file")
    except UnicodeDecodeError as error:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"the byte 0x{data[error.start]:02x}"
        before = data[: error.start].decode("utf-8")
        position = _position(len(before), _line_ends(before))
        problem = Problem("", f"got {found}; expected UTF-8; save the file as UTF-8", *position)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        problem = Problem("", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    else:
        if len(data) <= _MAX_LENGTH:
            try:
                return parse(text, str(path))
            except ConfigError as error:
                return _parse_hjson(text, str(path), error)
        problem = _TOO_LONG
    raise ConfigError([problem], str(path))


def parse(text: str, source: str = "config") -> Document:
    """Read JSON text.

    Raises:
        ConfigError: it is not JSON, or its top level is not an object.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError([_TOO_LONG], source)
    parser = _Parser(text.removeprefix("\ufeff"))
    try:
        value, error = parser.whole(), None
    except _SyntaxError as found:
        value, error = {}, found
    document = Document(value, source, parser.mistakes, parser.offsets, parser.line_ends)
    if error is None:
        return document
    message, offset = error.args
    problems = [document.problem(*mistake) for mistake in document.mistakes.items()]
    raise ConfigError([*problems, Problem("", message, *_position(offset, parser.line_ends))], source)


def _parse_hjson(text: str, source: str, error: ConfigError) -> Document:
    """Read what JSON's parser did not; `error` is what it said."""
    *problems, last = error.problems
    if "which JSON writes" in last.message:  # to Hjson, True is a string
        raise error
    try:
        import hjson
    except ImportError:
        message = f"{last.message}; or is it Hjson, which needs: pip install 'redline[hjson]'"
        raise ConfigError([*problems, replace(last, message=message)], source) from None
    twice: dict[Route, str] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for key in found if len(found) < len(pairs) else ():
            if sum(key == each for each, _ in pairs) > 1:
                twice[key,] = "given twice in one object; remove one"
        return found

    try:
        value = hjson.loads(text.removeprefix("\ufeff"), object_pairs_hook=unique)
    except (hjson.HjsonDecodeError, RecursionError) as other:
        place = (other.lineno, other.colno) if isinstance(other, hjson.HjsonDecodeError) else (None, None)
        raise ConfigError([*error.problems, Problem("", f"nor is it Hjson: {other}", *place)], source) from None
    if not isinstance(value, dict):
        raise error
    document = copy_document(value)
    source = f"{source} (Hjson, whose reader tells no lines)"
    return replace(document, source=source, mistakes={**document.mistakes, **twice})


def copy_document(given: Mapping[Any, Any]) -> Document:
    """Copy a dict, with a mistake for each thing in it that JSON cannot express.

    A tuple counts as a list. What JSON cannot express becomes null.

    Raises:
        ConfigError: it is longer than any config.
    """
    mistakes: dict[Route, str] = {}
    length = 0

    def copy(value: Any, route: Route, inside: tuple[int, ...]) -> Any:
        nonlocal length
        length += len(value) + 1 if isinstance(value, str) else 1
        length += len(route[-1]) if route and isinstance(route[-1], str) else 0
        if length > _MAX_LENGTH:
            raise ConfigError([_TOO_LONG])
        if isinstance(value, (Mapping, list, tuple)):
            if len(route) >= _MAX_DEPTH or id(value) in inside:
                mistakes[route[:1]] = f"nested deeper than {_MAX_DEPTH} levels, or inside itself"
                return None
            inside = (*inside, id(value))  # on the way down only: one list may be at two places
        if isinstance(value, Mapping):
            for key in value:
                if not _is_text(key):
                    mistakes[route] = f"got the key {key!a:.60} ({type(key).__name__}); expected strings as keys"
            return {str(key): copy(value[key], (*route, key), inside) for key in value if _is_text(key)}
        if isinstance(value, (list, tuple)):
            return [copy(item, (*route, index), inside) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        if _is_text(value):
            return str(value)
        if not isinstance(value, (int, float)):
            kind = "half of a surrogate pair" if isinstance(value, str) else f"a Python {type(value).__name__}"
            mistakes[route] = f"got {kind}; expected an object, a list, a string, a number, true, false or null"
        elif not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            mistakes[route] = _not_finite("a huge integer" if isinstance(value, int) else value)
        else:
            return int(value) if isinstance(value, int) else float(value)
        return None

    return Document(copy(given, (), ()), mistakes=mistakes)


def looks_like_json(text: str) -> bool:
    """Whether a string is a config itself and not the path of one: it starts with ``{``, comments aside."""
    return _Parser(text.removeprefix("\ufeff")).token == "{"


def format_route(route: Route) -> str:
    """A route as messages write it.

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


class _SyntaxError(Exception):
    """The text is not JSON: a message and an offset."""


class _Parser:
    """A recursive-descent parser. `kind`, `token` and `offset` describe the next token."""

    def __init__(self, text: str) -> None:
        self.mistakes: dict[Route, str] = {}
        self.offsets: dict[Route, int] = {}
        self.line_ends = _line_ends(text)
        self._end = len(text)
        self._tokens = (match for match in _TOKEN.finditer(text) if match.lastgroup != "skip")
        self.advance()

    def advance(self) -> None:
        match = next(self._tokens, None)
        self.kind, self.token, self.offset = (
            (match.lastgroup, match[0], match.start()) if match else ("end", "", self._end)
        )

    def whole(self) -> dict[str, Any]:
        if self.kind == "end":
            raise _SyntaxError("empty; expected an object: { ... }", 0)
        start, value = self.offset, self.value(())
        if self.kind != "end":
            self.fail("the end of the file")
        if not isinstance(value, dict):
            raise _SyntaxError(f"got {json.dumps(value)[:40]}; expected an object: {{ ... }}", start)
        return value

    def value(self, route: Route) -> Any:
        self.offsets.setdefault(route, self.offset)  # a key's own offset is already there
        if self.token not in ("{", "["):
            value = self.string() if self.kind == "string" else self.scalar(route)
            self.advance()
            return value
        if len(route) >= _MAX_DEPTH:
            raise _SyntaxError(f"nested deeper than {_MAX_DEPTH} levels", self.offset)
        end = "}" if self.token == "{" else "]"
        items: dict[str | int, Any] = {}
        self.advance()
        while self.token != end:
            key = self.key(route, items) if end == "}" else len(items)
            items[key] = self.value((*route, key))
            if self.token == ",":  # the last item may have one, too
                self.advance()
            elif self.token != end:
                self.fail(f"',' or '{end}'")
        self.advance()
        return items if end == "}" else list(items.values())

    def key(self, route: Route, items: Mapping[str | int, Any]) -> str:
        if self.kind != "string":
            self.fail("a key in double quotes, or '}'")
        key = self.string()
        place = (*route, key)
        # JSON leaves open which of the two counts, and readers differ.
        if key in items:
            first, second = (_position(at, self.line_ends)[0] for at in (self.offsets[place], self.offset))
            self.mistakes[place] = f"given twice, on line {first} and on line {second}; remove one"
        self.offsets[place] = self.offset
        self.advance()
        if self.token != ":":
            self.fail(f"':' after the key {json.dumps(key)}")
        self.advance()
        return key

    def scalar(self, route: Route) -> float | int | bool | None:
        if self.token in _LITERALS:
            return _LITERALS[self.token]
        # int() refuses more than 4,300 digits, and takes quadratic time for fewer.
        number = _NUMBER.fullmatch(self.token)
        if number and len(self.token) <= 1000 and not math.isinf(float(self.token)):
            return float(self.token) if number["fraction"] else int(self.token)
        if number or self.token.lstrip("-") in ("NaN", "Infinity", "inf"):
            self.mistakes[route] = _not_finite(self.token)
            return None
        self.fail("a value: a number, a string in double quotes, true, false, null, { or [")

    def string(self) -> str:
        try:
            text: str = json.loads(self.token) if "\\" in self.token else self.token[1:-1]
        except ValueError:
            text = "\ud800"  # not text either
        if not _is_text(text):
            self.fail("only JSON's escapes in it: " + r"\" \\ \/ \b \f \n \r \t \uXXXX")
        return text

    def fail(self, expected: str) -> NoReturn:
        found = _STRAYS.get(self.token) or (self.token if len(self.token) <= 40 else self.token[:37] + "...")
        if self.kind == "stray" and not "!" <= self.token <= "~":
            found = f"U+{ord(self.token):04X}"
        raise _SyntaxError(f"got {found}; expected {expected}", self.offset)


def _line_ends(text: str) -> list[int]:
    return [match.start() for match in re.finditer("\n", text)]


def _position(offset: int, line_ends: list[int]) -> tuple[int, int]:
    """Line and column, 1-based."""
    line = bisect_left(line_ends, offset)
    return line + 1, offset - (line_ends[line - 1] if line else -1)


def _is_text(value: object) -> bool:
    """Whether it is a string that can be printed: half of a surrogate pair cannot."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _not_finite(number: object) -> str:
    text = "Infinity" if str(number) == "inf" else str(number)
    return f"got {text if len(text) <= 30 else text[:27] + '...'}; expected a finite number"


def _without_comments(value: Any) -> Any:
    """A copy without the keys that are comments, such as ``"_why"`` and ``"//lr"``, at any level."""
    if isinstance(value, dict):
        return {key: _without_comments(item) for key, item in value.items() if not key.startswith(("_", "//"))}
    return [_without_comments(item) for item in value] if isinstance(value, list) else value
