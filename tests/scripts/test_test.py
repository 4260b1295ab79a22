"""Running the tests: which of them. A stand-in for the Python of the environment notes what pytest would get."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in {
        "scripts/setup": "#!/usr/bin/env bash\n",
        ".venv/bin/python": '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts")
    return tmp_path


def arguments_of_pytest(checkout: Path, *arguments: str) -> list[str]:
    command = [str(checkout / "scripts" / "test"), *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    module, name, *given = said.removesuffix("\n").split("\n")
    assert (module, name) == ("-m", "pytest")
    return given


def test_long_tests_are_left_out(checkout: Path) -> None:
    given = arguments_of_pytest(checkout, "-k", "peers and ranks")
    assert given[-4:] == ["-m", "not long", "-k", "peers and ranks"]


@pytest.mark.parametrize("arguments", [("--all",), ("--all", "-x"), ("-x", "--all", "-vv")])
def test_all_runs_the_long_ones_too(checkout: Path, arguments: tuple[str, ...]) -> None:
    given = arguments_of_pytest(checkout, *arguments)
    marks = [mark for option, mark in pairwise(given) if option == "-m"]
    assert marks[-1] == ""  # the last one counts, and an empty one selects all
    assert "--all" not in given
    assert [each for each in given if each in ("-x", "-vv")] == [each for each in arguments if each != "--all"]


def test_ci_runs_all() -> None:
    assert "scripts/test --all" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_mark_is_one_that_pytest_knows(pytestconfig: pytest.Config) -> None:
    assert [line for line in pytestconfig.getini("markers") if line.startswith("long:")]
