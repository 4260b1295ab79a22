"""Redline's side of the bench: the shape of the two schedules, and what learning rate it suggests for each.

The only place that knows how a suggestion is asked for, and how a maximum becomes a schedule.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from engine import initialize, tune
from engine.range_test.suggestion import CYCLE_RATIO, RISING_SHARE, Suggestion
from suggestions.tasks import Task, task_of

__all__ = ["KINDS", "engine_config", "schedule_config", "suggest"]

KINDS = ("OneCycle", "WarmupDecayLR")
WARM_SHARE = 0.02  # share of the updates in which a decay warms up ...
LEAST_WARM = 2  # ... and the least of it


def schedule_config(kind: str, max_lr: float, steps: int) -> dict[str, Any]:
    """A config's scheduler section: the shape that a suggestion has, with this maximum."""
    if kind == "OneCycle":
        rising = max(1, round(RISING_SHARE * steps))
        params = {
            "cycle_min_lr": max_lr / CYCLE_RATIO,
            "cycle_max_lr": max_lr,
            "cycle_first_step_size": rising,
            "cycle_second_step_size": steps - rising,
        }
    else:
        params = {
            "total_num_steps": steps,
            "warmup_min_lr": 0.0,
            "warmup_max_lr": max_lr,
            "warmup_num_steps": max(LEAST_WARM, round(WARM_SHARE * steps)),
            "warmup_type": "linear",
        }
    return {"type": kind, "params": params}


def engine_config(task: Task, seed: int, scheduler: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an engine gets for a task; the optimizer's own learning rate is left out, and so is no hint."""
    params = {key: value for key, value in task.optimizer["params"].items() if key != "lr"}
    config = {
        "train_batch_size": task.batch_size,
        "optimizer": {"type": task.optimizer["type"], "params": params},
        "gradient_clipping": 0.0,
        "redline": {"data": {"seed": seed}},
    }
    return config if scheduler is None else {**config, "scheduler": scheduler}


def suggest(name: str, seed: int) -> dict[str, Any]:
    """The maximum for each schedule (None for a refusal), and the updates that it took to find."""
    for package in ("engine", "schedulers"):
        logging.getLogger(package).setLevel(logging.ERROR)
    task = task_of(name)
    torch.manual_seed(seed)
    model, data, loss, validation = task.build()
    redline = initialize(model, engine_config(task, seed), device="cpu")
    tuning = tune(redline, data, loss, steps=task.steps, validation=validation, budget=task.budget, progress=False)
    answer, updates = tuning.answer, tuning.spent
    if not isinstance(answer, Suggestion):
        return {"OneCycle": None, "WarmupDecayLR": None, "updates": updates, "why": answer.reason}
    return {"OneCycle": answer.cycle_max_lr, "WarmupDecayLR": answer.cycle_max_lr, "updates": updates}
