"""Ctrl-C, or a notebook's stop button, at the lines of the engine in turn: the cell can be run again."""

from __future__ import annotations

import gc
import linecache
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import redline as package
from redline import Engine
from tests.by_hand import ByHand, Case, build, exact, loss_of
from tests.distributed import run_ranks
from tests.engine.test_master_params import BOTH

FOLDER = str(Path(package.__file__).parent)
# Of the lines in these a rank runs more or fewer, by its shards; the ranks are to be interrupted in one place.
BY_SHARDS = ("fused.py",)


class Interrupt:
    """Raises KeyboardInterrupt before the line of this number that the engine runs."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.place = ""
        self.left_out = BY_SHARDS if "WORLD_SIZE" in os.environ else ()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        # What is raised in a finalizer, which the garbage collector may run at any line, is lost.
        if not path.startswith(FOLDER) or frame.f_code.co_name == "warn_unfinished" or path.endswith(self.left_out):
            return None
        # Between a kernel and the step counts that it needs nothing tells which of the two an interrupt came after.
        line = linecache.getline(path, frame.f_lineno).strip()
        if event == "line" and not line.startswith("kernel("):
            self.left -= 1
            if self.left == 0:
                self.place = f"{Path(path).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


class Warnings(logging.Handler):
    """Counts what the engine warns of."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.levelno >= logging.WARNING


def micro_batch(case: Case, engine: Engine, number: int) -> None:
    engine.backward(loss_of(engine, number, engine.global_rank, *BOTH, dtype=case.dtype))
    engine.step()


def weights_of_history(case: Case, steps: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What the loop by hand comes to, with these micro-batches in each optimizer step."""
    hand = ByHand(case, int(os.environ.get("WORLD_SIZE", "1")))
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


def interrupted_everywhere(case: Case, interrupted: int, every: int, first: int = 1) -> tuple[int, list[str]]:
    """Interrupt a micro-batch at every n-th line, the same one on all ranks; the number of lines, and what is wrong."""
    histories = (LAST if interrupted == 3 else HISTORIES)[case.accumulation]
    allowed = [weights_of_history(case, each) for each in histories]
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if case.precision == "fp32" else {"rtol": 2e-2, "atol": 4e-3}
    warnings, log = Warnings(), logging.getLogger("redline")
    log.addHandler(warnings)
    log.setLevel(logging.WARNING)
    at, faults = first, []
    try:
        while (fault := interrupted_at(at, case, interrupted, allowed, tolerance, warnings)) is not None:
            faults += [fault] if fault else []
            at += every
    finally:
        log.removeHandler(warnings)
    return at, faults


def interrupted_at(
    at: int,
    case: Case,
    interrupted: int,
    allowed: list[dict[str, Tensor]],
    tolerance: dict[str, float],
    warnings: Warnings,
) -> str | None:
    """What is wrong after an interrupt at this line; None where the micro-batch has fewer lines."""
    engine = build(case)
    for number in range(interrupted):
        micro_batch(case, engine, number)
    interrupt, before = Interrupt(at), sys.gettrace()
    warnings.count = 0
    gc.disable()  # what finalizers of earlier engines do would count as lines, on one rank and not on the other
    try:
        sys.settrace(interrupt)
        micro_batch(case, engine, interrupted)
        sys.settrace(before)
        return None
    except KeyboardInterrupt as error:
        sys.settrace(before)
        sys.last_value = error  # as Python has it once the error was shown
    finally:
        gc.enable()
    try:
        if not torch.is_grad_enabled():
            torch.set_grad_enabled(True)
            return f"{interrupt.place}: gradients stay disabled"
        for number in range(interrupted + 1, 7):
            micro_batch(case, engine, number)
    except Exception as error:
        return f"{interrupt.place}: refused: {error}"
    finally:
        del sys.last_value
    mine = exact(engine)
    if not any(all(torch.allclose(mine[name], each[name], **tolerance) for name in mine) for each in allowed):
        return f"{interrupt.place}: trained otherwise"
    return f"{interrupt.place}: {warnings.count} warnings" if warnings.count > 1 else ""


PLACES = [("fp32", 1, 2), ("bf16", 1, 2), ("fp32", 2, 2), ("fp32", 2, 3), ("bf16", 2, 3), ("autocast", 2, 3)]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)], ids=["one line in seven", "every line"])
@pytest.mark.parametrize("precision, accumulation, interrupted", PLACES)
def test_after_an_interrupt_at_any_line_the_cell_trains_on(
    precision: str, accumulation: int, interrupted: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("redline"), "level", logging.WARNING)
    # Between them, the places go through all lines even with one in seven.
    first = PLACES.index((precision, accumulation, interrupted)) % every + 1
    lines, faults = interrupted_everywhere(Case(precision, 0, accumulation), interrupted, every, first)
    assert lines > 50
    assert not faults, f"{len(faults)} of {lines}:\n" + "\n".join(faults)


PRECISIONS = ("fp32", "bf16", "autocast")
# Stage, interrupted micro-batch, precision.
SHARDED = [(stage, number, name) for stage in (1, 2) for number in (2, 3) for name in PRECISIONS] + [(3, 2, "fp32")]


def on_two_ranks(stage: int, precision: str, interrupted: int, every: int, first: int = 1) -> list[str]:
    # On ranks of their own: what an interrupt leaves in torch is no other test's business.
    case = Case(precision, stage, 2)
    faults = run_ranks(interrupted_everywhere, 2, case, interrupted, every, first, fresh=True)
    assert faults[0][0] > 50
    return [f"rank {rank}: {fault}" for rank, (_, found) in enumerate(faults) for fault in found]


@pytest.mark.long
@pytest.mark.parametrize("stage, precision, interrupted, every", [(2, "bf16", 2, 13), (3, "fp32", 3, 61)])
def test_after_an_interrupt_on_all_ranks_sharded_training_goes_on(
    stage: int, precision: str, interrupted: int, every: int
) -> None:
    assert on_two_ranks(stage, precision, interrupted, every) == []


@pytest.mark.long
@pytest.mark.parametrize("stage, interrupted, precision", SHARDED)
def test_after_an_interrupt_at_many_lines_sharded_training_goes_on(
    stage: int, precision: str, interrupted: int
) -> None:
    every = 61 if stage == 3 else 5  # sharding a model takes FSDP2 most of a second
    first = SHARDED.index((stage, interrupted, precision)) % every + 1  # between them all lines
    assert on_two_ranks(stage, precision, interrupted, every, first) == []
