"""A metric over data: each sample counts once on any number of ranks, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from redline import Engine, EngineError, initialize
from tests.distributed import run_ranks
from tests.tiny import make_engine, train

DIMS = 4


def rows(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(size)
    return TensorDataset(torch.randn(size, DIMS, generator=generator), torch.randn(size, 1, generator=generator))


def expected(engine: Engine, size: int) -> float:
    x, y = rows(size).tensors
    with torch.no_grad():
        return float(nn.functional.mse_loss(engine.module(x), y))


class Mean:
    """What torchmetrics' MeanSquaredError does: sums on each rank, joined by compute()."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total = torch.zeros(2)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += torch.stack([(outputs - targets).square().sum(), torch.tensor(float(len(targets)))])

    def compute(self) -> float:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.total)
        return float(self.total[0] / self.total[1])


def squares(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"each": (outputs - targets).square(), "mean": nn.functional.mse_loss(outputs, targets)}


def measure(stage: int, sizes: list[int]) -> list[list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIMS, 8), nn.Tanh(), nn.Linear(8, 1))
    bare = nn.Sequential(nn.Linear(DIMS, 8), nn.Tanh(), nn.Linear(8, 1))
    bare.load_state_dict(model.state_dict())
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, "zero_optimization": {"stage": stage}}
    engine = initialize(model, config, device="cpu")
    found = []
    for size in sizes:
        x, y = rows(size).tensors
        answer = float(nn.functional.mse_loss(bare(x), y))
        both = engine.evaluate(DataLoader(rows(size), batch_size=3, shuffle=True), squares)
        plain = engine.evaluate(rows(size), nn.functional.mse_loss)
        found.append([answer, plain, both["each"], both["mean"], engine.evaluate(rows(size), Mean())])
    return found


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_counts_once(stage: int, ranks: int) -> None:
    for of_rank in run_ranks(measure, ranks, stage, [1, 2, 11, 24]):
        for answer, *found in of_rank:
            assert found == pytest.approx([answer] * 4, rel=1e-5)


def test_training_goes_on_as_if_there_had_been_no_evaluation() -> None:
    def losses(evaluates: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(DIMS, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
        model[2].eval()
        config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}}
        engine = initialize(model, config, device="cpu")
        found = train(engine, 2)
        if evaluates:
            engine.evaluate(DataLoader(rows(9), batch_size=2, shuffle=True), nn.functional.mse_loss)
        assert engine.training and engine.module[1].training and not engine.module[2].training
        return found + train(engine, 2)

    assert losses(True) == losses(False)


class Named(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": torch.full((DIMS,), float(index))}


def test_batches_of_other_kinds_have_a_forward_of_their_own() -> None:
    engine = make_engine()
    x = torch.arange(5.0).expand(DIMS, 5).T
    assert engine.evaluate(Named(), torch.mean) == pytest.approx(engine.module(x).mean().item(), rel=1e-5)
    total = engine.evaluate(TensorDataset(x), lambda x: x.sum(1), forward=lambda engine, batch: batch[0])
    assert total == pytest.approx(float(x.sum(1).mean()))
    with pytest.raises(EngineError, match="give forward="):
        engine.evaluate(TensorDataset(x), torch.mean)


def test_a_metric_that_is_none_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(EngineError, match="as the metric"):
        engine.evaluate(rows(4), "accuracy")
    with pytest.raises(EngineError, match="the metric returned str"):
        engine.evaluate(rows(4), lambda outputs, targets: "good")
    assert engine.training and torch.is_grad_enabled()


def test_data_that_are_divided_already_or_empty_are_refused() -> None:
    engine = make_engine()
    loader = engine.prepare(DataLoader(rows(8), batch_size=4))
    with pytest.raises(EngineError, match="give the DataLoader or the dataset itself"):
        engine.evaluate(loader, nn.functional.mse_loss)
    with pytest.raises(EngineError, match="empty"):
        engine.evaluate(rows(0), nn.functional.mse_loss)


def evaluate_unequally(numbers: list[int], then: str, folder: str) -> str:
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 3}}
    engine = initialize(nn.Sequential(nn.Linear(DIMS, 8), nn.Linear(8, 1)), config, device="cpu")
    x, _ = rows(4).tensors
    try:
        with torch.no_grad():
            for _ in range(numbers[engine.global_rank]):
                engine(x)
        if then == "save":
            engine.save_checkpoint(folder)
        elif then == "evaluate":
            engine.evaluate(rows(4), nn.functional.mse_loss)
        else:
            engine.backward(engine(x).mean())
    except EngineError as error:
        dist.destroy_process_group()  # as the end of a script that does not catch it
        return str(error)
    return ""


@pytest.mark.parametrize("numbers", [[2, 3], [0, 1]], ids=["one more", "alone"])
@pytest.mark.parametrize(
    ("then", "named"), [("save", "save_checkpoint"), ("evaluate", "evaluate"), ("train", "forward to train")]
)
def test_at_stage_3_ranks_that_evaluate_unequal_numbers_of_batches_are_told(
    numbers: list[int], then: str, named: str, tmp_path: Path
) -> None:
    first, second = run_ranks(evaluate_unequally, 2, numbers, then, str(tmp_path), fresh=True)
    assert second.startswith(f"rank 0 called {named}, rank 1 called forward to evaluate: at ZeRO stage 3")
    assert first == second or "lost" in first  # a forward to train is under way already
