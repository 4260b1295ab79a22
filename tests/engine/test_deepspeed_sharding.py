"""ZeRO against real DeepSpeed: on two and four processes its stages give DeepSpeed's rates, losses and norms.

The expected numbers are in ``tests/golden/sharding.json``; ``scripts/dev/record_deepspeed.py`` records them, and says
which of DeepSpeed's own stages could not be asked. Compared as in
``test_deepspeed_training.py``, as closely at every stage.
"""

from __future__ import annotations

import json
import traceback
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.engine.test_deepspeed_training import FOLDER, Record, assert_the_record_is_deepspeeds, train, why_not
from tests.golden import workload

GOLDEN = json.loads((FOLDER / "sharding.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}


def train_all(cases: list[dict[str, Any]]) -> dict[str, Record | str]:
    """Several cases one after the other, in a process that `run_ranks` started; of one that fails its traceback."""
    records: dict[str, Record | str] = {}
    for case in cases:
        try:
            records[case["name"]] = train(case)
        except Exception:
            records[case["name"]] = traceback.format_exc()
    return records


def names(processes: int) -> list[str]:
    return [name for name, case in CASES.items() if case["processes"] == processes]


def records_of(processes: int) -> list[dict[str, Record | str]]:
    """Every case of so many processes, by rank and name, trained in one set of gloo processes."""
    return run_ranks(train_all, processes, [CASES[name] for name in names(processes) if why_not(CASES[name]) is None])


@pytest.fixture(scope="module")
def records_of_two() -> list[dict[str, Record | str]]:
    return records_of(2)


@pytest.fixture(scope="module")
def records_of_four() -> list[dict[str, Record | str]]:
    return records_of(4)


def check(name: str, request: pytest.FixtureRequest, crew: str) -> None:
    case = CASES[name]
    if (reason := why_not(case)) is not None:
        pytest.skip(reason)
    first, *others = [records[name] for records in request.getfixturevalue(crew)]
    if isinstance(first, str):
        pytest.fail(first)
    texts = {json.dumps(record) for record in (first, *others)}  # in which one NaN equals another
    assert len(texts) == 1, "the ranks hold different numbers"
    assert_the_record_is_deepspeeds(case, first)


def test_the_workload_is_the_one_deepspeed_trained_on() -> None:
    assert workload.fingerprint() == pytest.approx(GOLDEN["workload"]["fingerprint"], rel=1e-6)


@pytest.mark.parametrize("name", names(2))
def test_two_processes_train_as_deepspeed_does(name: str, request: pytest.FixtureRequest) -> None:
    check(name, request, "records_of_two")


@pytest.mark.long
@pytest.mark.parametrize("name", names(4))
def test_four_processes_train_as_deepspeed_does(name: str, request: pytest.FixtureRequest) -> None:
    check(name, request, "records_of_four")
