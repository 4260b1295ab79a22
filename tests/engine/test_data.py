"""Each process's share of the data: disjoint, whole, shuffled alike; seen without any process but this one."""

from __future__ import annotations

from collections import Counter, namedtuple
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from engine.data import Loader, build_loader, to_device
from engine.distributed import World

CPU = torch.device("cpu")


class Counting(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def numbers(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def loaders(dataset: Any, world_size: int, **arguments: Any) -> list[Loader]:
    return [build_loader(dataset, World(rank, rank, world_size, CPU), **arguments) for rank in range(world_size)]


def epoch(loader: Loader) -> list[int]:
    """The samples of one pass, in their order."""
    return [int(number) for batch in loader for number in (batch[0] if isinstance(batch, list) else batch)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shares_are_disjoint_and_cover_the_data(world_size: int) -> None:
    shares = [epoch(loader) for loader in loaders(numbers(24), world_size, micro_batch=4)]
    assert {len(share) for share in shares} == {24 // world_size}
    assert Counter(chain(*shares)) == Counter(range(24))


def test_shares_of_a_number_that_does_not_divide_are_filled_up_to_equal_length() -> None:
    shares = [epoch(loader) for loader in loaders(numbers(9), 2, micro_batch=2)]
    assert [len(share) for share in shares] == [5, 5]
    assert set(chain(*shares)) == set(range(9))


def test_each_epoch_has_its_own_order_and_every_process_shuffles_alike() -> None:
    ours, theirs = loaders(numbers(24), 2, micro_batch=4)
    orders = [(epoch(ours), epoch(theirs)) for _ in range(3)]
    assert len({tuple(mine) for mine, _ in orders}) == 3
    assert all(not set(mine) & set(other) for mine, other in orders)


def test_the_order_depends_on_the_epoch_and_on_no_random_state() -> None:
    torch.manual_seed(1)
    first = epoch(loaders(numbers(24), 1, micro_batch=4)[0])
    torch.manual_seed(2)
    assert epoch(loaders(numbers(24), 1, micro_batch=4)[0]) == first


def test_a_saved_epoch_is_gone_on_with() -> None:
    loader, resumed = loaders(numbers(24), 1, micro_batch=4)[0], loaders(numbers(24), 1, micro_batch=4)[0]
    epoch(loader)
    epoch(loader)
    assert (loader.epoch, loader.samples) == (2, 0)
    resumed.load_state_dict(loader.state_dict())
    assert epoch(resumed) == epoch(loader)


def test_without_shuffling_the_order_is_the_datasets() -> None:
    (loader,) = loaders(numbers(10), 1, micro_batch=4, shuffle=False)
    assert epoch(loader) == list(range(10))
    assert epoch(loader) == list(range(10))


def test_micro_batches_have_their_size_and_the_last_one_what_is_left() -> None:
    assert [len(x) for (x,) in loaders(numbers(10), 1, micro_batch=4)[0]] == [4, 4, 2]
    assert [len(x) for (x,) in loaders(numbers(10), 1, micro_batch=4, drop_last=True)[0]] == [4, 4]
    assert len(loaders(numbers(10), 1, micro_batch=4)[0]) == 3


def test_a_collate_function_makes_the_batches() -> None:
    (loader,) = loaders(numbers(4), 1, micro_batch=2, collate_fn=len, shuffle=False)
    assert list(loader) == [2, 2]


def test_an_iterable_dataset_is_dealt_out_in_its_own_order() -> None:
    assert epoch(loaders(Counting(6), 1, micro_batch=4)[0]) == [0, 1, 2, 3, 4, 5]
    ours, theirs = loaders(Counting(8), 2, micro_batch=4)
    assert (epoch(ours), epoch(theirs)) == ([0, 2, 4, 6], [1, 3, 5, 7])


def test_the_processes_shares_of_an_iterable_dataset_have_one_length() -> None:
    ours, theirs = loaders(Counting(9), 2, micro_batch=4)
    assert (epoch(ours), epoch(theirs)) == ([0, 2, 4, 6], [1, 3, 5, 7])


Pair = namedtuple("Pair", "x y")


def test_every_tensor_of_a_nested_batch_goes_to_the_device() -> None:
    meta = torch.device("meta")
    x = torch.ones(2)
    moved = to_device({"pair": Pair(x, [x, (x, "text")]), "number": 3, "none": None}, meta)
    assert type(moved["pair"]) is Pair
    assert moved["pair"].x.device == meta
    assert moved["pair"].y[0].device == meta
    assert moved["pair"].y[1][0].device == meta
    assert isinstance(moved["pair"].y[1], tuple)
    assert (moved["pair"].y[1][1], moved["number"], moved["none"]) == ("text", 3, None)
