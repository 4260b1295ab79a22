"""Activations that are computed again: the same training, with fewer of them kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine import initialize
from engine.recompute import recompute


class Block(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(64, 64), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        Block.calls += 1
        out: Tensor = self.dropout(torch.tanh(self.linear(x))) * scale
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.9)
        return x


def run(recomputes: bool) -> tuple[list[float], int, int]:
    """Losses of a few updates, calls of the blocks' forward, and bytes that one forward keeps for its backward."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "AdamW"},
        "redline": {"activation_checkpointing": recomputes, "zero": {"smallest_block": 0}},
    }
    engine = initialize(Model(), config, device="cpu")
    Block.calls, kept, losses = 0, 0, []
    generator = torch.Generator().manual_seed(1)

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    for _ in range(3):
        x = torch.randn(32, 64, generator=generator)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = (engine(x) - x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses, Block.calls, kept


def test_training_is_the_same_bit_for_bit_with_dropout_and_keeps_less() -> None:
    plain, again = run(False), run(True)
    assert again[0] == plain[0]
    assert (plain[1], again[1]) == (9, 18)
    assert again[2] < 0.5 * plain[2]


def test_names_stay_and_evaluation_computes_once() -> None:
    model = Model()
    names = list(model.state_dict())
    recompute(model.blocks[0])
    assert list(model.state_dict()) == names
    Block.calls = 0
    with torch.no_grad():
        model(torch.zeros(1, 64))
    assert Block.calls == 3


def test_a_model_without_blocks_says_that_there_is_nothing_to_compute_again(caplog: pytest.LogCaptureFixture) -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "redline": {"activation_checkpointing": True}}
    with caplog.at_level("WARNING"):
        initialize(nn.Linear(1, 1), config, device="cpu")
    assert "activation_checkpointing: the model has no blocks" in caplog.text
