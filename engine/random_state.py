"""Random number generators: those of this process (Python's, NumPy's, torch's, CUDA's), and those an object holds.

NumPy is optional, and never imported for this: only where the script has imported it can its generator have been used.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["capture_generator", "is_generator", "random_state", "reseed", "seed_generators", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The state of all generators, as plain types and tensors; None for a generator that nobody has used."""
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": numpy and tree_map_only(numpy.ndarray, _to_tensor, numpy.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else None,
        "cuda_device": torch.cuda.current_device() if cuda else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _to_tensor(array: Any) -> Tensor:
    return torch.from_numpy(array.copy())


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned, in this process or in another.

    Args:
        state: states of CUDA devices that this host does not have are ignored.
    """
    random.setstate(state["python"])
    if state["numpy"] is not None:
        import numpy  # not at the top: optional, and imported where the state was saved

        numpy.random.set_state(tree_map_only(Tensor, Tensor.numpy, state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        for device, each in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each, device)
        if state.get("cuda_device") is not None:  # the process may run on another device now
            torch.cuda.set_rng_state(state["cuda"][state["cuda_device"]])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def reseed(state: Mapping[str, Any], number: int) -> None:
    """Seed all generators from a state and a number, such as rank 0's state and this rank."""
    digest = hashlib.blake2b(state["torch"].numpy().tobytes() + number.to_bytes(8, "big"), digest_size=8).digest()
    seed_generators(int.from_bytes(digest, "big") >> 1, torch.manual_seed)  # CUDA's, too


def seed_generators(seed: int, seed_torch: Callable[[int], Any]) -> None:
    """Seed Python's, torch's and NumPy's generators."""
    random.seed(seed)
    seed_torch(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def is_generator(value: Any) -> bool:
    """Whether it is a random number generator of Python's, NumPy's or torch's."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    return type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("Generator", "RandomState")


def capture_generator(generator: Any) -> Callable[[], Any]:
    """Capture a generator's state; returns what restores it, any number of times."""
    state: Any
    set_state: Callable[[Any], Any]
    if isinstance(generator, random.Random):
        state, set_state = generator.getstate(), generator.setstate
    elif isinstance(generator, torch.Generator):
        state, set_state = generator.get_state(), generator.set_state
    elif type(generator).__name__ == "RandomState":
        state, set_state = generator.get_state(legacy=False), generator.set_state
    else:
        state, set_state = generator.bit_generator.state, partial(setattr, generator.bit_generator, "state")
    return lambda: set_state(copy.deepcopy(state))
