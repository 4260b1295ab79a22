"""The JSON language: from a file, a dict or a text to a frozen, typed config, or to everything wrong with it.

    parser, document  text to value, with line and column
    words, section    what a message is made of; what every model shares
    component         a section that names a class: {"type", "params"}
    optimizer, scheduler, batch, root    the models of what is honoured
    sections          the models of all other sections of DeepSpeed
    key, support      the status of every DeepSpeed key
    judge, rules      everything that is wrong, found at once
    load, values, report, schema, catalog, explain    what is done with all this

It describes and never acts; nothing here makes an optimizer, a process group or a file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.config.load import Source, UnsupportedConfigError, load_config
from engine.config.optimizer import OptimizerConfig
from engine.config.root import EngineConfig
from engine.config.scheduler import SchedulerConfig

if TYPE_CHECKING:
    from engine.config.report import KeyStatus, Report, validate
    from engine.config.schema import build_schema
    from engine.config.values import Difference, Value, differences, effective, fingerprint, origins

__all__ = [
    "Difference",
    "EngineConfig",
    "KeyStatus",
    "OptimizerConfig",
    "Report",
    "SchedulerConfig",
    "Source",
    "UnsupportedConfigError",
    "Value",
    "build_schema",
    "differences",
    "effective",
    "fingerprint",
    "load_config",
    "origins",
    "validate",
]

# A training run reads its config and no more: what else is done with configs comes with its first use.
_LATER = {
    **dict.fromkeys(("Difference", "Value", "differences", "effective", "fingerprint", "origins"), "values"),
    "build_schema": "schema",
    **dict.fromkeys(("KeyStatus", "Report", "validate"), "report"),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"engine.config.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
