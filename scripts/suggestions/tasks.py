"""Small real tasks on which learning rates are judged.

Images (handwritten digits, tiles of two photographs), text (code, prose, the names of characters), tables and
regressions; MLPs, CNNs, GRUs and small GPTs, which start from scratch or from pretrained weights, or train a LoRA.
Of each kind there are at least two: one that rules are made on, one held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from suggestions import data
from suggestions.data import Pair
from suggestions.networks import (
    GPT,
    Recurrent,
    bytes_mlp,
    cnn,
    deep,
    gaussian,
    last_byte,
    lora,
    mlp,
    next_byte,
    pretrained,
    residual_cnn,
    text_mlp,
)

__all__ = ["FORMS", "TASKS", "Parts", "Task", "task_of"]

Parts = tuple[nn.Module, TensorDataset, Callable[..., Tensor], TensorDataset]


@dataclass(frozen=True)
class Task:
    """A model to train, and for how long.

    Attributes:
        name: data, network, optimizer.
        kind: what is special about it, one of the groups of the report.
        optimizer: the config's section, with the learning rate that a user might have written there.
        batch_size: samples per optimizer step.
        steps: optimizer steps of a training.
        build: model, training data, loss and validation data, as `redline tune` wants them; initial weights follow
            torch's seed, the data does not.
        held_out: whether rules were made without it.
        clipping: norm that gradients are clipped at; DeepSpeed's default is 1, and 0 is none.
        config: further sections of the config.
        log_scale: whether the loss is a log-likelihood that may be negative: losses are then compared by
            exp(loss - best), not loss / best.
    """

    name: str
    kind: str
    optimizer: Mapping[str, Any]
    batch_size: int
    steps: int
    build: Callable[[], Parts]
    held_out: bool = False
    clipping: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)
    log_scale: bool = False

    @property
    def own_lr(self) -> float:
        return float(self.optimizer["params"]["lr"])

    @property
    def grid(self) -> list[float]:
        """18 learning rates, a factor of 1.97 apart: SGD's from 1e-4 to 10, Adam's from 1e-5 to 1."""
        start = -4 if self.optimizer["type"] == "SGD" else -5
        return [10 ** (start + 5 * index / 17) for index in range(18)]


def _optimizer(kind: str, lr: float, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": lr, **params}}


SGD = _optimizer("SGD", 0.01, momentum=0.9)
NESTEROV = _optimizer("SGD", 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
ADAM = _optimizer("Adam", 0.001, weight_decay=0.0)
ADAMW = _optimizer("AdamW", 0.001, weight_decay=0.01)
GPT_ADAMW = _optimizer("AdamW", 3e-4, betas=[0.9, 0.95], weight_decay=0.1)
FINE_TUNE = _optimizer("AdamW", 5e-5, weight_decay=0.01)
LORA = _optimizer("AdamW", 1e-4, weight_decay=0.0)
NO_CLIPPING = 0.0


# -- parts of tasks --------------------------------------------------------------------------------------


def _split(x: Tensor, y: Tensor, share: float = 0.2) -> tuple[TensorDataset, TensorDataset]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    count = round(share * len(x))
    return TensorDataset(x[order[count:]], y[order[count:]]), TensorDataset(x[order[:count]], y[order[:count]])


def _learn(
    pair: Callable[[], Pair], network: Callable[[], nn.Module], loss: Callable[..., Tensor], *, few: int | None = None
) -> Callable[[], Parts]:
    """A task of features and targets, of which training gets all, or a few."""

    def build() -> Parts:
        training, validation = _split(*pair())
        return network(), TensorDataset(*training[:few]), loss, validation

    return build


def _classify(pair: Callable[[], Pair], network: Callable[[], nn.Module], **how: Any) -> Callable[[], Parts]:
    return _learn(pair, network, nn.CrossEntropyLoss(), **how)


def _regress(pair: Callable[[], Pair], network: Callable[[], nn.Module], **how: Any) -> Callable[[], Parts]:
    return _learn(pair, network, nn.MSELoss(), **how)


def _write(
    text: str,
    length: int,
    network: Callable[[], nn.Module],
    loss: Callable[..., Tensor] = next_byte,
    *,
    few: int | None = None,
) -> Callable[[], Parts]:
    """A task of text: windows of so many bytes, and the byte after them, of which training gets all, or a few."""

    def build() -> Parts:
        rows = data.windows(text, length + 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return network(), TensorDataset(rows[order[200:]][:few]), loss, TensorDataset(rows[order[:200]])

    return build


_GPT, _WIDE_GPT = partial(GPT, 32, 2, 32), partial(GPT, 48, 2, 32)


def _reader(text: str, make: Callable[[], GPT] = _GPT) -> Callable[[], GPT]:
    return lambda: pretrained(make, text, 1000)


# -- tasks -----------------------------------------------------------------------------------------------

_DEVELOPMENT = (
    Task("digits, MLP, SGD", "basic", SGD, 32, 180, _classify(data.digits, lambda: mlp(64, 128, 10)),
         clipping=NO_CLIPPING),
    Task("functions, MLP, Adam", "basic", ADAM, 32, 400, _classify(data.documented, lambda: mlp(30, 64, 2)),
         clipping=NO_CLIPPING),
    Task("functions' length, MLP, SGD", "basic", SGD, 32, 800, _regress(data.length, lambda: mlp(30, 64, 1)),
         clipping=NO_CLIPPING),
    Task("noisy digits, CNN, SGD", "basic", SGD, 64, 360,
         _classify(data.noisy_digits, lambda: cnn(1, 8, 10, norm=False)), clipping=NO_CLIPPING),
    Task("lines, MLP, AdamW", "basic", ADAMW, 32, 400, _classify(data.lines, lambda: text_mlp(64)),
         clipping=NO_CLIPPING),
    Task("painting, MLP, SGD", "basic", SGD, 64, 1500, _regress(data.painting, lambda: mlp(64, 64, 64, 3)),
         clipping=NO_CLIPPING),
    Task("manual, GPT", "GPT", GPT_ADAMW, 16, 300, _write("manual", 32, _GPT)),
    Task("descriptions, pretrained GPT", "fine-tuned", FINE_TUNE, 16, 200,
         _write("descriptions", 32, _reader("manual"))),
    Task("descriptions, GPT with LoRA", "LoRA", LORA, 16, 200,
         _write("descriptions", 32, lambda: lora(_reader("manual")(), 4))),
    Task("tumors unscaled, MLP, AdamW", "unscaled", ADAMW, 16, 500, _classify(data.tumors, lambda: mlp(30, 64, 2))),
    Task("functions' length unscaled, MLP, SGD", "unscaled", SGD, 32, 600,
         _regress(data.raw_length, lambda: mlp(30, 64, 1))),
    Task("painting, Gaussian, Adam", "Gaussian", ADAM, 64, 1000, _learn(data.painting, lambda: mlp(64, 64, 64, 6),
         gaussian), log_scale=True),
    Task("names, GRU, Adam", "GRU", ADAM, 16, 300,
         _write("names", 24, lambda: Recurrent(nn.Embedding(128, 32), 32, 64, 128, last=False))),
    Task("noisy digits, residual CNN, Nesterov", "batch norm", NESTEROV, 32, 300,
         _classify(data.noisy_digits, lambda: residual_cnn(1, 10, 16, 2))),
    Task("400 lines, MLP, Adam", "overfits", ADAM, 32, 600, _classify(data.lines, lambda: text_mlp(128), few=400)),
    Task("300 noisy digits, MLP, Adam", "overfits", ADAM, 32, 500,
         _classify(data.noisy_digits, lambda: mlp(64, 128, 10), few=300)),
    Task("800 lines, MLP, SGD", "overfits", SGD, 32, 600, _classify(data.lines, lambda: text_mlp(64), few=800)),
    Task("places, CNN, AdamW, bf16", "bf16", ADAMW, 32, 300,
         _classify(data.places, lambda: cnn(3, 8, 16, norm=False)),
         config={"bf16": {"enabled": True}, "gradient_accumulation_steps": 4}),
    # Rules that were made on the tasks above failed on these.
    Task("digits, MLP, Adam", "basic", ADAM, 32, 400, _classify(data.digits, lambda: mlp(64, 64, 64, 10))),
    Task("digits, CNN, SGD", "basic", SGD, 32, 400, _classify(data.digits, lambda: cnn(1, 8, 10, norm=False))),
    Task("digits, CNN, AdamW", "basic", ADAMW, 32, 400, _classify(data.digits, lambda: cnn(1, 8, 10, norm=False))),
    Task("noisy digits, MLP, SGD", "basic", SGD, 64, 400, _classify(data.noisy_digits, lambda: mlp(64, 128, 10))),
    Task("noisy digits, MLP, Adam", "basic", ADAM, 32, 600,
         _classify(data.noisy_digits, lambda: mlp(64, 64, 64, 10))),
    Task("functions, MLP, AdamW", "basic", ADAMW, 25, 300, _classify(data.documented, lambda: mlp(30, 128, 128, 2))),
    Task("functions' length, MLP, Adam", "basic", ADAM, 32, 800,
         _regress(data.length, lambda: mlp(30, 64, 64, 1))),
    Task("tumors, MLP, SGD", "basic", SGD, 16, 300, _classify(data.standardized_tumors, lambda: mlp(30, 64, 2))),
    Task("diabetes, MLP, AdamW", "basic", ADAMW, 16, 300,
         _regress(data.standardized_diabetes, lambda: mlp(10, 64, 1))),
    Task("descriptions, GPT", "GPT", ADAMW, 16, 300, _write("descriptions", 32, partial(GPT, 48, 3, 32))),
    Task("sources, GPT", "GPT", GPT_ADAMW, 16, 600, _write("sources", 32, _GPT)),
    Task("pixels, CNN with batch norm, SGD", "batch norm", SGD, 32, 400,
         _classify(data.pixels, lambda: cnn(3, 8, 16, norm=True))),
    Task("digits row by row, GRU, Adam", "GRU", ADAM, 32, 360,
         _classify(data.digits, lambda: Recurrent(nn.Unflatten(1, (8, 8)), 8, 48, 10, last=True))),
    Task("places in strips, GRU, AdamW", "GRU", ADAMW, 32, 500, _classify(data.places, lambda: nn.Sequential(
         nn.Flatten(), Recurrent(nn.Unflatten(1, (8, 24)), 24, 64, 16, last=True)))),
    Task("manual, GRU, AdamW", "GRU", ADAMW, 16, 400,
         _write("manual", 24, lambda: Recurrent(nn.Embedding(128, 32), 32, 64, 128, last=False))),
    Task("digits, MLP, Adam, 30 epochs", "basic", ADAM, 32, 1350,
         _classify(data.digits, lambda: mlp(64, 64, 64, 10))),
    Task("800 digits, CNN, SGD, 25 epochs", "basic", SGD, 32, 625,
         _classify(data.digits, lambda: cnn(1, 8, 10, norm=False), few=800)),
    Task("1000 functions, MLP, Adam, 25 epochs", "overfits", ADAM, 32, 780,
         _classify(data.documented, lambda: mlp(30, 64, 2), few=1000)),
    Task("1200 places, CNN, AdamW, 20 epochs", "basic", ADAMW, 32, 750,
         _classify(data.places, lambda: cnn(3, 8, 16, norm=False), few=1200)),
    Task("2000 lines, MLP, AdamW, 12 epochs", "overfits", ADAMW, 32, 750,
         _classify(data.lines, lambda: text_mlp(64), few=2000)),
    Task("1500 gaps, MLP, SGD, 20 epochs", "basic", SGD, 32, 940,
         _regress(data.gaps, lambda: mlp(192, 64, 12), few=1500)),
)  # fmt: skip

_HELD_OUT = (
    Task("photographs, CNN, SGD", "basic", SGD, 32, 600, _classify(data.places, lambda: cnn(3, 8, 16, norm=True)),
         clipping=NO_CLIPPING),
    Task("photographs, MLP, Adam", "basic", ADAM, 64, 2000, _regress(data.gaps, lambda: mlp(192, 64, 12)),
         clipping=NO_CLIPPING),
    Task("functions, MLP, SGD", "basic", SGD, 32, 400, _classify(data.documented, lambda: mlp(30, 64, 2)),
         clipping=NO_CLIPPING),
    Task("sources, MLP, SGD, long", "basic", SGD, 32, 3000, _write("sources", 12, bytes_mlp, last_byte),
         clipping=NO_CLIPPING),
    Task("functions' length, deep residual MLP, AdamW", "basic", ADAMW, 32, 600,
         _regress(data.length, lambda: deep(30, 48, 3, 1))),
    Task("scikit-learn code, GPT", "GPT", ADAMW, 16, 300, _write("scikit-learn code", 32, _WIDE_GPT)),
    Task("network code, pretrained GPT", "fine-tuned", {**FINE_TUNE, "params": {"lr": 1e-4, "weight_decay": 0.1}}, 16,
         200, _write("network code", 32, _reader("sources", _WIDE_GPT))),
    Task("manual, GPT with LoRA", "LoRA", LORA, 16, 200,
         _write("manual", 32, lambda: lora(_reader("sources", _WIDE_GPT)(), 8))),
    Task("diabetes unscaled, MLP, Adam", "unscaled", ADAM, 16, 600,
         _regress(data.diabetes, lambda: mlp(10, 64, 32, 1))),
    Task("pixels, CNN, SGD", "unscaled", SGD, 32, 500, _classify(data.pixels, lambda: cnn(3, 8, 16, norm=False))),
    Task("gaps, Gaussian, AdamW", "Gaussian", ADAMW, 64, 1000, _learn(data.gaps, lambda: mlp(192, 64, 24), gaussian),
         log_scale=True),
    Task("noisy digits row by row, GRU, AdamW", "GRU", ADAMW, 32, 360,
         _classify(data.noisy_digits, lambda: Recurrent(nn.Unflatten(1, (8, 8)), 8, 64, 10, last=True))),
    Task("places, residual CNN, Nesterov", "batch norm", NESTEROV, 32, 300,
         _classify(data.places, lambda: residual_cnn(3, 16, 16, 3))),
    Task("300 functions, MLP, AdamW", "overfits", ADAMW, 25, 864,
         _classify(data.documented, lambda: mlp(30, 256, 256, 2), few=300)),
    Task("128 windows of network code, pretrained GPT", "overfits", FINE_TUNE, 16, 480,
         _write("network code", 32, _reader("sources", _WIDE_GPT), few=128)),
    Task("network code, GPT, bf16", "bf16", GPT_ADAMW, 16, 150, _write("network code", 32, _GPT),
         config={"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}),
)  # fmt: skip

TASKS = (*_DEVELOPMENT, *(replace(task, held_out=True) for task in _HELD_OUT))


# -- one task in many forms ------------------------------------------------------------------------------


def _blocks(*, norm: bool = False, frozen: bool = False) -> nn.Sequential:
    """Two hidden blocks, the first of them frozen if asked for."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]

    first = nn.Sequential(*block(30, 64)).requires_grad_(not frozen)
    return nn.Sequential(*first, *block(64, 64), nn.Linear(64, 1))


def _unscaled() -> Pair:
    """Features as they are, and the target of the other forms."""
    return data.raw_length()[0], data.length()[1]


def _form(
    change: str,
    network: Callable[[], nn.Module] = _blocks,
    pair: Callable[[], Pair] = data.length,
    *,
    add: float = 0.0,
    times: float = 1.0,
) -> tuple[Task, float, float]:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return times * mse_loss(model(x), y) + add

    return Task(f"functions' length, {change}", "form", ADAM, 32, 400, _learn(pair, network, loss)), add, times


# What users do to a loss, to data, to a model: a task, what its loss has had added, and what it was multiplied by.
FORMS = (
    _form("as it is"),
    _form("1000 added to the loss", add=1000.0),
    _form("loss times 1000", times=1000.0),
    _form("features unscaled", pair=_unscaled),
    _form("half frozen", partial(_blocks, frozen=True)),
    _form("batch norm", partial(_blocks, norm=True)),
)


def task_of(name: str) -> Task:
    return next(task for task in (*TASKS, *(task for task, _, _ in FORMS)) if task.name == name)
