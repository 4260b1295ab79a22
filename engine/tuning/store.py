"""A tuning on the disk: `tune.json` holds all of it, `tune.csv` its curves, `tuned.json` the config to train with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.errors import RangeTestError
from engine.range_test.result import RangeTestResult, curve_from_json, curve_to_json, write_curves, write_text
from engine.tuning.result import Tuning
from engine.tuning.trials import Trial

__all__ = ["CONFIG_NAME", "CSV_NAME", "JSON_NAME", "is_tuning", "load_tuning", "save_tuning"]

JSON_NAME = "tune.json"
CSV_NAME = "tune.csv"
CONFIG_NAME = "tuned.json"

_PLAIN = (
    "steps", "budget", "spent", "updates", "seconds", "stopped", "micro_batch", "own_lr", "momentum",
    "target_batch_size", "target_processes",
)  # fmt: skip


def is_tuning(directory: str | Path) -> bool:
    """Whether a folder holds a tuning rather than a single range test."""
    return (Path(directory) / JSON_NAME).is_file()


def save_tuning(tuning: Tuning, directory: str | Path) -> dict[str, Path]:
    """Write JSON, CSV and, if there is one, the config; an earlier tuning's files are replaced.

    Returns:
        What was written, by kind: "json", "csv", "config".
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"json": folder / JSON_NAME, "csv": folder / CSV_NAME}
    write_text(written["json"], json.dumps(_to_json(tuning), indent=2) + "\n")
    tried = (trial.curve for trial in (*tuning.search, *tuning.trials))
    write_curves(written["csv"], [*tuning.test.curves, *tuning.comparisons, *tried])
    config = folder / CONFIG_NAME
    if tuning.refusal is None:
        write_text(config, json.dumps(tuning.to_config(), indent=2) + "\n")
        written["config"] = config
    else:
        config.unlink(missing_ok=True)  # an earlier tuning's is not this one's
    return written


def load_tuning(directory: str | Path) -> Tuning:
    """Read a tuning that `save_tuning` wrote.

    Raises:
        RangeTestError: there is none in that directory, or it is damaged.
    """
    path = Path(directory) / JSON_NAME
    try:
        value = json.loads(path.read_text())
        return Tuning(
            test=RangeTestResult.from_json(value["test"]),
            search=tuple(_trial_from_json(trial) for trial in value["search"]),
            trials=tuple(_trial_from_json(trial) for trial in value["trials"]),
            comparisons=tuple(curve_from_json(curve) for curve in value["comparisons"]),
            left_out=tuple(value["left_out"]),
            **{name: value[name] for name in _PLAIN},
        )
    except FileNotFoundError:
        raise RangeTestError(f"{directory}: there is no {JSON_NAME}; give the folder that a tuning wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RangeTestError(f"{path}: is no record of a tuning ({error})") from error


def _to_json(tuning: Tuning) -> dict[str, Any]:
    return {
        **{name: getattr(tuning, name) for name in _PLAIN},
        "winner": tuning.verdict.winner,
        "why": tuning.verdict.why,
        "left_out": tuning.left_out,
        "search": [_trial_to_json(trial) for trial in tuning.search],
        "trials": [_trial_to_json(trial) for trial in tuning.trials],
        "comparisons": [curve_to_json(curve) for curve in tuning.comparisons],
        "test": tuning.test.to_json(),
    }


def _trial_to_json(trial: Trial) -> dict[str, Any]:
    return {
        "schedule": trial.schedule,
        "lr": trial.lr,
        "loss": trial.loss if math.isfinite(trial.loss) else str(trial.loss),
        "diverged": trial.diverged,
        "noise": trial.noise if math.isfinite(trial.noise) else str(trial.noise),
        "why": trial.why,
        "curve": curve_to_json(trial.curve),
    }


def _trial_from_json(value: dict[str, Any]) -> Trial:
    return Trial(
        curve=curve_from_json(value["curve"]),
        schedule=value["schedule"],
        lr=value["lr"],
        loss=float(value["loss"]),
        diverged=value["diverged"],
        noise=float(value["noise"]),
        why=value["why"],
    )
