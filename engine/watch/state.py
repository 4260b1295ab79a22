"""`dump_state`: the config in force, once at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.log import log

if TYPE_CHECKING:
    from engine.config import EngineConfig

__all__ = ["dump_state"]

_SECRET = ("comet.api_key",)


def dump_state(config: EngineConfig) -> None:
    """Print every value of a config with its origin: given, derived, auto, or default; but no secret."""
    from engine.config import effective  # here: a run that prints nothing does not need it

    values = {path: value for path, value in effective(config).items()}
    width = max(map(len, values))
    lines = [
        f"  {path:<{width}}  {'*** (given)' if path in _SECRET and value.value else value}"
        for path, value in values.items()
    ]
    log.info("%s", "\n".join([f"config in force: {config.as_written().source}", *lines]))
