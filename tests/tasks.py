"""A folder with a task file to work in, as a user of the command has one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["task_folder"]


@contextmanager
def task_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, name: str = "task.py") -> Iterator[Path]:
    """Work in a folder that holds a task file; what importing it leaves behind is put back."""
    (folder / name).write_text(task)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for module in set(sys.modules) - before:
        if Path(getattr(sys.modules[module], "__file__", None) or "").parent == folder:
            del sys.modules[module]
