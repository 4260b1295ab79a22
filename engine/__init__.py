"""Redline: a small PyTorch training engine that speaks DeepSpeed's JSON.

from engine import initialize

engine = initialize(model, "config.json")
for x, y in loader:
    loss = loss_fn(engine(x), y)
    engine.backward(loss)
    engine.step()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig, load_config
    from engine.engine import Engine
    from engine.errors import ConfigError, EngineError, Problem, RangeTestError
    from engine.range_test import RangeTestResult, run_range_test
    from engine.start import initialize
    from engine.tuning import Tuning, tune

__all__ = [
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Problem",
    "RangeTestError",
    "RangeTestResult",
    "Tuning",
    "initialize",
    "load_config",
    "run_range_test",
    "tune",
]

__version__ = "0.1.0"

# Where each name lives. It is imported when it is asked for, so that `redline validate` needs no torch and a script
# that only trains no pydantic before its config is read.
_HOMES = {
    "ConfigError": "engine.errors",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "EngineError": "engine.errors",
    "Problem": "engine.errors",
    "RangeTestError": "engine.errors",
    "RangeTestResult": "engine.range_test",
    "Tuning": "engine.tuning",
    "initialize": "engine.start",
    "load_config": "engine.config",
    "run_range_test": "engine.range_test",
    "tune": "engine.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
