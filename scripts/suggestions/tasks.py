"""Small real tasks on which learning rates are judged; all data comes with Python and scikit-learn.

Images (handwritten digits, tiles of two photographs), text (the Python standard library's own sources), tables and
regressions; MLPs, CNNs, small transformers; SGD with momentum and Adam. Rules are made on those that
are not kept aside, and judged on both.
"""

from __future__ import annotations

import ast
import math
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

__all__ = ["TASKS", "Parts", "Task", "task_of"]

Parts = tuple[nn.Module, TensorDataset, Callable[..., Tensor], TensorDataset]
Pair = tuple[Tensor, Tensor]

SGD = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}
ADAM = {"type": "Adam", "params": {"lr": 0.001, "weight_decay": 0.0}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.01}}


@dataclass(frozen=True)
class Task:
    """A model to train, and for how long.

    Attributes:
        name: data, network, optimizer.
        optimizer: the config's section.
        batch_size: samples of an update.
        steps: updates of a training: the budget.
        build: model, training data, loss and validation data, as `redline tune` wants them; initial weights follow
            torch's seed, the data does not.
        aside: whether rules were made without it.
        seeds: trainings of each kind, unless asked otherwise; more where one differs much from the next.
        budget: share of the updates that a suggestion may take.
    """

    name: str
    optimizer: dict[str, object]
    batch_size: int
    steps: int
    build: Callable[[], Parts]
    aside: bool = False
    seeds: int = 5
    budget: float = 0.1

    @property
    def grid(self) -> list[float]:
        """18 learning rates, a factor of 1.97 apart: SGD's from 1e-4 to 10, Adam's from 1e-5 to 1."""
        start = -4 if self.optimizer["type"] == "SGD" else -5
        return [10 ** (start + 5 * index / 17) for index in range(18)]


# -- data ----------------------------------------------------------------------------------------------


def _split(x: Tensor, y: Tensor, held_out: float = 0.2) -> tuple[TensorDataset, TensorDataset]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    count = round(held_out * len(x))
    return TensorDataset(x[order[count:]], y[order[count:]]), TensorDataset(x[order[:count]], y[order[:count]])


@cache
def _digits() -> Pair:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)  # [1797, 64], [1797]


@cache
def _photographs() -> list[Tensor]:
    return [torch.tensor(image, dtype=torch.float32) / 255 for image in load_sample_images().images]  # [427, 640, 3]


@cache
def _tiles(side: int = 8) -> list[Tensor]:
    """Both photographs cut up: [rows, columns, 3, side, side], around zero."""
    return [(photograph.unfold(0, side, side).unfold(1, side, side) - 0.5) for photograph in _photographs()]


@cache
def _places() -> Pair:
    """Tiles, and which of sixteen parts each is from: two by four of either photograph."""
    tiles, labels = [], []
    for index, photograph in enumerate(_tiles()):
        rows, columns = photograph.shape[:2]
        row, column = torch.arange(rows) * 2 // rows, torch.arange(columns) * 4 // columns
        tiles.append(photograph.flatten(0, 1))
        labels.append((8 * index + 4 * row[:, None] + column).flatten())
    return torch.cat(tiles), torch.cat(labels)


@cache
def _gaps() -> Pair:
    """Tiles whose middle, two by two, is missing, and the colours that are missing there."""
    tiles = torch.cat([photograph.flatten(0, 1) for photograph in _tiles()])
    gap = (slice(None), slice(None), slice(3, 5), slice(3, 5))
    colours = tiles[gap].flatten(1)
    tiles = tiles.clone()
    tiles[gap] = 0
    return tiles.flatten(1), colours


@cache
def _painting() -> Pair:
    """Where a pixel of a photograph is, as 64 waves, and its colour."""
    photograph = _photographs()[1][::4, ::4]
    rows, columns, _ = photograph.shape
    place = torch.cartesian_prod(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns))
    waves = place @ (torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 6)
    return torch.cat([waves.sin(), waves.cos()], 1), photograph.reshape(-1, 3)


@cache
def _source(length: int, modules: tuple[str, ...] = ("argparse", "ast", "inspect", "typing", "zipfile")) -> Tensor:
    """Windows of the standard library's own text, a byte a token: [count, length]."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((folder / f"{name}.py").read_bytes() for name in modules)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


_NODES = (
    ast.Name, ast.Attribute, ast.Call, ast.Constant, ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Try,
    ast.With, ast.Return, ast.Raise, ast.Yield, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Subscript,
    ast.Tuple, ast.List, ast.Dict, ast.ListComp, ast.Lambda, ast.JoinedStr, ast.Import, ast.Assert, ast.arg,
    ast.keyword, ast.Expr,
)  # fmt: skip


@cache
def _functions() -> tuple[Tensor, Tensor, Tensor]:
    """Functions of the standard library: counts of 30 kinds of syntax, length in lines, has it a docstring?"""
    rows, lengths, documented = [], [], []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::2]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef):
                kinds = Counter(type(inner) for inner in ast.walk(node))
                rows.append([kinds[kind] for kind in _NODES])
                lengths.append(node.end_lineno - node.lineno + 1)
                documented.append(ast.get_docstring(node) is not None)
    x = torch.tensor(rows, dtype=torch.float32).log1p()
    y = torch.tensor(lengths, dtype=torch.float32).log()
    return (x - x.mean(0)) / (x.std(0) + 1e-6), ((y - y.mean()) / y.std()).unsqueeze(1), torch.tensor(documented).long()


@cache
def _which_module(width: int = 48) -> Pair:
    """Lines of eight modules as bytes, and which module each is from."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("tarfile", "decimal", "datetime", "difflib", "turtle", "socket", "optparse", "statistics")
    lines, labels = [], []
    for label, name in enumerate(names):
        text = (folder / ("_pydecimal.py" if name == "decimal" else f"{name}.py")).read_bytes()
        kept = [line.strip() for line in text.splitlines() if len(line.strip()) > 20][:700]
        lines += [list(line[:width].ljust(width, b"\0")) for line in kept]
        labels += [label] * len(kept)
    return torch.tensor(lines).clamp(max=127), torch.tensor(labels)


# -- networks --------------------------------------------------------------------------------------------


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _cnn(channels: int, side: int, classes: int, *, norm: bool) -> nn.Sequential:
    def block(before: int, after: int) -> list[nn.Module]:
        norms = [nn.BatchNorm2d(after)] if norm else []
        return [nn.Conv2d(before, after, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        nn.Unflatten(1, (channels, side, side)) if channels == 1 else nn.Identity(),
        *block(channels, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, classes),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _deep(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    blocks = [
        _Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))


class _Transformer(nn.Module):
    """Reads bytes, and says of each which comes next."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(128, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, length] -> [batch, length, 128]
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf, device=tokens.device).triu(1)
        x = self.token(tokens) + self.place[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def _next_byte(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (tokens,) = batch
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _last_byte(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (tokens,) = batch
    return cross_entropy(model(tokens[:, :-1]), tokens[:, -1])


# -- tasks -----------------------------------------------------------------------------------------------


def _classify(pair: Callable[[], Pair], network: Callable[[], nn.Module]) -> Callable[[], Parts]:
    def build() -> Parts:
        training, validation = _split(*pair())
        return network(), training, nn.CrossEntropyLoss(), validation

    return build


def _regress(pair: Callable[[], Pair], network: Callable[[], nn.Module]) -> Callable[[], Parts]:
    def build() -> Parts:
        training, validation = _split(*pair())
        return network(), training, nn.MSELoss(), validation

    return build


def _write(length: int, network: Callable[[], nn.Module], loss: Callable[..., Tensor]) -> Callable[[], Parts]:
    def build() -> Parts:
        windows = _source(length)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        validation = windows[order[:200]]
        return network(), TensorDataset(windows[order[200:]]), loss, TensorDataset(validation)

    return build


def _bytes_mlp() -> nn.Module:
    return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), *_mlp(12 * 16, 128, 128))


def _lines() -> nn.Module:
    return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), *_mlp(48 * 16, 64, 8))


def _documented() -> Pair:
    x, _, documented = _functions()
    return x, documented


def _length() -> Pair:
    x, length, _ = _functions()
    return x, length


# The seeds of the digits differ by a tenth of the loss and more.
TASKS = (
    Task("digits, MLP, SGD", SGD, 32, 180, _classify(_digits, lambda: _mlp(64, 128, 10)), seeds=15),
    Task("sources, MLP, SGD", SGD, 32, 2000, _write(13, _bytes_mlp, _last_byte)),
    Task("functions, MLP, Adam", ADAM, 32, 400, _classify(_documented, lambda: _mlp(30, 64, 2))),
    Task("functions' length, MLP, SGD", SGD, 32, 800, _regress(_length, lambda: _mlp(30, 64, 1))),
    Task("painting, MLP, Adam", ADAM, 64, 2000, _regress(_painting, lambda: _mlp(64, 64, 64, 3))),
    Task("digits, MLP, Adam", ADAM, 32, 360, _classify(_digits, lambda: _mlp(64, 128, 128, 10)), seeds=15),
    Task("digits, CNN, SGD", SGD, 64, 720, _classify(_digits, lambda: _cnn(1, 8, 10, norm=False)), seeds=15),
    Task("lines, MLP, AdamW", ADAMW, 32, 400, _classify(_which_module, _lines)),
    Task("sources, MLP, Adam", ADAM, 32, 2000, _write(13, _bytes_mlp, _last_byte)),
    Task("painting, MLP, SGD", SGD, 64, 2000, _regress(_painting, lambda: _mlp(64, 64, 64, 3))),
    Task("functions' length, deep residual MLP, AdamW", ADAMW, 32, 800, _regress(_length, lambda: _deep(30, 48, 3, 1))),
    Task("photographs, CNN, SGD", SGD, 32, 800, _classify(_places, lambda: _cnn(3, 8, 16, norm=True)), aside=True),
    Task("photographs, MLP, Adam", ADAM, 64, 4000, _regress(_gaps, lambda: _mlp(192, 64, 12)), aside=True),
    Task("functions, MLP, SGD", SGD, 32, 400, _classify(_documented, lambda: _mlp(30, 64, 2)), aside=True),
    Task("sources, transformer, AdamW", ADAMW, 16, 500, _write(25, lambda: _Transformer(32, 2, 24), _next_byte),
        aside=True),
    Task("sources, MLP, SGD, long", SGD, 32, 5000, _write(13, _bytes_mlp, _last_byte), aside=True, budget=0.02),
)  # fmt: skip


def task_of(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)
