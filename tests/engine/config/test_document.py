"""Text to value and position, and every way in which a text can be no document."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.config.document import copy_document, format_route, parse, read
from engine.config.parser import looks_like_json
from engine.errors import ConfigError

A_VALUE = "a value: a number, a string in double quotes, true, false, null, { or ["


def test_comments_and_trailing_commas_are_accepted() -> None:
    text = '# one\n{ // two\n "a": [1, 2,], /* three\n */ "b": "# // /* no comment", }\n# four'
    assert parse(text).value == {"a": [1, 2], "b": "# // /* no comment"}


def test_every_key_and_value_has_a_line_and_a_column() -> None:
    document = parse('{\n  "a": {\n    "b": [1,\n      2]\n  }\n}')
    assert document.locate(("a",)) == (2, 3)
    assert document.locate(("a", "b")) == (3, 5)
    assert document.locate(("a", "b", 1)) == (4, 7)
    assert document.value_offsets["a", "b"] == document.key_offsets["a", "b"] + 5


def test_what_is_missing_is_located_where_it_would_belong() -> None:
    assert parse('{\n "a": {}}').locate(("a", "missing", 3)) == (2, 2)
    assert parse("\n {}").locate(("missing",)) == (2, 2)


def test_a_byte_order_mark_is_not_a_column() -> None:
    assert parse('\ufeff{"a": 1}').locate(("a",)) == (1, 2)


def test_numbers_keep_their_kind() -> None:
    value = parse('{"i": -12, "f": 2e3, "g": 0.5, "z": -0}').value
    assert [(type(number), number) for number in value.values()] == [(int, -12), (float, 2e3), (float, 0.5), (int, 0)]


def test_escapes_are_read() -> None:
    assert parse(r'{"a\n\u00e9": "\ud83d\ude00\/"}').value == {"a\n\xe9": "\U0001f600/"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1:1: empty; expected an object: { ... }"),
        ("  # nothing\n", "1:1: empty; expected an object: { ... }"),
        (" [1]", "1:2: got [1]; expected an object: { ... }"),
        ('"x"', '1:1: got "x"; expected an object: { ... }'),
        ('{"a": 1', "1:8: got the end of the file; expected ',' or '}'"),
        ('{"a": 1}\n}', "2:1: got }; expected the end of the file"),
        ('{"a" 1}', "1:6: got 1; expected ':' after the key \"a\""),
        ('{"a": 1\n "b": 2}', "2:2: got \"b\"; expected ',' or '}'"),
        ("{a: 1}", "1:2: got a; expected a key in double quotes, or '}'"),
        ("{'a': 1}", "1:2: got a single quote; expected a key in double quotes, or '}'"),
        ("{,}", "1:2: got ,; expected a key in double quotes, or '}'"),
        ('{"a": [1 2]}', "1:10: got 2; expected ',' or ']'"),
        ('{"a": }', f"1:7: got }}; expected {A_VALUE}"),
        ('{"a": 01}', f"1:7: got 01; expected {A_VALUE}"),
        ('{"a": .5}', f"1:7: got .5; expected {A_VALUE}"),
        ('{"a": True}', f"1:7: got True, which JSON writes true; expected {A_VALUE}"),
        ('{"a": "b\n"}', f"1:7: got a string that its line does not close; expected {A_VALUE}"),
        ('{"a": /* b', f"1:7: got an unclosed comment; expected {A_VALUE}"),
        ('{"a": \u201cb\u201d}', f"1:7: got U+201C; expected {A_VALUE}"),
        ('{"a":\u00a01}', f"1:6: got U+00A0; expected {A_VALUE}"),
        (r'{"a": "\x"}', r"""1:7: got "\x"; expected only JSON's escapes in it: \" \\ \/ \b \f \n \r \t \uXXXX"""),
        (
            r'{"a": "\ud800"}',
            r"""1:7: got "\ud800"; expected only JSON's escapes in it: \" \\ \/ \b \f \n \r \t \uXXXX""",
        ),
        ('{"a":' * 101 + "1" + "}" * 101, "1:501: nested deeper than 100 levels"),
    ],
)
def test_what_is_not_json_is_an_error_with_its_place_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert [str(problem) for problem in caught.value.problems] == [message]


def test_a_hundred_levels_are_accepted() -> None:
    parse('{"a":' * 100 + "1" + "}" * 100)


def test_a_key_given_twice_names_both_lines_and_the_rest_is_read() -> None:
    document = parse('{\n"a": 1,\n"b": NaN,\n"a": 2,\n"c": 1e999}')
    assert document.mistakes == {
        ("b",): "got NaN; expected a finite number",
        ("a",): "given twice, on line 2 and on line 4; remove one",
        ("c",): "got 1e999; expected a finite number",
    }
    assert document.locate(("a",)) == (4, 1)


def test_mistakes_before_a_syntax_error_are_reported_with_it() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('{"a": 1, "a": -Infinity, "b" }')
    assert [str(problem) for problem in caught.value.problems] == [
        "1:10: a: got -Infinity; expected a finite number",
        "1:30: got }; expected ':' after the key \"b\"",
    ]


@pytest.mark.parametrize("text", ["[", '{"a":', '"', "#\n", "/*", " ", "9", '{"a":1,', "\\", "\ufeff"])
def test_ten_megabytes_of_anything_take_linear_time(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        parse(text * (10_000_000 // len(text)))
    assert time.perf_counter() - start < 60


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def error(path: str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(Path(path))
        return str(caught.value)

    assert error("no.json") == f"no.json: 1 problem\n  no such file (the working directory is {tmp_path})"
    assert error(str(tmp_path)) == f"{tmp_path}: 1 problem\n  is a directory; expected a JSON file"
    assert "cannot be read: " in error("a\0b")
    Path("latin").write_bytes('{\n "é": "\xe9"}'.encode("latin-1"))
    assert error("latin") == "latin: 1 problem\n  2:3: got the byte 0xe9; expected UTF-8; save the file as UTF-8"
    Path("wide").write_bytes("{}".encode("utf-16"))
    assert error("wide") == "wide: 1 problem\n  1:1: got UTF-16; expected UTF-8; save the file as UTF-8"


def test_a_dict_is_copied() -> None:
    given = {"a": {"b": [1, (2, 3)]}}
    document = copy_document(given)
    document.value["a"]["b"][1].append(4)
    assert given == {"a": {"b": [1, (2, 3)]}}
    assert document.locate(("a",)) == (None, None)


def test_what_json_cannot_say_is_a_mistake_in_a_dict() -> None:
    inside_itself: dict[str, object] = {}
    inside_itself["again"] = inside_itself
    document = copy_document(
        {1: 2, "a": object(), "b": float("nan"), "c": 10**400, "d": inside_itself, "e": {"f": {3}}}
    )
    json_has = "an object, a list, a string, a number, true, false or null"
    assert document.mistakes == {
        (): "got the key 1 (int); expected strings as keys",
        ("a",): f"got a Python object; expected what JSON has: {json_has}",
        ("b",): "got nan; expected a finite number",
        ("c",): "got a huge integer; expected a finite number",
        ("d",): "nested deeper than 100 levels, or inside itself",
        ("e", "f"): f"got a Python set; expected what JSON has: {json_has}",
    }


def test_comment_keys_are_no_settings_at_any_level() -> None:
    document = parse('{"$schema": "x", "_a": 1, "b": {"//c": 2, "d": [{"_e": 3, "f": 4}]}}')
    assert document.settings == {"b": {"d": [{"f": 4}]}}


def test_text_is_told_from_a_path() -> None:
    assert all(looks_like_json(text) for text in ("{", " \n{", "# x\n// y\n/* z */ {", "\ufeff{"))
    assert not any(looks_like_json(text) for text in ("", "config.json", "//host/config.json", "# x", "[{"))


def test_a_route_is_written_as_in_the_json() -> None:
    assert format_route(("a", "b_c", 0, "$d")) == "a.b_c[0].$d"
    assert format_route(("a.b", 'c"', "")) == '["a.b"]["c\\""][""]'
    assert format_route(("x" * 100,)) == f'["{"x" * 57}..."]'
