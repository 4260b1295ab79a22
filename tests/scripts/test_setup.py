"""Setting up: what is installed, once, and with which Python. A stand-in for Python logs its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAND_IN = """#!/usr/bin/env bash
echo "$@" >> {log}
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
exit {code}
"""


class Checkout:
    """A copy of the scripts, with a stand-in for Python that only logs its arguments."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.python = root, root / "log", root / "python"
        shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        for folder in ("engine", "schedulers"):
            (root / folder).mkdir()
            (root / folder / "__init__.py").touch()
        self.answer(0)

    def answer(self, code: int) -> None:
        self.python.write_text(STAND_IN.format(log=self.log, code=code))
        self.python.chmod(0o755)

    def setup(self, *arguments: str) -> tuple[int, str]:
        """Run scripts/setup from elsewhere; returns its exit code and stderr."""
        command = [str(self.root / "scripts" / "setup"), *arguments]
        environment = {**os.environ, "PYTHON": str(self.python)}
        ran = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
        return ran.returncode, ran.stderr

    def installed(self) -> list[str]:
        """The arguments of each call of pip."""
        return [line for line in self.log.read_text().splitlines() if "pip install" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_installs_the_extra_with_the_constraints(checkout: Checkout) -> None:
    assert checkout.setup("demo")[0] == 0
    (line,) = checkout.installed()
    assert line.endswith(
        "--editable .[demo] --config-settings editable_mode=strict --constraint scripts/constraints.txt"
    )


def test_a_second_call_does_nothing(checkout: Checkout) -> None:
    assert "installing" in checkout.setup()[1]
    assert checkout.setup() == (0, "")
    assert len(checkout.installed()) == 1


def test_what_the_tests_need_serves_the_demo_too(checkout: Checkout) -> None:
    checkout.setup("dev")
    checkout.setup("demo")
    assert len(checkout.installed()) == 1


@pytest.mark.parametrize("extra", ["bench", "quality", "peers"])
def test_what_the_engine_is_compared_with_or_runs_under_gets_an_environment_of_its_own(
    checkout: Checkout, extra: str
) -> None:
    assert checkout.setup(extra)[0] == 0
    assert (checkout.root / f".venv-{extra}" / f"redline-{extra}").exists()
    assert not (checkout.root / ".venv").exists()


def test_it_installs_anew_when_the_needs_have_changed(checkout: Checkout) -> None:
    checkout.setup("demo")
    later = time.time() + 10
    os.utime(checkout.root / "pyproject.toml", (later, later))
    checkout.setup("demo")
    assert len(checkout.installed()) == 2


def test_it_installs_again_when_a_file_was_added(checkout: Checkout) -> None:
    checkout.setup()
    (checkout.root / "engine" / "added.py").touch()
    assert "installing" in checkout.setup()[1]
    assert checkout.setup() == (0, "")


def test_an_unfit_python_is_named_with_the_remedy(checkout: Checkout) -> None:
    checkout.answer(1)
    code, said = checkout.setup()
    assert code == 1
    assert "Redline needs Python 3.10 to 3.13 (set PYTHON=" in said
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    "name", ["bench", "check", "demo", "kill_test", "lint", "quality", "setup", "test", "tutorials", "two_hosts"]
)
def test_the_scripts_can_be_run(name: str) -> None:
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
