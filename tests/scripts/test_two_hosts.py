"""scripts/two_hosts: the README's commands on two hosts, or the reason why they cannot be run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "two_hosts.py"


def two_hosts(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def hosts_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("redline")]


@pytest.mark.long
def test_the_readmes_commands_train_as_one_host_does_and_a_lost_host_ends_the_other() -> None:
    ran = two_hosts()
    if ran.returncode == 77:
        pytest.skip(ran.stdout.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("bit for bit") == 2
    assert "lost ranks 2-3 on node1 after 5 s of waiting" in ran.stdout
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert hosts_of(left) == []


def test_a_machine_without_namespaces_is_skipped_with_the_reason(tmp_path: Path) -> None:
    ran = two_hosts(PATH=str(tmp_path))
    assert ran.returncode == 77, ran.stdout + ran.stderr
    assert ran.stdout.startswith("skipped: this machine does not allow network namespaces: the command ip is not there")
