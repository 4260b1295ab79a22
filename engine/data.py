"""Data for training: each process's share of a dataset, in micro-batches on its device.

A map-style dataset is dealt out by torch's DistributedSampler, shuffled anew each epoch; an iterable
one is dealt out sample by sample. DeepSpeed's loader (`deepspeed/runtime/dataloader.py`) deals alike
and repeats the first epoch's order unless the script says otherwise; this one does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from engine.distributed import World

__all__ = ["Loader", "build_loader", "to_device"]

CollateFn = Callable[[list[Any]], Any]


class Loader:
    """Micro-batches of this process's share, on its device; each pass over it is one epoch.

    Attributes:
        epoch: index of the next pass; it seeds the shuffling.
        dataloader: torch's loader underneath.
        through: what each pass goes through on its way out, one after the other: a clock, a bar.
    """

    def __init__(self, dataloader: DataLoader[Any], device: torch.device) -> None:
        self.dataloader = dataloader
        self.device = device
        self.epoch = 0
        self.through: list[Callable[[Iterator[Any]], Iterator[Any]]] = []

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        batches = self._pass()
        for through in self.through:
            batches = through(batches)
        return batches

    def _pass(self) -> Iterator[Any]:
        if isinstance(self.dataloader.sampler, DistributedSampler):
            self.dataloader.sampler.set_epoch(self.epoch)
        self.epoch += 1
        for batch in self.dataloader:
            yield to_device(batch, self.device)

    def state_dict(self) -> dict[str, int]:
        """The epoch to come."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with a saved epoch."""
        self.epoch = state_dict["epoch"]


def build_loader(
    dataset: Dataset[Any],
    world: World,
    *,
    micro_batch: int,
    collate_fn: CollateFn | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Loader:
    """A loader over this process's share of a dataset.

    Args:
        dataset: map-style or iterable.
        world: the processes that share it.
        micro_batch: samples of one forward on one process.
        collate_fn: samples to batch; None takes torch's default.
        shuffle: a new order each epoch, the same on every process; an iterable dataset has its own.
        drop_last: leave out a last micro-batch that is not full.
    """
    sampler: DistributedSampler[Any] | None = None
    if isinstance(dataset, IterableDataset):
        dataset = _Share(dataset, world) if world.size > 1 else dataset
    else:
        sampler = DistributedSampler(dataset, num_replicas=world.size, rank=world.rank, shuffle=shuffle, seed=0)
    dataloader = DataLoader(
        dataset,
        batch_size=micro_batch,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=drop_last,
        pin_memory=world.device.type == "cuda",
    )
    return Loader(dataloader, world.device)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on the device: tensors, and (nested) tuples, lists and mappings."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[call-arg]
    return batch


class _Share(IterableDataset[Any]):
    """Every `size`-th sample of an iterable dataset; a last round that is not full is left out."""

    def __init__(self, dataset: IterableDataset[Any], world: World) -> None:
        self.dataset, self.rank, self.size = dataset, world.rank, world.size

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.dataset)
        # Processes with unequal shares would wait for each other's gradients for ever.
        while len(dealt := list(itertools.islice(samples, self.size))) == self.size:
            yield dealt[self.rank]
