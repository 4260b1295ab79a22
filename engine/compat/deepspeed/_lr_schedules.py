"""`deepspeed.runtime.lr_schedules`: Redline's schedules, which have DeepSpeed's values, and the names of their keys."""

from __future__ import annotations

import argparse
from typing import Any

from redline.schedulers import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "add_tuning_arguments"]

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR = "LRRangeTest", "OneCycle", "WarmupLR"
WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupDecayLR", "WarmupCosineLR"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]
EDGE_VALUE, MID_VALUE = "edge_value", "mid_value"
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"

# Each key's constant has its name in capitals: CYCLE_MIN_LR = "cycle_min_lr".
_KEYS: dict[str, type] = {
    "lr_range_test_min_lr": float, "lr_range_test_step_rate": float, "lr_range_test_step_size": int,
    "lr_range_test_staircase": bool, "cycle_first_step_size": int, "cycle_first_stair_count": int,
    "cycle_second_step_size": int, "cycle_second_stair_count": int, "decay_step_size": int, "cycle_min_lr": float,
    "cycle_max_lr": float, "decay_lr_rate": float, "cycle_min_mom": float, "cycle_max_mom": float,
    "decay_mom_rate": float, "warmup_min_lr": float, "warmup_max_lr": float, "warmup_num_steps": int,
    "warmup_type": str, "total_num_steps": int, "warmup_min_ratio": float, "cos_min_ratio": float,
}  # fmt: skip
globals().update({key.upper(): key for key in _KEYS})


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add arguments that choose a schedule and its keys."""
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument("--lr_schedule", type=str, default=None, help="LR schedule for training")
    for key, kind in _KEYS.items():
        group.add_argument(f"--{key}", type=kind, default=None, help=f"key {key} of the schedule")
    return parser


def get_config_from_args(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """The scheduler section that the arguments ask for, or why there is none."""
    name = getattr(args, LR_SCHEDULE, None)
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not supported LR schedule"
    params = {key: getattr(args, key) for key in _KEYS if getattr(args, key, None) is not None}
    return {"type": name, "params": params}, None


def get_lr_from_config(config: dict[str, Any]) -> tuple[float | None, str]:
    """The highest rate that a scheduler section names; None with a reason."""
    if "type" not in config or "params" not in config:
        return None, "LR schedule type or params not defined in config"
    key = {LR_RANGE_TEST: "lr_range_test_min_lr", ONE_CYCLE: "cycle_max_lr"}.get(config["type"], "warmup_max_lr")
    return config["params"][key], ""
