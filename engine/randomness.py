"""The random numbers of this process: Python's, NumPy's, torch's and CUDA's, taken down and put back.

Data loaders' own generators are not here; what is drawn in workers is seeded by `engine.data`.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["random_state", "reseed", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The state of all generators, in plain types and tensors; None for one that nobody has used."""
    # NumPy is the user's: only if it is loaded can its generator have been used.
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": None if numpy is None else _to_tensors(numpy.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else None,
        "cuda_device": torch.cuda.current_device() if cuda else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave, here or in another process.

    Args:
        state: of CUDA's devices, those are set that are here.
    """
    random.setstate(state["python"])
    if state["numpy"] is not None:
        import numpy  # not above: the user's, and loaded where the state was taken

        numpy.random.set_state(_to_arrays(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        for device, each in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each, device)
        if state.get("cuda_device") is not None:  # a process may have another device now
            torch.cuda.set_rng_state(state["cuda"][state["cuda_device"]])


def reseed(state: Mapping[str, Any], number: int) -> None:
    """Seed all generators from a state and a number: another process's and one's own rank, say."""
    digest = hashlib.blake2b(state["torch"].numpy().tobytes() + number.to_bytes(8, "big"), digest_size=8).digest()
    seed = int.from_bytes(digest, "big") >> 1
    random.seed(seed)
    torch.manual_seed(seed)  # CUDA's, too
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _to_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tensors(item) for key, item in value.items()}
    return torch.from_numpy(value.copy()) if hasattr(value, "dtype") and value.ndim else value


def _to_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_arrays(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value
