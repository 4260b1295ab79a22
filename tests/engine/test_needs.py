"""What is said of memory when training starts: one line, and whether a stage is any good."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from engine import initialize
from engine.needs import verdict
from engine.zero.memory import Bytes, Elements, Held, estimate
from tests.distributed import run_ranks

GIB = 2**30


def said(model: nn.Module, config: dict[str, Any], **more: Any) -> list[str]:
    """What the log says of memory, beside its line about the stage in one process."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(record.getMessage().splitlines())

    handler, log = Keep(), logging.getLogger("engine")
    log.addHandler(handler)
    level = log.level
    try:
        log.setLevel("INFO")
        initialize(model, {"train_micro_batch_size_per_gpu": 1, **config}, device="cpu", **more)
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
    return [text for text in lines if "memory" in text or "gains nothing" in text]


def layers() -> nn.Module:
    return nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])


ADAM = {"optimizer": {"type": "AdamW"}}


def test_one_process_without_a_stage_is_told_nothing() -> None:
    assert said(layers(), ADAM) == []
    assert said(layers(), {"zero_optimization": {"stage": 1}}) == []  # nothing trains


def test_one_process_with_a_stage_is_told_what_all_of_it_takes() -> None:
    expected = "memory per process for weights, gradients and AdamW's state: 256 KiB"
    assert said(layers(), {**ADAM, "zero_optimization": {"stage": 2}}) == [expected]
    with torch.device("meta"):
        blank = layers()
    assert said(blank, {**ADAM, "zero_optimization": {"stage": 3}}) == [expected]


def told() -> list[list[str]]:
    zero = {"zero": {"smallest_block": 1}}
    own = type("Own", (torch.optim.Optimizer,), {"step": lambda self: None})
    return [
        said(layers(), {**ADAM, "redline": zero}),
        said(layers(), {**ADAM, "zero_optimization": {"stage": 3}, "redline": zero}),
        said(layers(), {**ADAM, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "redline": zero}),
        said(
            layers().bfloat16(),
            {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4, "redline": zero},
            optimizer=lambda parameters: own(parameters, {"lr": 0.1}),
        ),
    ]


def test_several_processes_are_told_what_each_stage_takes_the_one_in_force_first() -> None:
    (plain, shared, low, own), other = run_ranks(told, 2)
    assert other == [[], [], [], []]  # rank zero speaks
    begin = "memory per process for weights, gradients and"
    assert plain == [f"{begin} AdamW's state: 256 KiB at stage 0; 224 KiB at 1 and 2, 160 KiB at 3"]
    assert shared[0] == f"{begin} AdamW's state: 160 KiB at stage 3; 256 KiB at 0, 224 KiB at 1 and 2"
    assert low[0] == f"{begin} AdamW's state: 160 KiB at stage 2; 288 KiB at 0, 136 KiB at 3"
    assert shared[1].startswith("zero_optimization.stage 3 gains nothing for this model: stage 0 takes 256 KiB of the ")
    assert own[0].startswith(f"{begin} Own's state (taken for 4 bytes a weight): 176 KiB at stage 1; 128 KiB at 0")
    assert own[1] == (
        "zero_optimization.stage 1 gains nothing for this model: "
        "stage 0 takes 128 KiB of each process's memory, this one 176 KiB"
    )


# -- the verdict -------------------------------------------------------------------------------------------------


def needs(*gib: int) -> dict[int, Held]:
    return {stage: Held(0, 0, 0, each * GIB) for stage, each in enumerate(gib)}


@pytest.mark.parametrize(
    ("stage", "room", "why"),
    [
        (0, 80, None),
        (1, 80, None),
        (3, 80, None),
        (3, 241, "stage 2 takes 24 GiB of the 241 GiB that each process has"),
        (3, 1000, "stage 0 takes 64 GiB of the 1000 GiB that each process has"),
        (2, 640, "stage 0 takes 64 GiB of the 640 GiB that each process has"),
        (2, 639, None),
        (2, None, None),
    ],
)
def test_a_stage_gains_nothing_where_a_smaller_one_takes_a_tenth_of_the_memory(
    stage: int, room: int | None, why: str | None
) -> None:
    found = verdict(stage, needs(64, 24, 24, 16), None if room is None else room * GIB)
    assert found == (why and f"zero_optimization.stage {stage} gains nothing for this model: {why}")


def test_a_stage_gains_nothing_where_it_takes_more() -> None:
    assert verdict(2, needs(8, 9, 9, 4), None) == (
        "zero_optimization.stage 2 gains nothing for this model: "
        "stage 0 takes 8 GiB of each process's memory, this one 9 GiB"
    )
    assert verdict(3, needs(8, 9, 9, 4), None) is None


def test_a_model_of_seven_billion_parameters_on_eight_gpus_gains() -> None:
    billion = 1_000_000_000
    seven = estimate(Elements(7 * billion, rest=billion // 4, largest=billion // 5), Bytes(computed=2), 8)
    assert [round(each.most / GIB) for each in seven.values()] == [117, 36, 36, 15]
    assert all(verdict(stage, seven, 80 * GIB) is None for stage in (1, 2, 3))
