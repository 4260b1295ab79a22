"""Text to value and position, and every way in which a text can be no document."""

from __future__ import annotations

import enum
import sys
import time
from pathlib import Path

import pytest

from redline.config import load_config
from redline.config.document import copy_document, format_route, looks_like_json, parse, read
from redline.errors import ConfigError

A_VALUE = "a value: a number, a string in double quotes, true, false, null, { or ["
ESCAPES = r"only JSON's escapes in it: \" \\ \/ \b \f \n \r \t \uXXXX"


def test_comments_trailing_commas_escapes_and_kinds_of_numbers_are_read() -> None:
    text = '# one\n{ // two\n "a": [1, 2,], /* three\n */ "b": "# // /* no comment", }\n# four'
    assert parse(text).value == {"a": [1, 2], "b": "# // /* no comment"}
    assert parse(r'{"a\n\u00e9": "\ud83d\ude00\/"}').value == {"a\n\xe9": "\U0001f600/"}
    value = parse('{"i": -12, "f": 2e3, "g": 0.5, "z": -0}').value
    assert [(type(number), number) for number in value.values()] == [(int, -12), (float, 2e3), (float, 0.5), (int, 0)]
    parse('{"a":' * 100 + "1" + "}" * 100)


def test_every_key_has_a_line_and_a_column_and_what_is_missing_that_of_its_object() -> None:
    document = parse('{\n  "a": {\n    "b": [1,\n      2]\n  }\n}')
    assert [document.locate(route) for route in (("a",), ("a", "b"), ("a", "b", 1))] == [(2, 3), (3, 5), (4, 7)]
    assert document.locate(("a", "missing", 3)) == (2, 3)
    assert parse('\ufeff{"a": 1}').locate(("a",)) == (1, 2), "a byte order mark is no column"
    assert parse("\n {}").locate(("missing",)) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  # nothing\n", "2:1: got the end of the file; expected an object: { ... }"),
        (" [1]", "1:2: got [; expected an object: { ... }"),
        ('{"a": 1', "1:8: got the end of the file; expected ',' or '}'"),
        ('{"a": 1}\n}', "2:1: got }; expected the end of the file"),
        ('{"a" 1}', "1:6: got 1; expected ':' after the key \"a\""),
        ('{"a": 1\n "b": 2}', "2:2: got \"b\"; expected ',' or '}'"),
        ("{'a': 1}", "1:2: got a single quote; expected a key in double quotes, or '}'"),
        ("{,}", "1:2: got ,; expected a key in double quotes, or '}'"),
        ('{"a": [1 2]}', "1:10: got 2; expected ',' or ']'"),
        ('{"a": 01}', f"1:7: got 01; expected {A_VALUE}"),
        ('{"a": True}', f"1:7: got True, which JSON writes true; expected {A_VALUE}"),
        ('{"a": "b\n"}', f"1:7: got a string that its line does not close; expected {A_VALUE}"),
        ('{"a": /* b', f"1:7: got an unclosed comment; expected {A_VALUE}"),
        ('{"a": \u201cb\u201d}', f"1:7: got U+201C; expected {A_VALUE}"),
        (r'{"a": "\x"}', rf'1:7: got "\x"; expected {ESCAPES}'),
        ('{"a":' * 101 + "1" + "}" * 101, "1:501: nested deeper than 100 levels"),
    ],
)
def test_what_is_not_json_is_an_error_with_its_place_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert [str(problem) for problem in caught.value.problems] == [message]


def test_a_key_given_twice_and_an_infinite_number_are_mistakes_and_the_rest_is_read() -> None:
    document = parse('{\n"a": 1,\n"b": NaN,\n"a": 2,\n"c": 1e999, "d": "\\ud800"}')
    assert document.mistakes == {
        ("b",): "got NaN; expected a finite number",
        ("a",): "given twice, on line 2 and on line 4; remove one",
        ("c",): "got 1e999; expected a finite number",
        ("d",): "got half of a surrogate pair; expected an object, a list, a string, a number, true, false or null",
    }
    assert document.locate(("a",)) == (4, 1)
    with pytest.raises(ConfigError) as caught:  # with a syntax error after them
        parse('{"a": 1, "a": -Infinity, "b" }')
    assert [(problem.column, problem.path) for problem in caught.value.problems] == [(10, "a"), (30, "")]


@pytest.mark.parametrize("text", ["[", '{"a":', '"', "#\n", "/*", " ", "9", '{"a":1,', "\\", "\ufeff"])
def test_a_megabyte_of_anything_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        parse(text * (1_000_000 // len(text)))
    assert time.perf_counter() - start < 10


def test_what_is_longer_than_any_config_is_refused_and_not_read_to_its_end(tmp_path: Path) -> None:
    text = "{" + ",".join(f'"unknown_key_{number}": 0' for number in range(100_000)) + "}"
    (tmp_path / "large.json").write_text(text)
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for fails in (
        lambda: parse(text), lambda: read(tmp_path / "large.json"), lambda: read(tmp_path / "endless.json"),
        lambda: copy_document({f"unknown_key_{number}": 0 for number in range(200_000)}),
        lambda: copy_document({"optimizer": {"type": "x" * 3_000_000}}),
        lambda: copy_document({"x": [0] * 3_000_000}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"it is longer than 2,000,000 bytes, and no config is"):
            fails()


def test_of_thousands_of_unknown_keys_the_first_are_told() -> None:
    with pytest.raises(ConfigError, match="config: 50001 problems") as caught:
        load_config({f"unknown_key_{number}": 0 for number in range(50_000)})
    assert len(str(caught.value)) < 50_000 and str(caught.value).endswith("...")
    assert len(caught.value.problems) == 50_001


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
    assert error("wide") == "wide: 1 problem\n  1:1: got the byte 0xff; expected UTF-8; save the file as UTF-8"


HJSON = """
train_batch_size: 8   # no braces, no quotes, no commas
optimizer: {
  type: Adam
  params: {betas: [0.9, 0.99]}
}
_why: '''
  two
  lines
  '''
"""


def test_a_file_that_is_no_json_is_read_as_hjson(tmp_path: Path) -> None:
    pytest.importorskip("hjson", reason="needs the extra hjson")
    path = tmp_path / "ds.json"
    path.write_text(HJSON)
    document = read(path)
    assert document.settings == {
        "train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.99]}}
    }  # fmt: skip
    assert document.source == f"{path} (Hjson, whose reader tells no lines)"
    assert document.locate(("optimizer",)) == (None, None)
    path.write_text("a: {b: 1, b: 2}\nb: 3")
    assert read(path).mistakes == {("b",): "given twice in one object; remove one"}
    for text, message in ((HJSON + "}", "nor is it Hjson: "), ('{"a": True}', "True, which JSON writes true")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            read(path)
        assert all(problem.line for problem in caught.value.problems)


def test_hjson_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hjson", None)
    (tmp_path / "ds.json").write_text(HJSON)
    with pytest.raises(ConfigError, match=r"or is it Hjson, which needs: pip install 'redline\[hjson\]'"):
        read(tmp_path / "ds.json")


def test_a_dict_is_copied_and_what_json_cannot_say_is_a_mistake_in_it() -> None:
    given = {"a": {"b": [1, (2, 3)]}}
    document = copy_document(given)
    document.value["a"]["b"][1].append(4)
    assert given == {"a": {"b": [1, (2, 3)]}} and document.locate(("a",)) == (None, None)
    inside_itself: dict[str, object] = {}
    inside_itself["again"] = inside_itself
    wrong = {1: 2, "a": object(), "b": float("nan"), "c": 10**400, "d": inside_itself, "e": {"f": "\ud800"}}
    assert {route: message.partition(";")[0] for route, message in copy_document(wrong).mistakes.items()} == {
        (): "got the key 1 (int)",
        ("a",): "got a Python object",
        ("b",): "got NaN",
        ("c",): "got a huge integer",
        ("d",): "nested deeper than 100 levels, or inside itself",
        ("e", "f"): "got half of a surrogate pair",
    }


class Name(str, enum.Enum):
    device, cpu = "device", "cpu"


class Stage(enum.IntEnum):
    gradients = 2


def test_members_of_string_and_integer_enums_are_their_values() -> None:
    """Scripts write DeepSpeed's OffloadDeviceEnum.cpu into their configs."""
    value = copy_document({"stage": Stage.gradients, "offload_optimizer": {Name.device: Name.cpu}}).value
    assert repr(value) == "{'stage': 2, 'offload_optimizer': {'device': 'cpu'}}"


def test_comment_keys_are_no_settings_at_any_level() -> None:
    document = parse('{"$schema": "x", "_a": 1, "b": {"//c": 2, "d": [{"_e": 3, "f": 4}]}}')
    assert document.settings == {"b": {"d": [{"f": 4}]}}


def test_text_is_told_from_a_path_in_linear_time() -> None:
    assert all(looks_like_json(text) for text in ("{", " \n{", "# x\n// y\n/* z */ {", "\ufeff{"))
    assert not any(looks_like_json(text) for text in ("", "config.json", "//host/config.json", "# x", "[{"))
    assert not any(looks_like_json(text) for text in (" " * 10_000 + '"a": 1}', "#" * 10_000 + "\na: 1", "//" * 5_000))


def test_a_route_is_written_as_in_the_json() -> None:
    assert format_route(("a", "b_c", 0, "$d")) == "a.b_c[0].$d"
    assert format_route(("a.b", 'c"', "")) == '["a.b"]["c\\""][""]'
    assert format_route(("x" * 100,)) == f'["{"x" * 57}..."]'
