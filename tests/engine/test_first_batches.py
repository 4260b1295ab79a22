"""Wrong micro-batch sizes and ranks with equal samples are warned of once; what proves nothing is not."""

from __future__ import annotations

import logging
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from redline import Engine, initialize
from redline.distributed.process_group import World
from redline.first_batches import FirstBatches, fingerprint
from redline.log import log
from tests.distributed import run_ranks

SGD = {"type": "SGD", "params": {"lr": 0.01}}


class _Together(World):
    """Ranks in one process: the first to come hand in their values, the last one gets them all."""

    def gather(self, value: Any) -> list[Any]:
        assert self.rank == 0
        return [value, *(each() for each in others)]


def _found(first: FirstBatches) -> Any:
    return first._wrong_size(), first._fingerprint()


others: list[Callable[[], Any]] = []


def warnings_of(*batches: list[Any], micro_batch: int = 4, train_batch_size: int = 8, loader: Any = None) -> str:
    """What rank 0 logs when each rank has had its batches; a batch is one forward's arguments."""
    ranks = []
    for each in batches:
        first = FirstBatches(
            micro_batch=micro_batch, train_batch_size=train_batch_size, num_ranks=len(batches), loader=loader
        )
        for batch in each:
            first.see(*((batch[0], batch[1]) if isinstance(batch, Call) else ((batch,), {})))
        ranks.append(first)
    others[:] = [partial(_found, first) for first in ranks[1:]]
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        ranks[0].compare(_Together(0, 0, len(batches), torch.device("cpu")))
    finally:
        log.removeHandler(handler)
    assert len(records) <= 1
    assert not ranks[0].watching
    return "".join(records)


class Call(NamedTuple):
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(seed))


# -- the size of a micro-batch ---------------------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor
    name: str = "batch"


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        random(8, 3),
        random(2, 3),
        random(1, 3),
        random(8, 3, 5, 5),
        tokens(8, 16),
        Call((random(8, 3), torch.arange(8)), {"flag": True, "t": torch.tensor(3.0)}),
        Call((), {"input_ids": tokens(8, 16), "attention_mask": torch.ones(8, 16), "labels": None}),
        {"x": random(8, 3), "y": torch.arange(8)},
        UserDict(x=random(8, 3)),
        Batch(random(8, 3)),
        Pair(random(8, 3), random(8)),
        deque([random(8, 3), random(8)]),
        SimpleNamespace(x=random(8, 3)),
        numpy.ones((8, 3)),
        random(3, 8).T,
    ],
)
def test_a_micro_batch_of_another_size_is_warned_of(batch: Any) -> None:
    text = warnings_of([batch])
    assert "train_micro_batch_size_per_gpu is 4" in text
    assert "batch_size=engine.train_micro_batch_size_per_gpu()" in text


@pytest.mark.parametrize(
    "batch",
    [
        random(4, 3),
        Call((torch.tensor(2.0), 3, "text", None, {"width": 7})),  # scalars and a config
        Call((random(30, 4, 5),)),  # time first
        tokens(30, 4),  # time first
        tokens(512),  # tokens of all samples
        tokens(1, 512),  # documents packed into a row
        random(4 * 128, 16),  # one row per token
        Call((random(137, 16), tokens(2, 400))),  # nodes and edges
        Call((random(137, 16), torch.eye(137).to_sparse())),
        [random(3, 32, 32, seed=seed) for seed in range(4)],  # a tensor per sample
        [random(3, 32, 32, seed=seed) for seed in range(3)],
        Call((random(8, 3), random(12, 3))),
        random(0, 3),
        object(),
        torch.empty(8, 3, device="meta"),
        torch.nested.nested_tensor([random(2, 3), random(1, 3)], layout=torch.jagged),
    ],
)
def test_inputs_whose_first_dimension_is_not_the_batch_are_not_warned_of(batch: Any) -> None:
    assert not warnings_of([batch])


def test_the_last_short_batch_of_an_epoch_is_not_warned_of() -> None:
    assert not warnings_of([random(4, 3), random(1, 3)])
    assert not warnings_of([random(1, 3), random(4, 3)])
    assert "dimension of 8" in warnings_of([random(8, 3), random(8, 3), random(5, 3)])
    assert not warnings_of([random(137, 3), random(140, 3)]), "sizes that vary are no batch size"
    assert not warnings_of([random(137, 3), random(120, 3), random(101, 3)])


def test_a_micro_batch_of_one_may_stand_for_all_that_a_forward_takes() -> None:
    assert not warnings_of([random(4096, 3)], micro_batch=1, train_batch_size=2)
    assert "dimension of 2" in warnings_of([random(2, 3)], micro_batch=1, train_batch_size=2)


# -- ranks that train on the same samples ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        random(4, 3),
        random(4, 3).bfloat16(),
        random(4, 3).to(torch.float8_e4m3fn),
        random(4, 3).to(torch.complex64),
        random(3, 4).T,
        tokens(4, 16),
        {"x": random(4, 3), "mask": torch.ones(4, 3)},
        Call((random(4, 3), None), {"y": [1, 2]}),
        Batch(random(4, 3)),
        [random(3, 32, 32, seed=seed) for seed in range(4)],
        torch.full((4, 3), torch.nan).index_fill(0, torch.tensor([1]), 2.0),
    ],
)
def test_ranks_with_equal_inputs_are_warned_of(batch: Any) -> None:
    text = warnings_of([batch], [batch])
    assert text.startswith("data: ranks 0-1 train on the same samples")
    assert "initialize(training_data=...)" in text and "DistributedSampler" in text


def test_the_ranks_are_named() -> None:
    one, other = random(4, 3), random(4, 3, seed=1)
    assert warnings_of([one], [other], [other]).startswith("data: ranks 1-2 train on")
    assert not warnings_of([one], [other], [random(4, 3, seed=2)])


def nan_rows(row: int) -> Tensor:
    return torch.full((4, 3), torch.nan).index_fill(0, torch.tensor([row]), 2.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (random(4, 3), random(4, 3).flip(0)),
        (random(4, 3), random(4, 3, seed=1)),
        (nan_rows(1), nan_rows(2)),
        (tokens(4, 16), tokens(4, 16).flip(1)),
        (Call((random(4, 3), "a cat")), Call((random(4, 3), "a dog"))),
        (Call((random(4, 3), tokens(4))), Call((random(4, 3), tokens(4, seed=1)))),
        (torch.ones(4, 3), torch.ones(4, 3)),
        (Call((torch.zeros(4, 3), torch.ones(4))), Call((torch.zeros(4, 3), torch.ones(4)))),
        (torch.tensor([[1, 0], [0, 1]]), torch.tensor([[1, 0], [0, 1]])),  # chance
        (Call((random(99, 16), tokens(2, 40))), Call((random(99, 16), tokens(2, 40)))),  # one graph
        (Call((random(4, 3), object())), Call((random(4, 3), object()))),
        (Call((1.0, {"width": 2})), Call((1.0, {"width": 2}))),
    ],
)
def test_ranks_with_other_inputs_or_with_inputs_that_prove_nothing_are_not_warned_of(ours: Any, theirs: Any) -> None:
    assert "same samples" not in warnings_of([ours], [theirs])


def test_an_input_that_each_forward_has_is_a_choice() -> None:
    grid = random(4, 3)
    assert not warnings_of([grid, grid], [grid, grid])
    assert warnings_of([grid, random(4, 3, seed=1)], [grid, random(4, 3, seed=1)])
    assert not warnings_of([grid, random(4, 3, seed=1)], [grid, random(4, 3, seed=2)])
    large = random(4, 3, 200, 200)
    assert not warnings_of([large], [large + 1])
    assert warnings_of([large], [large.clone()])


def test_looking_at_inputs_reads_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a value was read")

    first = FirstBatches(micro_batch=4, train_batch_size=8, num_ranks=2)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            patch.setattr(Tensor, name, refuse)
        first.see((random(4, 3), tokens(4, 16)), {"mask": torch.ones(4)})
    assert first._fingerprint() is not None


def test_samples_have_one_fingerprint_if_they_are_equal() -> None:
    assert fingerprint((torch.zeros(2), 1)) == fingerprint((torch.zeros(2), 1))
    distinct = [torch.zeros(2), torch.ones(2), (torch.zeros(2), 1), {"text": "a"}, {"text": "b"}, 3, 4, numpy.zeros(2)]
    texts = [fingerprint(each) for each in distinct]
    assert all(one != other for one, other in pairwise(texts))
    assert None not in texts
    assert fingerprint(object()) is None


# -- in an engine ----------------------------------------------------------------------------------------------


def start(**arguments: Any) -> Engine:
    config = {"train_batch_size": 4, "optimizer": SGD}
    return initialize(nn.Linear(3, 1), config, device="cpu", **arguments)


def train(engine: Engine, batches: Any) -> None:
    for x in batches:
        engine.backward(engine(x).pow(2).mean())
        engine.step()


def test_a_loader_with_another_batch_size_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = start()
    engine.eval()
    engine(random(7, 3))
    engine.train()
    with torch.no_grad():
        engine(random(7, 3))
    train(engine, [random(6, 3)] * 3)
    assert caplog.text.count("first dimension of 6, and train_micro_batch_size_per_gpu is 4") == 1


def test_batches_of_the_engines_loader_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = start(training_data=list(random(3, 3)))
    train(engine, engine.training_dataloader)
    assert engine.global_steps == 1
    assert "first dimension" not in caplog.text


class Generated(IterableDataset[Tensor]):
    """One stream for all ranks."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(random(8, 3))


def logged_by_rank() -> dict[str, list[str]]:
    """What this rank's log has of each way to data; the filter for rank 0 taken off."""
    found: dict[str, list[str]] = {}

    def record(name: str, data: Any, config: dict[str, Any] | None = None) -> None:
        config = {"train_batch_size": 4, "optimizer": SGD, **(config or {})}
        own = isinstance(data, IterableDataset | TensorDataset | list)
        engine = initialize(nn.Linear(3, 1), config, training_data=data if own else None, device="cpu")
        found[name] = []
        handler = logging.Handler()
        handler.emit = lambda record: found[name].append(record.getMessage())  # type: ignore[method-assign]
        log.addHandler(handler)
        train(engine, engine.training_dataloader if own else (x for (x,) in data))
        log.removeHandler(handler)

    dataset = TensorDataset(random(16, 3))
    record("plain", DataLoader(dataset, batch_size=2))
    record("sampler", DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset)))
    record("global batch", DataLoader(dataset, batch_size=4))
    record("engine", list(random(16, 3)))
    record("stream", Generated())
    record("stream not split", Generated(), {"redline": {"data": {"split_by_rank": True}}})
    return found


def test_two_ranks_on_one_loader_are_warned_of_once() -> None:
    found, _ = run_ranks(logged_by_rank, 2)
    warned = {name: [line for line in lines if line.startswith("data: ")] for name, lines in found.items()}
    assert {name: len(lines) for name, lines in warned.items()} == {
        "plain": 1,
        "sampler": 0,
        "global batch": 1,
        "engine": 0,
        "stream": 0,
        "stream not split": 1,
    }
    assert "ranks 0-1 train on the same samples" in warned["plain"][0]
    assert "first dimension of 4 on ranks 0-1" in warned["global batch"][0]
    assert "redline.data.split_by_rank" in warned["stream not split"][0]
