"""The learning rate range test: run it, record it, read it. `redline.reports` shows it.

session     short runs on a live engine, which is restored afterwards; `runner` makes a test of them
recorder    records a run: an active test's, or a training whose config says LRRangeTest
curve       the record of one run, its smoothing and divergence, and the rules of other tools
suggest     curves to a suggestion or a refusal, pure numbers
result      a test as a value, on disk, in the monitors, and as a config
task        model, data and loss in the forms that users have; `importers` read what other tools recorded
"""

from redline.range_test.curve import Curve
from redline.range_test.result import RangeTestResult
from redline.range_test.runner import run_range_test
from redline.range_test.suggest import Refusal, Suggestion

__all__ = ["Curve", "RangeTestResult", "Refusal", "Suggestion", "run_range_test"]
