"""Hugging Face Trainer, PEFT, TRL, Accelerate and Lightning on Redline under the name `deepspeed`: the numbers of each
run are the same at all stages, and DeepSpeed's.

``scripts/dev/record_peers.py`` writes DeepSpeed's numbers to ``tests/golden/peers.json``. ``scripts/test --peers`` runs
this folder, with the frameworks installed and the package `deepspeed` on the path.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.peers import cases
from tests.peers.tiny import Case

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "peers.json").read_text(encoding="utf-8"))
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-3, "mixed": 2e-3}
STAGE_0_TOLERANCE = {**TOLERANCE, "bf16": 3e-2}  # of DeepSpeed, whose stage 0 computes otherwise in bf16
KEYS = ("run", "precision", "ranks", "stage")


def run_all(some: list[Case], folder: str) -> list[Any]:
    """What each case comes to, or the traceback; runs in every rank. Each case has a folder of its own."""
    import deepspeed

    assert deepspeed.__redline__
    logging.getLogger("redline").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    results: list[Any] = []
    for number, case in enumerate(some):
        own = Path(folder) / str(number)
        own.mkdir(exist_ok=True)
        try:
            results.append(cases.run(case, own))
        except Exception:
            results.append(traceback.format_exc())
    return results


@functools.cache
def results(framework: str, ranks: int) -> dict[tuple[Any, ...], Any]:
    """Of all cases of a framework, which is imported once."""
    some = [case for case in cases.cases() if case["run"].startswith(framework) and case["ranks"] == ranks]
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(run_all, ranks, some, folder, timeout=1200.0)[0]
    return {key_of(case): each for case, each in zip(some, found)}


def key_of(case: Case) -> tuple[Any, ...]:
    return tuple(case[key] for key in KEYS)


def differences(found: Any, expected: dict[str, Any], tolerance: float) -> Iterator[str]:
    if not isinstance(found, dict):  # a traceback
        yield str(found)
    elif found.keys() - {"norm"} != expected.keys() - {"norm"}:  # DeepSpeed has none in fp32 at stage 0
        yield f"got {sorted(found)}, expected {sorted(expected)}"
    else:
        for name, value in expected.items():
            if found[name] != pytest.approx(value, rel=tolerance, abs=tolerance):
                yield f"{name}: got {found[name]}, expected {value}"


GROUPS = [
    pytest.param(list(group), id="-".join(map(str, key)))
    for key, group in itertools.groupby(GOLDEN["cases"], lambda case: key_of(case)[:-1])
]


@pytest.mark.parametrize("group", GROUPS)
def test_a_run_comes_to_deepspeeds_numbers_at_every_stage(group: list[Case]) -> None:
    first = group[0]
    found = results(first["run"].partition(".")[0], first["ranks"])
    faults = []
    for case in group:
        own, stage, precision = found[key_of(case)], case["stage"], case["precision"]
        if not case["run"].endswith(".save"):  # what is saved without the gathering key depends on the stage
            compared = differences(own, found[key_of(first)], TOLERANCE[precision])
            faults += [f"stage {stage} and stage {first['stage']}: {each}" for each in compared]
        if "error" not in case:
            expected = {key: value for key, value in case.items() if key not in KEYS}
            compared = differences(own, expected, (TOLERANCE if stage else STAGE_0_TOLERANCE)[precision])
            faults += [f"stage {stage} and DeepSpeed: {each}" for each in compared]
    assert not faults, "\n".join(faults)


def test_a_resumed_run_repeats_the_whole_ones_losses() -> None:
    runs = [case for case in cases.cases() if case["run"].endswith(".resume")]
    for case in runs:
        found = results(case["run"].partition(".")[0], case["ranks"])[key_of(case)]
        assert found["resumed"] == found["loss"][-len(found["resumed"]) :], case


@pytest.mark.parametrize("framework", cases.FRAMEWORKS)
def test_a_checkpoint_loads_on_other_ranks_and_at_another_stage(framework: str, tmp_path: Path) -> None:
    given = {"run": f"{framework}.hand_over", "precision": "fp32"}
    (saved,), _ = run_ranks(run_all, 2, [{**given, "stage": 2, "ranks": 2}], str(tmp_path))
    ((loaded,),) = run_ranks(run_all, 1, [{**given, "stage": 3, "ranks": 1}], str(tmp_path))
    assert loaded == pytest.approx(saved, rel=1e-5)


def test_every_run_is_recorded() -> None:
    assert sorted(map(key_of, GOLDEN["cases"])) == sorted(map(key_of, cases.cases()))
