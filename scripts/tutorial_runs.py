"""What scripts/tutorials.py is made of, the part that trains: two tasks, one training loop, one range test.

The loop is anybody's: it knows nothing of learning rates. Two ways to train differ in nothing but a config on disk.
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
from source_text import source_text
from torch.utils.data import Subset

from engine import Engine, RangeTestResult, initialize, run_range_test

SCALE = 8  # how many times the batch


@dataclass(frozen=True)
class Task:
    """Model and data, and how they are trained with the small batch, which is what the hardware holds.

    Attributes:
        make: model, training data, loss, held-out data.
        optimizer: the config's, without a learning rate.
        lrs: fixed learning rates tried with the small batch.
        factors: multiples of the best of them that are tried with the large one.
        test: what `run_range_test` is given.
        samples: of the training data; None for all.
        evaluations: of each training and of each test, beside the one before the first update.
        processes: how many the 1Cycle is trained on, too; 1 leaves that out. It is done by scripts/digits.py.
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
    processes: int = 1

    def parts(self) -> tuple[Any, ...]:
        model, data, loss, held_out = self.make()
        return model, data if self.samples is None else Subset(data, range(self.samples)), loss, held_out

    def updates(self, batch: int) -> int:
        """Updates of a training."""
        return self.epochs * len(self.parts()[1]) // batch

    def config(self, lr: float, *, scale: int) -> dict[str, Any]:
        """DeepSpeed's JSON for a fixed learning rate; accumulation makes up what the hardware does not hold."""
        return {
            "train_batch_size": scale * self.batch,
            "train_micro_batch_size_per_gpu": self.batch,
            "optimizer": {"type": self.optimizer["type"], "params": {"lr": lr, **self.optimizer["params"]}},
        }


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
    processes=2,
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


def rehearsal(task: Task) -> Task:
    """The same in a few seconds: too little of everything for an answer that is worth anything."""
    less = replace(task, epochs=1, samples=512, evaluations=4, processes=1)
    return replace(less, lrs=task.lrs[1:2], factors=(1, SCALE), test={**task.test, "steps": 20})


@dataclass(frozen=True)
class Run:
    """One training: the learning rate of each update, and (updates, loss, accuracy) on the held-out data."""

    seed: int
    lrs: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """A way to set the learning rate, and what it led to, a run for each seed."""

    name: str
    lr: float  # the highest that it uses
    batch: int
    runs: list[Run]

    @property
    def losses(self) -> list[float]:
        """Validation loss at the end, one for each seed."""
        return [run.held_out[-1][1] for run in self.runs]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy at the end, in percent, one for each seed."""
        return [100 * run.held_out[-1][2] for run in self.runs]

    @property
    def loss(self) -> float:
        return mean(self.losses)

    def named(self, name: str) -> Method:
        return replace(self, name=name)


def train(task: Task, config: Path, seed: int) -> Run:
    """Train as the config says."""
    torch.manual_seed(seed)
    model, data, loss_fn, held_out = task.parts()
    engine = initialize(model, config, training_data=data)
    assert engine.training_dataloader is not None
    run = Run(seed)
    every = max(1, task.updates(engine.train_batch_size()) // task.evaluations)
    run.held_out.append((0, *evaluate(engine, loss_fn, held_out)))
    for _ in range(task.epochs):
        for x, y in engine.training_dataloader:
            lr = float(engine.get_lr()[0])
            engine.backward(loss_fn(engine(x), y))
            engine.step()
            if engine.global_steps > len(run.lrs):  # an update, not one of the micro-batches before it
                run.lrs.append(lr)
                if engine.global_steps % every == 0:
                    run.held_out.append((engine.global_steps, *evaluate(engine, loss_fn, held_out)))
    if run.held_out[-1][0] < engine.global_steps:
        run.held_out.append((engine.global_steps, *evaluate(engine, loss_fn, held_out)))
    return run


@torch.no_grad()
def evaluate(engine: Engine, loss_fn: Callable[..., torch.Tensor], held_out: Any) -> tuple[float, float]:
    """Mean loss and share of right answers on the held-out data."""
    x, y = held_out.tensors
    engine.eval()
    logits = engine(x)
    engine.train()
    return float(loss_fn(logits, y)), float((logits.argmax(-1) == y).float().mean())


def find_boundaries(task: Task, config: Path, seeds: int) -> RangeTestResult:
    """The same range tests from each seed's initial network; the suggestion is read from all of them together."""
    results = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, data, loss, held_out = task.parts()
        engine = initialize(model, config)  # its own learning rate is the fixed one that runs beside the tests
        planned = task.updates(engine.train_batch_size())
        results.append(
            run_range_test(
                engine,
                data,
                loss,
                validation=held_out,
                validations=task.evaluations,
                train_steps=planned,
                progress=False,
                **task.test,
            )
        )
        print(".", end="", flush=True)
    curves = [replace(curve, seed=seed) for seed, result in enumerate(results) for curve in result.curves]
    return replace(results[0], curves=tuple(curves))


def write_config(config: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path
