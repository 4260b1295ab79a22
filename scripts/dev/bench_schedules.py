"""Times one ``.step()`` of a schedule: written by hand, ours, torch's, DeepSpeed's where it is installed.

All of them run in one process on the same kind of Adam, in turn, and the median over the rounds counts, so
that a busy machine slows all alike. "By hand" is the loop one would write into a training script: the formula, then one
write per parameter group (``lr``; for 1Cycle ``betas`` too). It is the floor; the ratios are to it.

    LRRangeTest    by hand, schedulers.LRRangeTest, torch's LambdaLR with the same formula, DeepSpeed's LRRangeTest
    OneCycle       by hand, schedulers.OneCycle, torch's OneCycleLR (linear, cycling betas), DeepSpeed's OneCycle
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from redline import schedulers

Step = Callable[[], object]

MIN_LR, MAX_LR, MIN_MOM, MAX_MOM, BETA2 = 1e-4, 1e-3, 0.85, 0.95, 0.99
RATE, SIZE = 5.0, 200


def build_optimizer(num_groups: int) -> torch.optim.Adam:
    """Adam on `num_groups` groups of one parameter each."""
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
    return torch.optim.Adam(groups, lr=MIN_LR)


def range_test_by_hand(optimizer: torch.optim.Optimizer) -> Step:
    k = 0

    def step() -> None:
        nonlocal k
        k += 1
        lr = MIN_LR * (1 + RATE * k / SIZE)
        for group in optimizer.param_groups:
            group["lr"] = lr

    return step


def one_cycle_by_hand(optimizer: torch.optim.Optimizer, half: int) -> Step:
    k = 0

    def step() -> None:
        nonlocal k
        k += 1
        height = k / half if k <= half else (2 * half - k) / half
        lr = MIN_LR + (MAX_LR - MIN_LR) * height
        betas = (MAX_MOM - (MAX_MOM - MIN_MOM) * height, BETA2)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["betas"] = betas

    return step


def range_tests(num_groups: int, total_steps: int, deepspeed: ModuleType | None) -> dict[str, Step]:
    arguments = {"lr_range_test_min_lr": MIN_LR, "lr_range_test_step_rate": RATE, "lr_range_test_step_size": SIZE}
    found: dict[str, Step] = {
        "by hand": range_test_by_hand(build_optimizer(num_groups)),
        "ours": schedulers.LRRangeTest(build_optimizer(num_groups), **arguments).step,  # type: ignore[arg-type]
        "torch LambdaLR": lr_scheduler.LambdaLR(build_optimizer(num_groups), lambda k: 1 + RATE * k / SIZE).step,
    }
    if deepspeed is not None:
        found["DeepSpeed"] = deepspeed.LRRangeTest(build_optimizer(num_groups), **arguments).step
    return found


def one_cycles(num_groups: int, total_steps: int, deepspeed: ModuleType | None) -> dict[str, Step]:
    half = total_steps // 2 + 1  # all timed steps lie within the cycle
    arguments = {
        "cycle_min_lr": MIN_LR,
        "cycle_max_lr": MAX_LR,
        "cycle_first_step_size": half,
        "cycle_min_mom": MIN_MOM,
        "cycle_max_mom": MAX_MOM,
    }
    torch_cycle = lr_scheduler.OneCycleLR(
        build_optimizer(num_groups),
        max_lr=MAX_LR,
        total_steps=2 * half,
        pct_start=0.5,
        anneal_strategy="linear",
        base_momentum=MIN_MOM,
        max_momentum=MAX_MOM,
    )
    found: dict[str, Step] = {
        "by hand": one_cycle_by_hand(build_optimizer(num_groups), half),
        "ours": schedulers.OneCycle(build_optimizer(num_groups), **arguments).step,  # type: ignore[arg-type]
        "torch OneCycleLR": torch_cycle.step,
    }
    if deepspeed is not None:
        found["DeepSpeed"] = deepspeed.OneCycle(build_optimizer(num_groups), **arguments).step
    return found


def time_steps(candidates: dict[str, Step], rounds: int, calls: int) -> dict[str, float]:
    """Median over the rounds of the mean nanoseconds of one step; each round gives every candidate a turn."""
    timings: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for turn in range(rounds + 1):
        for name in order:
            step = candidates[name]
            start = time.perf_counter_ns()
            for _ in range(calls):
                step()
            if turn > 0:  # the first round warms up
                timings[name].append((time.perf_counter_ns() - start) / calls)
        order.append(order.pop(0))
    return {name: statistics.median(values) for name, values in timings.items()}


def measure(num_groups: list[int], rounds: int, work: int, deepspeed: ModuleType | None) -> list[dict[str, Any]]:
    """One row per schedule, number of groups and candidate; `work` is the number of group writes per timing."""
    rows = []
    for schedule, build in (("LRRangeTest", range_tests), ("OneCycle", one_cycles)):
        for count in num_groups:
            calls = max(20, work // count)
            with warnings.catch_warnings():
                # Torch warns where a schedule steps before its optimizer; here no optimizer ever does.
                warnings.simplefilter("ignore")
                ns = time_steps(build(count, calls * (rounds + 1), deepspeed), rounds, calls)
            rows += [
                {
                    "schedule": schedule,
                    "groups": count,
                    "method": method,
                    "ns": round(value, 1),
                    "ratio": round(value / ns["by hand"], 2),
                }
                for method, value in ns.items()
            ]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'schedule':12} {'groups':>6}  {'method':16} {'ns/step':>10} {'x by hand':>10}")
    before = None
    for row in rows:
        if before not in (None, (row["schedule"], row["groups"])):
            print()
        before = (row["schedule"], row["groups"])
        print(
            f"{row['schedule']:12} {row['groups']:6d}  {row['method']:16} {row['ns']:10,.0f} {row['ratio']:10.2f}",
        )


def import_deepspeed() -> tuple[ModuleType | None, str | None]:
    """DeepSpeed's schedules and its version, or None and None where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.runtime import lr_schedules
    except ImportError:
        return None, None
    return lr_schedules, deepspeed.__version__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 100], help="numbers of groups (default: 1 100)")
    parser.add_argument("--rounds", type=int, default=25, help="turns of every candidate (default: %(default)s)")
    parser.add_argument(
        "--work", type=int, default=5000, help="group writes per turn: steps times groups (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    given = parser.parse_args()
    deepspeed, version = import_deepspeed()
    rows = measure(given.groups, given.rounds, given.work, deepspeed)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": version}
    if given.json:
        print(json.dumps({"versions": versions, "rounds": given.rounds, "results": rows}, indent=2))
    else:
        print(", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items()))
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
