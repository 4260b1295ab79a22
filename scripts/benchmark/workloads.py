"""The models that are trained and the batches they see: made up, on the device, the same for every subject."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

__all__ = ["WORKLOADS", "Workload"]

Batch = tuple[Tensor, Tensor]
BATCHES = 8  # different ones, in turn


@dataclass(frozen=True)
class Workload:
    """Something to train.

    Attributes:
        build: makes the model, without a seed.
        batch: samples per micro-batch.
        draw: batch size and random generator to inputs and targets, on the CPU.
        loss: of the model's output and the targets; a mean.
    """

    build: Callable[[], nn.Module]
    batch: int
    draw: Callable[[int, torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]

    def model(self) -> nn.Module:
        """The model, with the same weights each time."""
        torch.manual_seed(0)
        return self.build()

    def batches(self, rank: int, device: str) -> list[Batch]:
        """The batches of a rank."""
        generator = torch.Generator().manual_seed(1 + rank)
        drawn = [self.draw(self.batch, generator) for _ in range(BATCHES)]
        return [(x.to(device), y.to(device)) for x, y in drawn]


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, length, width / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's shape: learned positions, head tied to the token embedding, no dropout."""

    def __init__(self, layers: int, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, length] -> [batch, length, vocabulary]
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _mlp(*widths: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    return build


def _images(batch: int, generator: torch.Generator) -> Batch:
    # Large values: gradients beyond the clipping norm, so that a subject that does not clip is found out.
    return 5 * torch.randn(batch, 64, generator=generator), torch.randint(10, (batch,), generator=generator)


def _text(length: int, vocabulary: int) -> Callable[[int, torch.Generator], Batch]:
    def draw(batch: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    return draw


def _of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _gpt(layers: int, width: int, heads: int, length: int, vocabulary: int, batch: int) -> Workload:
    return Workload(lambda: GPT(layers, width, heads, length, vocabulary), batch, _text(length, vocabulary), _of_tokens)


WORKLOADS = {
    "MLP 64-64-10": Workload(_mlp(64, 64, 10), 8, _images, cross_entropy),
    "digits MLP 64-256-256-10": Workload(_mlp(64, 256, 256, 10), 64, _images, cross_entropy),
    "tiny GPT 1 x 32": _gpt(1, 32, 2, 16, 256, batch=2),
    "GPT 4 x 256": _gpt(4, 256, 4, 128, 256, batch=8),
    "GPT-2 12 x 768": _gpt(12, 768, 12, 1024, 50304, batch=4),
}
