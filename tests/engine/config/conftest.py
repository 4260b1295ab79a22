"""What the config tests share: a config file to read from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], Path]:
    """Write a text as ds_config.json in an empty working directory; returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        path = Path("ds_config.json")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write
