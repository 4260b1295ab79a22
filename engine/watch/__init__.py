"""Seeing a training run: what is printed, profiled and written down while it goes on.

Everything here looks at a finished `Engine` from outside: observers in ``engine.observers``, and, where a feature must
see inside a step, instance attributes around ``forward``, ``backward`` and ``step``. Without observers all of it is
silent; that is how a range test keeps it out of its runs.
"""

from __future__ import annotations

from engine.watch.attach import attach
from engine.watch.comms import log_comms_summary

__all__ = ["attach", "log_comms_summary"]
