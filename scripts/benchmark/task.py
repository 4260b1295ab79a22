"""What a worker is to do, and who the subjects are; plain data, no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

__all__ = ["BY_HAND", "LR", "OPTIMIZER", "RAMP", "SUBJECTS", "Task", "is_installed"]

BY_HAND = "by hand"  # what all others are compared with
SUBJECTS = {  # and the module that each imports
    BY_HAND: "torch",
    "by hand, again": "torch",  # the same once more: what differs here is noise
    "by hand, fp32 master params": "torch",
    "Redline": "engine",
    "Redline, recording": "engine",
    "Redline, as deepspeed": "engine",
    **{f"Redline, ZeRO {stage}": "engine" for stage in (1, 2, 3)},
    "DeepSpeed": "deepspeed",
    **{f"DeepSpeed, ZeRO {stage}": "deepspeed" for stage in (1, 2, 3)},
    "Accelerate": "accelerate",
    "Fabric": "lightning.fabric",
}

# Adam forgives a wrong scale of the gradients unless epsilon is large; weight decay shows a step too many.
LR = 1e-3
OPTIMIZER = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
RAMP = 10_000  # steps in which the rate grows by LR


@dataclass(frozen=True)
class Task:
    """One subject's training, the same on each of its ranks.

    Attributes:
        subject: a name of SUBJECTS.
        workload: a name of `workloads.WORKLOADS`.
        device: "cpu" or "cuda".
        ranks: how many train together.
        accumulation: micro-batches per optimizer step.
        clip: the norm to which gradients are clipped; 0 for never.
        precision: "fp32" or "bf16".
        compiled: whether the model runs under torch.compile.
        threads: of torch, on each rank.
    """

    subject: str
    workload: str
    device: str
    ranks: int = 1
    accumulation: int = 1
    clip: float = 1.0
    precision: str = "fp32"
    compiled: bool = False
    threads: int = 1


def is_installed(subject: str) -> bool:
    """Whether this Python has what the subject imports."""
    module = SUBJECTS[subject].partition(".")[0]
    return (
        module == "engine" or importlib.util.find_spec(module) is not None
    )  # the workers import it from the repository
