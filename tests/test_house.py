"""The package as a whole does what it did: configs, short runs, checkpoints, learning rates.

``scripts/dev/record_house.py`` records the answers into ``tests/golden/house`` and compares two commits bit for bit.
Here numbers may differ in their seventh digit, since machines do; all else is exact. Where such a difference grows,
more is allowed: between AVX-512 and SSE4 it came to 3e-4 at the end of a range test.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests import house

# Relative: in fp32; after hundreds of steps, or with a batch norm over three samples; and where numbers are rounded to
# bf16 or fp16, in a model or within Muon.
EXACT, LONG, LOW = 1e-6, 2e-3, 1e-2


def recorded(name: str) -> Any:
    return json.loads((house.FOLDER / f"{name}.json").read_text())


def faults(found: Any, want: Any, relative: float, path: str = "") -> list[str]:
    """Where an answer differs from the recorded one."""
    if isinstance(want, dict) and isinstance(found, dict) and found.keys() == want.keys():
        return [fault for key in want for fault in faults(found[key], want[key], relative, f"{path}/{key}")]
    if isinstance(want, list) and isinstance(found, list) and len(found) == len(want):
        pairs = enumerate(zip(found, want))
        return [fault for number, (x, y) in pairs for fault in faults(x, y, relative, f"{path}/{number}")]
    if isinstance(want, float) and isinstance(found, float):
        same = math.isclose(found, want, rel_tol=relative, abs_tol=1e-9) or (math.isnan(found) and math.isnan(want))
    else:
        same = type(found) is type(want) and found == want
    return [] if same else [f"{path}: {found!r:.200} instead of {want!r:.200}"]


def plain(answer: Any) -> Any:
    """An answer as it comes out of a JSON file."""
    return json.loads(json.dumps(answer))


def check(found: Any, want: Any, relative: float = EXACT) -> None:
    wrong = faults(plain(found), want, relative)
    assert not wrong, "\n".join([f"{len(wrong)} differences", *wrong[:20]])


def test_every_key_has_its_status_and_default() -> None:
    check(house.explained(), recorded("configs")["explain"])


@pytest.mark.parametrize("world_size", [1, 4])
def test_every_config_is_judged_as_before(world_size: int) -> None:
    asked, want = house.asked(world_size), recorded("configs")["one rank" if world_size == 1 else "four ranks"]
    found = house.answer_configs(asked, world_size)
    check(found["usual"], want["usual"])
    by_config = [
        {json.dumps(config): answer for config, answer in zip(asked, answers["configs"], strict=True)}
        for answers in (found, want)
    ]
    check(*by_config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_short_runs_train_as_before(ranks: int) -> None:
    want = recorded("runs")["one rank" if ranks == 1 else "two ranks"]
    for found, known in zip(house.train_all(ranks), want, strict=True):
        for name in known:
            exact = "fp32" in name and "Muon" not in name
            check({name: found[name]}, {name: known[name]}, EXACT if exact else LOW)
        assert found.keys() == known.keys()


def test_checkpoints_of_an_older_version_load_bit_for_bit(tmp_path: Path) -> None:
    with tarfile.open(house.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    found, want = plain(house.load_checkpoints(tmp_path)), recorded("checkpoints")
    for rank, checkpoints in want.items():
        for name, known in checkpoints.items():
            following, known_following = found[rank][name].pop("next", None), known.pop("next", None)
            assert found[rank][name] == known, (rank, name)
            check(following, known_following, LOW if "16" in name else LONG)


@pytest.mark.parametrize(("command", "task"), house.COMMANDS)
def test_learning_rates_are_found_as_before(command: str, task: str) -> None:
    check(house.answer_command(command, task), recorded("finders")[f"{command} {task}"], LONG)
