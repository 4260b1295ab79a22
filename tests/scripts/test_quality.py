"""scripts/quality: a small run measures and reports, and its figures are computed correctly."""

from __future__ import annotations

import json
import logging
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
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("quality")
    few = ("--tasks", DIGITS, "--seeds", "1", "--methods", "own", "Redline, 10%", "--processes", "1")
    ran = run_quality("--out", str(folder), *few)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "quality.json").read_text())


@pytest.fixture
def parts() -> Iterator[SimpleNamespace]:
    """The modules of the script."""
    sys.path.insert(0, str(ROOT / "scripts"))
    threads, logger = torch.get_num_threads(), logging.getLogger("redline")
    level = logger.level
    import quality
    from suggestions import grid, judge, ours, peers, report, tasks, work

    yield SimpleNamespace(
        grid=grid, judge=judge, ours=ours, peers=peers, quality=quality, report=report, tasks=tasks, work=work
    )
    torch.set_num_threads(threads)
    logger.setLevel(level)  # the script's jobs log errors only
    sys.path.remove(str(ROOT / "scripts"))
    mine = ("bench", "benchmark", "quality", "suggestions")
    for name in [name for name in sys.modules if name.partition(".")[0] in mine]:
        del sys.modules[name]


# -- a whole run -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_trains_the_grid_and_the_suggestion_and_says_where_it_comes_from(
    results: dict[str, Any], parts: SimpleNamespace
) -> None:
    assert results["command"].startswith(f"scripts/quality --out out --tasks '{DIGITS}' --seeds 1 --methods own ")
    assert (
        len(results["tasks_left_out"]) == len(parts.tasks.TASKS) - 1
        and {"Python", "torch"} <= results["versions"].keys()
    )
    (task,) = results["tasks"]
    points = {round(point["lr"], 4): point["runs"] for point in task["grid"]["points"]}
    assert 0.3 < points[0.0225][0]["loss"] < 0.6 < points[0.0001][0]["loss"]  # as a loop by hand has it
    assert points[10.0] == []  # next to a rate that diverged
    assert points[5.0802][0]["diverged"]
    own, ours = (task["methods"][name][0] for name in ("config's own", "Redline, 10%"))
    assert own["lr"] == 0.01 and own["steps"] == 0
    assert ours["steps"] > 0 and ours["asking"] > 0 and ours["loss"] < own["loss"]


@pytest.mark.long
def test_a_run_leaves_tables_a_picture_and_a_cache_that_the_next_one_continues(out: Path) -> None:
    page = (out / "quality.md").read_text()
    assert page.startswith("Measured by `scripts/quality --out ") and "| digits, MLP, SGD (basic) | 0." in page
    assert 5_000 < (out / "quality.png").stat().st_size < 150_000
    assert not (out / "quality_budget.png").exists()  # of one budget there is no curve
    kept = (out / "cache" / "digits-MLP-SGD.json").read_text()
    again = run_quality("--out", str(out), "--tasks", DIGITS, "--seeds", "1", "--report")
    assert again.returncode == 0 and (out / "cache" / "digits-MLP-SGD.json").read_text() == kept
    assert "| Redline, 10% |" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "faces"], f"no task has 'faces' in its name; there are\n  {DIGITS}"),
        (["--methods", "Adagrad"], "no method has 'Adagrad' in its name; there are\n  grid\n  config's own"),
        (["--seeds", "0"], "--seeds and --processes are at least 1"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
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


# -- tasks and grids -------------------------------------------------------------------------------------------


def test_there_is_a_task_of_each_kind_on_either_side(parts: SimpleNamespace) -> None:
    development, held_out = ([task for task in parts.tasks.TASKS if task.held_out is side] for side in (False, True))
    assert {task.kind for task in development} == {task.kind for task in held_out}
    assert len({task.name for task in parts.tasks.TASKS}) == len(parts.tasks.TASKS) >= 24
    assert len(held_out) >= 10


def test_every_grid_has_18_learning_rates_equal_factors_apart(parts: SimpleNamespace) -> None:
    for task in parts.tasks.TASKS:
        lrs = task.grid
        assert len(lrs) == 18
        assert lrs[0] == pytest.approx(1e-4 if task.optimizer["type"] == "SGD" else 1e-5)
        assert [b / a for a, b in pairwise(lrs)] == pytest.approx([10 ** (5 / 17)] * 17)


def test_a_schedule_has_its_maximum_and_fits_the_training(parts: SimpleNamespace) -> None:
    config = parts.ours.engine_config(parts.tasks.task_of(DIGITS), 3, 0.3)
    decay = config["scheduler"]["params"]
    assert (decay["warmup_min_lr"], decay["warmup_max_lr"]) == (0.0, 0.3)
    assert (decay["warmup_num_steps"], decay["total_num_steps"]) == (4, 180)
    assert config["optimizer"]["params"]["lr"] == 0.01 and config["redline"]["data"]["seed"] == 3
    assert "scheduler" not in parts.ours.engine_config(parts.tasks.task_of(DIGITS), 3)


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


def test_hopeless_learning_rates_are_not_repeated(parts: SimpleNamespace) -> None:
    losses = {0.1: [2.0], 0.2: [1.25], 0.3: [1.0], 0.4: [1.26], 0.5: [None], 0.6: []}
    assert parts.grid.worth_repeating(losses, 1.25, log_scale=False) == [0.2, 0.3]
    assert parts.grid.worth_repeating({0.2: [1.25, 1.0], 0.3: [1.0, 1.0]}, 1.1, log_scale=False) == [0.3]
    assert parts.grid.worth_repeating({0.1: [None]}, 1.25, log_scale=False) == []
    # exp(0.1) is 10.5% above, whatever the sign of the loss
    assert parts.grid.worth_repeating({0.1: [-2.0], 0.2: [-1.9]}, 1.1, log_scale=True) == [0.1]


def test_a_model_that_overfits_has_not_diverged(parts: SimpleNamespace) -> None:
    task = parts.tasks.task_of(DIGITS)
    start = parts.grid.untrained(DIGITS, 0)
    for training, loss, diverged, counted in (
        (0.1, 9.0, False, 9.0),
        (9.0, 9.0, True, start),
        (9.0, None, True, start),
    ):
        worth = parts.judge._worth(task, {"training": training, "loss": loss}, 0)
        assert (worth["diverged"], worth["loss"]) == (diverged, counted)


def test_the_cache_counts_for_the_same_task_and_versions_only(parts: SimpleNamespace, tmp_path: Path) -> None:
    key = {"torch": "2.13", "task": "abc"}
    cache = parts.work.Cache(tmp_path, "a, b", key)
    cache.found.update({"train 0": {"loss": 1.0}, "ask Redline, 10% 0": {"lr": 0.1}})
    cache.save()
    assert parts.work.Cache(tmp_path, "a, b", key).found == cache.found
    assert parts.work.Cache(tmp_path, "a, b", {**key, "task": "abd"}).found == {}
    assert parts.work.Cache(tmp_path, "c", key).found == {}
    cache.forget("ask Redline")
    assert parts.work.Cache(tmp_path, "a, b", key).found == cache.found == {"train 0": {"loss": 1.0}}


def test_two_runs_at_once_add_to_one_cache(parts: SimpleNamespace, tmp_path: Path) -> None:
    first, second = (parts.work.Cache(tmp_path, "a task", {}) for _ in range(2))
    for cache, name in ((first, "train 0"), (second, "train 1")):
        cache.found[name] = {"loss": 1.0}
        cache.save()
    assert parts.work.Cache(tmp_path, "a task", {}).found.keys() == {"train 0", "train 1"}


def test_ctrl_c_keeps_finished_jobs(parts: SimpleNamespace, tmp_path: Path) -> None:
    def job(number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return number

    cache = parts.work.Cache(tmp_path, "a task", {})
    with pytest.raises(KeyboardInterrupt), parts.work.Workers(1) as workers:
        workers.do("a task", [(str(number), job, (number,)) for number in range(4)], cache)
    assert parts.work.Cache(tmp_path, "a task", {}).found == {"0": 0, "1": 1}


# -- one task in many forms ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("index", range(6))
def test_the_answer_is_near_the_best_of_the_grid_in_every_form_of_a_task(parts: SimpleNamespace, index: int) -> None:
    """Within a factor of two of it, or within a quarter of its loss, once what was done to the loss is undone.

    By default the search has 100 steps; seeds of this task differ by a fifth of the loss.
    """
    torch.set_num_threads(1)
    task, add, times = parts.tasks.FORMS[index]

    def trained(lr: float) -> float:
        loss = parts.grid.train(task.name, 0, lr)["loss"]
        return math.inf if loss is None else (loss - add) / times

    losses = {lr: trained(lr) for lr in task.grid[5:17]}
    best = min(losses, key=losses.__getitem__)
    answer = parts.ours.suggest(task.name, 0, None)
    assert answer["lr"] is not None, answer
    assert best / 2 <= answer["lr"] <= best * 2 or trained(answer["lr"]) <= 1.25 * losses[best], (answer, losses)


# -- figures and tables ---------------------------------------------------------------------------------------


def made_up(
    losses: list[float], lrs: list[float | None], *, own: tuple[float, ...] = (2.1, 2.1), log_scale: bool = False
) -> dict[str, Any]:
    """Results of one task and one method beside the config's own rate; the grid's best is 2.0."""

    def run(seed: int, loss: float, lr: float | None) -> dict[str, Any]:
        why = {} if lr is not None else {"why": "it returned nothing"}
        timing = {"steps": 10, "asking": 3.0, "seconds": 6.0}
        return {"seed": seed, "loss": loss, "lr": lr, "diverged": loss >= 5, **timing, **why}

    runs = [run(seed, loss, lr) for seed, (loss, lr) in enumerate(zip(losses, lrs))]
    task = {
        "name": "made up", "kind": "basic", "held_out": False, "log_scale": log_scale, "steps": 100, "own_lr": 0.01,
        "grid": {"points": [], "best": {"lr": 0.1, "runs": [{"loss": 2.0, "diverged": False}] * 2}},
        "methods": {"config's own": [run(seed, loss, 0.01) for seed, loss in enumerate(own)], "a rule": runs},
    }  # fmt: skip
    return {
        "date": "2026-01-01", "command": "scripts/quality --out out", "machine": "a machine",
        "versions": {"Python": "3.11", "torch": "2.13"}, "left_out": [], "tasks_left_out": ["faces"], "tasks": [task],
    }  # fmt: skip


@pytest.mark.parametrize(("log_scale", "expected"), [(False, 0.15), (True, 0.3499)])  # exp(0.3) - 1
def test_the_excess_is_of_the_mean_loss_over_the_grids_best(
    parts: SimpleNamespace, log_scale: bool, expected: float
) -> None:
    (task,) = made_up([2.2, 2.4], [0.2, 0.1], log_scale=log_scale)["tasks"]
    assert parts.report.excess(task, "a rule") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("losses", "own", "worse"),
    [
        ([2.3, 2.3], (2.1, 2.1), True),
        ([2.13, 2.13], (2.1, 2.1), False),  # by less than 2%
        ([2.3, 2.3], (1.9, 2.3), False),  # by less than two standard deviations
    ],
)
def test_an_answer_is_worse_than_the_configs_own_rate_beyond_noise_only(
    parts: SimpleNamespace, losses: list[float], own: tuple[float, ...], worse: bool
) -> None:
    (task,) = made_up(losses, [0.2, 0.1], own=own)["tasks"]
    assert parts.report.worse_than_own(task, "a rule") is worse


def test_the_tables_have_all_figures_of_a_method(parts: SimpleNamespace) -> None:
    page = parts.report.tables(made_up([2.2, 5.0], [0.2, None]))
    row = next(line for line in page.splitlines() if line.startswith("| a rule |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a rule", "+80.0%", "+80.0%", "1 of 1", "1 of 1", "1 of 2", "-", "10%", "50%"]
    assert "+80.0% at 0.2, 1 without an answer, 1 diverged" in page
    assert "- made up: a rule, 1 of 2 seeds: it returned nothing" in page


def test_a_page_gets_the_block_and_keeps_the_rest(parts: SimpleNamespace) -> None:
    report = parts.report
    page = f"# Title\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nThe end.\n"
    assert report.renew(page, "new") == f"# Title\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nThe end.\n"
    with pytest.raises(ValueError, match="the page lacks"):
        report.renew("# Title\n", "new")


# -- other tools -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["torch-lr-finder", "Lightning", "fastai"])
def test_a_peer_suggests_by_its_own_package(parts: SimpleNamespace, peer: str) -> None:
    if parts.peers.missing(peer):
        pytest.skip(f"{peer} is not installed; scripts/quality installs it into .venv-quality")
    # In a process of its own: their imports set environment variables.
    code = f"import json; from suggestions.peers import ask; print(json.dumps(ask({peer!r}, {DIGITS!r}, 0)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    assert found.keys() == {"lrs", "steps"}, found
    assert found["lrs"].keys() == set(parts.peers.METHODS[peer])
    assert all(lr is None or (0 < lr < 100 and math.isfinite(lr)) for lr in found["lrs"].values())
    assert 10 < found["steps"] <= 101


def test_a_peer_that_fails_is_reported(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no plot\nlong story")

    monkeypatch.setitem(parts.peers._ADAPTERS, "fastai", fail)
    assert parts.peers.ask("fastai", DIGITS, 0) == {"error": "RuntimeError: no plot"}


# -- the docs --------------------------------------------------------------------------------------------------


def test_the_page_shows_a_full_run_in_the_form_that_the_script_writes(parts: SimpleNamespace) -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    inner = page.partition(parts.report.BEGIN)[2].partition(parts.report.END)[0].strip()
    assert re.match(
        r"Measured by `scripts/quality .+` on \d{4}-\d\d-\d\d: \d+ tasks, .* seeds, 18 points of the grid\. ", inner
    )
    for heading in re.findall(r"^### .*$", parts.report.tables(made_up([2.2], [0.2])), re.MULTILINE):
        assert heading.partition(" (")[0] in inner
    _, _, rest = inner.partition("Tasks that are not in this run: ")
    left_out = rest.partition(".\n")[0]
    assert all(f"| {task.name}" in inner or task.name in left_out for task in parts.tasks.TASKS)
    head = next(line for line in parts.report.tables(made_up([2.2], [0.2])).splitlines() if line.startswith("|  |"))
    assert head in inner
