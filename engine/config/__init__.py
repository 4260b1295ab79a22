"""The JSON language: a file, a dict or a text becomes a frozen, typed config, or everything that is wrong with it.

    document                  text to value, with line and column
    section, messages         what all sections share; what is said of values and keys
    components, zero, sections    the sections that are honoured
    root                      EngineConfig: the keys at the top; batch sizes and what keys cannot be obeyed together
    refused.json              the keys that are refused or have no effect
    schema, editors           all of this as one JSON Schema; the one for editors
    load                      a document becomes an EngineConfig
    values                    those in force of one with their origins
    report, explain           what is said of configs and keys

It describes and never acts; nothing here makes an optimizer, a process group or a file.
"""

import importlib
from typing import TYPE_CHECKING, Any

from redline.config.components import OptimizerConfig, SchedulerConfig
from redline.config.load import Source, UnsupportedConfigError, load_config
from redline.config.root import EngineConfig

if TYPE_CHECKING:
    from redline.config.editors import build_schema
    from redline.config.report import KeyStatus, Report, validate
    from redline.config.values import Difference, Value, differences, effective, fingerprint, origins

# What training does not need is imported when it is first asked for.
_LATER = {
    **dict.fromkeys(("Difference", "Value", "differences", "effective", "fingerprint", "origins"), "values"),
    **dict.fromkeys(("KeyStatus", "Report", "validate"), "report"),
    "build_schema": "editors",
}

__all__ = [
    "Difference", "EngineConfig", "KeyStatus", "OptimizerConfig", "Report", "SchedulerConfig", "Source",
    "UnsupportedConfigError", "Value", "build_schema", "differences", "effective", "fingerprint", "load_config",
    "origins", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
