"""A few numbers between the host and the device, without waiting for the device.

Everything on the hot path that wants a number asks here: on the CPU it is read at once, on CUDA it is copied into
page-locked memory and read when it has arrived. Large data is not this file's concern.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostCopy", "numbers_on", "reads_cost_nothing"]

_READ_AT_ONCE = ("cpu",)


def reads_cost_nothing(device: torch.device) -> bool:
    """Whether a tensor there can be read without waiting: its operations are done when they return."""
    return device.type in _READ_AT_ONCE


def numbers_on(device: torch.device | None, numbers: Sequence[float]) -> Tensor:
    """Numbers as an fp32 tensor on a device, shape (n,); None is the CPU."""
    if device is None or reads_cost_nothing(device):
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    # torch.tensor() would copy from pageable memory, and wait for the stream to get there.
    made = torch.empty(len(numbers), dtype=torch.float32, device=device)
    for place, number in zip(made.unbind(), numbers):
        place.fill_(number)
    return made


class HostCopy:
    """Scalars on their way to the host.

    On the meta device, where a run is tried without values, all of them are taken to be 0.

    Args:
        values: scalar tensors, and numbers that the host has already.
    """

    def __init__(self, *values: Tensor | float) -> None:
        self._values, self._event = _send(values)

    def has_arrived(self) -> bool:
        """Whether :meth:`read` would return at once."""
        if self._event is not None and self._event.query():
            self._event = None
        return self._event is None

    def read(self) -> list[float]:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values]


def _send(values: Sequence[Tensor | float]) -> tuple[Sequence[Tensor | float], Any]:
    """The copies on the host, and an event that tells when they are valid; None where they are valid already."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    if device == "meta":
        return [0.0] * len(values), None
    if device != "cuda":
        return values, None
    host = torch.empty(len(values), pin_memory=True)
    for place, value in zip(host.unbind(), values):
        if isinstance(value, Tensor):
            place.copy_(value, non_blocking=True)
        else:
            place.fill_(value)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host.unbind(), event
