"""Redline: a small PyTorch training engine that speaks DeepSpeed's JSON.

from redline import initialize

engine = initialize(model, "config.json", training_data=dataset)
for x, y in engine.training_dataloader:
    loss = loss_fn(engine(x), y)
    engine.backward(loss)
    engine.step()
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "engine":
    # A script in a checkout has imported this folder by its name. It gets the installed package: the same objects.
    try:
        sys.modules["engine"] = import_module("redline")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "engine: Redline is not installed in this Python; run scripts/setup, and import redline"
        ) from error

if TYPE_CHECKING:
    from redline.config import EngineConfig, load_config
    from redline.engine import Engine
    from redline.errors import ConfigError, EngineError, Problem, RangeTestError
    from redline.range_test import RangeTestResult, run_range_test
    from redline.start import initialize
    from redline.tuning import Tuning, tune

__all__ = [
    "ConfigError", "Engine", "EngineConfig", "EngineError", "Problem", "RangeTestError", "RangeTestResult", "Tuning",
    "initialize", "load_config", "run_range_test", "tune",
]  # fmt: skip

__version__ = "0.2.0"

# Where each name lives. It is imported when it is asked for, so that `redline validate` needs no torch and a script
# that only trains no pydantic before its config is read.
_HOMES = {
    "redline.config": ("EngineConfig", "load_config"),
    "redline.engine": ("Engine",),
    "redline.errors": ("ConfigError", "EngineError", "Problem", "RangeTestError"),
    "redline.range_test": ("RangeTestResult", "run_range_test"),
    "redline.start": ("initialize",),
    "redline.tuning": ("Tuning", "tune"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
