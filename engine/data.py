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
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

from engine.device import to_device
from engine.distributed import World
from engine.errors import EngineError
from engine.log import log

__all__ = ["CollateFn", "Loader", "build_loader"]

CollateFn = Callable[[list[Any]], Any]


class _Source(Protocol):
    """What deals out a dataset: map-style or iterable."""

    @property
    def sampler(self) -> Iterable[int] | None: ...
    @property
    def seed(self) -> int: ...
    @seed.setter
    def seed(self, seed: int) -> None: ...

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
            yield to_device(batch, self._device)
        self.position = (epoch + 1, 0, False)

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
) -> Loader:
    """A loader over this process's share of a dataset.

    Args:
        dataset: map-style or iterable. An iterable one is read whole by every process, which keeps every n-th
            sample; a last round that is not full is left out. It resumes by its own `state_dict`, if it has
            one and there is no worker, else by reading on to the place.
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

    Raises:
        EngineError: a map-style dataset without samples.
    """
    options: dict[str, Any] = {"collate_fn": collate_fn, "pin_memory": pin_memory and world.device.type == "cuda"}
    survival: dict[str, Any] = {"worker_init_fn": _outlive_sigterm} if survives_sigterm else {}
    source: _Source
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise EngineError("sampler: an iterable dataset has its own order; leave the sampler out")
        if workers > 1:
            log.info("data: an iterable dataset is read by 1 worker, not %d, each of which would read all", workers)
            workers = 1
        if workers:
            options |= {"num_workers": workers, "prefetch_factor": prefetch_factor, **survival}
        source = _Stream(dataset, world, seed, {**options, "batch_size": micro_batch, "drop_last": drop_last})
    else:
        if workers:
            options |= {"num_workers": workers, "prefetch_factor": prefetch_factor, **survival}
        size = len(dataset)  # type: ignore[arg-type]
        if size == 0:
            raise EngineError("data: the dataset is empty; give it at least one sample")
        order = _Order(size, world.rank, world.size, micro_batch, shuffle, seed, drop_last, even, sampler)
        source = _Table(dataset, order, options)
    return Loader(source, world, dataset, collate_fn, micro_batch)


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

    def __init__(self, dataset: Any, order: _Order, options: dict[str, Any]) -> None:
        self._dataset, self._order, self._options = dataset, order, options

    @property
    def sampler(self) -> Iterable[int] | None:
        return self._order.sampler

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

    def __init__(self, dataset: IterableDataset[Any], world: World, seed: int, options: dict[str, Any]) -> None:
        self._dataset, self._world, self.seed, self._options = dataset, world, seed, options
        self._stateful = (
            hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict") and "num_workers" not in options
        )
        self._in_place = False  # whether the dataset itself has been put where the next pass starts
        self._said = False

    def read(self, epoch: int, start: int) -> Iterable[Any]:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        skipped = 0 if self._in_place else start
        self._in_place = False
        if skipped and not self._said:
            self._said = True
            log.info("data: resuming an iterable dataset reads on to the place, past %d samples", skipped)
        share = _Share(self._dataset, self._world, skipped)
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch, self._world.rank))
        return DataLoader(share, generator=generator, **self._options)

    def num_batches(self, start: int) -> int:
        if not isinstance(self._dataset, Sized):
            raise TypeError(f"{type(self._dataset).__name__} is iterable and has no length")
        share: int = max(0, len(self._dataset) - start) // self._world.size
        batch: int = self._options["batch_size"]
        return share // batch if self._options["drop_last"] else math.ceil(share / batch)

    def state_dict(self) -> dict[str, Any]:
        return {"dataset": self._dataset.state_dict()} if self._stateful else {}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_place = self._stateful and "dataset" in state_dict
        if self._in_place:
            self._dataset.load_state_dict(state_dict["dataset"])  # type: ignore[attr-defined]


class _Share(IterableDataset[Any]):
    """Every `size`-th sample of an iterable dataset; a last round that is not full is left out."""

    def __init__(self, dataset: IterableDataset[Any], world: World, skipped: int) -> None:
        self.dataset, self.rank, self.size, self.skipped = dataset, world.rank, world.size, skipped

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
