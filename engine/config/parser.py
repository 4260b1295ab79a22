"""The parser: JSON text to a Python value, with the offset of everything in it.

Standard JSON (RFC 8259) plus what DeepSpeed's reader lets pass: comments (``#``, ``//``, ``/* */``) and
trailing commas. It reads in one pass and linear time, and goes on past what has a mistake but can be read.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = ["MAX_DEPTH", "JsonSyntaxError", "Parser", "Route", "is_text", "looks_like_json", "position", "shown_number"]

Route = tuple[str | int, ...]  # the way to a value: ("optimizer", "params", "betas", 0)

MAX_DEPTH = 100

_SKIP = r"[ \t\r\n]+|(?:\#|//)[^\n]*|/\*(?s:.*?)\*/"
_JSON_TEXT = re.compile(rf"\ufeff?(?:{_SKIP})*\{{")
_TOKEN = re.compile(
    rf"""(?P<skip>{_SKIP})
    | (?P<mark>[{{}}\[\],:])
    | (?P<string>"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")
    | (?P<word>[\w.+-]+)
    | (?P<stray>(?s:.))""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<fraction>(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LITERALS = {"true": True, "false": False, "null": None}
_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}


class JsonSyntaxError(Exception):
    """The text is not JSON: a message, and the offset where."""


class Parser:
    """A recursive descent; `kind`, `token` and `offset` are of the token that comes next."""

    def __init__(self, text: str) -> None:
        self.mistakes: dict[Route, str] = {}
        self.key_offsets: dict[Route, int] = {}
        self.value_offsets: dict[Route, int] = {}
        self.line_ends = [match.start() for match in re.finditer("\n", text)]
        self._end = len(text)
        self._tokens: Iterator[re.Match[str]] = _TOKEN.finditer(text)
        self.advance()

    def advance(self) -> None:
        for match in self._tokens:
            if match.lastgroup != "skip":
                self.kind, self.token, self.offset = match.lastgroup, match[0], match.start()
                return
        self.kind, self.token, self.offset = "end", "", self._end

    def whole(self) -> dict[str, Any]:
        if self.kind == "end":
            raise JsonSyntaxError("empty; expected an object: { ... }", 0)
        start, value = self.offset, self.value(())
        if self.kind != "end":
            self.fail("the end of the file")
        if not isinstance(value, dict):
            raise JsonSyntaxError(f"got {json.dumps(value)[:40]}; expected an object: {{ ... }}", start)
        return value

    def value(self, route: Route) -> Any:
        self.value_offsets[route] = self.offset
        if self.token in ("{", "["):
            if len(route) >= MAX_DEPTH:
                raise JsonSyntaxError(f"nested deeper than {MAX_DEPTH} levels", self.offset)
            return self.object(route) if self.token == "{" else self.list(route)
        value = self.scalar(route)
        self.advance()
        return value

    def object(self, route: Route) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self.advance()
        while self.token != "}":
            if self.kind != "string":
                self.fail("a key in double quotes, or '}'")
            key = self.string()
            place = (*route, key)
            if key in members:
                first, second = (position(at, self.line_ends)[0] for at in (self.key_offsets[place], self.offset))
                self.mistakes[place] = f"given twice, on line {first} and on line {second}; remove one"
            self.key_offsets[place] = self.offset
            self.advance()
            if self.token != ":":
                self.fail(f"':' after the key {json.dumps(key)}")
            self.advance()
            members[key] = self.value(place)
            self.separate("}")
        self.advance()
        return members

    def list(self, route: Route) -> list[Any]:
        items: list[Any] = []
        self.advance()
        while self.token != "]":
            items.append(self.value((*route, len(items))))
            self.separate("]")
        self.advance()
        return items

    def separate(self, end: str) -> None:
        """Past the comma behind an item; a trailing one is accepted."""
        if self.token == ",":
            self.advance()
        elif self.token != end:
            self.fail(f"',' or '{end}'")

    def scalar(self, route: Route) -> str | float | int | bool | None:
        if self.kind == "string":
            return self.string()
        if self.token in _LITERALS:
            return _LITERALS[self.token]
        number = _NUMBER.fullmatch(self.token)
        if number and len(self.token) <= 1000 and not math.isinf(float(self.token)):
            return float(self.token) if number["fraction"] else int(self.token)
        if number or self.token in ("NaN", "Infinity", "-Infinity"):
            self.mistakes[route] = f"got {shown_number(self.token)}; expected a finite number"
            return None
        self.fail("a value: a number, a string in double quotes, true, false, null, { or [")

    def string(self) -> str:
        try:
            text: str = json.loads(self.token) if "\\" in self.token else self.token[1:-1]
        except ValueError:
            text = "\ud800"
        if not is_text(text):
            self.fail("only JSON's escapes in it: " + r"\" \\ \/ \b \f \n \r \t \uXXXX")
        return text

    def fail(self, expected: str) -> NoReturn:
        raise JsonSyntaxError(f"got {self._found()}; expected {expected}", self.offset)

    def _found(self) -> str:
        """The next token, with what people mean by it."""
        if self.kind == "end":
            return "the end of the file"
        if self.token in _PYTHON_LITERALS:
            return f"{self.token}, which JSON writes {_PYTHON_LITERALS[self.token]}"
        if self.kind == "stray":
            known = {'"': "a string that its line does not close", "'": "a single quote", "/": "an unclosed comment"}
            return known.get(self.token) or (self.token if "!" <= self.token <= "~" else f"U+{ord(self.token):04X}")
        return self.token if len(self.token) <= 40 else self.token[:37] + "..."


def looks_like_json(text: str) -> bool:
    """Whether a string is a config itself rather than the path of one: comments apart, ``{`` starts it."""
    return _JSON_TEXT.match(text) is not None


def position(offset: int, line_ends: list[int]) -> tuple[int, int]:
    """Line and column, from 1."""
    line = bisect_left(line_ends, offset)
    return line + 1, offset - (line_ends[line - 1] if line else -1)


def is_text(value: object) -> bool:
    """Whether it is a string that can be printed: half of a surrogate pair cannot."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def shown_number(number: object) -> str:
    text = "a huge integer" if isinstance(number, int) else str(number)
    return text if len(text) <= 30 else f"{text[:27]}..."
