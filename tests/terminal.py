"""A terminal in memory, in the place of standard error."""

from __future__ import annotations

import io
import re
import sys

import pytest

__all__ = ["Terminal", "on_terminal"]


class Terminal(io.StringIO):
    """What a program writes to a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Lines as they are at the end, without color."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())
        return [line.rpartition("\r")[2] for line in plain.split("\n")]


def on_terminal(monkeypatch: pytest.MonkeyPatch, stream: str = "stderr") -> Terminal:
    """A terminal from here on; no fixture, since pytest takes its streams back before the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, stream, terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return terminal
