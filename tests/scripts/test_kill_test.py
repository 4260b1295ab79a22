"""scripts/kill_test: a few kills lose nothing, and runs that lose something are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kill_test(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--seed", "7", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [("--ranks", "2", "--stage", "0", "--no-async"), ("--ranks", "1", "--stage", "3", "--async")],
    ids=" ".join,
)
def test_runs_that_are_killed_lose_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ran = kill_test(tmp_path, "--count", "2", "--victims", "all", *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    printed = ran.stdout.splitlines()
    assert printed[-1] == "nothing was lost"
    assert any(line.split() == ["kills", "2"] for line in printed)
    assert ": 2 kills, " in ran.stdout
    assert list(tmp_path.glob("kill_test-*")) == []


@pytest.mark.long
@pytest.mark.parametrize(("sabotage", "found"), [("data", "same: rank "), ("save", "saved: step ")])
def test_restarts_that_lose_something_are_found(sabotage: str, found: str, tmp_path: Path) -> None:
    ran = kill_test(tmp_path, "--count", "8", "--ranks", "1", "--stage", "0", "--no-async", "--sabotage", sabotage)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    _, _, faults = ran.stdout.partition("FAILED\n")
    assert found in faults
