"""The command line: help that teaches, and mistakes that are said."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arguments import build_parser

COMMANDS = ("validate", "explain", "diff", "schema", "plot", "range-test", "tune", "report", "consolidate")


def exits(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(arguments)
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: redline {command}" in out
    assert "example" in out
    assert f"  redline {command}" in out.partition("example")[2]


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert exits("range-test", "--help") == 0
    out = capsys.readouterr().out
    options = [line for line in out.splitlines() if line.startswith("  --")]
    assert len(options) >= 10
    assert [line for line in options if len(line.split("  ")) < 3] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("valdate", "good.json"), "invalid choice: 'valdate'"),
        (("validate",), "CONFIG"),
        (("validate", "good.json", "--world-size", "0"), 'got "0"; expected an integer >= 1'),
        (("plot", "good.json", "--steps", "many"), 'got "many"; expected an integer >= 1'),
        (("range-test", "task.py:linear"), "--config"),
        (("range-test", "task.py:linear", "--config", "good.json", "--rates", "5;50"), "expected numbers with commas"),
        (
            ("range-test", "task.py:linear", "--config", "good.json", "--sweep", "lr=1"),
            "expected weight_decay=... or mom",
        ),
        (
            ("range-test", "task.py:linear", "--config", "good.json", "--sweep", "momentum=a"),
            "expected numbers with comm",
        ),
        (("range-test", "task.py:linear", "--config", "good.json", "--batch-sizes", "8,0"), "expected an integer >= 1"),
        (("range-test", "task.py:linear", "--config", "good.json", "--growth", "fast"), "invalid choice: 'fast'"),
        (
            ("range-test", "task.py:linear", "--config", "good.json", "--baseline", "no"),
            "expected a learning rate or none",
        ),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits(*arguments) == 2
    assert message in capsys.readouterr().err
