"""A script's own `DataLoader`, divided among the ranks: what `engine.prepare` and `engine.evaluate` read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from redline.data import CollateFn, Loader, build_loader, fetch
from redline.distributed.process_group import World
from redline.errors import EngineError
from redline.random_state import random_state, seed_generators, set_random_state

__all__ = ["divide"]


def divide(
    loader: DataLoader[Any],
    world: World,
    *,
    seed: int,
    even: bool = True,
    survives_sigterm: bool = False,
    method: str = "prepare",
) -> Loader:
    """This rank's part of what a `DataLoader` reads, in batches of its size.

    The ranks share the samples of each epoch, so that its `batch_size` is that of one rank. Its order stays what it
    was: in order, shuffled (by the seed and the epoch), or its sampler's. With a batch sampler, or with a dataset that
    yields whole batches, the ranks share batches. A `DistributedSampler` has divided the samples already.

    Args:
        loader: torch's, or one derived from it.
        seed: of the shuffled order, and of samplers that draw random numbers: the ranks have to draw the same.
        even: give every rank as many samples, repeating some; False gives each sample once, in no certain order.
        survives_sigterm: as in :func:`redline.data.build_loader`.
        method: the engine's, which errors name.

    Raises:
        EngineError: it is no `DataLoader`, or nothing can be divided.
    """
    if not isinstance(loader, DataLoader):
        raise EngineError(
            f"{method}: got a {type(loader).__name__}; expected a torch DataLoader; a dataset is given to "
            "initialize(training_data=...), which makes the loader"
        )
    dataset: Any = loader.dataset
    sampler, collate = loader.sampler, loader.collate_fn
    micro_batch, shuffle = loader.batch_size, isinstance(sampler, RandomSampler)
    batches = None if micro_batch is not None else loader.batch_sampler
    if batches is not None:  # the script's own: each of its lists of indices is a sample here
        dataset, sampler, collate, micro_batch = _Batches(dataset, collate), batches, _Only(None), 1
    elif micro_batch is None:
        collate, micro_batch = _Only(collate), 1
    own: Iterable[int] | None = None
    if isinstance(dataset, IterableDataset):
        shuffle = False
    elif hasattr(sampler, "num_replicas"):  # a DistributedSampler, which repeats samples to be even
        own, shuffle = (sampler if even else None), False
    elif not (isinstance(sampler, SequentialSampler) or (shuffle and _is_plain(sampler))):
        own = _RankSampler(sampler, world, seed, even=even)
    return build_loader(
        dataset,
        world,
        micro_batch=micro_batch,
        collate_fn=collate,
        sampler=own,
        shuffle=shuffle and own is None and even,
        seed=seed,
        drop_last=loader.drop_last and even,
        even=even,
        workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor or 2,
        pin_memory=loader.pin_memory,
        survives_sigterm=survives_sigterm,
        worker_init_fn=loader.worker_init_fn,
        split_by_rank=None if even else False,
    )


def _is_plain(sampler: Any) -> bool:
    """Whether a random sampler gives each sample once: what the engine's own order does, and enters anywhere."""
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


class _Only:
    """A `collate_fn` for single samples, as of a `DataLoader` with ``batch_size=None``."""

    def __init__(self, convert: CollateFn | None) -> None:
        self._convert = convert

    def __call__(self, items: list[Any]) -> Any:
        return items[0] if self._convert is None else self._convert(items[0])


class _Batches:
    """A dataset whose indices are lists of indices, and whose samples are batches."""

    def __init__(self, dataset: Any, collate: CollateFn) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: list[int] | int) -> Any:
        return self._collate(fetch(self._dataset, index if isinstance(index, list) else [index]))


class _RankSampler:
    """This rank's part of what a sampler gives: every n-th index.

    The sampler draws the same on all ranks, since the generators are seeded for it, by the seed and the epoch.
    """

    def __init__(self, sampler: Any, world: World, seed: int, *, even: bool) -> None:
        self._sampler, self._world, self._seed, self._even = sampler, world, seed, even
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        rank, ranks = self._world.rank, self._world.size
        return (len(self._sampler) + ranks - 1 - (0 if self._even else rank)) // ranks  # TypeError without a length

    def __iter__(self) -> Iterator[Any]:
        before = random_state()
        try:
            for each in (self._sampler, getattr(self._sampler, "sampler", None)):  # a batch sampler has one
                generator = getattr(each, "generator", None)
                if generator is not None:
                    generator.manual_seed(self._seed + self._epoch)
            seed_generators(self._seed + self._epoch, torch.default_generator.manual_seed)
            everything = list(self._sampler)
        finally:
            set_random_state(before)
        rank, ranks = self._world.rank, self._world.size
        length = len(everything) + (-len(everything) % ranks if self._even else 0)
        return itertools.islice(itertools.cycle(everything), rank, length, ranks)
