"""A config as a document: a file, text or dict becomes a value with the line and column of everything in it.

Standard JSON (RFC 8259) plus what DeepSpeed's reader accepts: comments (``#``, ``//``, ``/* */``) and trailing commas.
A file that is no JSON is read as Hjson, as DeepSpeed reads all files, by the package of that name.
This file knows how a document can be malformed; it does not know what any key means.
"""

from __future__ import annotations

import json
import math
import re
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
_TOO_LONG = Problem("", f"it is longer than {_MAX_LENGTH:,} bytes, and no config is; is it something else?")
ENDLESS = "got Infinity; expected a finite number"  # the mistake of a number that a key for counts may have


@dataclass(frozen=True)
class Document:
    """A config as it was written.

    Attributes:
        value: all of it, comment keys included.
        source: the file's name, or "config".
        mistakes: what is wrong with it as a document although it could be read, by route.
        offsets: where each key (for the items of a list: each value) starts in the text; empty for a dict.
        text: what it was read from; empty for a dict.
    """

    value: dict[str, Any]
    source: str = field(default="config", compare=False)
    mistakes: dict[Route, str] = field(default_factory=dict, compare=False)
    offsets: dict[Route, int] = field(default_factory=dict, compare=False, repr=False)
    text: str = field(default="", compare=False, repr=False)

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
        return _position(self.text, self.offsets[route]) if route in self.offsets else (None, None)

    def problem(self, route: Route, message: str) -> Problem:
        """A message about a key, with its place."""
        return Problem(format_route(route), message, *self.locate(route))


def _without_comments(value: Any) -> Any:
    """A copy without the keys that are comments, such as ``"_why"`` and ``"//lr"``, at any level."""
    if isinstance(value, dict):
        return {key: _without_comments(item) for key, item in value.items() if not key.startswith(("_", "//"))}
    return [_without_comments(item) for item in value] if isinstance(value, list) else value


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


# -- a dict ----------------------------------------------------------------------------------------------


def copy_document(given: Mapping[Any, Any]) -> Document:
    """Copy a dict, with a mistake for each thing in it that JSON cannot express, which becomes null.

    A tuple counts as a list.

    Raises:
        ConfigError: it is longer than any config.
    """
    mistakes: dict[Route, str] = {}
    length = 0

    def copy(value: Any, route: Route) -> Any:
        nonlocal length
        length += sum(len(text) for text in (value, *route[-1:]) if isinstance(text, str)) + 1
        if length > _MAX_LENGTH:
            raise ConfigError([_TOO_LONG])
        if isinstance(value, (Mapping, list, tuple)) and len(route) >= _MAX_DEPTH:
            mistakes[route[:1]] = f"nested deeper than {_MAX_DEPTH} levels, or inside itself"
            return None
        if isinstance(value, Mapping):
            for key in value:
                if not _is_text(key):
                    mistakes[route] = f"got the key {key!a:.60} ({type(key).__name__}); expected strings as keys"
            return {str.__str__(key): copy(value[key], (*route, key)) for key in value if _is_text(key)}
        if isinstance(value, (list, tuple)):
            return [copy(item, (*route, index)) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        if _is_text(value):
            return str.__str__(value)  # str() of a string enum is its member's name
        if not isinstance(value, (int, float)):
            found = "half of a surrogate pair" if isinstance(value, str) else f"a Python {type(value).__name__}"
            mistakes[route] = f"got {found}; expected an object, a list, a string, a number, true, false or null"
        elif not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            found = "a huge integer" if isinstance(value, int) else json.dumps(value)  # NaN, Infinity
            mistakes[route] = f"got {found}; expected a finite number"
        else:
            return int(value) if isinstance(value, int) else float(value)
        return None

    return Document(copy(given, ()), mistakes=mistakes)


def _is_text(value: object) -> bool:
    """Whether it is a string that can be printed: half of a surrogate pair cannot."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


# -- a file ----------------------------------------------------------------------------------------------


def read(path: Path) -> Document:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, or is neither JSON nor Hjson.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_LENGTH + 1)  # not all of it: it may be a model, or a device that never ends
        if len(data) > _MAX_LENGTH:
            raise ConfigError([_TOO_LONG], str(path))
        text = data.decode("utf-8")
    except FileNotFoundError:
        problem = Problem("", f"no such file (the working directory is {Path.cwd()})")
    except IsADirectoryError:
        problem = Problem("", "is a directory; expected a JSON file")
    except UnicodeDecodeError as error:
        before, byte = data[: error.start].decode("utf-8"), data[error.start]
        message = f"got the byte 0x{byte:02x}; expected UTF-8; save the file as UTF-8"
        problem = Problem("", message, *_position(before, len(before)))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        problem = Problem("", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    else:
        try:
            return parse(text, str(path))
        except ConfigError as error:
            return _parse_hjson(text, error)
    raise ConfigError([problem], str(path))


def _parse_hjson(text: str, error: ConfigError) -> Document:
    """Read a file that JSON's parser refused with `error`."""
    *problems, last = error.problems
    if "which JSON writes" in last.message:  # to Hjson, True is a string
        raise error
    try:
        import hjson
    except ImportError:
        message = f"{last.message}; or is it Hjson, which needs: pip install 'redline[hjson]'"
        raise ConfigError([*problems, replace(last, message=message)], error.source) from None
    twice: dict[Route, str] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.update({(key,): "given twice in one object; remove one" for key in keys if keys.count(key) > 1})
        return dict(pairs)

    try:
        value = hjson.loads(text.removeprefix("\ufeff"), object_pairs_hook=unique)
    except (hjson.HjsonDecodeError, RecursionError) as other:
        place = (other.lineno, other.colno) if isinstance(other, hjson.HjsonDecodeError) else (None, None)
        raise ConfigError([*error.problems, Problem("", f"nor is it Hjson: {other}", *place)], error.source) from None
    if not isinstance(value, dict):
        raise error
    document = copy_document(value)
    source = f"{error.source} (Hjson, whose reader tells no lines)"
    return replace(document, source=source, mistakes={**document.mistakes, **twice})


# -- a text ----------------------------------------------------------------------------------------------

# Its last alternative matches anything: no text is searched twice, so that reading takes linear time.
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|(?:\#|//)[^\n]*|/\*(?s:.*?)\*/)
    | (?P<mark>[{}\[\],:])
    | (?P<string>"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")
    | (?P<word>[\w.+-]+)
    | (?P<stray>(?s:.))""",
    re.VERBOSE,
)
# How messages call some tokens.
_STRAYS = {
    '"': "a string that its line does not close", "'": "a single quote", "/": "an unclosed comment",
    "": "the end of the file", "True": "True, which JSON writes true", "False": "False, which JSON writes false",
    "None": "None, which JSON writes null",
}  # fmt: skip


def parse(text: str, source: str = "config") -> Document:
    """Read JSON text.

    Raises:
        ConfigError: it is not JSON, or its top level is not an object.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError([_TOO_LONG], source)
    parser = _Parser(text.removeprefix("\ufeff"))
    value, error = {}, None
    try:
        value = parser.whole()
    except _SyntaxError as found:
        error = found
    # What a dict may not hold can stand in a text, too: NaN, a huge number, half of a surrogate pair.
    mistakes = {**(document := copy_document(value)).mistakes, **parser.mistakes}
    document = replace(document, source=source, mistakes=mistakes, offsets=parser.offsets, text=parser.text)
    if error is None:
        return document
    message, offset = error.args
    problems = [document.problem(*mistake) for mistake in mistakes.items()]
    raise ConfigError([*problems, Problem("", message, *_position(parser.text, offset))], source)


def looks_like_json(text: str) -> bool:
    """Whether a string is a config itself and not the path of one: it starts with ``{``, comments aside."""
    return _Parser(text.removeprefix("\ufeff")).token == "{"


class _SyntaxError(Exception):
    """The text is not JSON: a message and an offset."""


class _Parser:
    """A recursive-descent parser. `token` and `offset` are those of the next token."""

    def __init__(self, text: str) -> None:
        self.mistakes: dict[Route, str] = {}
        self.offsets: dict[Route, int] = {}
        self.text = text
        self._tokens = (match for match in _TOKEN.finditer(text) if match.lastgroup != "skip")
        self._advance()

    def whole(self) -> dict[str, Any]:
        """The object that the text is."""
        if self.token != "{":
            self._fail("an object: { ... }")
        value: dict[str, Any] = self._value(())
        if self.token:
            self._fail("the end of the file")
        return value

    def _advance(self) -> None:
        match = next(self._tokens, None)
        self.token, self.offset = (match[0], match.start()) if match else ("", len(self.text))

    def _value(self, route: Route) -> Any:
        self.offsets.setdefault(route, self.offset)  # a key's own offset is already there
        if self.token not in ("{", "["):
            token, value = self.token, self._scalar()
            if isinstance(value, float) and math.isinf(value) and token[-1].isdigit():  # as it is written
                self.mistakes[route] = f"got {_shorten(token)}; expected a finite number"
            return value
        if len(route) >= _MAX_DEPTH:
            raise _SyntaxError(f"nested deeper than {_MAX_DEPTH} levels", self.offset)
        end = "}" if self.token == "{" else "]"
        items: dict[str | int, Any] = {}
        self._advance()
        while self.token != end:
            key = self._key(route) if end == "}" else len(items)
            items[key] = self._value((*route, key))
            if self.token == ",":  # the last item may have one, too
                self._advance()
            elif self.token != end:
                self._fail(f"',' or '{end}'")
        self._advance()
        return items if end == "}" else list(items.values())

    def _key(self, route: Route) -> str:
        if not self.token.startswith('"'):
            self._fail("a key in double quotes, or '}'")
        offset, key = self.offset, str(self._scalar())
        place = (*route, key)
        # JSON leaves open which of the two counts, and readers differ.
        if place in self.offsets:
            first, second = (_position(self.text, at)[0] for at in (self.offsets[place], offset))
            self.mistakes[place] = f"given twice, on line {first} and on line {second}; remove one"
        self.offsets[place] = offset
        if self.token != ":":
            self._fail(f"':' after the key {json.dumps(key)}")
        self._advance()
        return key

    def _scalar(self) -> Any:
        try:
            value = math.inf if self.token == "inf" else json.loads(self.token)  # Hjson's word for it
        except ValueError:
            if len(self.token) > 1 and self.token[0] == '"':
                self._fail("only JSON's escapes in it: " + r"\" \\ \/ \b \f \n \r \t \uXXXX")
            self._fail("a value: a number, a string in double quotes, true, false, null, { or [")
        self._advance()
        return value

    def _fail(self, expected: str) -> NoReturn:
        found = _STRAYS.get(self.token) or _shorten(self.token)
        if len(found) == 1 and not found.isascii():
            found = f"U+{ord(found):04X}"
        raise _SyntaxError(f"got {found}; expected {expected}", self.offset)


def _shorten(token: str) -> str:
    return token if len(token) <= 40 else token[:37] + "..."


def _position(text: str, offset: int) -> tuple[int, int]:
    """Line and column, 1-based."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
