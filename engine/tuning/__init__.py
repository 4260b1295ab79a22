"""From a task to a config that was proven by training: a range test, a search for the peak, schedule trials.

api       `tune`; the engines it runs on, the signals that end it
budget    what may be spent, on what, and the count of it
tuner     the stages in order, and the short trainings they are made of
search    which short trainings find the peak learning rate, and what they say
trials    what trials answer: the peak learning rate, the schedule
batch_sizes  learning rate and keys for another batch size than the tuning's
result    the outcome as a value, as a config and on disk; `report` its files and its summary
"""

from redline.tuning.api import Interrupted, tune
from redline.tuning.result import Tuning
from redline.tuning.trials import Trial

__all__ = ["Interrupted", "Trial", "Tuning", "tune"]
