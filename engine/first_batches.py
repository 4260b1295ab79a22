"""What the first micro-batches of a run tell: their size, and whether several ranks train on the same samples.

Both mistakes train without an error: a `DataLoader` without a `DistributedSampler` gives every rank the same samples,
and one with another `batch_size` than the config's makes every count of samples wrong. `FirstBatches` looks at the
inputs of the first training forwards, compares them between ranks once, and logs at most one warning.

An input's first dimension is not always the batch, and equal inputs are not always a mistake. Where the inputs do not
tell, nothing is logged.
"""

from __future__ import annotations

import enum
import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.distributed import World
from engine.log import log
from engine.peers import name_ranks

__all__ = ["FirstBatches", "fingerprint"]

_FORWARDS = 4  # that are looked at, at most
_ELEMENTS = 1 << 16  # of a tensor that enter its checksum, at most
_TENSORS = 64  # of a batch, at most
_DEPTH = 8  # of containers in containers, at most
_FEW = 16  # integers in a batch that two ranks may have in common by chance
_TOKENS = 16  # tokens of a sample, at least, where a batch is flattened to one row per token

_Checksums = tuple[list[Tensor], bytes]  # of a batch's tensors, on their devices, and of its plain values


class _Loader(Protocol):
    """What the engine knows of the loader that it built."""

    @property
    def used(self) -> bool: ...
    @property
    def separates_ranks(self) -> bool: ...


class FirstBatches:
    """Looks at the inputs of the first training forwards and warns once, at the first optimizer step.

    Nothing here waits for the device before :meth:`compare`, which reads a few numbers.

    Args:
        micro_batch: `train_micro_batch_size_per_gpu`.
        train_batch_size: samples of an optimizer step, over all ranks.
        num_ranks: that train together; with one no checksums are computed.
        loader: the engine's own. Its micro-batches have their size by construction.

    Attributes:
        watching: whether :meth:`see` and :meth:`compare` still do something.
    """

    def __init__(
        self, *, micro_batch: int, train_batch_size: int, num_ranks: int, loader: _Loader | None = None
    ) -> None:
        self.watching = True
        self._micro_batch, self._train_batch_size = micro_batch, train_batch_size
        self._num_ranks, self._loader = num_ranks, loader
        self._seen = 0
        self._sizes: list[int | None] = []
        self._checksums: list[_Checksums | None] = []

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the inputs of a training forward; never raises, never waits for the device."""
        if not self.watching or self._seen == _FORWARDS or torch.compiler.is_compiling():
            return
        self._seen += 1
        size, checksums = None, None
        try:
            contents = _contents((*args, *kwargs.values()))
            size = _batch_size(contents, self._micro_batch)
            if self._num_ranks > 1 and not contents.opaque and not _is_graph(contents) and not _is_tiny(contents):
                checksums = _checksums(contents)
        except Exception:  # a tensor subclass or an object of the script's that does not bear inspection
            log.debug("the inputs of a forward could not be inspected", exc_info=True)
        self._sizes.append(size)
        self._checksums.append(checksums)

    def compare(self, world: World) -> None:
        """Compare what was seen between ranks and warn of mistakes; a collective where there are several, once."""
        if not self.watching:
            return
        self.watching = False
        everyone = world.gather((self._wrong_size(), self._fingerprint()))
        self._checksums.clear()
        found = [*_describe_sizes([size for size, _ in everyone], self._micro_batch)]
        found += _describe_equal_ranks([digest for _, digest in everyone], streams=self._uses_own_loader())
        if found:
            log.warning("data: %s", "; and ".join(found))

    def _uses_own_loader(self) -> bool:
        return self._loader is not None and self._loader.used

    def _wrong_size(self) -> int | None:
        """The size of the micro-batches seen, if they have one and it is not the config's."""
        # A dataset that is smaller than the micro-batch makes short ones, which is no mistake of the script's.
        if self._uses_own_loader() or not self._sizes or None in self._sizes or self._micro_batch in self._sizes:
            return None
        size = self._sizes[0]
        assert size is not None
        if any(each != size for each in self._sizes[1:-1]) or self._sizes[-1] > size:  # type: ignore[operator]
            return None  # no loader with a fixed batch size made these: graphs, or tokens packed to rows
        if self._micro_batch == 1 and (size == 1 or self._train_batch_size % size):
            return None  # 1 is also what configs say where a forward has no batch: one graph, all rays, one document
        return size

    def _fingerprint(self) -> str | None:
        """One text for all that was seen; None where equal ones would prove nothing."""
        if self._loader is not None and self._loader.used and self._loader.separates_ranks:
            return None
        if not self._checksums or None in self._checksums:
            return None
        digests = [_digest(each) for each in self._checksums if each is not None]
        if None in digests or (len(digests) > 1 and len(set(digests)) == 1):
            return None  # the same input in each forward is a choice: full-batch training, or a fixed grid
        return " ".join(digest for digest in digests if digest is not None)


def fingerprint(sample: Any) -> str | None:
    """A text that two samples share if they are equal; None for a sample that does not tell. Reads its tensors."""
    contents = _contents((sample,))
    return None if contents.opaque else _digest(_checksums(contents), constants=True)


# -- the messages ----------------------------------------------------------------------------------------------


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
    equal = [name_ranks(each) for each in ranks.values() if len(each) > 1]
    if not equal:
        return
    remedy = (
        "the stream is not split by rank; leave redline.data.split_by_rank out or set it to false"
        if streams
        else "give the dataset to initialize(training_data=...) and iterate over engine.training_dataloader, or give "
        "the DataLoader a torch.utils.data.DistributedSampler; seed what is generated by rank"
    )
    yield f"{' and '.join(equal)} train on the same samples, so that all but one of them are wasted: {remedy}"


# -- what a batch holds ----------------------------------------------------------------------------------------


@dataclass
class _Contents:
    """What is in a batch.

    Attributes:
        tensors: in order.
        plain: numbers and strings.
        lists: lengths of the lists of tensors in it.
        opaque: whether something in it could not be looked into.
        separate: whether a list in it may hold one tensor per sample.
    """

    tensors: list[Tensor] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)
    opaque: bool = False
    separate: bool = False


def _contents(batch: tuple[Any, ...]) -> _Contents:
    contents = _Contents()
    for value in batch:
        _collect(value, contents, _DEPTH)
    return contents


def _collect(value: Any, contents: _Contents, depth: int) -> None:
    if isinstance(value, Tensor):
        if len(contents.tensors) == _TENSORS or value.device.type == "meta":
            contents.opaque = True
        else:
            contents.tensors.append(value)
    elif isinstance(value, (str, bytes, int, float, complex)):
        contents.plain.append(value)
    elif value is None or callable(value) or isinstance(
        value, (enum.Enum, nn.Module, torch.dtype, torch.device, torch.Generator)
    ):  # fmt: skip
        return  # no data
    elif (array := _from_numpy(value)) is not None:
        contents.tensors.append(array)
    elif depth == 0:
        contents.opaque = True
    elif isinstance(value, Mapping):
        _collect_all(value.values(), contents, depth)
    elif isinstance(value, (list, tuple, deque, Set)):
        tensors = [each for each in value if isinstance(each, Tensor)]
        if tensors:
            contents.lists.append(len(value))
            contents.separate |= len(tensors) == len(value) and len({each.shape for each in tensors}) == 1
        _collect_all(value, contents, depth)
    else:
        known = len(contents.tensors) + len(contents.plain)
        _collect_all(_attributes(value), contents, depth)
        contents.opaque |= len(contents.tensors) + len(contents.plain) == known


def _collect_all(values: Iterable[Any], contents: _Contents, depth: int) -> None:
    for value in values:
        _collect(value, contents, depth - 1)


def _attributes(value: Any) -> list[Any]:
    """What an object holds: a dataclass, an attrs class, a graph."""
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    held = [getattr(value, name, None) for name in names if not name.startswith("__")]
    return held + list(getattr(value, "__dict__", {}).values())


def _from_numpy(value: Any) -> Tensor | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)) or value.dtype.kind not in "biufc":
        return None
    return torch.from_numpy(numpy.array(value))


def _batch_size(contents: _Contents, micro_batch: int) -> int | None:
    """The first dimension of all tensors, where that can only be the batch."""
    tensors = [tensor for tensor in contents.tensors if tensor.ndim]
    if not tensors or _is_graph(contents):
        return None
    if micro_batch in contents.lists:
        return micro_batch  # a tensor per sample
    sizes = {tensor.shape[0] for tensor in tensors}
    ranks = {tensor.ndim for tensor in tensors}
    if contents.separate or len(sizes) > 1 or ranks == {1}:  # one sequence, all tokens
        return None
    (size,) = sizes
    if size == micro_batch:
        return size
    tokens = [tensor for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()]
    if size == 0 or (size == 1 and tokens):  # documents that were packed into one row
        return None
    time_first = (tensor for tensor in tensors if tensor.ndim > 2)
    if any(tensor.shape[1] == micro_batch for tensor in (*time_first, *tokens)):
        return None
    if max(ranks) == 2 and not tokens and size % micro_batch == 0 and size // micro_batch >= _TOKENS:
        return None  # (samples x tokens, features)
    return size


def _is_graph(contents: _Contents) -> bool:
    """Whether the batch has edges: ranks that train on different nodes of one graph have equal inputs."""
    return any(
        tensor.layout != torch.strided
        or (tensor.ndim == 2 and tensor.shape[0] == 2 and tensor.dtype in (torch.int64, torch.int32)
            and any(other.ndim > 1 and other.is_floating_point() and other.shape[0] != 2 for other in contents.tensors))
        for tensor in contents.tensors
    )  # fmt: skip


def _is_tiny(contents: _Contents) -> bool:
    """Whether different samples may well be equal: a few integers."""
    if any(tensor.is_floating_point() or tensor.is_complex() for tensor in contents.tensors):
        return False
    return sum(tensor.numel() for tensor in contents.tensors) < _FEW


# -- checksums -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _checksums(contents: _Contents) -> _Checksums:
    """Of each tensor, computed where it is."""
    sums = [_checksum(tensor) for tensor in contents.tensors if tensor.numel()]
    plain = repr(contents.plain).encode() if contents.plain else b""
    return sums, plain


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


def _digest(checksums: _Checksums, *, constants: bool = False) -> str | None:
    """One text for a batch; None where it holds nothing but constants, unless these count. Reads the checksums."""
    sums, plain = checksums
    values = [tensor.tolist() for tensor in sums]
    if not constants and all(constant for constant, _ in values):
        return None  # ones and zeros of a test, masks, paddings
    return hashlib.blake2b(repr(values).encode() + plain, digest_size=16).hexdigest()
