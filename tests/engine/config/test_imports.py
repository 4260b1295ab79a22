"""What the config language may know: itself, the errors, pydantic. A config is judged without torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import engine.config

MODULES = sorted(Path(engine.config.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_what_a_config_may_know(path: Path) -> None:
    imported: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            imported.update(alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            imported.add(statement.module or "")
    for name in imported:
        root = name.partition(".")[0]
        assert root in sys.stdlib_module_names or root.startswith("pydantic") or name.startswith("engine."), name
        assert root != "engine" or name == "engine.errors" or name.startswith("engine.config."), name
