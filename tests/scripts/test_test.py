"""scripts/test: which tests it runs, and when it installs a browser. Stand-ins note what they are called with."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.browser import NAMES

ROOT = Path(__file__).parents[2]


class Checkout:
    """A copy of scripts/test with stand-ins for Python, apt-get and id, on a machine with a browser or without."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.write("scripts/setup", "")
        self.write(".venv/bin/python", 'printf "%s\\n" "$@"')
        for name in ("bash", "env", "dirname", "timeout"):
            self.bin.mkdir(exist_ok=True)
            (self.bin / name).symlink_to(str(shutil.which(name)))
        self.write("bin/chromium", "")
        shutil.copy(ROOT / "scripts" / "test", folder / "scripts")

    def write(self, name: str, script: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def run(self, *arguments: str) -> tuple[list[str], str]:
        """The arguments that pytest gets, and what is printed to stderr."""
        done = subprocess.run(
            [str(self.folder / "scripts" / "test"), *arguments],
            env={"PATH": str(self.bin)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        module, name, *given = done.stdout.removesuffix("\n").split("\n")
        assert (module, name) == ("-m", "pytest")
        return given, done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_long_tests_are_left_out(checkout: Checkout) -> None:
    given, _ = checkout.run("-k", "peers and ranks")
    assert given[given.index("not long") - 1 :] == [
        *("-m", "not long", "-k", "peers and ranks"),
        *("tests", "--pyargs", "redline"),
    ]


def test_a_file_that_is_named_is_all_that_runs(checkout: Checkout) -> None:
    (checkout.folder / "test_it.py").touch()
    assert checkout.run("test_it.py::test_this")[0][-2:] == ["not long", "test_it.py::test_this"]


@pytest.mark.parametrize("arguments", [("--all",), ("--all", "-x"), ("-x", "--all", "-vv")])
def test_all_runs_the_long_ones_too(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    given, _ = checkout.run(*arguments)
    marks = [mark for option, mark in pairwise(given) if option == "-m"]
    assert marks[-1] == ""  # the last one counts, and an empty one selects all
    assert "--all" not in given
    assert [each for each in given if each in ("-x", "-vv")] == [each for each in arguments if each != "--all"]


@pytest.mark.parametrize(
    ("arguments", "browser", "calls"),
    [
        (["--all"], False, ["update -qq", "install -y -qq --no-install-recommends chromium"]),
        (["--all"], True, []),
        (["-x"], False, []),
    ],
)
def test_all_installs_a_browser_where_there_is_none(
    checkout: Checkout, arguments: list[str], browser: bool, calls: list[str]
) -> None:
    if not browser:
        (checkout.bin / "chromium").unlink()
    log = checkout.folder / "log"
    log.touch()
    checkout.write("bin/apt-get", f'echo "$@" >> {log}')
    checkout.write("bin/id", "echo 0")
    checkout.run(*arguments)
    assert log.read_text().splitlines() == calls


@pytest.mark.parametrize(
    ("apt_get", "user", "reason"),
    [(None, 0, "no apt-get"), ("exit 0", 1000, "only root"), ("exit 100", 0, "cannot install Chromium")],
)
def test_tests_run_without_a_browser_and_the_reason_is_reported(
    checkout: Checkout, apt_get: str | None, user: int, reason: str
) -> None:
    (checkout.bin / "chromium").unlink()
    checkout.write("bin/id", f"echo {user}")
    if apt_get:
        checkout.write("bin/apt-get", apt_get)
    given, printed = checkout.run("--all")
    assert given[-3:] == ["tests", "--pyargs", "redline"]
    assert reason in printed and "the browser tests will be skipped" in printed


def test_it_looks_for_the_browsers_that_the_tests_use() -> None:
    assert f"for name in {' '.join(NAMES)}; do" in (ROOT / "scripts" / "test").read_text()


@pytest.mark.parametrize("arguments", [("--peers", "-k", "lora"), ("-k", "lora", "--peers")])
def test_peers_runs_the_frameworks_in_an_environment_of_their_own(
    checkout: Checkout, arguments: tuple[str, ...]
) -> None:
    checkout.write(".venv-peers/bin/python", 'printf "%s\\n" "$@" "$PYTHONPATH"')
    checkout.write("scripts/setup", 'echo "$@" > installed')
    *given, path = checkout.run(*arguments)[0]
    assert given[-3:] == ["-k", "lora", "tests/peers"]
    assert path == str(checkout.folder / "engine" / "compat")
    assert (checkout.folder / "installed").read_text() == "peers\n"


def test_another_torch_has_an_environment_of_its_own(checkout: Checkout) -> None:
    checkout.write(".venv-torch-2.9.1/bin/python", 'printf "%s\\n" "$@"')
    checkout.write("scripts/setup", 'echo "$TORCH $@" > installed')
    assert checkout.run("-x", "--torch", "2.9.1")[0][-4:] == ["-x", "tests", "--pyargs", "redline"]
    assert (checkout.folder / "installed").read_text() == "2.9.1 dev\n"


def test_the_other_tests_leave_the_frameworks_out(pytestconfig: pytest.Config) -> None:
    assert "peers" in pytestconfig.getini("norecursedirs")


def test_ci_runs_all() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"scripts/test --all", "scripts/test --peers"} <= {*lines}


def test_the_mark_is_one_that_pytest_knows(pytestconfig: pytest.Config) -> None:
    assert [line for line in pytestconfig.getini("markers") if line.startswith("long:")]
