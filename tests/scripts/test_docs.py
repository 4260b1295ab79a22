"""What the documentation says is true: its tables are the code's, its examples run, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.arguments import build_parser
from engine.config import validate
from engine.config.support import KEYS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def write_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tables_are_fresh(path: Path, write_docs: ModuleType) -> None:
    text = path.read_text()
    assert write_docs.render(text) == text, "run python scripts/write_docs.py"


def test_every_page_with_a_table_is_renewed_and_every_table_is_shown(write_docs: ModuleType) -> None:
    named = {
        path: set(re.findall(r"^<!-- ([a-z][a-z0-9_ ]*) -->$", path.read_text(), re.MULTILINE)) - {"end"}
        for path in PAGES
    }
    assert sorted(str(path.relative_to(ROOT)) for path, names in named.items() if names) == sorted(write_docs.FILES)
    assert set().union(*named.values()) == set(write_docs.BLOCKS)


def test_the_readme_lists_every_key_of_deepspeed_once() -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- support -->")[2].partition("<!-- end -->")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(KEYS)


def test_the_first_example_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(blocks(ROOT / "README.md", "json")[0])
    batch = torch.randn(32, 4), torch.randint(3, (32,))
    names: dict[str, Any] = {
        "model": torch.nn.Linear(4, 3),
        "loader": [batch] * 5,
        "loss_fn": torch.nn.functional.cross_entropy,
    }
    exec(blocks(ROOT / "README.md", "python")[0], names)
    assert names["engine"].global_steps == 5
    assert names["engine"].get_lr()[0] > 0.0004  # the cycle has begun to rise


def test_the_config_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(blocks(ROOT / "README.md", "json")[0])
    assert validate(path).exit_code == 0


def commands(path: Path) -> list[str]:
    """The commands that a page shows, each on one line, comments and prompts apart."""
    lines = "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_commands_that_the_pages_show_can_be_typed(path: Path) -> None:
    for command in commands(path):
        words = shlex.split(command)
        if words[0] == "redline":
            build_parser().parse_args(words[1:])
        elif words[0].startswith("./"):
            assert (ROOT / words[0]).is_file(), command
        else:
            assert words[0] in {"pip", "python", "torchrun", "srun"}, command


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_links_lead_to_files_that_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_pages_are_plain_text(path: Path) -> None:
    path.read_text(encoding="utf-8").encode("ascii")


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The tree\n\n```\n")[2].partition("\n```")[0]
    folder = ROOT
    for line in tree.splitlines():
        names = re.findall(r"^ *(.+?)(?:   |$)", line)[0].split("  ")
        for name in names:
            indented = line.startswith(" ")
            assert ((folder if indented else ROOT) / name).exists(), name
        if not line.startswith(" "):
            folder = ROOT / names[0]


def test_the_answers_in_the_page_on_range_tests_are_those_of_the_code() -> None:
    source = (ROOT / "engine" / "range_test" / "analysis.py").read_text()
    refusals = (ROOT / "docs" / "range_test.md").read_text().partition("| it says |")[2].partition("\n\n")[0]
    said = re.findall(r"^\| `(.+?)` \|", refusals, re.MULTILINE)
    assert len(said) == 6
    for sentence in said:
        for part in sentence.split("..."):
            assert part.strip() in re.sub(r'"\s+f?"', "", source), part


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_enough_for_a_page(path: Path) -> None:
    assert path.stat().st_size < 150_000
