"""One step of the same training, as each subject would have it written.

Each function takes a task, a workload's model on the device and its loss, and the batches, and returns the step:
forward and backward for every micro-batch, clipping, the optimizer, the next learning rate. What a step returns is
the loss of its last micro-batch, on the device, unread.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmark.task import LR, OPTIMIZER, RAMP, Task

__all__ = ["BUILDERS", "Step"]

Step = Callable[[], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]


def by_hand(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """The loop that all are compared with: fused AdamW, foreach clipping, the rate set by hand, DDP, autocast."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, **OPTIMIZER, fused=True)
    rate = _rate(optimizer)
    model = torch.compile(model) if task.compiled else model
    if task.ranks > 1:
        _join(task)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    accumulation, clip, lowered = task.accumulation, task.clip, task.precision == "bf16"

    def loss_on(x: Tensor, y: Tensor) -> Tensor:
        if not lowered:
            return loss_of(model(x), y)
        with torch.autocast(task.device, torch.bfloat16):
            return loss_of(model(x), y)

    def step() -> Tensor:
        if accumulation == 1:
            loss = loss_on(*next(batches))
            loss.backward()
        else:
            with model.no_sync() if task.ranks > 1 else contextlib.nullcontext():
                for _ in range(accumulation - 1):
                    (loss_on(*next(batches)) / accumulation).backward()
            loss = loss_on(*next(batches))
            (loss / accumulation).backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        rate()
        return loss

    return step


def by_hand_with_fp32_params(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """bf16 weights for the model, fp32 ones for the optimizer; one rank only."""
    master_params = [parameter.detach().clone() for parameter in model.parameters()]
    weights = list(model.bfloat16().parameters())
    model = torch.compile(model) if task.compiled else model
    optimizer = torch.optim.AdamW(master_params, **OPTIMIZER, fused=True)
    rate = _rate(optimizer)

    def step() -> Tensor:
        for index in range(task.accumulation):
            x, y = next(batches)
            loss = loss_of(model(x), y)
            (loss / task.accumulation if task.accumulation > 1 else loss).backward()
            for master, weight in zip(master_params, weights):
                if index == 0:
                    master.grad = weight.grad.float()
                else:
                    master.grad += weight.grad
                weight.grad = None
        if task.clip:
            nn.utils.clip_grad_norm_(master_params, task.clip, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, master_params)
        rate()
        return loss

    return step


def redline(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """Our engine."""
    from redline import initialize

    config = _config(task)
    if stage := _stage(task):
        config["zero_optimization"] = {"stage": stage}
    engine = initialize(model, config, device="cpu" if task.device == "cpu" else None)
    if task.subject != "Redline, recording":
        # A schedule that is a range test is recorded; the rest of a run's callbacks stays.
        engine.callbacks = [each for each in engine.callbacks if type(each).__name__ != "PassiveRecorder"]
    if task.compiled:
        engine.compile()
    return _driven(engine, task, loss_of, batches)


def as_deepspeed(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """Our engine under DeepSpeed's names, as `redline run` has scripts import them."""
    import redline

    sys.path.insert(0, str(Path(redline.__file__).parent / "compat"))
    import deepspeed

    assert deepspeed.__redline__
    engine, *_ = deepspeed.initialize(model=model, config={**_config(task), "steps_per_print": 10**9})
    return _driven(engine, task, loss_of, batches)


def deepspeed(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """DeepSpeed with torch's fused AdamW: its own would first be compiled, and is slower where it was."""
    import deepspeed

    config = _config(task)
    del config["optimizer"], config["redline"]
    config |= {"steps_per_print": 10**9, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if stage := _stage(task):
        config["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 50_000_000}
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if task.compiled:
        engine.compile()
    return _driven(engine, task, loss_of, batches)


def accelerate(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=task.device == "cpu",
        mixed_precision="bf16" if task.precision == "bf16" else "no",
        gradient_accumulation_steps=task.accumulation,
        dynamo_backend="inductor" if task.compiled else None,
    )
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    rate = _rate(optimizer)  # not before: it has replaced the parameter groups
    parameters = list(model.parameters())

    def step() -> Tensor:
        for _ in range(task.accumulation):
            x, y = next(batches)
            with accelerator.accumulate(model):
                loss = loss_of(model(x), y)
                accelerator.backward(loss)
                if task.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, task.clip)
                optimizer.step()
                optimizer.zero_grad()
        rate()
        return loss

    return step


def fabric(task: Task, model: nn.Module, loss_of: Loss, batches: Batches) -> Step:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    made = Fabric(
        accelerator=task.device,
        devices=task.ranks,
        strategy="ddp" if task.ranks > 1 else "auto",
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
    )
    made.launch()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER, fused=True)
    rate = _rate(optimizer)
    model, optimizer = made.setup(torch.compile(model) if task.compiled else model, optimizer)
    accumulation, clip = task.accumulation, task.clip

    def step() -> Tensor:
        for index in range(accumulation):
            x, y = next(batches)
            if accumulation == 1:
                loss = loss_of(model(x), y)
                made.backward(loss)
            else:
                with made.no_backward_sync(model, enabled=index + 1 < accumulation):
                    loss = loss_of(model(x), y)
                    made.backward(loss / accumulation)
        if clip:
            made.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()
        rate()
        return loss

    return step


BUILDERS: dict[str, Callable[[Task, nn.Module, Loss, Batches], Step]] = {
    "by hand": by_hand,
    "by hand, again": by_hand,
    "by hand, fp32 master params": by_hand_with_fp32_params,
    "Redline": redline,
    "Redline, recording": redline,
    "Redline, as deepspeed": as_deepspeed,
    "DeepSpeed": deepspeed,
    **{f"Redline, ZeRO {stage}": redline for stage in (1, 2, 3)},
    **{f"DeepSpeed, ZeRO {stage}": deepspeed for stage in (1, 2, 3)},
    "Accelerate": accelerate,
    "Fabric": fabric,
}


def _driven(engine: Any, task: Task, loss_of: Loss, batches: Batches) -> Step:
    """The training loop that DeepSpeed and Redline have in common."""
    accumulation = task.accumulation

    def step() -> Tensor:
        for _ in range(accumulation):
            x, y = next(batches)
            loss = loss_of(engine(x), y)
            engine.backward(loss)
            engine.step()
        return loss

    return step


def _stage(task: Task) -> int:
    """The ZeRO stage that a subject's name ends in; 0 where it names none."""
    name, _, stage = task.subject.rpartition(", ZeRO ")
    return int(stage) if name else 0


def _config(task: Task) -> dict[str, Any]:
    """The training as the JSON that both read; the rate grows as `_rate` has it."""
    from benchmark.workloads import WORKLOADS

    logging.disable(logging.INFO)
    ramp = {"lr_range_test_min_lr": LR, "lr_range_test_step_size": RAMP, "lr_range_test_step_rate": 1.0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": WORKLOADS[task.workload].batch,
        "gradient_accumulation_steps": task.accumulation,
        "gradient_clipping": task.clip,
        "optimizer": {"type": "AdamW", "params": {**OPTIMIZER, "betas": list(OPTIMIZER["betas"])}},
        "scheduler": {"type": "LRRangeTest", "params": ramp},
        "redline": {},
    }
    if task.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def _rate(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Sets the rate of the next step by hand."""
    group, count = optimizer.param_groups[0], 0

    def rate() -> None:
        nonlocal count
        count += 1
        group["lr"] = LR * (1 + count / RAMP)

    return rate


def _join(task: Task) -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if task.device == "cuda" else "gloo")
