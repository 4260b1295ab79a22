"""scripts/tutorials: a smoke run, and what a full run has written into the docs."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from redline import RangeTestResult
from redline.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "tutorial_range_test.md", ROOT / "docs" / "tutorial_1cycle.md"]
TASKS = ("digits", "text")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a quick run wrote, and what it printed."""
    out = tmp_path_factory.mktemp("tutorials")
    command = [sys.executable, str(ROOT / "scripts" / "tutorials.py"), "--quick", "--seeds", "1", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out, ran.stdout


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        from tutorial import tables

        return tables


@pytest.mark.long
def test_it_prints_where_its_results_are(quick: tuple[Path, str]) -> None:
    out, printed = quick
    lines = printed.partition("Results are in ")[2].splitlines()
    assert lines[0] == f"{out}:"
    assert len(lines) == 10
    for line in lines[1:]:
        assert (out / line.split()[0]).exists(), line


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_config_is_one_that_runs(quick: tuple[Path, str], task: str) -> None:
    configs = {path.name: load_config(path) for path in (quick[0] / task / "configs").iterdir()}
    assert len(configs) == 5  # fixed for the small batch and two for the large one, 1Cycle, linear decay
    assert {config.train_batch_size for name, config in configs.items() if name.startswith("1x")} == {8}
    assert {config.train_batch_size for name, config in configs.items() if not name.startswith("1x")} == {64}


@pytest.mark.long
@pytest.mark.parametrize(("task", "steps"), [("digits", 8), ("text", 8)])
def test_1cycle_has_the_boundaries_of_the_range_test_and_fills_the_training(
    quick: tuple[Path, str], task: str, steps: int
) -> None:
    config = load_config(quick[0] / task / "configs" / "one_cycle.json")
    suggested = RangeTestResult.load(quick[0] / task / "range_test").to_config()["scheduler"]["params"]
    assert config.scheduler is not None
    arguments = config.scheduler.arguments()
    assert {key: arguments[key] for key in suggested} == suggested
    assert arguments["cycle_first_step_size"] + arguments["cycle_second_step_size"] == steps


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_number_of_the_trainings_is_in_the_csv(quick: tuple[Path, str], task: str) -> None:
    with (quick[0] / task / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = json.loads((quick[0] / task / "runs.json").read_text())
    assert len(rows) == sum(len(run["held_out"]) for method in methods for run in method["runs"])
    peaks = {
        method["name"]: max((lr for run in method["runs"] for lr in run["lrs"]), default=None) for method in methods
    }
    assert peaks["LinearScale"] == 8 * peaks["Fixed"] == 8 * peaks["small batch"]
    ends = {method["name"]: method["runs"][0]["held_out"][-1][1] for method in methods}
    assert {row["schedule"]: float(row["validation_loss"]) for row in rows} == ends  # a schedule's last row


@pytest.mark.long
def test_a_quick_run_has_the_tables_that_the_pages_have(quick: tuple[Path, str], tables: ModuleType) -> None:
    written = (quick[0] / "tables.md").read_text()
    names = [found["name"] for page in PAGES for found in tables.BLOCK.finditer(page.read_text())]
    assert set(re.findall(r"^## (.+)$", written, re.MULTILINE)) == set(names)
    for page in PAGES:
        for found in tables.BLOCK.finditer(page.read_text()):
            text = written.partition(f"## {found['name']}\n\n")[2].partition("\n\n## ")[0]
            assert form(found.group().split("\n", 1)[1]) == form(text), found["name"]


def form(text: str) -> list[list[str]]:
    """Heads and first columns of tables, or keys of the schedule, without what a quick run has less of."""
    rows = rows_of(text)
    names = [[re.sub(r"\d+ fixed", "N fixed", row[0])] for row in rows[1:] if " ranks" not in row[0]]
    return [rows[0], *names] if rows else [[key] for key in re.findall(r'^ *"(\w+)":', text, re.MULTILINE)]


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("task", TASKS)
def test_the_pages_are_of_a_full_run(task: str, tables: ModuleType) -> None:
    page = PAGES[1].read_text()
    stated = re.search(r"By `scripts/tutorials --seeds (\d+)` on \d{4}-\d\d-\d\d: Python [\d.]+, torch [\d.]+", page)
    assert stated is not None
    assert int(stated[1]) >= 5
    blocks = {found["name"]: found.group() for found in tables.BLOCK.finditer(page)}
    rows = rows_of(blocks[f"{task} one cycle"])
    assert tuple(rows[0]) == tables.METHODS_HEAD
    for row in rows[2:]:
        assert re.fullmatch(r"\d\.\d{4} \+- \d\.\d{4}", row[3]), row
        assert re.fullmatch(r"\d+% of the data|never", row[5]), row


def test_two_ranks_come_to_what_accumulation_comes_to(tables: ModuleType) -> None:
    page = PAGES[1].read_text()
    block = next(found.group() for found in tables.BLOCK.finditer(page) if found["name"] == "digits one cycle")
    rows = {row[0]: row for row in rows_of(block)}
    alone, two = (float(rows[name][3].split()[0]) for name in ("1Cycle", "1Cycle, 2 ranks"))
    assert two == pytest.approx(alone, rel=0.01)


def test_without_a_suggestion_the_tables_have_no_schedules(tables: ModuleType) -> None:
    from tutorial.runs import DIGITS, Method, Run

    runs = [Run(0, [0.1] * 100, [(0, 2.3, 0.1), (100, 0.5, 0.9)])]
    methods = [Method(name, 0.1, 64, runs) for name in ("small batch", "Fixed", "LinearScale", "best of 2 fixed")]
    result = RangeTestResult((), {}, 64, 1, "SGD", 100)
    outcome = tables.Outcome(DIGITS, result, methods)
    assert "No suggestion" in tables.suggestion_block(outcome)
    assert tables.claims_table(tables.ONE_CYCLE_CLAIMS, [outcome, outcome]).count("no schedule was suggested") == 12
