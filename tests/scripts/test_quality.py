"""The bench of suggestions: that a small run measures and shows what it says, and that its judgement is right."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sklearn  # noqa: F401  # here, since its first import sets environment variables
import torch
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
DIGITS = "digits, MLP, SGD"


def run_quality(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "quality.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run, interrupted by nobody."""
    folder = tmp_path_factory.mktemp("quality")
    few = ("--tasks", DIGITS, "--seeds", "1", "--grid", "3", "--no-peers", "--processes", "1")
    ran = run_quality("--out", str(folder), *few)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "quality.json").read_text())


@pytest.fixture
def parts() -> Iterator[SimpleNamespace]:
    """The bench's own modules."""
    sys.path.insert(0, str(ROOT / "scripts"))
    threads = torch.get_num_threads()
    import quality
    from suggestions import grid, ours, peers, report, tasks, work

    yield SimpleNamespace(grid=grid, ours=ours, peers=peers, quality=quality, report=report, tasks=tasks, work=work)
    torch.set_num_threads(threads)
    sys.path.remove(str(ROOT / "scripts"))
    mine = ("bench", "benchmark", "quality", "suggestions")
    for name in [name for name in sys.modules if name.partition(".")[0] in mine]:
        del sys.modules[name]


# -- a whole run -----------------------------------------------------------------------------------------------


def test_a_run_says_where_it_comes_from(results: dict[str, Any]) -> None:
    assert results["command"] == (
        f"scripts/quality --out out --tasks '{DIGITS}' --seeds 1 --grid 3 --no-peers --processes 1"
    )
    assert len(results["tasks_left_out"]) == 15
    assert {"Python", "torch"} <= results["versions"].keys()
    assert results["points"] == 3 and [len(task["untrained"]) for task in results["tasks"]] == [1]
    assert [task["name"] for task in results["tasks"]] == [DIGITS]


def test_the_grid_is_trained_with_both_schedules(results: dict[str, Any]) -> None:
    (task,) = results["tasks"]
    for kind in ("OneCycle", "WarmupDecayLR"):
        grid = task["grid"][kind]
        assert [point["lr"] for point in grid["points"]] == pytest.approx([1e-4, 0.0225393, 10.0], rel=1e-5)
        low, middle, high = (point["runs"][0] for point in grid["points"])
        assert 0.3 < middle["loss"] < 0.6 < low["loss"]  # as a loop by hand has it: 0.42 and 0.46
        assert high["diverged"]
        assert grid["best"]["lr"] == pytest.approx(0.0225393, rel=1e-5)


def test_the_suggestion_is_trained_with_both_schedules(results: dict[str, Any]) -> None:
    found = results["tasks"][0]["methods"]["Redline"]
    assert found["answers"][0]["updates"] > 0
    for kind in ("OneCycle", "WarmupDecayLR"):
        assert found["answers"][0][kind] > 0
        assert {"loss", "accuracy", "diverged"} == found["trained"][kind][0].keys()


def test_a_run_leaves_tables_a_picture_and_a_cache(out: Path) -> None:
    page = (out / "quality.md").read_text()
    assert page.startswith("Measured by `scripts/quality --out ")
    assert "| digits, MLP, SGD | 0.4" in page
    assert 5_000 < (out / "quality.png").stat().st_size < 150_000
    kept = json.loads((out / "cache" / "digits-MLP-SGD.json").read_text())
    assert len([name for name in kept["found"] if name.startswith("train 0 ")]) in (7, 8)  # 3 x 2, and the answers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "faces"], f"no task has 'faces' in its name; there are\n  {DIGITS}"),
        (["--seeds", "4", "--docs"], "--docs: the page shows whole runs only"),
        (["--grid", "1"], "--grid is 2 to 18"),
    ],
)
def test_what_cannot_be_is_refused(
    parts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", "--out", "nowhere", *arguments])
    with pytest.raises(SystemExit) as ended:
        parts.quality.parse()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# -- what it is measured on ------------------------------------------------------------------------------------


def test_every_grid_has_18_rates_that_lie_equal_factors_apart(parts: SimpleNamespace) -> None:
    assert len(parts.tasks.TASKS) == 16
    for task in parts.tasks.TASKS:
        lrs = task.grid
        assert len(lrs) == 18
        assert lrs[0] == pytest.approx(1e-4 if task.optimizer["type"] == "SGD" else 1e-5)
        assert [b / a for a, b in pairwise(lrs)] == pytest.approx([10 ** (5 / 17)] * 17)
        assert parts.grid.points(task, 18) == lrs


def test_a_schedule_has_its_maximum_and_fits_the_training(parts: SimpleNamespace) -> None:
    cycle = parts.ours.schedule_config("OneCycle", 0.3, 200)["params"]
    assert cycle["cycle_max_lr"] == 0.3
    assert cycle["cycle_min_lr"] == pytest.approx(0.01)
    assert (cycle["cycle_first_step_size"], cycle["cycle_second_step_size"]) == (40, 160)
    decay = parts.ours.schedule_config("WarmupDecayLR", 0.3, 200)["params"]
    assert (decay["warmup_min_lr"], decay["warmup_max_lr"]) == (0.0, 0.3)
    assert (decay["warmup_num_steps"], decay["total_num_steps"]) == (4, 200)
    assert parts.ours.schedule_config("WarmupDecayLR", 0.3, 20)["params"]["warmup_num_steps"] == 2


def test_the_data_comes_in_another_order_for_each_seed_and_each_epoch(parts: SimpleNamespace) -> None:
    data = TensorDataset(torch.arange(10))

    def epochs(seed: int) -> tuple[list[int], list[int]]:
        feed = parts.grid.batches(data, 4, seed)
        seen = [next(feed)[0].tolist() for _ in range(4)]
        return seen[0] + seen[1], seen[2] + seen[3]

    first, second = epochs(0)
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    assert epochs(0) == (first, second)
    assert epochs(1)[0] != first


def test_hopeless_rates_are_not_repeated(parts: SimpleNamespace) -> None:
    chosen = parts.grid.worth_repeating({0.1: [2.0], 0.2: [1.25], 0.3: [1.0], 0.4: [1.26], 0.5: [None]}, 1.25)
    assert chosen == [0.2, 0.3]
    assert parts.grid.worth_repeating({0.2: [1.25, 1.0], 0.3: [1.0, 1.0], 0.4: [0.5, None]}, 1.1) == [0.3]
    assert parts.grid.worth_repeating({0.1: [None]}, 1.25) == []


def test_what_is_kept_counts_for_the_same_task_and_versions_only(parts: SimpleNamespace, tmp_path: Path) -> None:
    key = {"torch": "2.13", "task": "abc"}
    cache = parts.work.Cache(tmp_path, "a, b", key)
    cache.found["train 0"] = {"loss": 1.0}
    cache.save()
    assert parts.work.Cache(tmp_path, "a, b", key).found == {"train 0": {"loss": 1.0}}
    assert parts.work.Cache(tmp_path, "a, b", {**key, "task": "abd"}).found == {}
    assert parts.work.Cache(tmp_path, "c", key).found == {}


def test_ctrl_c_leaves_what_was_done(parts: SimpleNamespace, tmp_path: Path) -> None:
    def job(number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return number

    cache = parts.work.Cache(tmp_path, "a task", {})
    with pytest.raises(KeyboardInterrupt), parts.work.Crew(1) as crew:
        crew.do("a task", [(str(number), job, (number,)) for number in range(4)], cache)
    assert parts.work.Cache(tmp_path, "a task", {}).found == {"0": 0, "1": 1}


# -- how it is judged ------------------------------------------------------------------------------------------


def made_up(losses: list[float | None], lrs: list[float | None]) -> dict[str, Any]:
    """Results of one task and method; the grid's best is 2.0, an untrained model has 5.0."""
    runs = [None if lr is None else {"loss": loss, "diverged": loss is None} for loss, lr in zip(losses, lrs)]
    answers = [{"OneCycle": lr, "WarmupDecayLR": lr, "updates": 10} for lr in lrs]
    best = {"lr": 0.1, "loss": 2.0, "spread": 0.1, "accuracy": None}
    kinds = ("OneCycle", "WarmupDecayLR")
    task = {
        "name": "made up", "aside": False, "optimizer": "SGD", "steps": 100, "batch_size": 8,
        "untrained": [5.0] * len(lrs),
        "grid": {kind: {"points": [], "best": best} for kind in kinds},
        "methods": {"a rule": {"answers": answers, "trained": dict.fromkeys(kinds, runs)}},
    }  # fmt: skip
    return {
        "date": "2026-01-01", "command": "scripts/quality --out out", "machine": "a machine",
        "versions": {"Python": "3.11", "torch": "2.13"}, "points": 18, "left_out": [],
        "tasks_left_out": ["faces"], "tasks": [task],
    }  # fmt: skip


def test_the_excess_is_of_the_mean_loss_over_the_grids_best(parts: SimpleNamespace) -> None:
    (task,) = made_up([2.2, 2.4], [0.2, 0.1])["tasks"]
    assert parts.report.excess(task, "a rule", "OneCycle") == pytest.approx(0.15)


def test_a_run_that_diverged_counts_as_an_untrained_model(parts: SimpleNamespace) -> None:
    (task,) = made_up([2.0, None], [0.2, 0.1])["tasks"]
    assert parts.report.excess(task, "a rule", "OneCycle") == pytest.approx(0.75)


def test_no_answer_is_shown_and_no_loss(parts: SimpleNamespace) -> None:
    (task,) = made_up([None, None], [None, None])["tasks"]
    assert parts.report.excess(task, "a rule", "OneCycle") is None
    page = parts.report.tables(made_up([2.1, None], [0.2, None]))
    assert "0 of 1, 1 without an answer" in page
    assert "- made up: a rule, 1 of 2 seeds: it returned nothing" in page


def test_the_tables_have_spread_and_cost(parts: SimpleNamespace) -> None:
    page = parts.report.tables(made_up([2.2, 2.4], [0.2, 0.1]))
    row = next(line for line in page.splitlines() if line.startswith("| a rule |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a rule", *["+15.0%", "+15.0%", "0 of 2"] * 2, "2 / 2", "10% / 10%"]


def test_a_page_gets_the_block_and_keeps_the_rest(parts: SimpleNamespace) -> None:
    report = parts.report
    page = f"# Title\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nThe end.\n"
    assert report.renew(page, "new") == f"# Title\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nThe end.\n"
    with pytest.raises(ValueError, match="the page lacks"):
        report.renew("# Title\n", "new")


# -- the others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["torch-lr-finder", "Lightning", "fastai"])
def test_a_peer_suggests_by_its_own_package(parts: SimpleNamespace, peer: str) -> None:
    if parts.peers.missing(peer):
        pytest.skip(f"{peer} is not installed; scripts/quality installs it into .venv-quality")
    # In a process of its own: their imports set environment variables.
    code = f"import json; from suggestions.peers import ask; print(json.dumps(ask({peer!r}, {DIGITS!r}, 0)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    assert found.keys() == {"lrs", "updates"}, found
    assert found["lrs"].keys() == set(parts.peers.METHODS[peer])
    assert all(lr is None or (0 < lr < 100 and math.isfinite(lr)) for lr in found["lrs"].values())
    assert 10 < found["updates"] <= 101


def test_a_peer_that_fails_is_reported(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no plot\nlong story")

    monkeypatch.setitem(parts.peers._ADAPTERS, "fastai", fail)
    assert parts.peers.ask("fastai", DIGITS, 0) == {"error": "RuntimeError: no plot"}


# -- the docs --------------------------------------------------------------------------------------------------


def test_the_page_shows_a_whole_run_in_the_form_that_the_bench_writes(parts: SimpleNamespace) -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    inner = page.partition(parts.report.BEGIN)[2].partition(parts.report.END)[0].strip()
    assert re.match(
        r"Measured by `scripts/quality .+` on \d{4}-\d\d-\d\d: 5 or 15 seeds, 18 points of the grid\. ", inner
    )
    for heading in re.findall(r"^### .*$", parts.report.tables(made_up([2.2], [0.2])), re.MULTILINE):
        assert heading.partition(" (")[0] in inner
    _, _, rest = inner.partition("Tasks that are not in this run: ")
    left_out = rest.partition(".\n")[0]
    assert all(f"| {task.name}" in inner or task.name in left_out for task in parts.tasks.TASKS)
    head = next(line for line in parts.report.tables(made_up([2.2], [0.2])).splitlines() if line.startswith("|  |"))
    assert head in inner
    assert (ROOT / "docs" / "images" / "quality.png").stat().st_size < 150_000
