"""Records what real DeepSpeed does, as the numbers that the tests expect of this engine.

Writes ``tests/golden/schedules.json`` (every learning rate schedule, step by step, and every argument refused),
``tests/golden/training.json`` (short training runs through ``deepspeed.initialize`` on the CPU, in fp32),
``tests/golden/precision.json`` (the same in bf16 and fp16), ``tests/golden/sharding.json`` (ZeRO's stages on two and
four processes) and ``tests/golden/loss_scale.json``. The model, the data and the optimizers come from
``tests/golden/workload.py``, which the tests use too. Needs an environment with deepspeed==0.19.8 and torch; no other
part of this repository. Recording again on one machine gives the same bytes.

A schedule case is one constructor call and what follows it:

    schedule, args           the class of ``deepspeed.runtime.lr_schedules``, its arguments but the optimizer
    optimizer, its args,     the class of ``torch.optim`` and its parameter groups; with ``tensor_lr`` each group's
      groups, tensor_lr      ``lr`` is a float32 tensor without dimensions
    load                     n: ``load_state_dict({"last_batch_iteration": n})`` follows construction; null: nothing
    steps                    null: ``step()``; k: ``step(k)``
    trace, get_lr            the groups, and ``get_lr()``, after construction (and load) and after each step
    error                    the exception's type where construction refuses; the trace is then what it left behind

A training case is one run; ``loss`` is the mean over micro-batches and processes, ``lr`` and ``momentum`` (betas, or the
momentum of SGD) are what the update used, ``grad_norm`` is the norm of the averaged gradients before clipping. Some have

    model                    not the perceptron; see ``workload.build_model_of``
    backwards                micro-batches of each update, where the script decides (``managed_gradient_accumulation``)
    overflow                 the steps in which a gradient is not finite; see ``workload.loss_of``
    deepspeed                what DeepSpeed's config had besides: bf16 and fp16 are recorded at ZeRO stage 1, as at
                             stage 0 DeepSpeed runs an update while it is built, and forgets to scale fp16's loss

and in ``precision.json`` they record, after each step, ``skipped_steps`` (null with autocast, where DeepSpeed does not
count them) and ``loss_scale`` (null where fp16 is off); at the end ``distance``, how far all weights together have
gone, and ``error_at``, the step that found the loss scale at its floor, or null. The norm of a skipped step is null.
Where the loss scale grows, clipping is to less than half the norm: DeepSpeed divides the gradients of such a step by the
new scale, twice too much, and only clipping makes up for it. Torch's schedules are missing, as DeepSpeed refuses them beside ZeRO.

The cases of ``sharding.json`` have ``zero_optimization`` in their config, and at the end ``distance`` in every format. Of
the models ("odd", "tied", "frozen", "turns") and of ``groups``, the settings of two parameter groups, see ``workload``. A case
whose ``deepspeed`` names another stage than its config was recorded at that one, as DeepSpeed errs at its own:

    weights unused for a step      at stage 3 their gradient of the step before counts once more
    weights unused by one rank     at stages 1 and 2 the norm is another from the first step on, as if gradients of different
                                   weights were added up; at stage 3 the ranks gather different weights and break off
    a loss scale that grows        at stage 3 the norm of such a step is divided by the new scale

and some are missing, as DeepSpeed cannot be asked:

    gradient_allreduce_op "sum"    refused at stage 3
    prescale_gradients,            refused at stages 2 and 3 unless ``reduce_scatter`` is false; at stage 3 a factor equal to
    gradient_predivide_factor      the number of processes divides once more than it should, so that it is 4 of 2 here
    weights without a dimension    refused at every stage: DeepSpeed sends a model's bytes around, and they have none
    mics_shard_size                removed

A loss scale case is one ``DynamicLossScaler``, told of an overflow ("1") or of none ("0") update after update: ``scales``
after each, and ``error``, whether the last one found the scale at its floor.
"""

# ruff: noqa: E501  (the cases are tables, one line each)

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.distributed import run_ranks  # noqa: E402
from tests.golden import workload  # noqa: E402

DEEPSPEED_VERSION = "0.19.8"
Case = dict[str, Any]

SGD = {"optimizer": "SGD", "optimizer_args": {"momentum": 0.9}}
ADAM = {"optimizer": "Adam", "optimizer_args": {}}
ADAMW = {"optimizer": "AdamW", "optimizer_args": {"betas": {"tuple": [0.85, 0.995]}}}
TWO_GROUPS = {"groups": [{"lr": 0.1}, {"lr": 0.003}]}
TENSOR = {"tensor_lr": True}
TUTORIAL_STEPS = [0, 1, 199, 200, 201, 399, 400, 1999, 2000, 2001]


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def schedule_case(
    name: str, schedule: str, args: dict[str, Any], /, steps: int | list[int | None] = 12, **given: Any
) -> Case:
    """One case; what is not given is SGD with momentum, one group at 0.1, no load, 12 calls of ``step()``."""
    case = {
        "name": name,
        "schedule": schedule,
        **SGD,
        "groups": [{"lr": 0.1}],
        "tensor_lr": False,
        "args": args,
        "load": None,
        "steps": [None] * steps if isinstance(steps, int) else steps,
    }
    unknown = given.keys() - case.keys()
    assert not unknown, unknown
    return {**case, **given}


# fmt: off
def range_test_cases() -> list[Case]:
    def case(name: str, /, steps: int | list[int | None] = 12, *, over: Case | None = None, **args: Any) -> Case:
        full = {key if key == "last_batch_iteration" else f"lr_range_test_{key}": v for key, v in args.items()}
        return schedule_case(f"range-test-{name}", "LRRangeTest", full, steps, **(over or {}))

    tutorial = {"min_lr": 1e-4, "step_size": 200, "step_rate": 5}
    return [
        case("defaults"),
        case("continuous-size-1", min_lr=0.01, step_size=1, step_rate=0.1),
        case("continuous-size-5", min_lr=0.01, step_size=5, step_rate=0.3),
        case("continuous-size-200", min_lr=1e-5, step_size=200, step_rate=5.0),
        case("staircase-size-1", min_lr=0.01, step_size=1, step_rate=0.1, staircase=True),
        case("staircase-size-5", min_lr=0.01, step_size=5, step_rate=0.3, staircase=True),
        case("staircase-size-200", [198, 199, 200, 398, 399, 400], min_lr=1e-5, step_size=200, step_rate=5.0, staircase=True),
        case("tutorial", TUTORIAL_STEPS, **tutorial),
        case("tutorial-staircase", TUTORIAL_STEPS, **tutorial, staircase=True),
        case("list-per-group", min_lr=[0.01, 0.0007], step_size=5, over=TWO_GROUPS),
        case("tuple-per-group", min_lr={"tuple": [0.01, 0.0007]}, step_size=5, staircase=True, over=TWO_GROUPS),
        case("one-value-for-two-groups", min_lr=0.01, step_size=5, over=TWO_GROUPS),
        case("list-of-one", min_lr=[0.02], step_size=3),
        case("adam", min_lr=0.01, step_size=5, over=ADAM),
        case("tensor-lr", min_lr=0.01, step_size=5, step_rate=0.3, over=TENSOR),
        case("tensor-lr-staircase-two-groups", min_lr=[0.01, 0.0007], step_size=5, staircase=True, over={**TENSOR, **TWO_GROUPS, **ADAM}),
        case("load-7", 6, min_lr=0.01, step_size=5, over={"load": 7}),
        case("load-minus-1", 6, min_lr=0.01, step_size=5, over={"load": -1}),
        case("load-0-tensor-lr", 6, min_lr=0.01, step_size=5, over={"load": 0, **TENSOR}),
        case("last-batch-iteration-9", 6, min_lr=0.01, step_size=5, last_batch_iteration=9),
        case("last-batch-iteration-0-tensor-lr", 6, min_lr=0.01, step_size=5, last_batch_iteration=0, over=TENSOR),
        case("explicit-steps", [3, None, None, 0, -1, None, 100, None], min_lr=0.01, step_size=5),
        case("explicit-steps-staircase", [3, 4, None, 0, -1, None, 100, None], min_lr=0.01, step_size=5, staircase=True),
        case("rate-0", 4, min_lr=0.01, step_rate=0.0),
        case("rate-negative-passes-through-0", 12, min_lr=0.01, step_size=5, step_rate=-1.0),
        case("min-lr-0", 4, min_lr=0.0, step_size=1),
        case("min-lr-negative", 4, min_lr=-0.01, step_size=1),
        case("min-lr-integer", 4, min_lr=1, step_size=4),
        case("step-size-true-counts-as-1", 4, min_lr=0.01, step_size=True),
        case("staircase-integer-1", 6, min_lr=0.01, step_size=4, staircase=1),
        # Refused.
        case("refused-list-too-long", min_lr=[0.01, 0.02]),
        case("refused-list-too-short", min_lr=[0.01], over=TWO_GROUPS),
        case("refused-list-empty", min_lr=[]),
        case("refused-tuple-too-long", min_lr={"tuple": [0.01, 0.02]}),
        case("refused-step-size-0", step_size=0),
        case("refused-step-size-negative", step_size=-5),
        case("refused-step-size-float", step_size=200.0),
        case("refused-step-size-string", step_size="200"),
        case("refused-step-size-null", step_size=None),
        case("refused-step-size-false", step_size=False),
        case("refused-step-size-0-tensor-lr", step_size=0, over=TENSOR),
        case("refused-unknown-argument", max_lr=1.0),
    ]


def one_cycle_cases() -> list[Case]:
    def case(name: str, /, steps: int | list[int | None] = 16, *, over: Case = ADAM, **args: Any) -> Case:
        return schedule_case(f"one-cycle-{name}", "OneCycle", args, steps, **(over or {}))

    low_high = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}
    ten = {**low_high, "cycle_first_step_size": 5}
    lopsided = {**low_high, "cycle_first_step_size": 3, "cycle_second_step_size": 7}
    decay = {**ten, "decay_step_size": 3, "decay_lr_rate": 0.5, "decay_mom_rate": 0.1}
    tutorial = {"cycle_min_lr": 0.002, "cycle_max_lr": 0.005, "cycle_first_step_size": 2000, "cycle_second_step_size": 2000}
    lists = {
        "cycle_min_lr": [0.01, 0.002], "cycle_max_lr": [0.1, 0.05], "cycle_min_mom": [0.7, 0.85],
        "cycle_max_mom": [0.95, 0.9], "cycle_first_step_size": 4, "cycle_second_step_size": 6,
    }
    bad_moms = {**ten, "cycle_min_mom": 0.6, "cycle_max_mom": 0.7}
    seen = [0, 1, 999, 1000, 1998, 1999, 2000, 2999, 3998, 3999, 4000, 4001, 6000]
    return [
        case("defaults", [None, None, 998, 999, 1000, 1998, 1999, 2000, 3998, 3999, 4000, 5000], **low_high),
        case("second-size-null", **ten, cycle_second_step_size=None),
        case("equal-sizes", **ten, cycle_second_step_size=5),
        case("short-first", **lopsided),
        case("long-first", **low_high, cycle_first_step_size=7, cycle_second_step_size=3),
        case("second-size-0", 10, **low_high, cycle_first_step_size=6, cycle_second_step_size=0),
        case("second-size-0-with-stairs", 10, **low_high, cycle_first_step_size=6, cycle_second_step_size=0, cycle_first_stair_count=3),
        case("sizes-of-1", 6, **low_high, cycle_first_step_size=1, cycle_second_step_size=1),
        case("thirds", 14, **low_high, cycle_first_step_size=3, cycle_second_step_size=9),
        case("size-49", 110, **low_high, cycle_first_step_size=49, over=SGD),
        case("tutorial", seen, **tutorial),
        case("tutorial-decay", seen, **tutorial, decay_step_size=1000, decay_lr_rate=0.001, decay_mom_rate=0.001),
        case("stairs-both", **ten, cycle_first_stair_count=2),
        case("stairs-5-of-5", **ten, cycle_first_stair_count=5, cycle_second_stair_count=5),
        case("stairs-different", **low_high, cycle_first_step_size=8, cycle_first_stair_count=4, cycle_second_stair_count=2, steps=20),
        case("stairs-first-only", **ten, cycle_first_stair_count=3, cycle_second_stair_count=0),
        case("stairs-second-only", **ten, cycle_second_stair_count=3),
        case("stairs-lopsided", **lopsided, cycle_first_stair_count=3, cycle_second_stair_count=3),
        case("stairs-lopsided-49-50", 105, **low_high, cycle_first_step_size=49, cycle_second_step_size=50, cycle_first_stair_count=7, over=SGD),
        case("stairs-more-than-steps", **ten, cycle_first_stair_count=10),
        case("decay-both", 24, **decay),
        case("decay-lr-only", 24, **ten, decay_step_size=3, decay_lr_rate=0.5),
        case("decay-momentum-only", 24, **ten, decay_step_size=3, decay_mom_rate=0.1),
        case("decay-step-size-1", 24, **{**decay, "decay_step_size": 1}),
        case("decay-step-size-0-means-none", 24, **{**decay, "decay_step_size": 0}),
        case("decay-rate-without-step-size", 24, **ten, decay_lr_rate=0.5, decay_mom_rate=0.1),
        case("decay-step-size-without-rate", 14, **ten, decay_step_size=3),
        case("decay-step-size-float", 14, **{**decay, "decay_step_size": 2.5}),
        case("decay-rate-negative", 14, **{**decay, "decay_lr_rate": -0.05, "decay_mom_rate": -0.05}),
        case("decay-step-size-negative", 14, **{**decay, "decay_step_size": -30}),
        case("decay-rate-tiny-still-decays", 14, **{**decay, "decay_lr_rate": 1e-12, "decay_mom_rate": 1e-12}),
        case("decay-lopsided-stairs", 16, **lopsided, cycle_first_stair_count=2, decay_step_size=2, decay_lr_rate=0.1, decay_mom_rate=0.05),
        case("lists-per-group", over={**ADAM, **TWO_GROUPS}, **lists),
        case("lists-per-group-decay", 20, over={**ADAM, **TWO_GROUPS}, **lists, decay_step_size=1, decay_lr_rate=0.2, decay_mom_rate=0.01),
        case("tuples-per-group", 12, over={**ADAM, **TWO_GROUPS}, **{**lists, "cycle_min_lr": {"tuple": [0.01, 0.002]}, "cycle_min_mom": {"tuple": [0.7, 0.85]}}),
        case("one-value-for-two-groups", 12, over={**ADAMW, **TWO_GROUPS}, **ten),
        case("groups-with-own-betas", 12, over={**ADAM, "groups": [{"lr": 0.1, "betas": {"tuple": [0.5, 0.9]}}, {"lr": 0.2}]}, **ten),
        case("groups-with-own-betas-no-momentum-cycle", 4, over={**ADAM, "groups": [{"lr": 0.1, "betas": {"tuple": [0.5, 0.9]}}, {"lr": 0.2}]}, **ten, cycle_momentum=False),
        case("no-momentum-cycle", **ten, cycle_momentum=False),
        case("no-momentum-cycle-decay", 16, **decay, cycle_momentum=False),
        case("no-momentum-cycle-ignores-its-bounds", 4, **ten, cycle_momentum=False, cycle_min_mom=[0.1, 0.2, 0.3]),
        case("momentum-bounds", **ten, cycle_min_mom=0.6, cycle_max_mom=0.7),
        case("momentum-min-above-max", **ten, cycle_min_mom=0.95, cycle_max_mom=0.8),
        case("adamw", over=ADAMW, **ten),
        case("radam", 6, over={"optimizer": "RAdam", "optimizer_args": {}}, **ten),
        case("sgd-keeps-its-momentum", over=SGD, **ten),
        case("sgd-decay", 24, over=SGD, **decay),
        case("sgd-without-momentum", 6, over={**SGD, "optimizer_args": {}}, **ten),
        case("rmsprop-keeps-its-momentum", 6, over={"optimizer": "RMSprop", "optimizer_args": {"momentum": 0.5}}, **ten),
        case("adagrad-has-no-momentum", 6, over={"optimizer": "Adagrad", "optimizer_args": {}}, **ten),
        case("tensor-lr", 14, over={**ADAM, **TENSOR}, **decay),
        case("tensor-lr-sgd-two-groups", 14, over={**SGD, **TENSOR, **TWO_GROUPS}, **ten),
        case("tensor-lr-stairs", 12, over={**ADAMW, **TENSOR}, **ten, cycle_first_stair_count=2),
        case("load-minus-1", 3, over={**ADAM, "load": -1}, **ten),
        case("load-0", 3, over={**ADAM, "load": 0}, **ten),
        case("load-at-the-peak", 3, over={**ADAM, "load": 4}, **ten),
        case("load-at-the-end", 3, over={**ADAM, "load": 9}, **decay),
        case("load-past-the-end", 3, over={**ADAM, "load": 30}, **decay),
        case("load-tensor-lr", 3, over={**ADAM, **TENSOR, "load": 6}, **ten),
        case("last-batch-iteration-2", 5, **ten, last_batch_iteration=2),
        case("last-batch-iteration-past-the-end", 3, **decay, last_batch_iteration=20),
        case("explicit-steps", [3, None, 4, 5, 0, -1, None, 8, 9, 10, 11, 100, None], **decay),
        case("min-lr-above-max", **{**ten, "cycle_min_lr": 0.2}),
        case("min-lr-equals-max", 8, **{**ten, "cycle_min_lr": 0.1}),
        case("min-lr-0", 8, **{**ten, "cycle_min_lr": 0.0}),
        case("integer-lrs", 8, **{**ten, "cycle_min_lr": 1, "cycle_max_lr": 3}),
        case("first-size-fractional", **low_high, cycle_first_step_size=2.5),
        case("sizes-fractional", **low_high, cycle_first_step_size=2.5, cycle_second_step_size=4.25, cycle_first_stair_count=2),
        case("first-size-numeric-string", 8, **low_high, cycle_first_step_size="3"),
        case("first-size-true-counts-as-1", 4, **low_high, cycle_first_step_size=True),
        case("stair-count-fractional", **ten, cycle_first_stair_count=2.5),
        case("stair-count-negative-means-none", **ten, cycle_first_stair_count=-1),
        # Refused.
        case("refused-first-size-0", **low_high, cycle_first_step_size=0),
        case("refused-first-size-negative", **low_high, cycle_first_step_size=-1),
        case("refused-first-size-null", **low_high, cycle_first_step_size=None),
        case("refused-first-size-word", **low_high, cycle_first_step_size="ten"),
        case("refused-first-size-list", **low_high, cycle_first_step_size=[5]),
        case("refused-second-size-negative", **ten, cycle_second_step_size=-1),
        case("refused-second-size-word", **ten, cycle_second_step_size="ten"),
        case("refused-min-lr-list-too-long", **{**ten, "cycle_min_lr": [0.01, 0.02]}),
        case("refused-min-lr-list-too-short", over={**ADAM, **TWO_GROUPS}, **{**ten, "cycle_min_lr": [0.01]}),
        case("refused-max-lr-list-too-long", **{**ten, "cycle_max_lr": [0.1, 0.2]}),
        case("refused-max-lr-tuple-too-long", **{**ten, "cycle_max_lr": {"tuple": [0.1, 0.2]}}),
        case("refused-min-mom-list-too-long", **{**bad_moms, "cycle_min_mom": [0.6, 0.6]}),
        case("refused-max-mom-list-too-long", **{**bad_moms, "cycle_max_mom": [0.7, 0.7]}),
        case("refused-max-mom-list-too-short-tensor-lr", over={**ADAM, **TENSOR, **TWO_GROUPS}, **{**bad_moms, "cycle_max_mom": [0.7]}),
        case("refused-decay-step-size-null", **ten, decay_step_size=None),
        case("refused-decay-step-size-string", **ten, decay_step_size="3"),
        case("refused-decay-lr-rate-null", **ten, decay_lr_rate=None),
        case("refused-decay-mom-rate-null", **ten, decay_mom_rate=None),
        case("refused-without-max-lr", cycle_min_lr=0.01),
        case("refused-without-bounds", cycle_first_step_size=5),
        case("refused-unknown-argument", **ten, cycle_mid_lr=0.05),
    ]


def warmup_cases() -> list[Case]:
    def case(name: str, schedule: str, /, steps: int | list[int | None] = 12, *, over: Case | None = None, **args: Any) -> Case:
        return schedule_case(name, schedule, args, steps, **(over or {}))

    def short(args: dict[str, Any]) -> dict[str, Any]:
        return {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, **args}

    cases: list[Case] = []
    for kind in ("log", "linear"):
        for num in (1, 2, 5, 10):
            given = {"warmup_num_steps": num, "warmup_type": kind}
            cases += [
                case(f"warmup-{kind}-{num}", "WarmupLR", num + 3, **short(given)),
                case(f"warmup-decay-{kind}-{num}", "WarmupDecayLR", 17, total_num_steps=13, **short(given)),
                case(f"warmup-cosine-{kind}-{num}", "WarmupCosineLR", 17, total_num_steps=13, warmup_min_ratio=0.05, cos_min_ratio=0.1, **given),
            ]
    five = {"warmup_num_steps": 5}
    lists = {"warmup_min_lr": [0.001, 0.0], "warmup_max_lr": [0.2, 0.05], **five}
    for name, schedule, total in (
        ("warmup", "WarmupLR", {}),
        ("warmup-decay", "WarmupDecayLR", {"total_num_steps": 9}),
    ):
        cases += [
            case(f"{name}-defaults", schedule, [None, None, 9, 10, 500, 998, 999, 1000, 1001], **total),
            case(f"{name}-max-lr-null-takes-the-groups-own", schedule, 8, over=TWO_GROUPS, **total, **five, warmup_max_lr=None),
            case(f"{name}-max-lr-null-tensor-lr", schedule, 8, over={**TWO_GROUPS, **TENSOR}, **total, **five, warmup_max_lr=None),
            case(f"{name}-max-lr-null-min-lr-tensor-lr", schedule, 8, over=TENSOR, **total, **five, warmup_max_lr=None, warmup_min_lr=0.03),
            case(f"{name}-max-lr-null-linear-tensor-lr", schedule, 8, over={**TENSOR, **ADAMW}, **total, **five, warmup_max_lr=None, warmup_type="linear"),
            case(f"{name}-tensor-lr", schedule, 8, over=TENSOR, **total, **short(five)),
            case(f"{name}-lists-per-group", schedule, 12, over=TWO_GROUPS, **total, **lists),
            case(f"{name}-tuple-and-scalar", schedule, 12, over=TWO_GROUPS, **total, **{**lists, "warmup_max_lr": {"tuple": [0.2, 0.05]}, "warmup_min_lr": 0.002}),
            case(f"{name}-lists-per-group-tensor-lr", schedule, 8, over={**TWO_GROUPS, **TENSOR}, **total, **lists),
            case(f"{name}-min-lr-above-max", schedule, 8, **total, **five, warmup_min_lr=0.3, warmup_max_lr=0.1),
            case(f"{name}-max-lr-0", schedule, 8, **total, **five, warmup_min_lr=0.3, warmup_max_lr=0.0),
            case(f"{name}-integer-lrs", schedule, 8, **total, **five, warmup_min_lr=0, warmup_max_lr=1),
            case(f"{name}-unknown-type-is-log", schedule, 8, **total, **short(five), warmup_type="cosine"),
            case(f"{name}-type-null-is-log", schedule, 8, **total, **short(five), warmup_type=None),
            case(f"{name}-num-steps-true-counts-as-2", schedule, 5, **total, **short({"warmup_num_steps": True})),
            case(f"{name}-adam-keeps-its-betas", schedule, 4, over=ADAM, **total, **short(five)),
            case(f"{name}-load-minus-1", schedule, 3, over={"load": -1}, **total, **short(five)),
            case(f"{name}-load-2", schedule, 5, over={"load": 2}, **total, **short(five)),
            case(f"{name}-load-past-the-end", schedule, 3, over={"load": 40}, **total, **short(five)),
            case(f"{name}-load-3-tensor-lr", schedule, 4, over={"load": 3, **TENSOR}, **total, **five, warmup_max_lr=None),
            case(f"{name}-last-batch-iteration-3", schedule, 5, **total, **short(five), last_batch_iteration=3),
            case(f"{name}-last-batch-iteration-3-max-lr-null", schedule, 5, **total, **five, warmup_max_lr=None, last_batch_iteration=3),
            case(f"{name}-last-batch-iteration-3-max-lr-null-tensor-lr", schedule, 5, over=TENSOR, **total, **five, warmup_max_lr=None, last_batch_iteration=3),
            case(f"{name}-explicit-steps", schedule, [3, None, 4, 5, 0, -1, None, 8, 9, 100, None], **total, **short(five)),
            case(f"{name}-refused-num-steps-0", schedule, **total, warmup_num_steps=0),
            case(f"{name}-refused-num-steps-negative", schedule, **total, warmup_num_steps=-1),
            case(f"{name}-refused-num-steps-float", schedule, **total, warmup_num_steps=10.0),
            case(f"{name}-refused-num-steps-string", schedule, **total, warmup_num_steps="10"),
            case(f"{name}-refused-num-steps-null", schedule, **total, warmup_num_steps=None),
            case(f"{name}-refused-num-steps-false", schedule, **total, warmup_num_steps=False),
            case(f"{name}-refused-min-lr-list-too-long", schedule, **total, **five, warmup_min_lr=[0.0, 0.0]),
            case(f"{name}-refused-max-lr-list-too-long", schedule, **total, **five, warmup_max_lr=[0.1, 0.1]),
            case(f"{name}-refused-max-lr-list-too-short", schedule, over=TWO_GROUPS, **total, **five, warmup_max_lr=[0.1]),
            case(f"{name}-refused-max-lr-string", schedule, **total, **five, warmup_max_lr="0.1"),
            case(f"{name}-refused-min-lr-null", schedule, **total, **five, warmup_min_lr=None),
            case(f"{name}-refused-type-list", schedule, **total, **five, warmup_type=["log"]),
            case(f"{name}-refused-unknown-argument", schedule, **total, **five, max_lr=0.1),
        ]

    decay = short(five)
    cases += [
        case("warmup-decay-max-lr-absent-is-0.001", "WarmupDecayLR", 12, over=TWO_GROUPS, total_num_steps=9, **five),
        case("warmup-decay-total-below-warmup", "WarmupDecayLR", 9, total_num_steps=3, **decay),
        case("warmup-decay-total-equals-warmup", "WarmupDecayLR", 9, total_num_steps=5, **decay),
        case("warmup-decay-total-one-past-warmup", "WarmupDecayLR", 9, total_num_steps=6, **decay),
        case("warmup-decay-total-0", "WarmupDecayLR", 8, total_num_steps=0, **decay),
        case("warmup-decay-total-negative", "WarmupDecayLR", 8, total_num_steps=-4, **decay),
        case("warmup-decay-total-fractional", "WarmupDecayLR", 12, total_num_steps=9.5, **decay),
        case("warmup-decay-refused-total-null", "WarmupDecayLR", total_num_steps=None, **decay),
        case("warmup-decay-refused-total-string", "WarmupDecayLR", total_num_steps="9", **decay),
        case("warmup-decay-refused-without-total", "WarmupDecayLR", **decay),
    ]

    def cosine(name: str, /, steps: int | list[int | None] = 12, *, over: Case | None = None, **args: Any) -> Case:
        given = {"total_num_steps": 9, **five, **args}
        return case(f"warmup-cosine-{name}", "WarmupCosineLR", steps, over=over, **given)

    cases += [
        case("warmup-cosine-defaults", "WarmupCosineLR", [None, None, 500, 998, 999, 1000, 1500, 1998, 1999, 2000], total_num_steps=2000),
        cosine("cos-min-ratio-0", 8, cos_min_ratio=0),
        cosine("cos-min-ratio-0.1", 12, cos_min_ratio=0.1),
        cosine("cos-min-ratio-1", 12, cos_min_ratio=1.0),
        cosine("cos-min-ratio-above-1", 12, cos_min_ratio=1.5),
        cosine("cos-min-ratio-negative-stops-at-0", 12, cos_min_ratio=-0.5),
        cosine("min-ratio-0.2", 8, warmup_min_ratio=0.2),
        cosine("min-ratio-above-1", 8, warmup_min_ratio=1.5, warmup_type="linear"),
        cosine("groups-keep-their-ratio", 12, over=TWO_GROUPS, warmup_min_ratio=0.1),
        cosine("tensor-lr", 12, over=TENSOR, warmup_min_ratio=0.1),
        cosine("tensor-lr-linear-two-groups", 12, over={**TENSOR, **TWO_GROUPS, **ADAMW}, warmup_type="linear"),
        cosine("adam-keeps-its-betas", 4, over=ADAM),
        cosine("total-below-warmup", 9, total_num_steps=3),
        cosine("total-equals-warmup", 9, total_num_steps=5),
        cosine("total-one-past-warmup", 9, total_num_steps=6),
        cosine("total-0", 8, total_num_steps=0),
        cosine("total-negative", 8, total_num_steps=-4),
        cosine("total-fractional", 12, total_num_steps=9.5),
        cosine("unknown-type-is-log", 8, warmup_type="cosine"),
        cosine("num-steps-true-counts-as-2", 8, warmup_num_steps=True),
        cosine("load-minus-1", 3, over={"load": -1}),
        cosine("load-2", 5, over={"load": 2}),
        cosine("load-past-the-end", 3, over={"load": 40}),
        cosine("load-6-tensor-lr", 3, over={"load": 6, **TENSOR}),
        cosine("last-batch-iteration-3", 5, last_batch_iteration=3),
        cosine("last-batch-iteration-3-tensor-lr", 5, over=TENSOR, last_batch_iteration=3),
        cosine("explicit-steps", [3, None, 4, 5, 0, -1, None, 8, 9, 100, None]),
        cosine("refused-num-steps-0", warmup_num_steps=0),
        cosine("refused-num-steps-negative", warmup_num_steps=-1),
        cosine("refused-num-steps-float", warmup_num_steps=5.0),
        cosine("refused-num-steps-string", warmup_num_steps="5"),
        cosine("refused-num-steps-null", warmup_num_steps=None),
        cosine("refused-type-list", warmup_type=["log"]),
        cosine("refused-total-null", total_num_steps=None),
        cosine("refused-total-string", total_num_steps="9"),
        cosine("refused-max-lr", warmup_max_lr=0.1),
        cosine("refused-min-lr", warmup_min_lr=0.0),
        case("warmup-cosine-refused-without-total", "WarmupCosineLR", **five),
    ]
    return cases


# fmt: on
def record_schedule(case: Case) -> Case:
    """The case with what DeepSpeed did: ``trace``, ``get_lr`` and ``error``."""
    from deepspeed.runtime import lr_schedules

    optimizer = workload.build_optimizer(case)
    try:
        schedule = getattr(lr_schedules, case["schedule"])(optimizer, **workload.decode(case["args"]))
    except Exception as error:
        return {
            **case,
            "steps": [],
            "trace": [workload.snapshot(optimizer)],
            "get_lr": [],
            "error": type(error).__name__,
        }
    if case["load"] is not None:
        schedule.load_state_dict({"last_batch_iteration": case["load"]})
    trace = [workload.snapshot(optimizer)]
    rates = [[float(lr) for lr in schedule.get_lr()]]
    for step in case["steps"]:
        schedule.step() if step is None else schedule.step(step)
        trace.append(workload.snapshot(optimizer))
        rates.append([float(lr) for lr in schedule.get_lr()])
    return {**case, "trace": trace, "get_lr": rates, "error": None}


# ---------------------------------------------------------------------------------------------------------------------
# Training

# A large eps and weight decay make Adam feel the size of its gradients: a clip left out or a wrong average shows.
ADAM_PARAMS = {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-3, "weight_decay": 0.1}
COARSE_ADAM = {**ADAM_PARAMS, "eps": 1e-2}  # where bf16's rounding would hide the rest
SGD_PARAMS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
ADAGRAD_PARAMS = {"lr": 0.05, "lr_decay": 0.02, "eps": 1e-3, "weight_decay": 0.02, "initial_accumulator_value": 0.1}
UNCORRECTED = {"bias_correction": False, "lr": 0.003}
RAMP = {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 5, "lr_range_test_step_rate": 3.0}
CYCLE = {"cycle_min_lr": 0.002, "cycle_max_lr": 0.03, "cycle_first_step_size": 8}
WARM = {"warmup_min_lr": 0.0005, "warmup_max_lr": 0.03, "warmup_num_steps": 6}
TOTAL = {"total_num_steps": 20}
# Each layer is gathered for itself, as DeepSpeed's stage 3 always does.
BLOCKS = {"redline": {"zero": {"smallest_block": 0}}}
# DeepSpeed wants to be told that SGD may be partitioned.
ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def training_case(
    name: str,
    optimizer: str,
    params: dict[str, Any],
    scheduler: str | None = None,
    scheduler_params: dict[str, Any] | None = None,
    /,
    *,
    processes: int = 1,
    clipping: float | None = None,
    accumulation: int = 1,
    batch: dict[str, int] | None = None,
    also: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    """One run; ``clipping`` None leaves the key out, ``batch`` replaces the two batch keys, ``also`` adds keys."""
    config: dict[str, Any] = batch or {
        "train_micro_batch_size_per_gpu": workload.MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
    }
    config["optimizer"] = {"type": optimizer, "params": params}
    if scheduler is not None:
        config["scheduler"] = {"type": scheduler, "params": scheduler_params or {}}
    if clipping is not None:
        config["gradient_clipping"] = clipping
    return {"name": name, "processes": processes, "accumulation": accumulation, "config": config | (also or {}), **rest}


# fmt: off
def training_cases() -> list[Case]:
    case = training_case
    adam, sgd = ADAM_PARAMS, SGD_PARAMS
    ramp, cycle, warm, total = RAMP, CYCLE, WARM, TOTAL
    tiny = {**ADAM_PARAMS, "eps": 1e-8, "weight_decay": 0.0}
    stairs = {"cycle_first_stair_count": 4, "decay_step_size": 2, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01}
    return [
        case("adam-is-adamw", "Adam", adam),
        case("adam-with-l2", "Adam", {**adam, "adam_w_mode": False}),
        case("adam-with-l2-no-clipping", "Adam", {**adam, "adam_w_mode": False}, clipping=0.0, accumulation=4),
        case("adam-by-torch", "Adam", {**adam, "torch_adam": True}, clipping=1.0),
        case("adam-loose-clipping", "Adam", adam, clipping=100.0),
        case("adam-small-eps", "Adam", tiny, clipping=1.0),
        case("adamw-tight-clipping", "AdamW", adam, clipping=0.05),
        case("adamw-accumulated", "AdamW", adam, accumulation=4),
        case("sgd-no-clipping", "SGD", sgd, clipping=0.0),
        case("sgd-tight-clipping", "SGD", sgd, clipping=0.05),
        case("sgd-clipping-absent", "SGD", sgd),
        case("sgd-nesterov-accumulated", "SGD", {**sgd, "nesterov": True}, clipping=1.0, accumulation=4),
        case("range-test-sgd-staircase", "SGD", sgd, "LRRangeTest", {**ramp, "lr_range_test_staircase": True}, clipping=0.0),
        case("range-test-adamw", "AdamW", adam, "LRRangeTest", ramp, clipping=1.0, accumulation=4),
        case("one-cycle-adam", "Adam", adam, "OneCycle", cycle, clipping=1.0),
        case("one-cycle-sgd", "SGD", sgd, "OneCycle", {**cycle, "cycle_second_step_size": 12}),
        case("one-cycle-stairs-and-decay", "AdamW", adam, "OneCycle", {**cycle, **stairs}, clipping=0.05, accumulation=4),
        case("warmup-adam", "Adam", adam, "WarmupLR", warm, clipping=1.0),
        case("warmup-to-the-optimizers-lr", "SGD", sgd, "WarmupLR", {"warmup_num_steps": 5, "warmup_type": "linear"}, clipping=0.0),
        case("warmup-decay-adamw", "AdamW", adam, "WarmupDecayLR", {**warm, **total}),
        case("warmup-cosine-adamw", "AdamW", adam, "WarmupCosineLR", {"warmup_num_steps": 6, **total}, clipping=1.0),
        case("torch-step-lr", "SGD", sgd, "StepLR", {"step_size": 8, "gamma": 0.5}, clipping=1.0),
        case("torch-step-lr-train-batch-given", "Adam", adam, "StepLR", {"step_size": 8}, accumulation=4, batch={"train_batch_size": 32, "gradient_accumulation_steps": 4}),
        case("two-adam-tight-clipping", "Adam", adam, processes=2, clipping=0.05),
        case("two-sgd-no-clipping", "SGD", sgd, processes=2, clipping=0.0),
        case("two-sgd-range-test", "SGD", sgd, "LRRangeTest", ramp, processes=2),
        case("two-sgd-warmup-decay-accumulated", "SGD", sgd, "WarmupDecayLR", {**warm, **total}, processes=2, clipping=1.0, accumulation=4),
        case("two-adamw-one-cycle-accumulated", "AdamW", adam, "OneCycle", cycle, processes=2, accumulation=4),
        case("two-adam-warmup-cosine-train-batch-given", "Adam", {**adam, "adam_w_mode": False}, "WarmupCosineLR", {"warmup_num_steps": 6, **total, "cos_min_ratio": 0.1}, processes=2, clipping=1.0, batch={"train_batch_size": 16}),
        *optimizer_cases(),
        *reduction_cases(),
        *unused_cases(),
        *unmanaged_cases(),
    ]


def optimizer_cases() -> list[Case]:
    case = training_case
    adam, sgd, adagrad = ADAM_PARAMS, SGD_PARAMS, ADAGRAD_PARAMS
    one_cycle = {"max_lr": 0.03, "total_steps": 30}
    return [
        case("adagrad", "Adagrad", adagrad, clipping=0.0),
        case("adagrad-tight-clipping-accumulated-by-2", "Adagrad", adagrad, clipping=0.05, accumulation=2),
        case("adagrad-warmup", "Adagrad", adagrad, "WarmupLR", WARM, clipping=1.0),
        case("adam-without-bias-correction", "Adam", {**adam, **UNCORRECTED}, clipping=1.0),
        case("adam-with-l2-without-bias-correction", "Adam", {**adam, **UNCORRECTED, "adam_w_mode": False}, clipping=0.0, accumulation=2),
        case("adam-with-l2-accumulated-by-2", "Adam", {**adam, "adam_w_mode": False}, clipping=1.0, accumulation=2),
        case("adamw-tight-clipping-accumulated-by-2", "AdamW", adam, clipping=0.05, accumulation=2),
        case("sgd-accumulated-by-2", "SGD", sgd, clipping=1.0, accumulation=2),
        case("torch-cosine-sgd", "SGD", sgd, "CosineAnnealingLR", {"T_max": 16, "eta_min": 0.001}, clipping=1.0, accumulation=2),
        case("torch-one-cycle-adamw", "AdamW", adam, "OneCycleLR", one_cycle, clipping=1.0),
        case("two-adagrad-accumulated", "Adagrad", adagrad, processes=2, clipping=1.0, accumulation=4),
        case("two-adamw-without-bias-correction", "AdamW", {**adam, **UNCORRECTED}, processes=2, clipping=1.0),
        case("two-torch-one-cycle-sgd", "SGD", sgd, "OneCycleLR", one_cycle, processes=2, clipping=1.0, accumulation=2),
    ]


def reduction_cases() -> list[Case]:
    case = training_case
    adam, sgd, adagrad = ADAM_PARAMS, SGD_PARAMS, ADAGRAD_PARAMS
    add, before = {"gradient_allreduce_op": "sum"}, {"prescale_gradients": True}

    def by(factor: float) -> dict[str, float]:
        return {"gradient_predivide_factor": factor}

    return [
        case("sum-of-one-process", "SGD", sgd, accumulation=2, clipping=0.0, also=add),
        case("prescale-of-one-process", "Adam", adam, clipping=1.0, also=before),
        case("predivide-of-one-process", "AdamW", adam, clipping=0.05, also=by(2.0)),
        case("two-sum-sgd-no-clipping", "SGD", {**sgd, "lr": 0.01}, processes=2, clipping=0.0, also=add),
        case("two-sum-adam-accumulated-by-2", "Adam", adam, processes=2, clipping=1.0, accumulation=2, also=add),
        case("two-sum-adagrad-warmup", "Adagrad", adagrad, "WarmupLR", WARM, processes=2, clipping=0.0, also=add),
        case("two-sum-outranks-prescale-and-predivide", "SGD", sgd, processes=2, clipping=100.0, also={**add, **before, **by(4.0)}),
        case("two-prescale-sgd", "SGD", sgd, processes=2, clipping=0.0, also=before),
        case("two-prescale-outranks-predivide", "Adam", adam, processes=2, clipping=1.0, accumulation=2, also={**before, **by(8.0)}),
        case("two-predivide-by-2-sgd", "SGD", sgd, processes=2, clipping=0.0, also=by(2.0)),
        case("two-predivide-by-4-adamw-accumulated", "AdamW", adam, processes=2, clipping=0.05, accumulation=4, also=by(4.0)),
    ]


def unused_cases() -> list[Case]:
    case = training_case
    adam, sgd, adagrad = ADAM_PARAMS, {**SGD_PARAMS, "weight_decay": 0.1}, ADAGRAD_PARAMS
    find = {"redline": {"find_unused_parameters": True}}
    return [
        case("unused-sgd", "SGD", sgd, clipping=0.0, model="turns"),
        case("unused-adam", "Adam", {**adam, "adam_w_mode": False}, clipping=1.0, model="turns"),
        case("unused-adamw-accumulated-by-2", "AdamW", adam, clipping=1.0, accumulation=2, model="turns"),
        case("unused-adagrad", "Adagrad", {**adagrad, "weight_decay": 0.2}, clipping=1.0, model="turns"),
        case("two-unused-sgd", "SGD", sgd, processes=2, clipping=0.0, model="turns", also=find),
        case("two-unused-adamw-accumulated-by-2", "AdamW", adam, processes=2, clipping=1.0, accumulation=2, model="turns", also=find),
        case("two-unused-by-one-rank-sgd", "SGD", sgd, processes=2, clipping=0.0, model="turns by rank", also=find),
        case("two-unused-by-one-rank-adam", "Adam", adam, processes=2, clipping=1.0, model="turns by rank", also=find),
    ]


def unmanaged_cases() -> list[Case]:
    def case(name: str, optimizer: str, params: dict[str, Any], backwards: list[int], **given: Any) -> Case:
        """At ZeRO stage 1, which tells the norm; the rest is stage 0's."""
        also = {"managed_gradient_accumulation": False}
        return training_case(f"unmanaged-{name}", optimizer, params, "WarmupLR", WARM, also=also, backwards=backwards, deepspeed=ZERO_1, **given)

    adam, sgd = ADAM_PARAMS, {**SGD_PARAMS, "lr": 0.01}
    return [
        case("sgd-sums-its-micro-batches", "SGD", sgd, [1, 3, 2], clipping=100.0),
        case("adam-divides-by-the-config", "Adam", adam, [2, 1, 4], clipping=1.0, accumulation=2),
        case("two-sgd", "SGD", sgd, [2, 1, 3], clipping=100.0, accumulation=2, processes=2),
    ]


def precision_cases() -> list[Case]:
    return [*bf16_cases(), *bf16_cases_of_two(), *autocast_cases(), *fp16_cases()]


def low_precision(prefix: str, section: dict[str, Any]) -> Any:
    """``training_case`` in a number format: the section, and ZeRO stage 1 to record at."""

    def case(name: str, optimizer: str, params: dict[str, Any], *schedule: Any, also: dict[str, Any] | None = None, **given: Any) -> Case:
        return training_case(f"{prefix}-{name}", optimizer, params, *schedule, also={**section, **(also or {})}, deepspeed=ZERO_1, **given)

    return case


def bf16_cases() -> list[Case]:
    case = low_precision("bf16", {"bf16": {"enabled": True}})
    adam, sgd, adagrad = COARSE_ADAM, SGD_PARAMS, ADAGRAD_PARAMS
    fp32 = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    all_bf16 = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    return [
        case("adam-is-adamw", "Adam", adam),
        case("adam-with-l2", "Adam", {**adam, "adam_w_mode": False}, clipping=1.0),
        case("adam-with-l2-accumulated-no-clipping", "Adam", {**adam, "adam_w_mode": False}, clipping=0.0, accumulation=4),
        case("adamw-tight-clipping-accumulated-by-2", "AdamW", adam, clipping=0.05, accumulation=2),
        case("sgd-no-clipping", "SGD", sgd, clipping=0.0),
        case("sgd-tight-clipping", "SGD", sgd, clipping=0.05),
        case("sgd-accumulated-by-2", "SGD", sgd, clipping=1.0, accumulation=2),
        case("adagrad", "Adagrad", adagrad, clipping=0.0),
        case("adagrad-tight-clipping-accumulated", "Adagrad", adagrad, clipping=0.05, accumulation=4),
        case("range-test-sgd", "SGD", sgd, "LRRangeTest", RAMP, clipping=0.0),
        case("one-cycle-adam", "Adam", adam, "OneCycle", CYCLE, clipping=1.0),
        case("warmup-adam-accumulated-by-2", "Adam", adam, "WarmupLR", WARM, clipping=1.0, accumulation=2),
        case("warmup-decay-adamw", "AdamW", adam, "WarmupDecayLR", {**WARM, **TOTAL}, clipping=1.0),
        case("warmup-cosine-sgd", "SGD", sgd, "WarmupCosineLR", {"warmup_num_steps": 6, **TOTAL}, clipping=1.0),
        case("overflow-adam", "Adam", adam, "WarmupLR", WARM, clipping=1.0, overflow=[0, 3, 4, 11]),
        case("overflow-sgd-no-clipping", "SGD", sgd, "OneCycle", CYCLE, clipping=0.0, accumulation=2, overflow=[2, 9]),
        case("fp32-accumulation-and-communication", "Adam", adam, clipping=1.0, accumulation=4, also=fp32),
        case("bf16-master-weights-and-moments", "Adam", adam, clipping=1.0, also=all_bf16),
        case("unused-sgd", "SGD", {**sgd, "weight_decay": 0.1}, clipping=0.0, model="turns"),
    ]


def bf16_cases_of_two() -> list[Case]:
    case = low_precision("bf16-two", {"bf16": {"enabled": True}})
    adam, sgd, adagrad = COARSE_ADAM, SGD_PARAMS, ADAGRAD_PARAMS
    add = {"gradient_allreduce_op": "sum"}
    fp32 = {"communication_data_type": "fp32"}
    return [
        case("adam-tight-clipping", "Adam", adam, processes=2, clipping=0.05),
        case("adamw-one-cycle-accumulated-by-2", "AdamW", adam, "OneCycle", CYCLE, processes=2, clipping=1.0, accumulation=2),
        case("sgd-no-clipping-accumulated", "SGD", sgd, processes=2, clipping=0.0, accumulation=4),
        case("adagrad-warmup", "Adagrad", adagrad, "WarmupLR", WARM, processes=2, clipping=1.0),
        case("sum-sgd-no-clipping", "SGD", {**sgd, "lr": 0.01}, processes=2, clipping=0.0, also=add),
        case("sum-adam-accumulated-by-2", "Adam", adam, processes=2, clipping=1.0, accumulation=2, also=add),
        case("prescale-sgd", "SGD", sgd, processes=2, clipping=0.0, also={"prescale_gradients": True}),
        case("predivide-adamw", "AdamW", adam, processes=2, clipping=0.05, also={"gradient_predivide_factor": 2.0}),
        case("fp32-communication", "SGD", sgd, processes=2, clipping=1.0, also=fp32),
        case("overflow-on-one-rank", "SGD", sgd, "WarmupDecayLR", {**WARM, **TOTAL}, processes=2, clipping=1.0, overflow=[1, 8, 9]),
    ]


def autocast_cases() -> list[Case]:
    """At stage 0, where weights and gradients are fp32's unless the config has bf16, too; the autocast is torch's own."""
    bf16, fp16 = ({"torch_autocast": {"enabled": True, "dtype": dtype}} for dtype in ("bfloat16", "float16"))
    return [
        training_case("autocast-bf16-adam", "Adam", COARSE_ADAM, clipping=1.0, also=bf16),
        training_case("autocast-bf16-two-sgd-accumulated-by-2", "SGD", SGD_PARAMS, "OneCycle", CYCLE, processes=2, clipping=1.0, accumulation=2, also=bf16),
        training_case("autocast-fp16-adam", "Adam", ADAM_PARAMS, clipping=1.0, also=fp16),
        low_precision("autocast-bf16-of-bf16", {"bf16": {"enabled": True}})("adam", "Adam", COARSE_ADAM, clipping=1.0, also=bf16),
    ]


def fp16_cases() -> list[Case]:
    adam, sgd = ADAM_PARAMS, SGD_PARAMS

    def case(name: str, optimizer: str, params: dict[str, Any], fp16: dict[str, Any], *schedule: Any, **given: Any) -> Case:
        return low_precision("fp16", {"fp16": {"enabled": True, **fp16}})(name, optimizer, params, *schedule, **given)

    def dynamic(name: str, overflow: list[int], *, window: int, hysteresis: int, power: int = 6, **fp16: Any) -> Case:
        section = {"initial_scale_power": power, "loss_scale_window": window, "hysteresis": hysteresis, **fp16}
        return case(name, "Adam", adam, section, "WarmupLR", WARM, clipping=0.5, overflow=overflow)

    eager = {"initial_scale_power": 5, "loss_scale_window": 3, "hysteresis": 1}
    add = {"gradient_allreduce_op": "sum"}
    return [
        case("static", "SGD", sgd, {"loss_scale": 8}, "WarmupLR", WARM, clipping=1.0, overflow=[2, 9, 10]),
        case("static-no-clipping", "Adam", adam, {"loss_scale": 128}, clipping=0.0, accumulation=2),
        case("static-1", "SGD", sgd, {"loss_scale": 1}, clipping=0.05),
        case("overflows-by-itself", "Adam", adam, {"initial_scale_power": 18}, clipping=1.0),
        case("window-1000-no-clipping", "SGD", sgd, {"initial_scale_power": 10}, "OneCycle", CYCLE, clipping=0.0, overflow=[4, 5, 6]),
        dynamic("window-2-hysteresis-1", [3, 4, 11], window=2, hysteresis=1),
        dynamic("window-2-hysteresis-2", [3, 4, 5, 11, 14], window=2, hysteresis=2),
        dynamic("window-2-hysteresis-2-consecutive", [3, 4, 5, 11, 14], window=2, hysteresis=2, consecutive_hysteresis=True),
        dynamic("window-3-hysteresis-2", [0, 1, 2, 8, 10, 12], window=3, hysteresis=2),
        dynamic("window-3-hysteresis-2-consecutive", [0, 2, 4, 8, 9, 10, 12], window=3, hysteresis=2, consecutive_hysteresis=True),
        dynamic("window-4-hysteresis-1-consecutive", [2, 3, 12], window=4, hysteresis=1, consecutive_hysteresis=True),
        dynamic("window-5-hysteresis-2", [6, 7, 13, 20], window=5, hysteresis=2),
        dynamic("window-6-hysteresis-1", [6, 14], window=6, hysteresis=1),
        dynamic("window-8-hysteresis-2", [9, 10, 11], window=8, hysteresis=2),
        dynamic("floor-touched", [1, 2, 5], window=4, hysteresis=1, power=5, min_loss_scale=4),
        dynamic("floor-no-power-of-2", [1, 2, 3], window=4, hysteresis=1, power=4, min_loss_scale=3),
        dynamic("floor-hit", [2, 5, 7], window=4, hysteresis=1, power=2),
        dynamic("floor-hit-hysteresis-2", [2, 3, 4, 7], window=8, hysteresis=2, power=3, min_loss_scale=2),
        case("accumulated-by-2", "AdamW", adam, eager, "WarmupCosineLR", {"warmup_num_steps": 6, **TOTAL}, clipping=0.5, accumulation=2, overflow=[5, 6]),
        case("two-overflow-on-one-rank", "SGD", sgd, eager, "WarmupDecayLR", {**WARM, **TOTAL}, processes=2, clipping=0.5, accumulation=2, overflow=[1, 8]),
        case("two-sum", "SGD", {**sgd, "lr": 0.01}, {"loss_scale": 64}, processes=2, clipping=0.0, also=add),
    ]


def sharding_cases() -> list[Case]:
    return [*stages_compared(), *sharded_reductions(), *sharded_models(), *sharded_low_precision()]


def sharded(name: str, optimizer: str, params: dict[str, Any], *schedule: Any, stages: Sequence[int] = (1, 2, 3), zero: dict[str, Any] | None = None, also: dict[str, Any] | None = None, at: dict[int, int] | None = None, **given: Any) -> list[Case]:
    """One case per stage, at stage 3 with small parameters shared out too; recorded at that stage, or what ``at`` says."""
    cases = []
    for stage in stages:
        section = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **(zero or {})}
        keys = {"zero_optimization": section, "zero_allow_untested_optimizer": True, **(also or {})}
        other = {"deepspeed": {"zero_optimization": {"stage": at[stage]}}} if at and stage in at else {}
        cases.append(training_case(f"{name}-stage-{stage}", optimizer, params, *schedule, also=keys, **other, **given))
    return cases


def stages_compared() -> list[Case]:
    """Optimizers, schedules, groups, clipping and accumulation; two at stage 0, too."""
    adam, sgd = ADAM_PARAMS, SGD_PARAMS
    l2 = {**adam, "adam_w_mode": False}
    each = (0, 1, 2, 3)
    groups = [{}, {"lr": 0.002, "weight_decay": 0.0}]
    warm_groups = {**WARM, "warmup_min_lr": [0.0005, 0.001], "warmup_max_lr": [0.03, 0.004]}
    defaults = {"stage3_param_persistence_threshold": 100_000}
    return [
        *sharded("two-adam-with-l2-no-clipping-accumulated", "Adam", l2, "OneCycle", CYCLE, stages=each, processes=2, clipping=0.0, accumulation=4),
        *sharded("two-adamw-tight-clipping", "AdamW", adam, processes=2, clipping=0.05),
        *sharded("two-adamw-without-bias-correction", "AdamW", {**adam, **UNCORRECTED}, processes=2, clipping=1.0),
        *sharded("two-sgd-accumulated", "SGD", sgd, "WarmupLR", WARM, processes=2, clipping=1.0, accumulation=4),
        *sharded("two-groups-adamw", "AdamW", adam, processes=2, clipping=1.0, groups=groups),
        *sharded("two-groups-sgd-warmup", "SGD", sgd, "WarmupLR", warm_groups, processes=2, clipping=0.0, groups=groups),
        *sharded("four-adam-with-l2-no-clipping", "Adam", l2, "WarmupLR", WARM, processes=4, clipping=0.0),
        *sharded("four-adamw-accumulated", "AdamW", adam, "OneCycle", CYCLE, stages=each, processes=4, clipping=1.0, accumulation=4, also=BLOCKS),
        *sharded("four-sgd-tight-clipping", "SGD", sgd, processes=4, clipping=0.05),
        *sharded("four-sgd-small-parameters-whole", "SGD", sgd, stages=(3,), processes=4, clipping=1.0, zero=defaults),
        *sharded("four-sgd-pairs", "SGD", sgd, stages=(3,), processes=4, clipping=1.0, accumulation=2, zero={"zero_hpz_partition_size": 2}, also=BLOCKS),
    ]


def sharded_reductions() -> list[Case]:
    """How the sum over processes is scaled; stages 2 and 3 obey but where ``reduce_scatter`` is off, 3 never adds only."""
    adam, sgd = ADAM_PARAMS, SGD_PARAMS
    add, before, by_4 = {"gradient_allreduce_op": "sum"}, {"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}
    off = {"reduce_scatter": False}
    return [
        *sharded("two-sum-sgd-no-clipping", "SGD", {**sgd, "lr": 0.01}, stages=(1, 2), processes=2, clipping=0.0, also=add),
        *sharded("two-prescale-sgd-no-clipping", "SGD", sgd, processes=2, clipping=0.0, zero=off, also=before),
        *sharded("two-predivide-adam", "Adam", adam, processes=2, clipping=0.05, zero=off, also=by_4),
        *sharded("four-sum-adam-accumulated-by-2", "Adam", adam, stages=(1, 2), processes=4, clipping=1.0, accumulation=2, also=add),
    ]


def sharded_models() -> list[Case]:
    """Parameters that do not divide, do not take part, are shared between layers, or do not learn."""
    adam, sgd = ADAM_PARAMS, SGD_PARAMS
    find = {"redline": {"find_unused_parameters": True}}
    return [
        *sharded("two-odd-adamw", "AdamW", adam, processes=2, clipping=1.0, model="odd"),
        *sharded("four-odd-sgd-accumulated-by-2", "SGD", sgd, processes=4, clipping=0.5, accumulation=2, model="odd", also=BLOCKS),
        *sharded("two-unused-sgd", "SGD", {**sgd, "weight_decay": 0.1}, processes=2, clipping=0.0, model="turns", also=BLOCKS, at={3: 1}),
        *sharded("two-unused-adamw-accumulated-by-2", "AdamW", adam, processes=2, clipping=1.0, accumulation=2, model="turns", at={3: 1}),
        *sharded("two-unused-by-one-rank-sgd", "SGD", {**sgd, "weight_decay": 0.1}, processes=2, clipping=0.0, model="turns by rank", also=find, at={1: 0, 2: 0, 3: 0}),
        *sharded("four-unused-by-some-ranks-adamw", "AdamW", adam, stages=(2, 3), processes=4, clipping=1.0, model="turns by rank", also=find, at={2: 0, 3: 0}),
        *sharded("two-tied-adamw", "AdamW", adam, processes=2, clipping=1.0, model="tied"),
        *sharded("two-frozen-sgd", "SGD", sgd, processes=2, clipping=1.0, model="frozen", also=BLOCKS),
    ]


def sharded_low_precision() -> list[Case]:
    adam, coarse, sgd = ADAM_PARAMS, COARSE_ADAM, SGD_PARAMS
    bf16, autocast = {"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    halves = {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 2}}
    moves = {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 1, "loss_scale_window": 3}}
    return [
        *sharded("two-bf16-adam-accumulated-by-2", "Adam", coarse, "OneCycle", CYCLE, processes=2, clipping=1.0, accumulation=2, also=bf16),
        *sharded("four-bf16-sgd", "SGD", sgd, processes=4, clipping=0.5, also={**bf16, **BLOCKS}),
        *sharded("two-autocast-bf16-adam", "Adam", coarse, processes=2, clipping=1.0, also=autocast),
        *sharded("two-autocast-bf16-of-bf16-adam", "Adam", coarse, stages=(1, 3), processes=2, clipping=1.0, also={**bf16, **autocast}),
        *sharded("two-fp16-adam", "Adam", adam, "WarmupLR", WARM, processes=2, clipping=0.5, overflow=[3, 4, 11], also={**moves, **BLOCKS}, at={3: 1}),
        *sharded("four-fp16-sgd-accumulated-by-2", "SGD", sgd, "WarmupLR", WARM, processes=4, clipping=0.5, accumulation=2, overflow=[2, 9, 10], also=halves),
    ]


# fmt: on
def record_training(cases: list[Case]) -> list[Case]:
    """Runs in every rank of ``processes``: the cases with their losses, rates and norms, which all ranks agree on."""
    import deepspeed

    _quiet()
    _take_fp16()
    return [{**case, **_train(deepspeed, case)} for case in cases]


def _train(deepspeed: Any, case: Case) -> dict[str, Any]:
    """One run: per optimizer step the loss, and the rates, betas (or momenta) and gradient norm its update used."""
    model = workload.build_model_of(case)
    config = json.loads(json.dumps({**case["config"], **case.get("deepspeed", {})}))
    parameters = workload.parameters_of(case, model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    has_zero = engine.zero_optimization_stage() > 0
    started_at = _weights(deepspeed, model)
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    dataset = workload.build_dataset()
    record: dict[str, Any] = {"loss": [], "lr": [], "momentum": [], "grad_norm": []}
    after: dict[str, Any] = {"skipped_steps": [], "loss_scale": []}
    error_at = None
    for step in range(workload.NUM_STEPS):
        losses = []
        indices = workload.micro_steps(case, step)
        for index in indices:
            loss = workload.loss_of(case, engine, dataset, step, index, rank, world_size)
            engine.backward(loss)
            losses.append(loss.detach().double())
            if index == indices[-1]:
                record["lr"].append([float(lr) for lr in engine.get_lr()])
                record["momentum"].append(engine.get_mom())
                if not has_zero:  # reduced and averaged by backward, clipped only in step
                    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
                    scaler = engine.torch_autocast_z0_gradscaler  # of an autocast to fp16
                    scale = 1.0 if scaler is None else scaler.get_scale()
                    record["grad_norm"].append(_finite(float(gradients.double().norm()) / scale))
            if index == indices[-1] or "backwards" not in case:
                try:
                    engine.step()
                except Exception as error:
                    assert "already at minimum" in str(error), error
                    error_at = step
        mean = torch.stack(losses).mean()
        torch.distributed.all_reduce(mean)
        record["loss"].append(float(mean / world_size))
        if error_at is not None:
            break
        if has_zero:
            record["grad_norm"].append(_finite(float(engine.get_global_grad_norm())))
        after["skipped_steps"].append(engine.skipped_steps)
        after["loss_scale"].append(engine._get_optimizer_loss_scale())
    distance = float((_weights(deepspeed, model) - started_at).norm())
    if _in_low_precision(case):
        if "fp16" not in config:
            after["loss_scale"] = None
        if "torch_autocast" in config:
            after["skipped_steps"] = None
        record |= {**after, "distance": distance, "error_at": error_at}
    elif "zero_optimization" in case["config"]:
        record["distance"] = distance
    _assert_ranks_agree(record)
    assert engine.global_steps == (workload.NUM_STEPS if error_at is None else error_at)
    engine.destroy()
    return record


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weights(deepspeed: Any, model: torch.nn.Module) -> torch.Tensor:
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):  # which stage 3 has shared out
        return torch.cat([parameter.detach().flatten().double() for parameter in parameters])


def _in_low_precision(case: Case) -> bool:
    return not {"bf16", "fp16", "torch_autocast"}.isdisjoint(case["config"])


def _assert_ranks_agree(record: dict[str, list[Any]]) -> None:
    records: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(records, record)
    assert all(other == record for other in records), "the ranks hold different numbers"


# ---------------------------------------------------------------------------------------------------------------------
# Loss scale


def loss_scale_cases() -> list[Case]:
    """Each way to set a scaler up, under patterns of overflows from rare to nearly always."""
    draw = random.Random(0)
    cases = []
    for hysteresis in (1, 2, 3):
        for consecutive in (False, True):
            for window in (1, 2, 3, 5, 8):
                for frequency in (0.05, 0.2, 0.5, 0.8):
                    start, floor = draw.choice([(2.0**16, 1), (2.0**6, 1), (2.0**5, 4), (16.0, 3), (2.0, 8)])
                    overflows = "".join("01"[draw.random() < frequency] for _ in range(40))
                    settings = {
                        "scale": start,
                        "window": window,
                        "hysteresis": hysteresis,
                        "consecutive_hysteresis": consecutive,
                        "minimum": floor,
                    }
                    cases.append({**settings, "overflows": overflows})
    return cases


def record_loss_scales(cases: list[Case]) -> list[Case]:
    """Runs in one process, as the scaler asks for its rank."""
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    _quiet()
    deepspeed.init_distributed("gloo")
    return [_scales(DynamicLossScaler, case) for case in cases]


def _scales(scaler_class: Any, case: Case) -> Case:
    scaler = scaler_class(
        init_scale=case["scale"],
        scale_window=case["window"],
        min_scale=case["minimum"],
        delayed_shift=case["hysteresis"],
        consecutive_hysteresis=case["consecutive_hysteresis"],
    )
    scales: list[float] = []
    try:
        for overflow in case["overflows"]:
            scaler.update_scale(overflow == "1")
            scales.append(scaler.cur_scale)
    except Exception as error:
        assert "already at minimum" in str(error), error
    told = case["overflows"][: len(scales) + 1]
    return {**case, "overflows": told, "scales": scales, "error": len(scales) < len(told)}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write(path: Path, cases: list[Case], **head: Any) -> None:
    """One JSON document, one line per case."""
    import deepspeed

    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "python": platform.python_version()}
    lines = [f'"{name}": {json.dumps(value)},' for name, value in {"versions": versions, **head}.items()]
    body = ",\n".join(json.dumps(case, separators=(",", ":"), allow_nan=False) for case in cases)
    path.write_text("\n".join(["{", *lines, '"cases": [', body, "]", "}"]) + "\n", encoding="utf-8")
    print(f"{path}: {len(cases)} cases, {path.stat().st_size / 1000:.0f} kB")


def record_schedules_file(directory: Path) -> None:
    cases = range_test_cases() + one_cycle_cases() + warmup_cases()
    _assert_names_differ(cases)
    write(directory / "schedules.json", [record_schedule(case) for case in cases])


def record_training_file(directory: Path) -> None:
    write(directory / "training.json", _record_runs(training_cases()), workload=_settings())


def record_precision_file(directory: Path) -> None:
    write(directory / "precision.json", _in_seven_digits(_record_runs(precision_cases())), workload=_settings())


def record_sharding_file(directory: Path) -> None:
    write(directory / "sharding.json", _in_seven_digits(_record_runs(sharding_cases())), workload=_settings())


def _in_seven_digits(recorded: list[Case]) -> list[Case]:
    """Losses and norms rounded to what the formats have, and more."""
    for case in recorded:
        for name in ("loss", "grad_norm"):
            case[name] = [None if value is None else float(f"{value:.7g}") for value in case[name]]
    return recorded


def record_loss_scale_file(directory: Path) -> None:
    write(
        directory / "loss_scale.json",
        run_ranks(record_loss_scales, 1, loss_scale_cases(), timeout=900.0, fresh=True)[0],
    )


def _record_runs(cases: list[Case]) -> list[Case]:
    """By number of processes; with autocast apart, as DeepSpeed keeps that in a global that ZeRO reads."""
    _assert_names_differ(cases)
    recorded: list[Case] = []
    for processes in (1, 2, 4):
        for autocast in (False, True):
            chosen = [c for c in cases if c["processes"] == processes and ("torch_autocast" in c["config"]) == autocast]
            recorded += run_ranks(record_training, processes, chosen, timeout=900.0, fresh=True)[0] if chosen else []
    return recorded


def _settings() -> dict[str, Any]:
    return {
        "model_seed": workload.MODEL_SEED,
        "data_seed": workload.DATA_SEED,
        "num_steps": workload.NUM_STEPS,
        "micro_batch": workload.MICRO_BATCH,
        "fingerprint": workload.fingerprint(),
    }


def _assert_names_differ(cases: list[Case]) -> None:
    names = [case["name"] for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)


def _quiet() -> None:
    # What DeepSpeed calls in torch.
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _take_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU without instructions for it, though torch computes it on every CPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


FILES = {
    "schedules": record_schedules_file,
    "training": record_training_file,
    "precision": record_precision_file,
    "sharding": record_sharding_file,
    "loss_scale": record_loss_scale_file,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/dev/record_deepspeed.py all     (a few minutes; the first time DeepSpeed compiles)",
    )
    parser.add_argument("what", choices=[*FILES, "all"], help="which file to write")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "tests" / "golden",
        metavar="DIR",
        help="where to write it (default: tests/golden); another folder lets you compare before you replace",
    )
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        parser.error(f"DeepSpeed cannot be imported ({error}); install deepspeed=={DEEPSPEED_VERSION} beside torch")
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        parser.error(f"the tests expect the numbers of DeepSpeed {DEEPSPEED_VERSION}; this is {deepspeed.__version__}")
    _quiet()
    given.output.mkdir(parents=True, exist_ok=True)
    for name, record in FILES.items():
        if given.what in (name, "all"):
            record(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
