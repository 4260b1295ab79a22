"""From a task to a config that is proved by training: sweep, range tests, trials, the winner's config.

api         the function `tune`; `command` is `redline tune`
plan        how the budget is shared out: pure numbers, and all constants
runs        which range tests; `candidates` which schedules; `trials` how these are judged
batch       rates at other batch sizes
tuner       the stages, one after the other; `stand` has the engines, `meter` counts, `stop` takes signals
result      a tuning as a value and as a config; `store` on disk; `summary` in words; `report` all files
"""

from engine.tuning.api import Interrupted, tune
from engine.tuning.result import Tuning
from engine.tuning.trials import Trial

__all__ = ["Interrupted", "Trial", "Tuning", "tune"]
