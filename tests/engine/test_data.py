"""Each rank's part of the data: disjoint, whole, shuffled alike, and resumed where it was left."""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice, repeat
from math import ceil
from typing import Any

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, TensorDataset

from redline import EngineError, initialize
from redline.data import Loader, build_loader
from redline.distributed.process_group import World, join_world
from redline.log import log
from tests.distributed import run_ranks

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


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_those_of_torchs_distributed_sampler_as_deepspeed_uses_it(world_size: int, drop_last: bool) -> None:
    data = numbers(23)
    for rank, loader in enumerate(loaders(data, world_size, micro_batch=4, drop_last=drop_last)):
        sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=world_size, rank=rank)
        theirs = DataLoader(data, batch_size=4, sampler=sampler, drop_last=drop_last)
        for number in range(2):
            sampler.set_epoch(number)
            assert [x.tolist() for (x,) in loader] == [x.tolist() for (x,) in theirs]
        assert len(loader) == len(theirs)


def test_the_order_depends_on_seed_and_epoch_and_on_no_random_state() -> None:
    (loader,) = loaders(numbers(24), 1, micro_batch=4)
    orders = [epoch(loader), epoch(loader), epoch(loaders(numbers(24), 1, micro_batch=4, seed=7)[0])]
    assert len(set(map(tuple, orders))) == 3
    torch.manual_seed(2)
    assert epoch(loaders(numbers(24), 1, micro_batch=4)[0]) == orders[0]
    (in_order,) = loaders(numbers(10), 1, micro_batch=4, shuffle=False)
    assert epoch(in_order) == epoch(in_order) == list(range(10))


def test_uneven_shares_give_each_sample_once() -> None:
    shares = [epoch(loader) for loader in loaders(numbers(7), 3, micro_batch=2, shuffle=False, even=False)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


# -- resuming inside an epoch ----------------------------------------------------------------------------------


def batches_of(loader: Loader, count: int) -> list[Any]:
    """The next micro-batches, over as many epochs as it takes."""
    return list(islice(chain.from_iterable(repeat(loader)), count))


def fills_a_batch(size: int, world_size: int, micro_batch: int, drop_last: bool) -> bool:
    """Whether an epoch has a micro-batch; one that has none is refused."""
    return not drop_last or ceil(size / world_size) >= micro_batch


def resumed(loader: Loader, fresh: Loader) -> Loader:
    fresh.load_state_dict(copy.deepcopy(loader.state_dict()))
    return fresh


def shapes(**more: Any) -> Any:
    """Sizes that divide and sizes that do not."""
    return {
        "size": st.integers(1, 40),
        "world_size": st.integers(1, 4),
        "micro_batch": st.integers(1, 5),
        "drop_last": st.booleans(),
        **more,
    }


@given(**shapes(done=st.integers(0, 25)))
def test_an_interrupted_sequence_of_batches_equals_an_uninterrupted_one(
    size: int, world_size: int, micro_batch: int, drop_last: bool, done: int
) -> None:
    assume(fills_a_batch(size, world_size, micro_batch, drop_last))
    arguments = {"micro_batch": micro_batch, "drop_last": drop_last, "collate_fn": list}
    whole, first, second = (loaders(range(size), world_size, **arguments) for _ in range(3))
    for never, before, after in zip(whole, first, second):
        expected = batches_of(never, done + 12)
        assert batches_of(before, done) == expected[:done]
        assert batches_of(resumed(before, after), 12) == expected[done:]
        assert after.state_dict() == never.state_dict()


@given(**shapes())
def test_processes_have_equal_batches_and_together_each_sample(
    size: int, world_size: int, micro_batch: int, drop_last: bool
) -> None:
    assume(fills_a_batch(size, world_size, micro_batch, drop_last))
    arguments = {"micro_batch": micro_batch, "drop_last": drop_last, "collate_fn": list}
    passes = [list(loader) for loader in loaders(range(size), world_size, **arguments)]
    assert len({tuple(map(len, each)) for each in passes}) == 1
    seen = Counter(chain(*chain(*passes)))
    share = ceil(size / world_size)
    dealt = share // micro_batch * micro_batch if drop_last else share
    assert seen.total() == dealt * world_size
    if not drop_last:
        assert seen.keys() == set(range(size))
        assert max(seen.values()) - min(seen.values()) <= 1


@settings(max_examples=40)
@given(**shapes(then=st.integers(1, 4), smaller=st.integers(1, 5), done=st.integers(0, 10)))
def test_another_number_of_processes_sees_what_is_left_and_nothing_else(
    size: int, world_size: int, micro_batch: int, drop_last: bool, then: int, smaller: int, done: int
) -> None:
    before = loaders(range(size), world_size, micro_batch=micro_batch, collate_fn=list)
    done = min(done, len(before[0]) - 1)
    seen = set(chain(*chain(*(batches_of(loader, done) for loader in before))))
    after = [resumed(before[0], loader) for loader in loaders(range(size), then, micro_batch=smaller, collate_fn=list)]
    rest = [list(loader) for loader in after]
    assert len({tuple(map(len, each)) for each in rest}) == 1
    left = list(chain(*chain(*rest)))
    filled_up = -(size - len(seen)) % then
    assert len(left) == size - len(seen) + filled_up
    assert seen | set(left) == set(range(size))
    assert {loader.epoch for loader in after} == {1}


def test_a_pass_that_is_broken_off_is_over() -> None:
    loader, other = (loaders(numbers(24), 1, micro_batch=4)[0] for _ in range(2))
    next(iter(loader))
    epoch(other)
    assert epoch(loader) == epoch(other)


def test_an_iterator_under_way_goes_on_after_another_pass_and_a_loaded_state() -> None:
    loader, other = (loaders(numbers(24), 1, micro_batch=4)[0] for _ in range(2))
    expected = [x.tolist() for (x,) in other]
    under_way = iter(loader)
    found = [next(under_way)[0].tolist()]
    state = copy.deepcopy(loader.state_dict())
    list(loader)
    loader.load_state_dict(state)
    assert found + [x.tolist() for (x,) in under_way] == expected
    assert epoch(loader) == epoch(other)


def test_another_seed_in_the_middle_of_an_epoch_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    loader, fresh = (loaders(numbers(24), 1, micro_batch=4, seed=seed)[0] for seed in (1, 2))
    batches_of(loader, 2)
    resumed(loader, fresh)
    assert "data: seed was 1, is 2 since the state was saved" in caplog.text


def test_a_sampler_of_ones_own_takes_the_place_of_the_order() -> None:
    loader, fresh = (loaders(numbers(9), 1, micro_batch=2, sampler=[8, 6, 4, 2, 0])[0] for _ in range(2))
    assert epoch(loader) == [8, 6, 4, 2, 0]
    assert len(loader) == 3
    next(iter(loader))
    assert epoch(resumed(loader, fresh)) == [4, 2, 0]


def test_a_pass_draws_one_number_from_the_global_generator_and_its_rest_none() -> None:
    data, loader = numbers(8), loaders(numbers(8), 1, micro_batch=4)[0]
    torch.manual_seed(1)
    list(DataLoader(data, batch_size=4))
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), expected)
    list(resumed(loader, loaders(data, 1, micro_batch=4)[0]))
    assert torch.equal(torch.get_rng_state(), expected)


# -- workers ---------------------------------------------------------------------------------------------------


class Drawing(Dataset[Any]):
    """Samples that draw from every generator."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return index, random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_workers_draw_the_same_after_an_interruption_whatever_was_read_ahead() -> None:
    whole, before, after, alone = (
        loaders(Drawing(), 1, micro_batch=4, collate_fn=list, workers=workers)[0] for workers in (2, 2, 2, 1)
    )
    expected = batches_of(whole, 8)
    assert batches_of(before, 3) == expected[:3]
    assert batches_of(resumed(before, after), 5) == expected[3:]
    assert batches_of(alone, 8) == expected
    assert len({sample[1:] for batch in expected for sample in batch}) == 30
    first, second = (list(each) for each in loaders(Drawing(), 2, micro_batch=4, collate_fn=list, workers=1))
    assert not {sample[1] for sample in chain(*first)} & {sample[1] for sample in chain(*second)}


def test_a_dataset_that_fetches_whole_batches_does_so_in_a_worker() -> None:
    class Whole(Drawing):
        def __getitems__(self, indices: list[int]) -> list[str]:
            return [f"sample {index}" for index in indices]

    assert next(iter(loaders(Whole(), 1, micro_batch=2, collate_fn=list, shuffle=False, workers=1)[0])) == [
        "sample 0",
        "sample 1",
    ]


# -- iterable datasets -----------------------------------------------------------------------------------------


@given(**shapes(done=st.integers(0, 10)))
def test_an_interrupted_iterable_dataset_is_read_on_to_its_place(
    size: int, world_size: int, micro_batch: int, drop_last: bool, done: int
) -> None:
    arguments = {"micro_batch": micro_batch, "drop_last": drop_last, "collate_fn": list}
    assume(size // world_size >= (micro_batch if drop_last else 1))
    for whole, before, after in zip(*(loaders(Counting(size), world_size, **arguments) for _ in range(3))):
        expected = list(whole)
        assume(done <= len(expected))
        list(islice(before, done))
        assert list(resumed(before, after)) == expected[done:]


def test_reading_on_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "redline")
    loader, fresh = (loaders(Counting(8), 1, micro_batch=2)[0] for _ in range(2))
    batches_of(loader, 2)
    for _ in range(2):
        assert epoch(resumed(loader, fresh)) == [4, 5, 6, 7]
    assert caplog.text.count("skips the 4 samples that were read") == 1


class Remembering(Counting):
    """It knows where it is."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.place, self.read, self.epoch = 0, 0, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        while self.place < self.size:
            self.place, self.read = self.place + 1, self.read + 1
            yield self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.place = state_dict["place"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_iterable_dataset_with_a_state_is_asked_for_it(world_size: int) -> None:
    before, after = Remembering(12), Remembering(12)
    loader, fresh = (loaders(data, world_size, micro_batch=2)[0] for data in (before, after))
    list(islice(loader, 2))
    assert epoch(resumed(loader, fresh)) == list(range(4 * world_size, 12, world_size))
    assert after.read == 12 - 4 * world_size
    assert epoch(fresh) == list(range(0, 12, world_size))
    assert after.epoch == 1


class Plain:
    """No dataset of torch's, and only iterable."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


@pytest.mark.parametrize("data", [Counting(9), Plain()])
def test_an_iterable_dataset_is_divided_in_its_own_order_and_evenly(data: Any) -> None:
    assert epoch(loaders(data, 1, micro_batch=4)[0]) == list(range(9))
    assert [epoch(loader) for loader in loaders(data, 2, micro_batch=4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(TypeError, match="is iterable and has no length"):
        len(loaders(data, 1, micro_batch=2)[0])


def test_an_iterable_dataset_has_one_worker_and_no_duplicates(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "redline")
    ours, theirs = loaders(Counting(8), 2, micro_batch=2, workers=3)
    assert (epoch(ours), epoch(theirs)) == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert "read by 1 worker, not 3" in caplog.text


# -- streams that are split by rank ----------------------------------------------------------------------------


class Strided(IterableDataset[int]):
    """Each rank's stream has its own samples."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.size, 2))


def strided_loaders(size: int, **arguments: Any) -> list[Loader]:
    arguments = {"micro_batch": 2, "split_by_rank": True, **arguments}
    return [build_loader(Strided(rank, size), World(rank, rank, 2, CPU), **arguments) for rank in (0, 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_of_a_stream_that_is_split_by_rank_each_rank_takes_all_and_resumes_in_its_place(workers: int) -> None:
    assert [epoch(loader) for loader in strided_loaders(8, workers=workers)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for before, after in zip(strided_loaders(12, workers=workers), strided_loaders(12, workers=workers)):
        expected = [batch.tolist() for batch in before]
        next(iter(before))
        assert before.state_dict() == {"epoch": 1, "samples": 4}
        assert [batch.tolist() for batch in resumed(before, after)] == expected[1:]


class SizedStream(Counting):
    def __len__(self) -> int:
        return self.size


def test_a_length_counts_the_samples_of_one_rank_where_the_stream_is_split_by_rank() -> None:
    for split, micro_batches in ((False, 2), (True, 4)):
        assert [len(each) for each in loaders(SizedStream(8), 2, micro_batch=2, split_by_rank=split)] == [
            micro_batches
        ] * 2
    (loader, _) = loaders(Remembering(8), 2, micro_batch=2, split_by_rank=True)
    assert loader.state_dict() == {"epoch": 0, "samples": 0}, "one rank's state is not that of the others"


class Noisy(Counting):
    """The samples of all ranks are the same, their noise is not."""

    def __iter__(self) -> Iterator[Any]:
        return (number + torch.rand(()) for number in range(self.size))


class Drawn(Counting):
    """Noise from a generator of its own."""

    generator = numpy.random.default_rng()

    def __iter__(self) -> Iterator[Any]:
        return (number + self.generator.random() for number in range(self.size))


class Handle(IterableDataset[int]):
    """It cannot be copied."""

    def __init__(self, rank: int) -> None:
        self.numbers = (number for number in range(rank, 8, 2))

    def __iter__(self) -> Iterator[int]:
        return self.numbers


def datasets_of_rank(rank: int) -> dict[str, Any]:
    return {"own": Strided(rank, 8), "all": Counting(8), "noisy": Noisy(8), "drawn": Drawn(8), "handle": Handle(rank)}


def find_splits() -> dict[str, tuple[bool, list[str], bool]]:
    """Of each stream whether it counts as split, what is logged, and whether random numbers were left alone."""
    world, found = join_world("cpu"), {}
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel("INFO")
    torch.manual_seed(world.rank)
    state = torch.get_rng_state()
    for name, dataset in datasets_of_rank(world.rank).items():
        records.clear()
        loader = build_loader(dataset, world, micro_batch=2, split_by_rank=None)
        found[name] = (loader.split_by_rank, records[:], torch.equal(state, torch.get_rng_state()))
    return found


def test_streams_that_read_alike_twice_and_differ_between_ranks_count_as_split() -> None:
    for found in run_ranks(find_splits, 2):
        assert {name: split for name, (split, _, _) in found.items()} == {
            "own": True,
            "all": False,
            "noisy": False,
            "drawn": False,
            "handle": False,
        }
        assert all(untouched for _, _, untouched in found.values())
        for _, logged, _ in found.values():
            assert "redline.data.split_by_rank" in "".join(logged)


# -- what cannot be dealt out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((number for number in range(4)), r"got a generator, which can be read only once; expected .* IterableDataset"),
        (map(str, [1, 2]), "got a map, which can be read only once"),
        (DataLoader(numbers(4)), r"got a DataLoader.*training_data=loader.dataset, with collate_fn=loader.collate_fn"),
        (3, "got a int; expected a dataset"),
        (Dataset(), "Dataset has no length; give it a __len__, or make it a torch IterableDataset"),
        ([], "the dataset is empty; give it at least one sample"),
    ],
)
def test_data_that_cannot_be_dealt_out_is_named_with_a_remedy(data: Any, message: str) -> None:
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with pytest.raises(EngineError, match=f"^data: {message}"):
        initialize(torch.nn.Linear(1, 1), config, training_data=data, device="cpu")


@pytest.mark.parametrize(
    ("data", "world_size", "micro_batch", "message"),
    [
        (numbers(5), 1, 6, "TensorDataset has 5 samples, too few .*at least 6 for each of 1 ranks: give"),
        (numbers(5), 2, 4, "TensorDataset has 5 samples, too few .*at least 4 for each of 2 ranks: give"),
        (SizedStream(5), 3, 2, "SizedStream has 5 samples, too few .*at least 2 for each of 3 ranks: give"),
        (Counting(3), 1, 4, "Counting has too few for a micro-batch"),
    ],
)
def test_dropping_the_only_batch_of_each_epoch_is_refused(
    data: Any, world_size: int, micro_batch: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        list(loaders(data, world_size, micro_batch=micro_batch, drop_last=True)[0])
    assert len(list(loaders(data, world_size, micro_batch=micro_batch)[0])) == 1


def test_a_stream_that_can_be_read_only_once_ends_training_in_the_second_epoch() -> None:
    (loader,) = loaders(Handle(0), 1, micro_batch=2)
    assert epoch(loader) == [0, 2, 4, 6]
    with pytest.raises(
        EngineError, match=r"Handle gave no samples in epoch 1 \(the first is 0\); expected its __iter__"
    ):
        list(loader)


class Once(Sampler[int]):
    indices = iter([1, 0])

    def __iter__(self) -> Iterator[int]:
        return self.indices


class Shuffled(Sampler[int]):
    """Its indices come from a generator function, and it has no length."""

    def __iter__(self) -> Iterator[int]:
        yield from (2, 0, 3)


def test_a_sampler_gives_its_indices_each_epoch() -> None:
    (loader,) = loaders(numbers(4), 1, micro_batch=2, sampler=Shuffled())
    assert [epoch(loader) for _ in range(3)] == [[2, 0, 3]] * 3
    with pytest.raises(EngineError, match=r"data_sampler: got a generator, .*a list of it, or a torch .*Sampler"):
        loaders(numbers(4), 1, micro_batch=2, sampler=(number for number in range(4)))
    with pytest.raises(EngineError, match=r"list has 3 samples, too few .*at least 4"):
        loaders(numbers(8), 1, micro_batch=4, sampler=[0, 1, 2], drop_last=True)
    (loader,) = loaders(numbers(4), 1, micro_batch=2, sampler=Once())
    assert epoch(loader) == [1, 0]
    with pytest.raises(EngineError, match="Once gave no samples in epoch 1"):
        list(loader)


# -- in real processes -----------------------------------------------------------------------------------------


def train_and_resume() -> list[Any]:
    """Batch sizes of two epochs of training, and what came after an interruption in the second one."""

    def start() -> Any:
        torch.manual_seed(0)
        config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        return initialize(torch.nn.Linear(1, 1), config, training_data=TensorDataset(torch.arange(11.0)), device="cpu")

    def train(engine: Any, batches: Any) -> list[list[float]]:
        seen = []
        for (x,) in batches:
            engine.backward(engine(x[:, None]).mean())
            engine.step()
            seen.append(x.tolist())
        return seen

    engine, other = start(), start()
    loader = engine.training_dataloader
    seen = train(engine, loader)
    under_way = iter(loader)
    seen += train(engine, islice(under_way, 1))
    other.training_dataloader.load_state_dict(loader.state_dict())
    rest = train(engine, under_way)
    return [seen + rest, rest == train(other, other.training_dataloader)]


def test_ranks_that_do_not_divide_the_data_train_without_waiting_forever() -> None:
    answers = run_ranks(train_and_resume, 3)
    assert all(equal for _, equal in answers)
    assert len({tuple(map(len, seen)) for seen, _ in answers}) == 1
    assert set(chain(*chain(*(seen for seen, _ in answers)))) == set(range(11))


def test_a_worker_that_gets_sigterm_as_it_starts_lives() -> None:
    strikes = [True]

    def strike() -> None:
        if strikes:
            os.kill(os.getpid(), signal.SIGTERM)

    os.register_at_fork(after_in_child=strike)  # before the worker can handle it
    try:
        (loader,) = loaders(numbers(4), 1, micro_batch=2, shuffle=False, workers=1, survives_sigterm=True)
        assert epoch(loader) == [0, 1, 2, 3]
    finally:
        strikes.clear()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
