"""A script's own DataLoader, divided among the ranks and resumed in the middle."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from redline import EngineError
from redline.data import Loader
from redline.distributed.process_group import World
from redline.loaders import divide
from tests.distributed import run_ranks
from tests.tiny import X, Y, make_engine, train

CPU = torch.device("cpu")
DATA = TensorDataset(torch.arange(22))


class Stream(IterableDataset[Any]):
    """Whole batches of a stream."""

    def __iter__(self) -> Iterator[Any]:
        return (torch.arange(first, first + 2) for first in range(0, 12, 2))


class PythonShuffled(Sampler[int]):
    """Draws from Python's generator, as many scripts' samplers do."""

    def __init__(self) -> None:
        self.order = list(range(22))

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(self.order, 22))


def shares(make: Callable[[], DataLoader[Any]], ranks: int, *, even: bool = True) -> list[list[int]]:
    """The samples of one epoch on each rank."""
    return [samples(divide(make(), World(rank, rank, ranks, CPU), seed=3, even=even)) for rank in range(ranks)]


def samples(loader: Loader) -> list[int]:
    return [int(x) for batch in loader for x in torch.as_tensor(batch[0] if isinstance(batch, list) else batch)]


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(DATA, batch_size=4),
    "shuffled": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "a subset": lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(22))),
    "a generator": lambda: DataLoader(
        DATA, batch_size=4, sampler=SubsetRandomSampler(range(22), generator=torch.Generator().manual_seed(8))
    ),
    "Python's generator": lambda: DataLoader(DATA, batch_size=4, sampler=PythonShuffled()),
    "a batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, drop_last=False)),
    "one by one": lambda: DataLoader(range(22), batch_size=None, collate_fn=lambda x: torch.tensor([x])),
    "workers": lambda: DataLoader(DATA, batch_size=4, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_ranks_share_what_a_loader_reads(kind: str) -> None:
    for ranks in (1, 2, 3):
        once = Counter(sample for share in shares(LOADERS[kind], ranks, even=False) for sample in share)
        assert once == Counter(range(22))
        parts = shares(LOADERS[kind], ranks)
        assert len({len(part) for part in parts}) == 1 or kind == "a batch sampler"
        assert set().union(*parts) == set(range(22))
        assert sum(map(len, parts)) < 22 + 2 * ranks


def test_each_epoch_has_an_order_of_its_own_that_is_the_same_on_all_ranks() -> None:
    for kind in ("shuffled", "a subset", "Python's generator"):
        pair = [divide(LOADERS[kind](), World(rank, rank, 2, CPU), seed=3) for rank in range(2)]
        first, second = ([samples(loader) for loader in pair] for _ in range(2))
        assert first != second
        assert sorted(first[0] + first[1]) == sorted(second[0] + second[1]) == list(range(22))


def test_a_sampler_keeps_its_own_choice() -> None:
    weights = [0.0] * 11 + [1.0] * 11
    parts = shares(lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(weights, 40)), 2)
    assert all(len(part) == 20 and min(part) >= 11 for part in parts)


def test_a_distributed_sampler_has_divided_the_samples_already() -> None:
    def part(rank: int) -> list[int]:
        sampler: DistributedSampler[Any] = DistributedSampler(DATA, num_replicas=2, rank=rank, shuffle=False)
        return samples(divide(DataLoader(DATA, batch_size=4, sampler=sampler), World(rank, rank, 2, CPU), seed=0))

    assert part(0) == list(range(0, 22, 2))
    assert part(1) == list(range(1, 22, 2))


def test_a_stream_of_batches_is_divided_by_batches() -> None:
    assert shares(lambda: DataLoader(Stream(), batch_size=None), 2, even=False) == [
        [0, 1, 4, 5, 8, 9],
        [2, 3, 6, 7, 10, 11],
    ]


@pytest.mark.parametrize("kind", ["in order", "shuffled", "a subset", "a batch sampler", "workers"])
def test_an_epoch_is_resumed_in_the_middle(kind: str) -> None:
    def make() -> Loader:
        return divide(LOADERS[kind](), World(1, 1, 2, CPU), seed=3)

    whole, interrupted, resumed = make(), make(), make()
    expected = [str(batch) for _ in range(2) for batch in whole]
    begun = [str(batch) for batch in islice(interrupted, 2)]
    resumed.load_state_dict(interrupted.state_dict())
    assert begun + [str(batch) for _ in range(2) for batch in resumed] == expected


def test_drawing_an_order_leaves_the_random_numbers_of_training_alone() -> None:
    loader = divide(LOADERS["a subset"](), World(0, 0, 1, CPU), seed=3)
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # what every pass draws, see `Loader`
    expected = torch.rand(1)
    torch.manual_seed(1)
    next(iter(loader))
    assert torch.rand(1) == expected


def test_the_engine_trains_on_a_prepared_loader_and_continues_in_its_middle(tmp_path: Any) -> None:
    def run(steps: int, load: bool = False, save: bool = False) -> list[float]:
        engine = make_engine(redline={"progress": False})
        loader = engine.prepare(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
        assert engine.training_dataloader is loader
        if load:
            engine.load_checkpoint(tmp_path)
        losses: list[float] = []
        while engine.global_steps < steps:
            for x, y in loader:
                loss = engine.backward(torch.nn.functional.mse_loss(engine(x), y))
                engine.step()
                losses.append(loss.item())
                if engine.global_steps == steps:
                    break
        if save:
            engine.save_checkpoint(tmp_path)
        return losses

    whole = run(10)
    assert run(3, save=True) + run(10, load=True) == whole


def prepared_shares() -> list[float]:
    engine = make_engine()
    loader = engine.prepare(DataLoader(TensorDataset(X), batch_size=4, shuffle=True))
    return [float(row[0]) for (x,) in loader for row in x]


def test_ranks_of_a_run_train_on_different_samples() -> None:
    first, second = run_ranks(prepared_shares, 2)
    assert sorted(first + second) == sorted(X[:, 0].tolist())


def test_what_cannot_be_prepared_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(EngineError, match="got a TensorDataset; expected a torch DataLoader"):
        engine.prepare(DATA)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"batch_size 3, and train_micro_batch_size_per_gpu is 4"):
        engine.prepare(DataLoader(DATA, batch_size=3))
    train(engine, 1)


def test_a_second_prepared_loader_is_not_the_one_that_checkpoints_save(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    first = engine.prepare(DataLoader(DATA, batch_size=4, sampler=SequentialSampler(DATA)))
    engine.prepare(DataLoader(DATA, batch_size=4))
    assert engine.training_dataloader is first
    assert "first loader only" in caplog.text
