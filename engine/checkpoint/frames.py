"""A tensor as `torch.save` writes it, at the cost of writing its values.

What `torch.save` puts before and after the values is the same for all tensors of one number format and shape. So it
is asked once for each, and its bytes are kept: a model has hundreds of tensors, and a dozen shapes. It took
more time than the values of a middling model, and held the interpreter, which a background thread should not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

__all__ = ["memory_of", "write_tensor"]

_KEPT = 4096  # shapes


class _Frame(NamedTuple):
    before: bytes
    after: bytes


_frames: dict[tuple[torch.dtype, torch.Size], _Frame] = {}


def write_tensor(tensor: Tensor, write: Callable[[Any], Any]) -> None:
    """Write what `torch.load` reads as this tensor, contiguous.

    Args:
        tensor: on any device.
        write: takes bytes, or memory that holds still until it returns.
    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    kind = tensor.dtype, tensor.shape
    if kind in _frames:
        frame = _frames[kind]
        write(frame.before)
        write(memory_of(tensor))
        write(frame.after)
        return
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes all that a storage holds
    spy = _Spy(tensor, write)
    with _without_checksums():
        torch.save(tensor, cast(IO[bytes], spy))
    if spy.found == 1 and len(_frames) < _KEPT:  # else its values happen to look like something else in there
        _frames[kind] = _Frame(bytes(spy.before), bytes(spy.after))


def memory_of(tensor: Tensor) -> Any:
    """A CPU tensor's values as they lie in memory, without a copy; it has to be contiguous and not empty."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


class _Spy:
    """Passes on what is written, and takes down what comes before a tensor's values and what after."""

    def __init__(self, tensor: Tensor, write: Callable[[Any], Any]) -> None:
        self._write = write
        self._values = memoryview(memory_of(tensor)).cast("B") if tensor.nbytes else None
        self.found = 0
        self.before, self.after = bytearray(), bytearray()

    def write(self, data: bytes) -> int:
        self._write(data)
        if self._values is not None and len(data) == len(self._values) and self._values == data:
            self.found += 1
        elif self.found:
            self.after += data
        else:
            self.before += data
        return len(data)

    def flush(self) -> None:
        pass


@contextmanager
def _without_checksums() -> Iterator[None]:
    """They depend on the values, and the manifest has one of the whole file."""
    computes = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(computes)
