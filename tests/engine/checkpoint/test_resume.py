"""A run that is cut in two is the run that is not: bit for bit, or on other processes to a rounding."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.resume import CASES, Case, build, run, trained

STEPS, CUT = 5, 2


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_cut_in_two_is_the_run_that_is_not(case: str, tmp_path: Path) -> None:
    whole = run(CASES[case], STEPS)
    run(CASES[case], CUT, save=tmp_path)
    cut = run(CASES[case], STEPS - CUT, load=tmp_path)
    assert cut.updates == whole.last(STEPS - CUT).updates
    assert cut.left == whole.left


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_saving_changes_nothing_in_the_run_that_goes_on(background: bool, tmp_path: Path) -> None:
    case = CASES["fp32, AdamW, OneCycle, accumulation 4"]
    saving = run(case, STEPS, often=tmp_path, redline={"checkpoint": {"async_save": background}})
    assert saving == run(case, STEPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"global_step{n + 1}" for n in range(STEPS)),
        "latest",
    ]


# Which stages each case is tried at on two processes; all pass at all.
STAGES = {
    "fp32, AdamW, OneCycle, 2 workers, accumulation 4": (0, 3),
    "fp32, AdamW, OneCycle, accumulation 4": (1, 2, 3),
    "bf16, AdamW, WarmupLR, accumulation 4": (0, 1, 2, 3),
    "fp16 with skipped updates, SGD, OneCycle": (0, 1, 2, 3),
    "fp32, Adagrad, a script's schedule and groups": (0, 1),
    "fp32, Lamb, StepLR": (0, 2),
    "bf16 autocast, AMSGrad": (1, 3),
}


def cut_and_whole(folder: str, pairs: list[tuple[str, int]]) -> list[str]:
    """In which pairs of a case and a stage this process ends up elsewhere when it is interrupted."""
    # Workers are forked, as in a script; a spawned process would spawn them, and a daemon has none.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    wrong = []
    for case, stage in pairs:
        place = f"{folder}/{list(CASES).index(case)}-{stage}"
        sharded = {"zero_optimization": {"stage": stage}}
        whole = run(CASES[case], STEPS, **sharded)
        run(CASES[case], CUT, save=place, **sharded)
        cut = run(CASES[case], STEPS - CUT, load=place, **sharded)
        if cut != whole.last(STEPS - CUT):
            left = [key for key in whole.left if cut.left[key] != whole.left[key]]
            wrong.append(f"{case}, stage {stage}: {left}; {cut.updates} instead of {whole.last(STEPS - CUT).updates}")
    return wrong


def test_on_two_processes_a_run_that_is_cut_in_two_is_the_run_that_is_not(tmp_path: Path) -> None:
    pairs = [(case, stage) for case, stages in STAGES.items() for stage in stages]
    assert run_ranks(cut_and_whole, 2, str(tmp_path), pairs) == [[], []]


# -- on another number of processes ------------------------------------------------------------------

SAME = Case(  # on any number of processes, to a rounding
    {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.02, "cycle_first_step_size": 4},
        },
    },
    noise=0.0,
    drops=0.0,
    norm=False,
    samples=40,
)
LEG = 2  # updates on each number of processes


def leg(load: str | None, save: str, stage: int, steps: int = LEG) -> Any:
    """One part of a run: what each update was trained with, by rates and samples, and the weights that it left."""
    engine = build(SAME, zero_optimization={"stage": stage if stage else 0})
    if load is not None:
        assert engine.load_checkpoint(load)[0]
    updates = [(rate, sorted(seen)) for _, rate, _, seen in trained(engine, steps)]
    engine.save_checkpoint(save)
    engine.reshard()
    weights = {name: each.detach() for name, each in engine.module.named_parameters()}
    whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in weights.items()}
    return updates, {name: each.tolist() for name, each in whole.items()}


def cut_and_leg(folder: str, load: str, save: str) -> Any:
    """On four processes, where the order of a sum shows in its last bits: uninterrupted and cut, then one part."""
    wrong = cut_and_whole(folder, [("fp32, AdamW, OneCycle, accumulation 4", 0)])
    return wrong, leg(load, save, 3)


def together(answers: list[Any]) -> Any:
    """The answers of all processes as those of one."""
    updates = [
        (rates[0][0], sorted(index for _, seen in rates for index in seen))
        for rates in zip(*(updates for updates, _ in answers))
    ]
    return updates, answers[0][1]


def test_a_run_moves_from_one_process_to_four_to_two_to_one_and_from_stage_to_stage(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("one", "four", "two", "end", "whole")]
    whole, weights = leg(None, places[4], 0, steps=4 * LEG)
    updates = leg(None, places[0], 0)[0]
    four = run_ranks(cut_and_leg, 4, str(tmp_path), places[0], places[1])
    assert [wrong for wrong, _ in four] == [[]] * 4
    updates += together([answer for _, answer in four])[0]
    updates += together(run_ranks(leg, 2, places[1], places[2], 0))[0]
    last, left = leg(places[2], places[3], 0)
    assert updates + last == whole
    for name, values in left.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(weights[name]), rtol=2e-5, atol=2e-6)
