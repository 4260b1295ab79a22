"""Short scripts of the kinds that an engine easily gets wrong: this engine comes to what DeepSpeed, or the loop, does.

``scripts/dev/record_deepspeed_invariants.py`` writes the expected numbers to ``tests/golden/invariants.json``. Each
case says whether DeepSpeed agrees with a loop by hand; where it does not, the loop's numbers are expected.
"""

from __future__ import annotations

import functools
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from redline import Engine, initialize
from redline.log import log
from tests.distributed import run_ranks
from tests.golden import invariants
from tests.golden.invariants import PROGRAMS, Case
from tests.plain_loop import Net

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "invariants.json").read_text(encoding="utf-8"))


class EngineDriver:
    """This engine, as a script would use it."""

    def initialize(self, model: nn.Module, case: Case) -> Engine:
        return initialize(model, invariants.config_of(case), model_parameters=list(model.parameters()), device="cpu")

    @torch.no_grad()
    def write(self, engine: Engine, write: Callable[[Any], None]) -> None:
        sharded = {name: param for name, param in engine.module.named_parameters() if hasattr(param, "full_tensor")}
        if not sharded:
            write(engine.module)
            return
        from torch.distributed.tensor import distribute_tensor

        full = Net()
        full.load_state_dict(self.read(engine))
        write(full)
        for name, value in full.named_parameters():
            shard: Any = sharded[name]
            shard.copy_(distribute_tensor(value, shard.device_mesh, shard.placements))

    def read(self, engine: Engine) -> dict[str, Tensor]:
        named: Any = engine.module.named_parameters()
        return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in named}


def run_all(cases: list[Case]) -> list[str]:
    """What is wrong in each case, on this rank; empty where nothing is."""
    log.setLevel(logging.ERROR)
    dist.init_process_group("gloo")  # a script on one rank has none by itself
    faults = []
    for case in cases:
        try:
            faults.append("; ".join(invariants.differences(case, invariants.run(case, EngineDriver()), case)))
        except Exception:
            faults.append(traceback.format_exc(limit=-4))
            break  # the ranks may not be together any more
    return faults


def by_hand(case: Case) -> dict[str, Any]:
    dist.init_process_group("gloo")
    return invariants.run(case, invariants.HandDriver())


def is_long(case: Case) -> bool:
    """Whether a case is left to the long run: a precision, a stage or a number of ranks that seldom tells more."""
    return case["precision"] in ("fp16", "autocast") or case["stage"] == 1 or case["processes"] == 3


@functools.cache
def faults_of(ranks: int, long: bool) -> dict[str, list[str]]:
    """Of each program what is wrong, in any of its cases."""
    chosen = [case for case in GOLDEN["cases"] if case["processes"] == ranks and is_long(case) == long]
    found: dict[str, list[str]] = {case["program"]: [] for case in chosen}
    for faults in run_ranks(run_all, ranks, chosen):
        for case, fault in zip(chosen, faults):
            if fault:
                found[case["program"]].append(f"{case['precision']}, stage {case['stage']}: {fault}")
    return found


def programs(ranks: int, long: bool) -> list[Any]:
    names = {c["program"]: None for c in GOLDEN["cases"] if c["processes"] == ranks and is_long(c) == long}
    return [pytest.param(name, ranks, id=f"{name}, {ranks} ranks") for name in names]


@pytest.mark.parametrize("program, ranks", [each for ranks in (1, 2) for each in programs(ranks, False)])
def test_a_script_comes_to_what_deepspeed_or_the_loop_by_hand_does(program: str, ranks: int) -> None:
    assert faults_of(ranks, False)[program] == []


@pytest.mark.long
@pytest.mark.parametrize("program, ranks", [each for ranks in (2, 3) for each in programs(ranks, True)])
def test_a_script_comes_to_the_same_in_further_situations(program: str, ranks: int) -> None:
    assert faults_of(ranks, True)[program] == []


def test_every_program_is_recorded_wherever_it_makes_sense() -> None:
    keys = ("program", "precision", "stage", "processes")
    recorded = {tuple(case[key] for key in keys) for case in GOLDEN["cases"]}
    assert recorded == {tuple(case[key] for key in keys) for case in invariants.cases()}
    assert {case["program"] for case in GOLDEN["cases"]} == set(PROGRAMS)


def test_the_loop_by_hand_still_comes_to_what_was_recorded() -> None:
    case = next(c for c in GOLDEN["cases"] if c["program"] == "frozen later" and c["processes"] == 2)
    for mine in run_ranks(by_hand, 2, case):
        assert invariants.differences(case, mine, case) == []
