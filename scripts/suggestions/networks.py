"""The networks of the tasks, their losses, LoRA, and weights that a short training makes and a cache keeps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gaussian_nll_loss, scaled_dot_product_attention

from suggestions.data import windows

__all__ = [
    "GPT", "Recurrent", "bytes_mlp", "cnn", "deep", "gaussian", "last_byte", "lora", "mlp", "next_byte", "pretrained",
    "residual_cnn", "text_mlp",
]  # fmt: skip

PRETRAINED = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "redline-quality"


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, side: int, classes: int, *, norm: bool) -> nn.Sequential:
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


def deep(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    blocks = [
        _Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)))
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))


def residual_cnn(channels: int, classes: int, width: int, blocks: int) -> nn.Sequential:
    """On images of 8 by 8, given flat or not; batch norm after every convolution."""

    def convolution(before: int) -> list[nn.Module]:
        return [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]

    residual = [
        nn.Sequential(_Residual(nn.Sequential(*convolution(width), nn.ReLU(), *convolution(width))), nn.ReLU())
        for _ in range(blocks)
    ]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)) if channels == 1 else nn.Identity(), *convolution(channels), nn.ReLU(),
        nn.MaxPool2d(2), *residual, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip


def bytes_mlp() -> nn.Module:
    return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), *mlp(12 * 16, 128, 128))


def text_mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), *mlp(48 * 16, width, 8))


class Recurrent(nn.Module):
    """A GRU over tokens or rows of numbers; an output for each of them, or for the last one."""

    def __init__(self, inputs: nn.Module, features: int, width: int, outputs: int, *, last: bool) -> None:
        super().__init__()
        self.inputs, self.gru = inputs, nn.GRU(features, width, batch_first=True)
        self.head, self.last = nn.Linear(width, outputs), last

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(self.inputs(x))
        return self.head(hidden[:, -1] if self.last else hidden)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Reads bytes, and predicts which comes next after each: [batch, length] -> [batch, length, 128]."""

    def __init__(self, width: int, layers: int, length: int, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(128, width), nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place[: tokens.shape[1]])))


# -- losses --------------------------------------------------------------------------------------------


def next_byte(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (tokens,) = batch
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def last_byte(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (tokens,) = batch
    return cross_entropy(model(tokens[:, :-1]), tokens[:, -1])


def gaussian(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The negative log-likelihood, per number, of a Gaussian whose mean and log variance the model gives."""
    x, y = batch
    mean, log_variance = model(x).chunk(2, 1)
    return gaussian_nll_loss(mean, y, log_variance.exp(), eps=1e-4)


# -- pretrained weights ----------------------------------------------------------------------------------


class _LoRA(nn.Module):
    """A frozen linear layer and a trained product of low rank, which is zero at first."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, alpha / rank
        self.down = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * (x @ self.down.T @ self.up.T)


def lora(model: GPT, rank: int) -> GPT:
    """The model with all weights frozen, and LoRA (alpha twice the rank) on the linear layers of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.out = _LoRA(block.qkv, rank, 2 * rank), _LoRA(block.out, rank, 2 * rank)
        block.mlp[1], block.mlp[3] = _LoRA(block.mlp[1], rank, 2 * rank), _LoRA(block.mlp[3], rank, 2 * rank)
    return model


def pretrained(make: Callable[[], GPT], text: str, steps: int, length: int = 32) -> GPT:
    """A GPT trained on a corpus for some steps, from the cache after the first time."""
    model = make()
    model.load_state_dict(_weights(make, text, steps, length))
    return model


@cache
def _weights(make: Callable[[], GPT], text: str, steps: int, length: int) -> dict[str, Tensor]:
    data = windows(text, length + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        identity = hashlib.sha256(f"{steps} {model}".encode() + data.numpy().tobytes()).hexdigest()[:16]
        path = PRETRAINED / f"{identity}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            next_byte(model, (data[torch.randint(len(data), (32,))],)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return model.state_dict()
