"""The two tasks of the tutorials, their training loop and their range tests.

The loop knows nothing of learning rates: two ways to train differ only in a config on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from digits import digits
from torch.utils.data import Subset

from redline import Engine, RangeTestResult, initialize, run_range_test
from tutorial.source_text import source_text

SCALE = 8  # the large batch is this many times the small one


@dataclass(frozen=True)
class Task:
    """A model, its data, and how it is trained.

    Attributes:
        make: returns model, training data, loss and held-out data.
        batch: the small batch size, which is what the hardware holds.
        optimizer: the config's, without a learning rate.
        lrs: fixed learning rates to try with the small batch.
        factors: multiples of the best of them to try with the large batch.
        test: arguments of `run_range_test`.
        samples: of the training data; None for all.
        evaluations: of each training and test, besides the one before the first step.
        ranks: train the 1Cycle on this many ranks, too, by scripts/digits.py; 1 for no such run.
    """

    name: str
    title: str
    make: Callable[[], tuple[Any, ...]]
    epochs: int
    batch: int
    optimizer: dict[str, Any]
    lrs: tuple[float, ...]
    factors: tuple[int, ...]
    test: dict[str, Any]
    samples: int | None = None
    evaluations: int = 16
    ranks: int = 1

    def parts(self) -> tuple[Any, ...]:
        model, data, loss, held_out = self.make()
        return model, data if self.samples is None else Subset(data, range(self.samples)), loss, held_out

    def steps(self, batch: int) -> int:
        """Optimizer steps of a training."""
        return self.epochs * len(self.parts()[1]) // batch

    def config(self, lr: float, *, scale: int) -> dict[str, Any]:
        """A config with a fixed learning rate; gradient accumulation makes up the large batch."""
        return {
            "train_batch_size": scale * self.batch,
            "train_micro_batch_size_per_gpu": self.batch,
            "optimizer": {"type": self.optimizer["type"], "params": {"lr": lr, **self.optimizer["params"]}},
        }

    def quick(self) -> Task:
        """The same in a few seconds: too little of everything for a meaningful result."""
        less = replace(self, epochs=1, samples=512, evaluations=4, ranks=1)
        return replace(less, lrs=self.lrs[1:2], factors=(1, SCALE), test={**self.test, "steps": 20})


DIGITS = Task(
    name="digits",
    title="handwritten digits, MLP, SGD with momentum",
    make=digits,
    epochs=5,
    batch=8,
    optimizer={"type": "SGD", "params": {"momentum": 0.9}},
    lrs=(0.005, 0.01, 0.02, 0.04),
    factors=(1, 2, 4, 8, 16),
    test={"min_lr": 1e-3, "step_size": 10, "rates": (20, 200), "steps": 160},
    ranks=2,
)
TEXT = Task(
    name="text",
    title="characters of Python's sources, transformer, Adam",
    make=source_text,
    epochs=1,
    batch=8,
    optimizer={"type": "Adam", "params": {}},
    lrs=(0.004, 0.008, 0.016),
    factors=(1, 2, 4, 8),
    test={"min_lr": 1e-4, "step_size": 10, "rates": (20, 200), "steps": 160},
)
TASKS = (DIGITS, TEXT)


@dataclass(frozen=True)
class Run:
    """One training: the learning rate of each step, and (step, loss, accuracy) on the held-out data."""

    seed: int
    lrs: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """A way to set the learning rate, with one run per seed; `lr` is the highest that it uses."""

    name: str
    lr: float
    batch: int
    runs: list[Run]

    @property
    def losses(self) -> list[float]:
        """Final validation loss of each seed."""
        return [run.held_out[-1][1] for run in self.runs]

    @property
    def accuracies(self) -> list[float]:
        """Final accuracy of each seed, in percent."""
        return [100 * run.held_out[-1][2] for run in self.runs]

    @property
    def loss(self) -> float:
        return mean(self.losses)

    def curve(self) -> list[tuple[int, float]]:
        """Mean validation loss over the seeds after each number of steps."""
        steps = [step for step, *_ in self.runs[0].held_out]
        return [(step, mean(run.held_out[i][1] for run in self.runs)) for i, step in enumerate(steps)]


def train(task: Task, config: Path, seed: int) -> Run:
    torch.manual_seed(seed)
    model, data, loss_fn, held_out = task.parts()
    engine = initialize(model, config, training_data=data)
    assert engine.training_dataloader is not None
    run = Run(seed)
    every = max(1, task.steps(engine.train_batch_size()) // task.evaluations)
    run.held_out.append((0, *evaluate(engine, loss_fn, held_out)))
    for _ in range(task.epochs):
        for x, y in engine.training_dataloader:
            lr = float(engine.get_lr()[0])
            engine.backward(loss_fn(engine(x), y))
            engine.step()
            if engine.global_steps > len(run.lrs):  # an optimizer step, not one of the micro-batches before it
                run.lrs.append(lr)
                if engine.global_steps % every == 0:
                    run.held_out.append((engine.global_steps, *evaluate(engine, loss_fn, held_out)))
    if run.held_out[-1][0] < engine.global_steps:
        run.held_out.append((engine.global_steps, *evaluate(engine, loss_fn, held_out)))
    return run


@torch.no_grad()
def evaluate(engine: Engine, loss_fn: Callable[..., torch.Tensor], held_out: Any) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out data."""
    x, y = held_out.tensors
    engine.eval()
    logits = engine(x)
    engine.train()
    return float(loss_fn(logits, y)), float((logits.argmax(-1) == y).float().mean())


def find_boundaries(task: Task, config: Path, seeds: int) -> RangeTestResult:
    """The same range tests from each seed's initial network, as one result that has all their curves."""
    curves = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, data, loss, held_out = task.parts()
        engine = initialize(model, config)  # its own learning rate is the fixed one that runs next to the tests
        result = run_range_test(
            engine,
            data,
            loss,
            validation=held_out,
            validations=task.evaluations,
            train_steps=task.steps(engine.train_batch_size()),
            progress=False,
            **task.test,
        )
        curves += [replace(curve, seed=seed) for curve in result.curves]
        print(".", end="", flush=True)
    return replace(result, curves=tuple(curves))


def write_config(config: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path
