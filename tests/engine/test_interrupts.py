"""Ctrl-C, or a notebook's stop button, at every line of the engine in turn: the cell can be run again."""

from __future__ import annotations

import linecache
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import engine as package
from engine import Engine
from tests.by_hand import ByHand, Case, build, exact, loss_of
from tests.engine.test_master_params import BOTH

FOLDER = str(Path(package.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt before the line of this number that the engine runs."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.place = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        # What is raised in a finalizer, which the garbage collector may run at any line, is lost.
        if not frame.f_code.co_filename.startswith(FOLDER) or frame.f_code.co_name == "_report_unfinished":
            return None
        # Between a kernel and the step counts that it needs nothing tells which of the two an interrupt came after.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith("kernel("):
            self.left -= 1
            if self.left == 0:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def micro_batch(case: Case, engine: Engine, number: int) -> None:
    engine.backward(loss_of(engine, number, 0, *BOTH, dtype=case.dtype))
    engine.step()


def weights_of_history(case: Case, steps: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the loop by hand comes to, with these micro-batches in each optimizer step."""
    hand = ByHand(case)
    for numbers in steps:
        for number in numbers:
            hand.micro_batch(number, BOTH)
        hand.step()
    return hand.masters


# Micro-batch 2 of 0 to 6 is interrupted: it counts once, or it is dropped, with or without the ones before it that were
# still to count.
HISTORIES = {
    1: [[[0], [1], [2], [3], [4], [5], [6]], [[0], [1], [3], [4], [5], [6]]],
    2: [[[0, 1], [2, 3], [4, 5]], [[0, 1], [3, 4], [5, 6]]],
}
LAST = {  # the same for micro-batch 3, the last of its optimizer step with accumulation 2
    2: [[[0, 1], [2, 3], [4, 5]], [[0, 1], [4, 5]], [[0, 1], [2, 4], [5, 6]]],
}


@pytest.mark.parametrize(
    "precision, accumulation, interrupted",
    [("fp32", 1, 2), ("bf16", 1, 2), ("fp32", 2, 2), ("fp32", 2, 3), ("bf16", 2, 3)],
)
def test_after_an_interrupt_at_any_line_the_cell_trains_on(
    precision: str,
    accumulation: int,
    interrupted: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(precision, 0, accumulation)
    histories = (LAST if interrupted == 3 else HISTORIES)[accumulation]
    allowed = [weights_of_history(case, each) for each in histories]
    tolerance = {"rtol": 2e-2, "atol": 4e-3} if case.dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}
    monkeypatch.setattr(logging.getLogger("engine"), "level", logging.WARNING)
    at, faults = 0, []
    while True:
        at += 1
        engine = build(case)
        for number in range(interrupted):
            micro_batch(case, engine, number)
        interrupt, warnings = Interrupt(at), len(caplog.records)
        before = sys.gettrace()
        try:
            sys.settrace(interrupt)
            micro_batch(case, engine, interrupted)
            sys.settrace(before)
            break  # it has run to its end: every line has had its turn
        except KeyboardInterrupt as error:
            sys.settrace(before)
            if not torch.is_grad_enabled():
                torch.set_grad_enabled(True)
                faults.append(f"{interrupt.place}: gradients stay disabled")
            monkeypatch.setattr(sys, "last_value", error, raising=False)  # as Python does once it has shown it
        try:
            for number in range(interrupted + 1, 7):
                micro_batch(case, engine, number)
        except Exception as error:
            faults.append(f"{interrupt.place}: refused: {error}")
            continue
        mine = exact(engine)
        if not any(all(torch.allclose(mine[name], each[name], **tolerance) for name in mine) for each in allowed):
            faults.append(f"{interrupt.place}: trained otherwise")
        if len(caplog.records) > warnings + 1:
            faults.append(f"{interrupt.place}: {len(caplog.records) - warnings} warnings")
    assert at > 50
    assert not faults, f"{len(faults)} of {at}:\n" + "\n".join(faults)
