"""The documentation is true: its tables match the code, its examples run, its links lead to files."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from redline import initialize, run_range_test, tune
from redline.cli import build_parser
from redline.config import validate
from redline.config.explain import top_keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def write_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "dev" / "write_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tables_are_fresh(path: Path, write_docs: ModuleType) -> None:
    text = path.read_text()
    assert write_docs.render(text) == text, "run python scripts/dev/write_docs.py"


def test_the_reference_of_keys_is_fresh(write_docs: ModuleType) -> None:
    assert (ROOT / "docs" / "config.md").read_text() == write_docs.reference(), "run python scripts/dev/write_docs.py"


def test_every_page_with_a_table_is_renewed_and_every_table_is_shown(write_docs: ModuleType) -> None:
    named = {
        path: set(re.findall(r"^<!-- ([a-z][a-z0-9_ ]*) -->$", path.read_text(), re.MULTILINE)) - {"end"}
        for path in PAGES
    }
    assert sorted(str(path.relative_to(ROOT)) for path, names in named.items() if names) == sorted(write_docs.FILES)
    assert set().union(*named.values()) == set(write_docs.BLOCKS)


def test_the_readme_lists_every_key_of_deepspeed_once() -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- support -->")[2].partition("<!-- end -->")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(key.path for key in top_keys())


# -- examples ------------------------------------------------------------------------------------------

# Pages with a whole script: tests/engine/test_restarts.py and tests/peers/test_pages.py run them under torchrun.
SCRIPTS = ("restarts.md", "deepspeed.md", "hf_trainer.md", "accelerate.md", "lightning.md")
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{index}")
    for path in PAGES
    if path.name not in SCRIPTS
    for index, code in enumerate(blocks(path, "python"))
]
CONFIG = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with configs, and the names that the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "one_cycle.json", "8x_fixed.json"):
        Path(name).write_text(json.dumps(CONFIG))
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(x, x[:, :3].argmax(1))
    model = torch.nn.Linear(4, 3)
    loss = torch.nn.CrossEntropyLoss()
    return {
        "torch": torch, "nn": torch.nn, "DataLoader": DataLoader,
        "initialize": initialize, "run_range_test": run_range_test, "tune": tune,
        "model": model, "loss": loss, "loss_fn": loss, "optimizer": torch.optim.Adam(model.parameters()),
        "engine": initialize(torch.nn.Linear(4, 3), CONFIG, training_data=dataset),
        "dataset": dataset, "data": dataset, "held_out": dataset, "loader": DataLoader(dataset, 8),
        "train_dataset": dataset, "validation_dataset": dataset, "epochs": 1, "validation_loss": 1.0,
        "validation_set": dataset, "graphs": [SimpleNamespace(x=each, y=each[:3]) for each, _ in dataset],
        "Llama": lambda config: torch.nn.Linear(4, 3), "config": None,
    }  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("code", EXAMPLES)
def test_the_python_examples_run(code: str, names: dict[str, Any]) -> None:
    if ".plot(" in code:
        pytest.importorskip("matplotlib")
    shorter = code.replace("10_000", "8").replace("% 500 == 0", "% 4 == 0")
    exec(shorter, names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_configs_that_the_pages_show_are_valid(path: Path) -> None:
    for block in blocks(path, "json"):
        shown = json.loads(block if block.startswith("{") else f"{{{block}}}")
        assert validate({**CONFIG, **shown}).exit_code == 0, block


def test_the_first_example_of_the_readme_trains_with_its_config(names: dict[str, Any]) -> None:
    Path("config.json").write_text(blocks(ROOT / "README.md", "json")[0])
    names["dataset"] = TensorDataset(torch.randn(160, 4), torch.randint(3, (160,)))
    exec(blocks(ROOT / "README.md", "python")[0], names)
    assert names["engine"].global_steps == 5
    assert names["engine"].get_lr()[0] > 0.0004  # the cycle has begun to rise


# -- commands, links, trees ----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("page", "start"), [("README.md", "## Repository"), ("docs/architecture.md", "# Architecture")]
)
def test_a_tree_in_the_docs_is_the_tree(page: str, start: str) -> None:
    tree = (ROOT / page).read_text().partition(start)[2].partition("```\n")[2].partition("\n```")[0]
    folder = ROOT
    for line in tree.splitlines():
        names = re.findall(r"^ *(.+?)(?:   |$)", line)[0].split("  ")
        for name in names:
            indented = line.startswith(" ")
            assert ((folder if indented else ROOT) / name).exists(), name
        if not line.startswith(" "):
            folder = ROOT / names[0]


def test_the_answers_in_the_page_on_range_tests_are_those_of_the_code() -> None:
    source = (ROOT / "engine" / "range_test" / "suggest.py").read_text()
    refusals = (ROOT / "docs" / "range_test.md").read_text().partition("| it says |")[2].partition("\n\n")[0]
    said = re.findall(r"^\| `(.+?)` \|", refusals, re.MULTILINE)
    assert len(said) == 5
    for sentence in said:
        for part in sentence.split("..."):
            assert part.strip() in re.sub(r'"\s+f?"', "", source), part


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_enough_for_a_page(path: Path) -> None:
    assert path.stat().st_size < 150_000
