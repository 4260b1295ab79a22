"""Train on Ray Train's workers: python train_ray.py. On GPUs give ScalingConfig(use_gpu=True)."""

import torch
from ray.train import ScalingConfig, report
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import TensorDataset

from redline import initialize

CONFIG = {"train_batch_size": 32, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}


def train() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    engine = initialize(nn.Linear(4, 1), CONFIG, training_data=dataset)
    for _ in range(20):
        for inputs, targets in engine.training_dataloader:
            loss = engine.backward(nn.functional.mse_loss(engine(inputs), targets))
            engine.step()
    loss = engine.evaluate(dataset, nn.functional.mse_loss)
    report({"loss": loss, "ranks": engine.world_size})
    if engine.global_rank == 0:
        print(f"{engine.world_size} ranks, loss {loss:.4f}")


if __name__ == "__main__":
    TorchTrainer(train, scaling_config=ScalingConfig(num_workers=2)).fit()
