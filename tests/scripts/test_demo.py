"""scripts/demo with fewer seeds, two ranks under torchrun included."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from redline import RangeTestResult
from redline.config import load_config
from redline.range_test import Suggestion
from redline.range_test.curve import divergence

ROOT = Path(__file__).parents[2]
SEEDS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the demo wrote, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--out", str(out), "--seeds", str(SEEDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out, ran.stdout


@pytest.mark.long
def test_it_prints_five_parts_and_where_the_results_are(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert [f"\n{number}. " in printed for number in range(1, 6)] == [True] * 5
    assert printed.splitlines()[-5].endswith(f"Results are in {out}:")
    for line in printed.splitlines()[-4:]:
        assert (out / line.split()[0]).exists(), line


@pytest.mark.long
@pytest.mark.parametrize("folder", ["one_rank", "two_ranks"])
def test_the_curves_show_what_the_docs_explain(demo: tuple[Path, str], folder: str) -> None:
    result = RangeTestResult.load(demo[0] / folder)
    fixed, slow, fast = result.curves
    best_slow, best_fast = (min(curve.validation, key=lambda point: point[1]) for curve in (slow, fast))
    # The fast one is first at a good loss, and diverges; the slow one goes on to a better one.
    assert first_below(fast, 1.0) < min(first_below(slow, 1.0), first_below(fixed, 1.0))
    assert divergence(fast.losses) == len(fast.losses) - 1
    assert divergence(slow.losses) is None
    assert best_slow[0] > best_fast[0]
    assert best_slow[1] < best_fast[1]
    assert isinstance(result.suggestion, Suggestion)
    assert result.suggestion.cycle_max_lr < fast.lrs[-1] / 2


def first_below(curve: object, loss: float) -> int:
    return next(step for step, value in curve.validation if value < loss)  # type: ignore[attr-defined]


@pytest.mark.long
@pytest.mark.parametrize(("folder", "batch", "steps"), [("one_rank", 32, 400), ("two_ranks", 128, 100)])
def test_the_suggested_config_runs_and_fills_the_training(
    demo: tuple[Path, str], folder: str, batch: int, steps: int
) -> None:
    config = load_config(demo[0] / folder / "one_cycle.json")
    assert config.train_batch_size == batch
    assert config.scheduler is not None
    arguments = config.scheduler.arguments()
    assert arguments["cycle_first_step_size"] + arguments["cycle_second_step_size"] == steps


@pytest.mark.long
def test_the_suggestion_is_no_worse_than_the_best_of_the_grid(demo: tuple[Path, str]) -> None:
    methods = json.loads((demo[0] / "comparison.json").read_text())
    ends = {name: mean(run[-1]["loss"] for run in method["runs"]) for name, method in methods.items()}
    best = min(loss for name, loss in ends.items() if name.startswith("fixed"))
    assert ends["1Cycle"] < 1.05 * best  # 0.82 where it was written; other machines sum in another order


@pytest.mark.long
def test_every_number_of_the_comparison_is_in_the_csv(demo: tuple[Path, str]) -> None:
    with (demo[0] / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * SEEDS * 10
    methods = json.loads((demo[0] / "comparison.json").read_text())
    assert {row["method"] for row in rows} == set(methods)
    assert float(rows[0]["validation_loss"]) == methods[rows[0]["method"]]["runs"][0][0]["loss"]
