"""The learning rate range test: run it, record it, read it, show it.

rig         a live engine on which short runs are made, and which is then as it was before; `runner` is the test
recorder    what any run notes of itself; `passive` keeps that of a run whose config says LRRangeTest
curve       the record of one run; `smoothing` and `divergence` read it
analysis    curves to a suggestion, pure numbers; `suggestion` is what comes out
result      a test as a value, on disk, and as a config; `picture` and `report` show it
task        model, data and loss in the forms people have them
snapshot    the state that a test puts back
"""

from engine.range_test.curve import Curve
from engine.range_test.result import RangeTestResult
from engine.range_test.runner import run_range_test
from engine.range_test.suggestion import Refusal, Suggestion

__all__ = ["Curve", "RangeTestResult", "Refusal", "Suggestion", "run_range_test"]
