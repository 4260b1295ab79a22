"""Training data: each rank's samples of a dataset, in micro-batches on its device, resumable anywhere.

An epoch of a map-style dataset is one order of all samples, drawn from the seed and the epoch: that of torch's
DistributedSampler, which DeepSpeed's loader (`deepspeed/runtime/dataloader.py`) uses. Rank r of n takes the samples at
r, r + n, r + 2n, ..., so that one micro-batch of every rank is a contiguous range of the order, and a position in it is
one number of samples, which means the same on any number of ranks. An iterable dataset has its own order.

torchdata's StatefulDataLoader would be a dependency to skip batches with; an order that can be entered anywhere needs
no skipping, and counts for all ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from redline.device import to_device
from redline.distributed.process_group import World
from redline.errors import EngineError
from redline.first_batches import is_split
from redline.log import log
from redline.random_state import seed_generators

__all__ = ["CollateFn", "Loader", "LoaderWrapper", "build_loader", "fetch"]

CollateFn = Callable[[list[Any]], Any]
LoaderWrapper = Callable[[Iterator[Any]], Iterator[Any]]  # of a pass over a loader: a bar, a timer


class Loader:
    """This rank's micro-batches, on its device; each pass is one epoch.

    A pass that was interrupted is over: the next one is the next epoch. After `load_state_dict` the next pass is the
    rest of the saved one: no batch is repeated or left out, whatever workers had prefetched. An iterator that was made
    before continues where it was. `_MapStyleLoader` and `_StreamLoader` know what is read.
    """

    sampler: Iterable[int] | None = None  # the script's own; None where the seed gives the order
    rereads = False  # whether a pass that is made again from the same position has the same samples
    separates_ranks = False  # whether no two ranks get the same batch, whatever the dataset does
    split_by_rank = False  # whether each rank's dataset has its own samples, so that this rank takes all of them
    _may_be_empty = False  # whether an epoch may have no micro-batch on this rank

    def __init__(
        self, dataset: Any, world: World, micro_batch: int, seed: int, drop_last: bool, options: dict[str, Any]
    ) -> None:
        self.dataset = dataset
        self.seed = seed  # of the order, and of random numbers in workers; changes take effect with the next pass
        self.collate_fn: CollateFn | None = options["collate_fn"]
        self._world, self._micro_batch, self._drop_last = world, micro_batch, drop_last
        self._options = options  # of torch's DataLoader
        self.epoch, self.samples = 0, 0  # of the current pass; samples that were returned, over all ranks
        self._resumes = False  # whether the next pass continues from `samples`
        self.wrappers: list[LoaderWrapper] = []  # of each pass
        self.used = False  # whether it has returned a batch

    def _read(self, epoch: int, start: int) -> Iterable[Any]:
        """This rank's micro-batches of an epoch from a sample on, counted over all ranks."""
        raise NotImplementedError

    def _num_samples(self, start: int) -> int:
        """How many samples those have; TypeError if the dataset has no length."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Micro-batches of a whole pass; TypeError for an iterable dataset without a length."""
        return self._num_batches(0)

    def _num_batches(self, start: int) -> int:
        batches = self._num_samples(start) / self._micro_batch
        return math.floor(batches) if self._drop_last else math.ceil(batches)

    def num_batches(self, start: int = 0) -> int | None:
        """Micro-batches from a sample on, counted over all ranks; None for data without a length."""
        try:
            return self._num_batches(start)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Any]:
        batches = self._pass()
        for wrap in self.wrappers:
            batches = wrap(batches)
        return batches

    def _pass(self) -> Iterator[Any]:
        if self.samples and not self._resumes:
            self.epoch, self.samples = self.epoch + 1, 0
        epoch, samples = self.epoch, self.samples
        if samples == 0:
            # torch's loader draws one number from the global generator when it starts. This one draws it once an epoch,
            # resumed or not, so that dropout is DeepSpeed's, and the same with and without an interruption.
            torch.empty((), dtype=torch.int64).random_()
        for batch in self._start(self._read(epoch, samples)):
            samples += self._micro_batch * self._world.size
            self.position = (epoch, samples, False)
            self.used = True
            yield to_device(batch, self._world.device)
        if samples == 0 and not self._may_be_empty:
            # A script that trains until a step, epoch after epoch, would never end.
            raise EngineError(self._why_empty(epoch))
        self.position = (epoch + 1, 0, False)

    def _start(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Begin to read, and start the workers. SIGTERM waits meanwhile, also in those that do not handle it yet."""
        init = self._options.get("worker_init_fn")
        if not isinstance(init, partial) or init.func is not _ignore_sigterm or not hasattr(signal, "pthread_sigmask"):
            return iter(batches)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return iter(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def first_sample(self) -> Any:
        """A batch of the dataset's first sample alone, on the device."""
        loader = DataLoader(self.dataset, collate_fn=self.collate_fn, generator=torch.Generator())
        return to_device(next(iter(loader)), self._world.device)

    def _why_empty(self, epoch: int) -> str:
        source = self.dataset if self.sampler is None else self.sampler
        what = type(source).__name__
        if epoch > 0:
            return (
                f"data: {what} gave no samples in epoch {epoch} (the first is 0); expected its __iter__ to start anew "
                "each time, and not to return one iterator again"
            )
        given = f" {len(source)} samples," if isinstance(source, Sized) else ""
        needed = self._micro_batch if self._drop_last else 1
        return (
            f"data: {what} has{given} too few for a micro-batch; expected at least {needed} for each of "
            f"{self._world.size} ranks: give more samples, a smaller train_micro_batch_size_per_gpu, or no "
            "dataloader_drop_last"
        )

    @property
    def position(self) -> tuple[int, int, bool]:
        """Epoch, samples, and whether the next pass continues from there."""
        return self.epoch, self.samples, self._resumes

    @position.setter
    def position(self, position: tuple[int, int, bool]) -> None:
        self.epoch, self.samples, self._resumes = position

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, after the batches returned so far; the same on every rank."""
        return {"epoch": self.epoch, "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position, also with other micro-batches or on another number of ranks."""
        self.position = (state_dict["epoch"], state_dict["samples"], True)
        if self.samples > 0 and self.num_batches(self.samples) == 0:  # without a length an empty rest ends by itself
            self.position = (self.epoch + 1, 0, True)


class _MapStyleLoader(Loader):
    """Reads by index: the order of the seed, or a sampler's."""

    def __init__(self, *args: Any, sampler: Iterable[int] | None, shuffle: bool, even: bool) -> None:
        super().__init__(*args)
        self.sampler, self._shuffle, self._even = sampler, shuffle, even
        self.separates_ranks = self.rereads = sampler is None
        self._may_be_empty = not even
        if not isinstance(self.dataset, Sized):
            name = type(self.dataset).__name__
            raise EngineError(f"data: {name} has no length; give it a __len__, or make it a torch IterableDataset")
        self._size = len(self.dataset)
        if self._size == 0:
            raise EngineError("data: the dataset is empty; give it at least one sample")

    def _read(self, epoch: int, start: int) -> Iterable[Any]:
        dataset, batches = self.dataset, self._indices(epoch, start)
        if "num_workers" in self._options:
            seed, rank = self.seed, self._world.rank
            places = itertools.count(start, self._micro_batch * self._world.size)
            dataset = _SeededDataset(dataset)
            batches = zip((_seed(seed, epoch, rank, place) for place in places), batches)
        # A loader for each pass: two passes at once, as a range test in the middle of an epoch is, share nothing.
        return DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), **self._options)

    def _indices(self, epoch: int, start: int) -> Iterable[Any]:
        """Those of each micro-batch, one list a micro-batch, of an epoch from a sample on."""
        rank, ranks, size = self._world.rank, self._world.size, self._micro_batch
        if self.sampler is not None:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            return BatchSampler(itertools.islice(self.sampler, start // ranks, None), size, self._drop_last)
        places = (start + rank + ranks * torch.arange(self._num_samples(start))) % self._size
        if self._shuffle:
            order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self.seed + epoch))
            places = order[places]
        firsts = range(0, self._num_batches(start) * size, size)
        return (places[first : first + size].tolist() for first in firsts)

    def _num_samples(self, start: int) -> int:
        ranks = self._world.size
        if self.sampler is not None:
            return max(0, len(self.sampler) - start // ranks)  # type: ignore[arg-type]
        rest = max(0, self._size - start)
        # Where the ranks do not divide what is left, its first samples are repeated: all ranks get equal numbers.
        return max(0, math.ceil((rest if self._even else rest - self._world.rank) / ranks))

    def _order(self) -> dict[str, Any]:
        return {"size": self._size, "seed": self.seed, "shuffle": self._shuffle}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        changed = [f"{k} was {state_dict[k]}, is {now}" for k, now in self._order().items() if state_dict[k] != now]
        if changed and state_dict["samples"]:
            log.warning(
                "data: %s since the state was saved; the rest of this epoch has another order, in which samples may "
                "come a second time or not at all",
                ", ".join(changed),
            )
        super().load_state_dict(state_dict)


class _StreamLoader(Loader):
    """Reads an iterable dataset, in its own order."""

    def __init__(self, *args: Any, split_by_rank: bool) -> None:
        super().__init__(*args)
        self.split_by_rank = split_by_rank
        # Of `_streams` different streams this rank reads part `_part` of `_parts` of its own.
        self._part, self._parts = (0, 1) if split_by_rank else (self._world.rank, self._world.size)
        self._streams = self._world.size // self._parts
        self._stateful = (
            hasattr(self.dataset, "state_dict")
            and hasattr(self.dataset, "load_state_dict")
            and "num_workers" not in self._options
            and not split_by_rank  # a checkpoint has one data state for all ranks, and different streams need their own
        )
        self._in_place = False  # whether the dataset itself was loaded with the position of the next pass
        self._logged = False

    def _read(self, epoch: int, start: int) -> Iterable[Any]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        skipped = 0 if self._in_place else start // self._streams
        self._in_place = False
        if skipped and not self._logged:
            self._logged = True
            log.info("data: resuming an iterable dataset skips the %d samples that were read", skipped)
        samples = _RankSamples(self.dataset, self._part, self._parts, skipped)
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch, self._world.rank))
        sizes: dict[str, Any] = {"batch_size": self._micro_batch, "drop_last": self._drop_last}
        return DataLoader(samples, generator=generator, **sizes, **self._options)

    def _num_samples(self, start: int) -> int:
        if not isinstance(self.dataset, Sized):
            raise TypeError(f"{type(self.dataset).__name__} is iterable and has no length")
        return max(0, len(self.dataset) - start // self._streams) // self._parts

    def state_dict(self) -> dict[str, Any]:
        own = {"dataset": self.dataset.state_dict()} if self._stateful else {}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_place = self._stateful and "dataset" in state_dict
        if self._in_place:
            self.dataset.load_state_dict(state_dict["dataset"])
        super().load_state_dict(state_dict)


class _RankSamples(IterableDataset[Any]):
    """Every `size`-th sample of an iterable dataset; an incomplete last round is dropped."""

    def __init__(self, dataset: Any, rank: int, size: int, skipped: int) -> None:
        self.dataset, self.rank, self.size, self.skipped = dataset, rank, size, skipped

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.dataset)
        next(itertools.islice(samples, self.skipped, self.skipped), None)
        # Ranks with unequal numbers of samples would wait for each other's gradients forever.
        while len(round_ := list(itertools.islice(samples, self.size))) == self.size:
            yield round_[self.rank]


class _SeededDataset:
    """A map-style dataset in a worker, where each micro-batch has random numbers of its own.

    What a worker has drawn cannot be saved; what a micro-batch draws is the same wherever and whenever it is made.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        seed, indices = batch
        assert get_worker_info() is not None, "the main process keeps its own random numbers"
        seed_generators(seed, torch.default_generator.manual_seed)  # torch.manual_seed takes a millisecond, for devices
        return fetch(self.dataset, indices)


def fetch(dataset: Any, indices: list[int]) -> list[Any]:
    """Samples of a map-style dataset, as torch's loader fetches them."""
    if getattr(dataset, "__getitems__", None):
        return list(dataset.__getitems__(indices))
    return [dataset[index] for index in indices]


def _ignore_sigterm(worker: int, then: Callable[[int], Any] | None = None) -> None:
    """In a worker: leave SIGTERM to the training process, which ends its workers once it has saved."""
    # A function, not SIG_IGN: that would be handed on to programs that the dataset starts.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # which the training process has blocked
    if then is not None:
        then(worker)


def _seed(*of: int) -> int:
    """One seed from several numbers; those of neighboring numbers are unrelated."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=8).digest(), "big") >> 1


# -- building -------------------------------------------------------------------------------------------


def build_loader(
    dataset: Dataset[Any],
    world: World,
    *,
    micro_batch: int,
    collate_fn: CollateFn | None = None,
    sampler: Iterable[int] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    even: bool = True,
    workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = True,
    survives_sigterm: bool = False,
    worker_init_fn: Callable[[int], Any] | None = None,
    split_by_rank: bool | None = False,
) -> Loader:
    """A loader over this rank's samples of a dataset.

    Args:
        dataset: map-style or iterable; an object with ``__iter__`` and without ``__getitem__`` is iterable. An iterable
            one is read in full by every rank, which keeps every n-th sample; an incomplete last round is dropped. It
            resumes by its own `state_dict`, if it has one and there is no worker, else by skipping samples.
        micro_batch: samples of one forward on one rank.
        sampler: indices of this rank's samples, in place of the order; resuming skips those that were read.
        even: give every rank as many samples of a map-style dataset, repeating some; False gives each sample once, and
            some ranks more than others.
        workers: worker processes that prefetch; an iterable dataset has at most one: each would read all of it.
        worker_init_fn: called in each worker with its number.
        survives_sigterm: let workers continue after SIGTERM, which torchrun and SLURM also send to them.
        split_by_rank: whether an iterable dataset is already split by rank, with as many samples on each: every rank
            takes all of its own stream, and resumes by skipping. None compares the ranks' first samples to find out; a
            collective.

    Raises:
        EngineError: no dataset, or an empty one; fewer samples than a micro-batch with `drop_last`; a sampler that can
            be read only once.
    """
    _check(dataset, sampler)
    only_iterates = hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    is_stream = isinstance(dataset, IterableDataset) or (only_iterates and not isinstance(dataset, Dataset))
    if is_stream and workers > 1:
        log.info("data: an iterable dataset is read by 1 worker, not %d, each of which would read all", workers)
        workers = 1
    options: dict[str, Any] = {"collate_fn": collate_fn, "pin_memory": pin_memory and world.device.type == "cuda"}
    if workers:
        init = partial(_ignore_sigterm, then=worker_init_fn) if survives_sigterm else worker_init_fn
        options |= {"num_workers": workers, "prefetch_factor": prefetch_factor, "worker_init_fn": init}
    arguments = (dataset, world, micro_batch, seed, drop_last, options)
    loader: Loader
    if not is_stream:
        loader = _MapStyleLoader(*arguments, sampler=sampler, shuffle=shuffle, even=even)
    elif sampler is not None:
        raise EngineError("sampler: an iterable dataset has its own order; leave the sampler out")
    else:
        loader = _StreamLoader(*arguments, split_by_rank=world.size > 1 and is_split(dataset, world, split_by_rank))
    if drop_last and loader.num_batches() == 0:  # a script would wait for batches forever
        raise EngineError(loader._why_empty(0))
    return loader


def _check(dataset: Any, sampler: Any) -> None:
    """Refuse what looks like data and cannot be divided among ranks, epoch after epoch."""
    if isinstance(dataset, DataLoader):
        raise EngineError(
            "data: got a DataLoader, which has its own batches; expected what it reads: training_data=loader.dataset, "
            "with collate_fn=loader.collate_fn; the engine makes the loader. Or give no training_data and iterate over "
            "the DataLoader, with a DistributedSampler and batch_size=engine.train_micro_batch_size_per_gpu()"
        )
    if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
        raise EngineError(
            f"data: got a {type(dataset).__name__}; expected a dataset: with __len__ and __getitem__, or iterable"
        )
    for name, given in (("data", dataset), ("data_sampler", sampler)):
        if isinstance(given, Iterator) and not isinstance(given, (Dataset, Sampler)):
            raise EngineError(
                f"{name}: got a {type(given).__name__}, which can be read only once; expected what can be read each "
                "epoch: a list of it, or a torch IterableDataset or Sampler whose __iter__ starts anew"
            )
