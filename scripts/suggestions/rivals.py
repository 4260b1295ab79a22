"""Optimizers that promise to need no learning rate, at their own defaults, in place of the task's optimizer.

They train in fp32, and a whole batch at once, also where the task's config says bf16 or accumulation.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from redline.range_test.task import loss_of
from suggestions.grid import batches, last_tenth, score
from suggestions.ours import WARM_FRACTION
from suggestions.tasks import Task, task_of

__all__ = ["PACKAGE", "RIVALS", "train"]

PACKAGE = "pytorch-optimizer"
RIVALS = ("Prodigy", "schedule-free AdamW")
REFRESHING = 20  # batches for the statistics of batch norm, since the weights that are judged are an average


def train(method: str, name: str, seed: int) -> dict[str, Any]:
    """Train a task to its end; the loss on the validation data, None where it is not finite."""
    task = task_of(name)
    torch.manual_seed(seed)
    model, data, criterion, validation = task.build()
    loss_fn = loss_of(criterion)
    optimizer, schedule = _optimizer_of(method, model, task)
    feed = batches(data, task.batch_size, seed)
    losses, began = [], time.process_time()
    for _ in range(task.steps):
        loss = loss_fn(model, next(feed))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"loss": None}
        optimizer.zero_grad()
        loss.backward()
        if task.clipping:
            nn.utils.clip_grad_norm_(model.parameters(), task.clipping)
        optimizer.step()
        schedule.step()
    if method != "Prodigy":
        optimizer.eval()
        with torch.no_grad():
            for _ in range(REFRESHING):
                loss_fn(model, next(feed))
    seconds = time.process_time() - began
    return {"seconds": seconds, "training": last_tenth(losses), **score(model, criterion, validation)}


def _optimizer_of(method: str, model: nn.Module, task: Task) -> tuple[Any, LRScheduler]:
    """Prodigy with its learning rate of 1 and cosine decay, as its authors advise; schedule-free with a warm-up."""
    from pytorch_optimizer import Prodigy, ScheduleFreeAdamW

    params = [param for param in model.parameters() if param.requires_grad]
    weight_decay = task.optimizer["params"].get("weight_decay", 0.0)
    if method == "Prodigy":
        optimizer: Any = Prodigy(params, weight_decay=weight_decay)
        return optimizer, CosineAnnealingLR(optimizer, task.steps)
    warm = max(1, round(WARM_FRACTION * task.steps))
    optimizer = ScheduleFreeAdamW(params, weight_decay=weight_decay, warmup_steps=warm)
    optimizer.train()
    return optimizer, ConstantLR(optimizer, 1.0)
