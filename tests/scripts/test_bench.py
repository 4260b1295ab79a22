"""scripts/bench runs, finds engines whose losses differ, and counts bytes correctly. No timings are checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARAMETERS = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10  # of the digits MLP


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--device", "cpu", "--threads", "1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """Results, page and output of a smoke run."""
    folder = tmp_path_factory.mktemp("bench")
    ran = run_bench("--quick", "--json", str(folder / "bench.json"), "--markdown", str(folder / "bench.md"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads((folder / "bench.json").read_text()), (folder / "bench.md").read_text(), ran.stdout


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of the script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark import measure, report, task, worker, worker_group

    yield SimpleNamespace(measure=measure, report=report, task=task, worker=worker, worker_group=worker_group)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmark"]:
        del sys.modules[name]


# -- a whole run -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_records_date_command_machine_and_versions(quick: tuple[dict[str, Any], str, str]) -> None:
    results, *_ = quick
    assert results.keys() == {"date", "command", "machine", "versions", "comparisons", "start"}
    assert results["machine"].keys() == {"name", "device", "ranks", "threads", "system"}
    assert {"Python", "torch"} <= results["versions"].keys()
    assert results["command"].startswith("scripts/bench --device cpu")


@pytest.mark.long
def test_every_kind_of_figure_is_there_for_the_loop_and_the_engine(quick: tuple[dict[str, Any], str, str]) -> None:
    results, *_ = quick
    figures = {
        "overhead": "overhead_us",
        "throughput": "ratio",
        "bytes": "sent_bytes",
        "memory": "memory_bytes",
    }
    seen = set()
    for comparison in results["comparisons"]:
        for measure in comparison["measures"]:
            seen.add(measure)
            for subject in ("by hand", "Redline"):
                assert figures[measure] in comparison["subjects"][subject], (comparison["title"], subject)
    assert seen == set(figures)
    for subject in ("by hand", "Redline"):
        assert results["start"][subject].keys() == {"import_s", "build_s", "first_s", "start_s"}


@pytest.mark.long
def test_the_engine_repeats_the_loops_losses(quick: tuple[dict[str, Any], str, str]) -> None:
    results, *_ = quick
    for comparison in results["comparisons"]:
        assert comparison["tolerance"] == 1e-6
        assert comparison["subjects"]["Redline"]["loss_difference"] <= 1e-6


@pytest.mark.long
def test_two_ranks_send_each_gradient_once_both_ways(quick: tuple[dict[str, Any], str, str]) -> None:
    (sending,) = [each for each in quick[0]["comparisons"] if "bytes" in each["measures"]]
    # A ring of two: each sends half of the sum's parts, then half of the sum.
    expected = 2 * 4 * PARAMETERS
    assert sending["task"]["ranks"] == 2
    assert sending["task"]["accumulation"] == 2
    assert sending["subjects"]["by hand"]["sent_bytes"] == expected
    status = 2 * 4 * 2  # two numbers that go with the gradients
    assert sending["subjects"]["Redline"]["sent_bytes"] == expected + status


@pytest.mark.long
def test_the_tables_are_printed_and_written(quick: tuple[dict[str, Any], str, str]) -> None:
    _, page, printed = quick
    for title in ("Overhead per step (us)", "Throughput", "Sent per optimizer step", "Peak memory (MiB)", "Start (s)"):
        assert f"\n## {title}" in page
        assert f"\n{title}" in printed
    assert page.startswith("# Performance\n\nWritten by `scripts/bench")
    assert not [line for line in page.splitlines() if len(line) > 1 and line != line.rstrip()]


def test_an_unknown_measure_is_refused() -> None:
    ran = run_bench("--only", "speed")
    assert ran.returncode == 2
    assert "'speed' is none of overhead, throughput, bytes, memory, start" in ran.stderr


# -- the losses ------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_clip_is_found(parts: SimpleNamespace) -> None:
    task = parts.task.Task("by hand", "MLP 64-64-10", "cpu")
    other = parts.task.Task("by hand, again", "MLP 64-64-10", "cpu", clip=0.0)
    with parts.worker_group.WorkerGroup(task) as base, parts.worker_group.WorkerGroup(other) as unclipped:
        groups = {"by hand": base, "by hand, again": unclipped}
        results = parts.measure._prove(groups, 1e-6)
    assert list(groups) == ["by hand"]
    assert results["by hand, again"]["loss_difference"] > 1e-3
    assert results["by hand, again"]["left_out"].startswith("its losses differ by ")


def test_an_engine_that_fails_is_left_out_with_its_last_line(parts: SimpleNamespace) -> None:
    task = parts.task.Task("by hand", "MLP 64-64-10", "cpu")
    broken = parts.task.Task("Redline", "MLP 64-64-10", "cpu", clip=-1.0)
    with parts.worker_group.WorkerGroup(task) as base, parts.worker_group.WorkerGroup(broken) as failing:
        results = parts.measure._prove({"by hand": base, "Redline": failing}, 1e-6)
    assert "gradient_clipping: got -1" in results["Redline"]["left_out"]


@pytest.mark.parametrize(("value", "expected", "distance"), [(1.5, 1.0, 0.5), (float("nan"), 1.0, float("inf"))])
def test_the_distance_of_losses(parts: SimpleNamespace, value: float, expected: float, distance: float) -> None:
    assert parts.measure._distance(value, expected) == distance


# -- the bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "shapes", "kinds", "size"),
    [
        ("all_reduce", [[100]], ["float"], 600),  # twice three quarters of 400
        ("all_gather", [[25]], ["float"], 300),  # its quarter to three others
        ("_reduce_scatter_base", [[100]], ["c10::BFloat16"], 150),
        ("barrier", [], [], 0),
    ],
)
def test_the_bytes_that_each_of_four_ranks_sends_in_a_ring(
    parts: SimpleNamespace, operation: str, shapes: list[list[int]], kinds: list[str], size: int
) -> None:
    assert parts.worker._sent(operation, shapes, kinds, 4) == size
