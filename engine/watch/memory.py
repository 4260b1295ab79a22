"""`memory_breakdown`: memory in use and at its peak, of rank zero; the allocator's on CUDA, else the process's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["Memory"]

_GIB = 1024**3


class Memory:
    """The memory of this process on its device.

    Args:
        device: on CUDA, tensors' memory, and what the allocator holds for them; elsewhere the resident set.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def line(self, updates: int = 0, seconds: float = 0.0) -> str:
        """Memory now and at most so far; the time does not matter."""
        parts = self._on_cuda() if self._device.type == "cuda" else _of_process()
        return "memory (GiB): " + ", ".join(f"{name}={size / _GIB:.2f}" for name, size in parts.items())

    def _on_cuda(self) -> dict[str, float]:
        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "peak": torch.cuda.max_memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
        }


def _of_process() -> dict[str, float]:
    if sys.platform == "win32":
        return {}
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024
    parts = {"peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        parts = {"resident": float(int(statm.read_text().split()[1]) * resource.getpagesize()), **parts}
    return parts
