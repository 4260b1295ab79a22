"""What the first batches of a run tell: their size, whether ranks train on the same samples, whose a stream is.

Two mistakes train without an error: a `DataLoader` without a `DistributedSampler` gives every rank the same samples,
and one with another `batch_size` than the config's makes every count of samples wrong. `FirstBatches` looks at the
inputs of the first training forwards, compares them between ranks once, and logs at most one warning.

An input's first dimension is not always the batch, and equal inputs are not always a mistake. Where the inputs do not
tell, nothing is logged.
"""

from __future__ import annotations

import copy
import enum
import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from redline.device import fields_of
from redline.distributed.failure import name_ranks
from redline.distributed.process_group import World
from redline.log import log
from redline.random_state import random_state, set_random_state

__all__ = ["FirstBatches", "fingerprint", "is_split"]

_FORWARDS = 4  # that are looked at, at most
_ELEMENTS = 1 << 16  # of a tensor that enter its checksum, at most
_FEW = 16  # integers in a batch that two ranks may have in common by chance
_TOKENS = 16  # tokens of a sample, at least, where a batch is flattened to one row per token

_PER_SAMPLE = object()  # a leaf: tensors that may be one for each sample are in a list
_PLAIN = (str, bytes, int, float, complex)
_NO_DATA = (type(None), enum.Enum, nn.Module, torch.dtype, torch.device, torch.Generator)

Checksums = tuple[list[Tensor], str]  # of a batch's tensors, on their devices, and its plain values


class FirstBatches:
    """Looks at the inputs of the first training forwards and warns once, at the first optimizer step.

    Args:
        loader: the engine's own. Its micro-batches have their size by construction.
    """

    def __init__(self, *, micro_batch: int, train_batch_size: int, num_ranks: int, loader: Any = None) -> None:
        self.watching = True  # whether the methods still do something
        self._micro_batch, self._train_batch_size = micro_batch, train_batch_size
        self._num_ranks = num_ranks
        self.loader = loader
        self._sizes: list[int | None] = []
        self._checksums: list[Checksums | None] = []

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the inputs of a training forward; never raises, never waits for the device."""
        if not self.watching or len(self._sizes) == _FORWARDS or torch.compiler.is_compiling():
            return
        size, checksums = None, None
        try:
            leaves = [leaf for value in (*args, *kwargs.values()) for leaf in _leaves(value)]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if not _is_graph(tensors):
                if all(leaf is not _PER_SAMPLE for leaf in leaves):
                    size = _batch_size(tensors, self._micro_batch)
                if self._num_ranks > 1 and not _is_tiny(tensors):
                    checksums = _checksums(leaves)
        except Exception:  # a tensor subclass or an object of the script's that does not bear inspection
            log.debug("the inputs of a forward could not be inspected", exc_info=True)
        self._sizes.append(size)
        self._checksums.append(checksums)

    def compare(self, world: World) -> None:
        """Compare what was seen between ranks and warn of mistakes; a collective where there are several, once."""
        if not self.watching:
            return
        self.watching = False
        own_loader = self.loader is not None and bool(self.loader.used)
        separate = own_loader and self.loader.separates_ranks
        # A dataset that is smaller than the micro-batch makes short ones, which is no mistake of the script's.
        size = None if own_loader else self._wrong_size()
        everyone = world.gather((size, None if separate else self._fingerprint()))
        self._checksums.clear()
        found = [*_describe_sizes([size for size, _ in everyone], self._micro_batch)]
        found += _describe_equal_ranks([digest for _, digest in everyone], streams=own_loader)
        if found:
            log.warning("data: %s", "; and ".join(found))

    def _wrong_size(self) -> int | None:
        """The size of the micro-batches seen, if they have one and it is not the config's."""
        sizes = [size for size in self._sizes if size is not None]
        if not sizes or None in self._sizes or self._micro_batch in sizes:
            return None
        size = sizes[0]
        if any(each != size for each in sizes[:-1]) or sizes[-1] > size:
            return None  # no loader with a fixed batch size made these: graphs, or tokens packed to rows
        if self._micro_batch == 1 and (size == 1 or self._train_batch_size % size):
            return None  # 1 is also what configs say where a forward has no batch: one graph, all rays, one document
        return size

    def _fingerprint(self) -> str | None:
        """One text for all that was seen; None where equal ones would prove nothing."""
        digests = [None if each is None else _digest(each) for each in self._checksums]
        if None in digests or not digests or (len(digests) > 1 and len(set(digests)) == 1):
            return None  # the same input in each forward is a choice: full-batch training, or a fixed grid
        return " ".join(map(str, digests))


def fingerprint(sample: Any) -> str | None:
    """A text that two samples share if they are equal; None for a sample that does not tell. Reads its tensors."""
    checksums = _checksums(_leaves(sample))
    return None if checksums is None else _digest(checksums, constants=True)


# -- streams --------------------------------------------------------------------------------------------

_HOW_SPLIT = (
    "each of %d ranks reads all of the iterable dataset and trains on its own part of the samples; if each rank's "
    "stream has only its own samples already, set redline.data.split_by_rank to true, else to false"
)


def is_split(dataset: Any, world: World, given: bool | None) -> bool:
    """Whether the ranks' streams are their own: as given, else by their first samples; a collective.

    A stream that reads the same twice on each rank, and not the same on all, depends on the rank. One that reads
    something else the second time draws random numbers, and tells nothing: it is not split.
    """
    if given:
        return True
    everyone = [("", "")] if given is False else world.gather(_first_samples(dataset))
    if len(set(everyone)) == 1:
        log.info(f"data: {_HOW_SPLIT}", world.size)
        return False
    if all(one is not None and one == other for one, other in everyone):
        log.warning(
            "data: the iterable dataset starts with another sample on each rank, so each rank trains on all samples of "
            "its own stream; if that is right, set redline.data.split_by_rank to true, else to false"
        )
        return True
    log.warning(f"data: the iterable dataset starts with random samples, which tell nothing; {_HOW_SPLIT}", world.size)
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


# -- the messages ---------------------------------------------------------------------------------------


def _describe_sizes(sizes: list[int | None], micro_batch: int) -> Iterator[str]:
    if wrong := {rank: size for rank, size in enumerate(sizes) if size is not None}:
        size = next(iter(wrong.values()))
        where = f" on {name_ranks(list(wrong))}" if len(sizes) > 1 else ""
        yield (
            f"the inputs have a first dimension of {size}{where}, and train_micro_batch_size_per_gpu is {micro_batch}; "
            "if that dimension is the batch, train_batch_size and all counts of samples are wrong: make the loader "
            f"with batch_size=engine.train_micro_batch_size_per_gpu(), or set train_micro_batch_size_per_gpu to {size}"
        )


def _describe_equal_ranks(digests: list[str | None], *, streams: bool) -> Iterator[str]:
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        if digest is not None:
            ranks.setdefault(digest, []).append(rank)
    if equal := [name_ranks(each) for each in ranks.values() if len(each) > 1]:
        remedy = (
            "the stream is not split by rank; leave redline.data.split_by_rank out or set it to false"
            if streams
            else "give the dataset to initialize(training_data=...) and iterate over engine.training_dataloader, or "
            "give the DataLoader a torch.utils.data.DistributedSampler; seed what is generated by rank"
        )
        yield f"{' and '.join(equal)} train on the same samples, so that all but one of them are wasted: {remedy}"


# -- what a batch holds ---------------------------------------------------------------------------------


def _leaves(value: Any, depth: int = 8) -> Iterator[Any]:
    """Tensors, NumPy's arrays as tensors, plain values, and objects into which one cannot look."""
    numpy = sys.modules.get("numpy")
    items: Iterable[Any] = ()
    if isinstance(value, (Tensor, *_PLAIN)):
        yield value
        return
    if isinstance(value, _NO_DATA) or callable(value):
        return
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
        yield torch.from_numpy(numpy.array(value))
        return
    if depth == 0:
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple, deque, Set)):
        items = value
        dims = [each.ndim for each in value if isinstance(each, Tensor)]
        if len(dims) == len(value) > 1 and len(set(dims)) == 1:
            yield _PER_SAMPLE
    elif names := [*fields_of(value)] or [*getattr(value, "__dict__", ())]:
        items = [getattr(value, name, None) for name in names]
    else:
        yield value
    for each in items:
        yield from _leaves(each, depth - 1)


def _batch_size(tensors: list[Tensor], micro_batch: int) -> int | None:
    """The first dimension of all tensors, where that can only be the batch."""
    shapes = [tensor.shape for tensor in tensors if tensor.ndim]
    sizes = {shape[0] for shape in shapes}
    most_dims = max(map(len, shapes), default=0)
    if len(sizes) != 1 or most_dims == 1 or any(tensor.device.type == "meta" for tensor in tensors):
        return None  # 1-d tensors: one sequence, or all tokens
    (size,) = sizes
    tokens = [tensor.shape for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()]
    if size == micro_batch:
        return size
    if size == 0 or (size == 1 and tokens):  # documents that were packed into one row
        return None
    if any(shape[1] == micro_batch for shape in (*tokens, *(shape for shape in shapes if len(shape) > 2))):
        return None  # time first
    if most_dims == 2 and not tokens and size % micro_batch == 0 and size // micro_batch >= _TOKENS:
        return None  # (samples x tokens, features)
    return size


def _is_graph(tensors: list[Tensor]) -> bool:
    """Whether the batch has edges: ranks that train on different nodes of one graph have equal inputs."""
    nodes = any(each.ndim > 1 and each.is_floating_point() and each.shape[0] != 2 for each in tensors)
    edges = any(each.ndim == 2 and each.shape[0] == 2 and each.dtype in (torch.int64, torch.int32) for each in tensors)
    return (nodes and edges) or any(each.layout != torch.strided for each in tensors)


def _is_tiny(tensors: list[Tensor]) -> bool:
    """Whether different samples may well be equal: a few integers."""
    if any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return False
    return sum(tensor.numel() for tensor in tensors) < _FEW


@torch.no_grad()
def _checksums(leaves: Iterable[Any]) -> Checksums | None:
    """Of each tensor, computed where it is; None if there is something that one cannot look into."""
    sums, plain = [], []
    for leaf in leaves:
        if isinstance(leaf, _PLAIN):
            plain.append(leaf)
        elif isinstance(leaf, Tensor) and leaf.device.type != "meta":
            sums += [_checksum(leaf)] if leaf.numel() else []
        elif leaf is not _PER_SAMPLE:
            return None
    return sums, repr(plain)


def _checksum(tensor: Tensor) -> Tensor:
    """Two integers: whether all elements are equal, and a sum over the bytes that depends on their places.

    Integers wrap around and do not depend on the order of a sum, so that equal inputs have equal checksums on every
    kind of device.
    """
    flat = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg().reshape(-1)
    flat = flat[:: flat.numel() // _ELEMENTS + 1].contiguous()
    constant = (flat == flat[0]).all()
    octets = flat.view(torch.uint8).long()
    places = torch.arange(1, octets.numel() + 1, device=flat.device) * -7046029254386353131  # 2**64 / golden ratio
    places ^= places >> 29
    places *= -4658895280553007687
    return torch.stack([constant.long(), ((octets + 1) * (places ^ (places >> 32))).sum()])


def _digest(checksums: Checksums, *, constants: bool = False) -> str | None:
    """One text for a batch; None where it holds nothing but constants, unless these count. Reads the checksums."""
    sums, plain = checksums
    values = [tensor.tolist() for tensor in sums]
    if not constants and all(constant for constant, _ in values):
        return None  # ones and zeros of a test, masks, paddings
    return hashlib.blake2b(f"{values}{plain}".encode(), digest_size=16).hexdigest()
