"""Handwritten digits: a task for `redline tune` and `redline range-test`, and a training script.

The 1,797 images of 8 x 8 pixels come with scikit-learn; nothing is downloaded. `digits` is the task, `train` the
training loop:

    redline range-test scripts/digits.py:digits --config configs/digits.json
    python scripts/digits.py --config configs/digits.json
    torchrun --nproc-per-node 2 scripts/digits.py --config configs/digits_large_batch.json
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from redline import Engine, initialize

TRAINING = 1280  # images: ten batches of 128, or forty of 32; the other 517 are held out


def digits() -> tuple[nn.Module, TensorDataset, nn.Module, TensorDataset]:
    """Model, training data, loss and validation data."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16  # [1797, 64], 0 to 1
    y = torch.tensor(labels)[order]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    training = TensorDataset(x[:TRAINING], y[:TRAINING])
    validation = TensorDataset(x[TRAINING:], y[TRAINING:])
    return model, training, nn.CrossEntropyLoss(), validation


def train(config: str | Path | dict[str, Any], *, epochs: int, seed: int) -> list[dict[str, float]]:
    """Train, and return the validation loss and accuracy after each epoch."""
    torch.manual_seed(seed)
    model, data, loss_fn, validation = digits()
    engine = initialize(model, config, training_data=data)
    assert engine.training_dataloader is not None
    history = []
    for _ in range(epochs):
        for x, y in engine.training_dataloader:
            loss = loss_fn(engine(x), y)
            engine.backward(loss)
            engine.step()
        history.append(evaluate(engine, validation))
    return history


@torch.no_grad()
def evaluate(engine: Engine, validation: TensorDataset) -> dict[str, float]:
    """Mean loss and accuracy of the engine's model over the held-out images."""
    x, y = (tensor.to(engine.device) for tensor in validation.tensors)
    engine.eval()
    logits = engine(x)  # [517, 10]
    engine.train()
    loss = nn.functional.cross_entropy(logits, y)
    return {"loss": float(loss), "accuracy": float((logits.argmax(1) == y).float().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on the digits, on one rank or on several under torchrun.")
    parser.add_argument("--config", required=True, metavar="C", help="DeepSpeed's JSON")
    parser.add_argument(
        "--epochs", type=int, default=10, metavar="N", help="passes over the data (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs, one after the other (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results here, as JSON")
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        runs.append(train(options.config, epochs=options.epochs, seed=seed))
        logging.getLogger("redline").setLevel(logging.WARNING)  # the first has logged its summary
        if is_rank_0():
            print(
                "seed {}: validation loss {loss:.4f}, accuracy {accuracy:.1%}".format(seed, **runs[-1][-1]), flush=True
            )
    if options.out and is_rank_0():
        options.out.write_text(json.dumps(runs) + "\n")


def is_rank_0() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


if __name__ == "__main__":
    main()
