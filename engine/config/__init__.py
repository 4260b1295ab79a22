"""The JSON language: a file, a dict or a text becomes a frozen, typed config, or everything that is wrong with it.

    document                  text to value, with line and column
    section                   what all sections share; a key in words
    components, zero, sections    the sections that are honoured
    root                      EngineConfig: the keys at the top, batch sizes, and the rules across sections
    refused.json              the keys that are refused or have no effect
    schema                    all of this as one JSON Schema
    load                      a document becomes an EngineConfig
    effective                 the values of one with their origins
    report, explain           what is said of configs and keys

It describes and never acts; nothing here makes an optimizer, a process group or a file.
"""

from typing import TYPE_CHECKING, Any

from redline.config.components import OptimizerConfig, SchedulerConfig
from redline.config.effective import Value, effective, fingerprint, origins
from redline.config.load import Source, UnsupportedConfigError, load_config
from redline.config.root import EngineConfig
from redline.config.schema import build_schema

if TYPE_CHECKING:
    from redline.config.report import Difference, KeyStatus, Report, differences, validate

__all__ = [
    "Difference", "EngineConfig", "KeyStatus", "OptimizerConfig", "Report", "SchedulerConfig", "Source",
    "UnsupportedConfigError", "Value", "build_schema", "differences", "effective", "fingerprint", "load_config",
    "origins", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What training does not need is imported when it is first asked for."""
    if name in ("Difference", "KeyStatus", "Report", "differences", "validate"):
        from redline.config import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
