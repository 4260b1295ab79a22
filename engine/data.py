"""Data for training: each process's share of a dataset, in micro-batches on its device, resumable anywhere.

An epoch is one order of all samples, drawn from the seed and the epoch, the same on every process: torch's
DistributedSampler's, which DeepSpeed's loader (`deepspeed/runtime/dataloader.py`) uses. Process r of n takes
the samples at r, r + n, r + 2n, ...; so one micro-batch of every process is a stretch of that order, and the
place in an epoch is one number of samples, which means the same on any number of processes. Where processes
do not divide what is left, the first samples of the order fill up: all get batches of equal number and size.

torchdata's StatefulDataLoader has the state inside torch's loader and workers. It would be a dependency to
skip batches with; an order that can be entered anywhere needs no skipping, and counts for all processes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from engine.device import to_device
from engine.distributed import World
from engine.errors import EngineError
from engine.first_batches import fingerprint
from engine.log import log
from engine.randomness import random_state, set_random_state

__all__ = ["CollateFn", "Loader", "build_loader"]

CollateFn = Callable[[list[Any]], Any]


class _Source(Protocol):
    """What deals out a dataset: map-style or iterable."""

    @property
    def sampler(self) -> Iterable[int] | None: ...
    @property
    def separates_ranks(self) -> bool: ...
    @property
    def split_by_rank(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @seed.setter
    def seed(self, seed: int) -> None: ...

    @property
    def may_be_empty(self) -> bool:
        """Whether a pass without a micro-batch is no mistake."""

    def read(self, epoch: int, start: int) -> Iterable[Any]:
        """This process's micro-batches of an epoch from a sample on, counted over all processes."""

    def num_batches(self, start: int) -> int:
        """How many those are; TypeError if nothing tells."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Loader:
    """Micro-batches of this process's share, on its device; each pass over it is one epoch.

    A pass that was broken off is over: the next one is the next epoch. After `load_state_dict` the next pass
    is the rest of the saved one: no batch that was handed out comes again, and none is left out, whatever
    workers had read ahead. An iterator made before goes on where it stood.

    Attributes:
        dataset: what it reads.
        collate_fn: samples to batch; None for torch's default.
        epoch: index of the pass under way, or of the first.
        samples: of this epoch that were handed out, over all processes.
        through: what each pass goes through on its way out, one after the other: a clock, a bar.
        used: whether it has handed out a batch.
    """

    def __init__(
        self, source: _Source, world: World, dataset: Any, collate_fn: CollateFn | None, micro_batch: int
    ) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn
        self._source, self._device = source, world.device
        self._stride = micro_batch * world.size
        self.epoch, self.samples = 0, 0
        self._resumes = False  # whether the next pass goes on from `samples`
        self.through: list[Callable[[Iterator[Any]], Iterator[Any]]] = []
        self.used = False

    def __len__(self) -> int:
        """Micro-batches of a whole pass; TypeError for an iterable dataset without a length."""
        return self._source.num_batches(0)

    def __iter__(self) -> Iterator[Any]:
        batches = self._pass()
        for through in self.through:
            batches = through(batches)
        return batches

    def _pass(self) -> Iterator[Any]:
        if self.samples and not self._resumes:
            self.epoch, self.samples = self.epoch + 1, 0
        epoch, samples = self.epoch, self.samples
        if samples == 0:
            # torch's loader draws one number from the global generator as it begins; this one draws it once an
            # epoch, resumed or not, so that dropout is what it is under DeepSpeed and without the interruption.
            torch.empty((), dtype=torch.int64).random_()
        for batch in self._source.read(epoch, samples):
            samples += self._stride
            self.position = (epoch, samples, False)
            self.used = True
            yield to_device(batch, self._device)
        if samples == 0 and not self._source.may_be_empty:
            # A script that trains until a step, epoch after epoch, would never end.
            raise EngineError(self._why_empty(epoch))
        self.position = (epoch + 1, 0, False)

    def _why_empty(self, epoch: int) -> str:
        what = type(self.dataset).__name__
        if self.sampler is not None:
            what = f"the sampler, {type(self.sampler).__name__},"
        if epoch > 0:
            return (
                f"data: {what} gave no samples in epoch {epoch} (the first is 0); expected its __iter__ to start anew "
                "each time, and not to return one iterator again"
            )
        return (
            f"data: {what} gave too few samples for one micro-batch on each rank: with dataloader_drop_last that takes "
            f"{self._stride} over all ranks, else one per rank; give more samples or a smaller "
            "train_micro_batch_size_per_gpu"
        )

    @property
    def separates_ranks(self) -> bool:
        """Whether no two ranks get the same batch, whatever the dataset does."""
        return self._source.separates_ranks

    @property
    def split_by_rank(self) -> bool:
        """Whether this rank takes all samples of the dataset, because each rank's dataset has its own."""
        return self._source.split_by_rank

    @property
    def sampler(self) -> Iterable[int] | None:
        """What gives the order in place of the seed, if the script gave one."""
        return self._source.sampler

    @property
    def seed(self) -> int:
        """Of the order of samples, and of random numbers in workers; another one counts from the next pass on."""
        return self._source.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._source.seed = seed

    @property
    def position(self) -> tuple[int, int, bool]:
        """Epoch, samples, and whether the next pass goes on from there; the state within this process."""
        return self.epoch, self.samples, self._resumes

    @position.setter
    def position(self, position: tuple[int, int, bool]) -> None:
        self.epoch, self.samples, self._resumes = position

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, after the batches handed out so far; the same on every process."""
        return {"epoch": self.epoch, "samples": self.samples, **self._source.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved place, also with other micro-batches or on another number of processes."""
        self._source.load_state_dict(state_dict)
        self.position = (state_dict["epoch"], state_dict["samples"], True)
        try:
            over = self.samples > 0 and self._source.num_batches(self.samples) == 0
        except TypeError:
            return
        if over:
            self.position = (self.epoch + 1, 0, True)


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
    split_by_rank: bool | None = False,
) -> Loader:
    """A loader over this process's share of a dataset.

    Args:
        dataset: map-style or iterable; an object with ``__iter__`` and without ``__getitem__`` is iterable. An iterable
            one is read whole by every process, which keeps every n-th sample; a last round that is not full is left
            out. It resumes by its own `state_dict`, if it has one and there is no worker, else by reading on to the
            place.
        world: the processes that share it.
        micro_batch: samples of one forward on one process.
        collate_fn: samples to batch; None takes torch's default.
        sampler: indices of this process's samples, in place of the order; resuming skips those that were read.
        shuffle: a new order each epoch, the same on every process; an iterable dataset has its own.
        seed: of the order, and of random numbers in workers.
        drop_last: leave out a last micro-batch that is not full.
        even: fill up the shares of a map-style dataset to equal length; False gives each sample once, and
            some processes more than others.
        workers: processes that read ahead; 0 reads in this one. Random numbers in them are seeded anew for
            each micro-batch, so that they do not depend on the workers' number nor on an interruption. An
            iterable dataset has at most one: each would read all of it.
        prefetch_factor: micro-batches that each worker reads ahead.
        pin_memory: put batches into pinned memory where the device is a GPU.
        survives_sigterm: let workers go on after SIGTERM, which torchrun and SLURM send to them, too.
        split_by_rank: an iterable dataset gives each rank samples of its own, as many on each rank: every rank takes
            all of its own stream, and resumes by reading on. None compares the ranks' first samples to find out; a
            collective.

    Raises:
        EngineError: no dataset, or one without samples; fewer samples than a micro-batch with `drop_last`; a sampler
            that can be read only once.
    """
    _check_dataset(dataset)
    _check_sampler(sampler)
    options: dict[str, Any] = {"collate_fn": collate_fn, "pin_memory": pin_memory and world.device.type == "cuda"}
    survival: dict[str, Any] = {"worker_init_fn": _outlive_sigterm} if survives_sigterm else {}
    source: _Source
    if _is_stream(dataset):
        if sampler is not None:
            raise EngineError("sampler: an iterable dataset has its own order; leave the sampler out")
        if workers > 1:
            log.info("data: an iterable dataset is read by 1 worker, not %d, each of which would read all", workers)
            workers = 1
        if workers:
            options |= {"num_workers": workers, "prefetch_factor": prefetch_factor, **survival}
        if world.size == 1:
            split_by_rank = False
        elif split_by_rank is None:
            split_by_rank = _find_split(dataset, world)
        elif not split_by_rank:
            log.info("data: %s", _HOW_SPLIT.format(size=world.size))
        options |= {"batch_size": micro_batch, "drop_last": drop_last}
        source = _Stream(dataset, world, seed, options, split_by_rank=split_by_rank)
    else:
        if workers:
            options |= {"num_workers": workers, "prefetch_factor": prefetch_factor, **survival}
        try:
            size = len(dataset)  # type: ignore[arg-type]
        except TypeError:
            raise EngineError(
                f"data: {type(dataset).__name__} has no length; give it a __len__, or make it a torch IterableDataset"
            ) from None
        if size == 0:
            raise EngineError("data: the dataset is empty; give it at least one sample")
        order = _Order(size, world.rank, world.size, micro_batch, shuffle, seed, drop_last, even, sampler)
        source = _Table(dataset, order, options)
    if drop_last:
        _check_full_batch(source, dataset, world, micro_batch)
    return Loader(source, world, dataset, collate_fn, micro_batch)


_HOW_SPLIT = (
    "each of {size} ranks reads all of the iterable dataset and trains on its own 1/{size} of the samples; if each "
    "rank's stream has only its own samples already, set redline.data.split_by_rank to true, else to false"
)


def _is_stream(dataset: Any) -> bool:
    """Whether samples come in the dataset's own order, and not by index."""
    if isinstance(dataset, IterableDataset):
        return True
    return not isinstance(dataset, Dataset) and hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


def _check_dataset(dataset: Any) -> None:
    """Refuse what looks like data and cannot be dealt out to ranks, epoch after epoch."""
    if isinstance(dataset, DataLoader):
        raise EngineError(
            "data: got a DataLoader, which has its own batches; expected what it reads: training_data=loader.dataset, "
            "with collate_fn=loader.collate_fn; the engine makes the loader. Or give no training_data and iterate over "
            "the DataLoader, with a DistributedSampler and batch_size=engine.train_micro_batch_size_per_gpu()"
        )
    if isinstance(dataset, Iterator) and not isinstance(dataset, Dataset):
        raise EngineError(
            f"data: got a {type(dataset).__name__}, which can be read only once; expected a dataset that can be read "
            "each epoch: list(...) of it, or a torch IterableDataset whose __iter__ makes it anew"
        )
    if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
        raise EngineError(
            f"data: got a {type(dataset).__name__}; expected a dataset: with __len__ and __getitem__, or iterable"
        )


def _check_sampler(sampler: Any) -> None:
    if isinstance(sampler, Iterator) and not isinstance(sampler, Sampler):
        raise EngineError(
            f"data_sampler: got a {type(sampler).__name__}, which gives its indices only once; expected indices for "
            "each epoch: a list, or a torch Sampler whose __iter__ starts anew"
        )


def _check_full_batch(source: _Source, dataset: Any, world: World, micro_batch: int) -> None:
    """With `drop_last` an epoch without a full micro-batch is empty, and a script that goes on would never end."""
    try:
        if source.num_batches(0):
            return
    except TypeError:
        return
    ranks = f" on each of {world.size} ranks" if world.size > 1 else ""
    needed = micro_batch * world.size
    sampler: Any = source.sampler
    what = f"dataset has {len(dataset)}"
    if sampler is not None or source.split_by_rank:
        what = f"dataset has {len(dataset)} on this rank" if sampler is None else f"sampler has {len(sampler)}"
        needed = micro_batch
    raise EngineError(
        f"dataloader_drop_last: the {what} samples, fewer than a micro-batch of {micro_batch}{ranks}, so that every "
        f"epoch would be empty; expected at least {needed}: give more samples, a smaller "
        "train_micro_batch_size_per_gpu, or leave dataloader_drop_last out"
    )


def _find_split(dataset: Any, world: World) -> bool:
    """Whether the ranks' streams are their own, by their first samples; a collective.

    A stream that reads the same twice on each rank, and not the same on all, depends on the rank. One that reads
    something else the second time draws random numbers, and tells nothing: it is split.
    """
    first, again = _first_samples(dataset)
    everyone = world.gather((first, again))
    thinned = _HOW_SPLIT.format(size=world.size)
    if len(set(everyone)) == 1:
        log.info("data: %s", thinned)
        return False
    if all(one is not None and one == other for one, other in everyone):
        log.warning(
            "data: the iterable dataset starts with another sample on each rank, so each rank trains on all samples of "
            "its own stream; if that is right, set redline.data.split_by_rank to true, else to false"
        )
        return True
    log.warning("data: the iterable dataset starts with random samples, which do not tell whose they are; %s", thinned)
    return False


def _first_samples(dataset: Any) -> tuple[str | None, str | None]:
    """The first sample of a copy of a stream, read twice; None where it does not tell. Leaves no trace here."""
    state = random_state()
    try:
        dataset = copy.deepcopy(dataset)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)
        one, other = (fingerprint(next(iter(dataset), None)) for _ in range(2))
    except Exception:  # what cannot be copied, or read here; training will tell why
        log.debug("the first sample of the stream could not be read", exc_info=True)
        return None, None
    finally:
        set_random_state(state)
    return one, other


@dataclass(frozen=True)
class _Order:
    """Which samples make up which micro-batch of this process."""

    size: int
    rank: int
    num_ranks: int
    micro_batch: int
    shuffle: bool
    seed: int
    drop_last: bool
    even: bool
    sampler: Iterable[int] | None

    def batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        """Indices, one list a micro-batch, of an epoch from a sample on."""
        if self.sampler is not None:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            mine = itertools.islice(self.sampler, start // self.num_ranks, None)
            return iter(BatchSampler(mine, self.micro_batch, self.drop_last))
        places = start + self.rank + self.num_ranks * torch.arange(self._share(start))
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
            places = order[places % self.size]
        else:
            places = places % self.size
        starts = range(0, self.num_batches(start) * self.micro_batch, self.micro_batch)
        return (places[first : first + self.micro_batch].tolist() for first in starts)

    def num_batches(self, start: int) -> int:
        share = self._share(start)
        return share // self.micro_batch if self.drop_last else math.ceil(share / self.micro_batch)

    def _share(self, start: int) -> int:
        """This process's samples, from one on."""
        if self.sampler is not None:
            return max(0, len(self.sampler) - start // self.num_ranks)  # type: ignore[arg-type]
        rest = max(0, self.size - start)
        return max(0, math.ceil((rest if self.even else rest - self.rank) / self.num_ranks))


class _Table:
    """A map-style dataset, dealt out in an order."""

    split_by_rank = False

    def __init__(self, dataset: Any, order: _Order, options: dict[str, Any]) -> None:
        self._dataset, self._order, self._options = dataset, order, options

    @property
    def sampler(self) -> Iterable[int] | None:
        return self._order.sampler

    @property
    def separates_ranks(self) -> bool:
        return self.sampler is None

    @property
    def may_be_empty(self) -> bool:
        return self.sampler is None and not self._order.even

    @property
    def seed(self) -> int:
        return self._order.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._order = dataclasses.replace(self._order, seed=seed)

    def read(self, epoch: int, start: int) -> Iterable[Any]:
        order, dataset = self._order, self._dataset
        batches: Iterable[Any] = order.batches(epoch, start)
        if "num_workers" in self._options:
            stride = order.micro_batch * order.num_ranks
            seeds = (_seed(order.seed, epoch, order.rank, place) for place in itertools.count(start, stride))
            batches, dataset = zip(seeds, batches), _Seeded(dataset)
        # A loader for each pass: two passes at once, as a range test in the middle of an epoch is, share nothing.
        generator = torch.Generator()
        return DataLoader(dataset, batch_sampler=batches, generator=generator, **self._options)

    def num_batches(self, start: int) -> int:
        return self._order.num_batches(start)

    def state_dict(self) -> dict[str, Any]:
        return {"size": self._order.size, "seed": self._order.seed, "shuffle": self._order.shuffle}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        changed = {name: (state_dict[name], ours) for name, ours in self.state_dict().items()}
        said = [f"{name} was {saved}, is {ours}" for name, (saved, ours) in changed.items() if saved != ours]
        if said and state_dict["samples"]:
            log.warning(
                "data: %s since the state was saved; the rest of this epoch has another order, in which samples may "
                "come a second time or not at all",
                ", ".join(said),
            )


class _Stream:
    """An iterable dataset, dealt out sample by sample."""

    sampler = None
    separates_ranks = False  # two ranks' streams may be equal
    may_be_empty = False

    def __init__(
        self, dataset: Any, world: World, seed: int, options: dict[str, Any], *, split_by_rank: bool = False
    ) -> None:
        self._dataset, self._world, self.seed, self._options = dataset, world, seed, options
        self.split_by_rank = split_by_rank
        # Of how many parts of this stream this rank takes which one, and how many such streams there are: places in an
        # epoch count the samples of all ranks.
        self._part, self._parts = (0, 1) if split_by_rank else (world.rank, world.size)
        self._streams = world.size // self._parts
        # A checkpoint has one state of the data for all ranks; streams of their own would need one each.
        self._stateful = (
            hasattr(dataset, "state_dict")
            and hasattr(dataset, "load_state_dict")
            and "num_workers" not in options
            and not split_by_rank
        )
        self._in_place = False  # whether the dataset itself has been put where the next pass starts
        self._said = False

    def read(self, epoch: int, start: int) -> Iterable[Any]:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        skipped = 0 if self._in_place else start // self._streams
        self._in_place = False
        if skipped and not self._said:
            self._said = True
            log.info("data: resuming an iterable dataset reads on to the place, past %d samples", skipped)
        share = _Share(self._dataset, self._part, self._parts, skipped)
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch, self._world.rank))
        return DataLoader(share, generator=generator, **self._options)

    def num_batches(self, start: int) -> int:
        if not isinstance(self._dataset, Sized):
            raise TypeError(f"{type(self._dataset).__name__} is iterable and has no length")
        share: int = max(0, len(self._dataset) - start // self._streams) // self._parts
        batch: int = self._options["batch_size"]
        return share // batch if self._options["drop_last"] else math.ceil(share / batch)

    def state_dict(self) -> dict[str, Any]:
        return {"dataset": self._dataset.state_dict()} if self._stateful else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_place = self._stateful and "dataset" in state_dict
        if self._in_place:
            self._dataset.load_state_dict(state_dict["dataset"])


class _Share(IterableDataset[Any]):
    """Every `size`-th sample of an iterable dataset; a last round that is not full is left out."""

    def __init__(self, dataset: Any, rank: int, size: int, skipped: int) -> None:
        self.dataset, self.rank, self.size, self.skipped = dataset, rank, size, skipped

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.dataset)
        next(itertools.islice(samples, self.skipped, self.skipped), None)
        # Processes with unequal shares would wait for each other's gradients for ever.
        while len(dealt := list(itertools.islice(samples, self.size))) == self.size:
            yield dealt[self.rank]


class _Seeded:
    """A map-style dataset in a worker, where each micro-batch has random numbers of its own.

    What a worker has drawn cannot be saved; what a micro-batch draws is the same wherever and whenever it is made.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        seed, indices = batch
        assert get_worker_info() is not None, "the main process keeps its own random numbers"
        random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, for devices
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        if getattr(self.dataset, "__getitems__", None):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[index] for index in indices]


def _outlive_sigterm(worker: int) -> None:
    """In a worker: leave SIGTERM to the training process, which ends the worker when it has saved."""
    # A function, not SIG_IGN: that would be handed on to programs that the dataset starts.
    signal.signal(signal.SIGTERM, lambda number, frame: None)


def _seed(*of: int) -> int:
    """One seed out of several numbers, unlike that of any neighbours."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=8).digest(), "big") >> 1
