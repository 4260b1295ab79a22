"""A task for the tutorials: the source text of Python's own standard library, one character after the other.

The text is on every machine that has Python; nothing is downloaded, and another version of Python has another text.
`source_text` is what `redline range-test` wants of a task:

    redline range-test scripts/source_text.py:source_text --config config.json
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CHARACTERS = 96  # the printable ones of ASCII, and the end of a line
CONTEXT = 32  # characters that a sample holds
TRAINING, VALIDATION = 8192, 256  # samples


class Transformer(nn.Module):
    """One block: attention to the characters before, then a layer for each character by itself."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(CHARACTERS, width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attend, self.gather = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.read = nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:  # [samples, CONTEXT] to [samples, CONTEXT, CHARACTERS]
        x = self.embed(characters) + self.place
        samples, context, width = x.shape
        parts = self.attend(self.norm1(x)).view(samples, context, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.gather(seen.transpose(1, 2).reshape(samples, context, width))
        x = x + self.think(self.norm2(x))
        return self.read(self.norm3(x))


def next_character(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all places of all samples, in nats per character."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def source_text() -> tuple[nn.Module, TensorDataset, object, TensorDataset]:
    """Model, training data, loss and validation data, the last from files that the training does not see."""
    training, validation = _texts()
    return Transformer(), _samples(training, TRAINING), next_character, _samples(validation, VALIDATION)


@cache
def _texts() -> tuple[Tensor, Tensor]:
    """Nine of ten files of the standard library, and the tenth, as numbers of characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, path in enumerate(files):
        text = path.read_text(encoding="utf-8", errors="ignore")
        parts[index % 10 == 0].append("".join(c for c in text if c == "\n" or " " <= c <= "~").encode("ascii"))
    training, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in parts)
    return _numbers(training), _numbers(validation)


def _numbers(text: Tensor) -> Tensor:
    """0 for the end of a line, then the printable characters in ASCII's order."""
    return torch.where(text == ord("\n"), 0, text - ord(" ") + 1)


def _samples(text: Tensor, count: int) -> TensorDataset:
    """Pieces at equal distances, and for each of their characters the one that follows."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, count).long()
    pieces = text[starts[:, None] + torch.arange(CONTEXT + 1)]  # [count, CONTEXT + 1]
    return TensorDataset(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())
