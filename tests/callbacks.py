"""An engine's callbacks, found by their class."""

from __future__ import annotations

import atexit
from typing import Any

from redline import Engine
from redline.range_test.recorder import PassiveRecorder

__all__ = ["drop_recorder", "find"]


def find(engine: Engine, kind: type) -> Any:
    """The engine's callback of a class; None if it has none."""
    return next((callback for callback in engine.callbacks if isinstance(callback, kind)), None)


def drop_recorder(engine: Engine) -> None:
    """Let the recorder of a passive range test, if there is one, write no report at exit."""
    recorder = find(engine, PassiveRecorder)
    if recorder is not None:
        atexit.unregister(recorder.close)
