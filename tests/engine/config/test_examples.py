"""The configs that we ship."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from engine.config import build_schema, load_config, validate
from engine.config.document import read

CONFIGS = sorted(path for path in (Path(__file__).parents[3] / "configs").glob("*.json") if path.name != "schema.json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_runs_as_written(path: Path) -> None:
    assert validate(path).exit_code == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_satisfies_the_schema_that_it_names(path: Path) -> None:
    document = read(path).value
    assert (path.parent / document["$schema"]).samefile(path.parent / "schema.json")
    Draft202012Validator(build_schema()).validate(document)


def test_the_range_test_is_that_of_the_tutorial() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "lr_range_test"))
    assert config.scheduler is not None
    assert config.scheduler.arguments() == {
        "lr_range_test_min_lr": 1e-4,
        "lr_range_test_step_size": 200,
        "lr_range_test_step_rate": 5.0,
        "lr_range_test_staircase": False,
    }
