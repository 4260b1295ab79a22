"""Redline's side of the bench: the config that a task is trained with, and what learning rate Redline suggests for it.

The only place that knows how a suggestion is asked for, and how a maximum becomes a schedule.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from redline import initialize, tune
from redline.errors import RangeTestError
from redline.range_test.suggest import Suggestion
from suggestions.tasks import Task, task_of

__all__ = ["engine_config", "suggest"]

WARM_FRACTION = 0.02  # of the steps, in which the schedule warms up ...
LEAST_WARM = 2  # ... and the least of it


def engine_config(task: Task, seed: int, max_lr: float | None = None) -> dict[str, Any]:
    """The task's config; with a maximum, its learning rate warms up to that and decays linearly to zero."""
    config: dict[str, Any] = {
        "train_batch_size": task.batch_size,
        "optimizer": task.optimizer,
        "gradient_clipping": task.clipping,
        "redline": {"data": {"seed": seed}},
        **task.config,
    }
    if max_lr is not None:
        params = {
            "total_num_steps": task.steps,
            "warmup_min_lr": 0.0,
            "warmup_max_lr": max_lr,
            "warmup_num_steps": max(LEAST_WARM, round(WARM_FRACTION * task.steps)),
            "warmup_type": "linear",
        }
        config["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    return config


def suggest(name: str, seed: int, budget: float | None) -> dict[str, Any]:
    """The learning rate (None for a refusal), and what it cost: steps, and seconds of the processor.

    `budget` is None for the default.
    """
    logging.getLogger("redline").setLevel(logging.ERROR)
    task = task_of(name)
    torch.manual_seed(seed)
    model, data, loss, validation = task.build()
    engine = initialize(model, engine_config(task, seed), device="cpu")
    most = None if budget is None else max(1000, round(budget * task.steps))  # the cap is below the larger budgets
    began = time.process_time()
    try:
        tuning = tune(
            engine, data, loss, steps=task.steps, validation=validation, budget=budget, max_updates=most, progress=False
        )
    except RangeTestError as error:  # too small a budget
        return {"lr": None, "why": str(error), "steps": 0}
    cost = {"steps": tuning.spent, "seconds": time.process_time() - began}
    if isinstance(tuning.answer, Suggestion):
        return {"lr": tuning.answer.cycle_max_lr, **cost}
    return {"lr": None, "why": tuning.answer.reason, **cost}
