"""`deepspeed.checkpointing`: activation checkpointing by torch's own, and Megatron's tracker of random states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as _checkpoint

__all__ = [
    "CudaRNGStatesTracker", "checkpoint", "configure", "get_cuda_rng_tracker", "is_configured",
    "model_parallel_cuda_manual_seed", "non_reentrant_checkpoint", "reset",
]  # fmt: skip

checkpoint = partial(_checkpoint, use_reentrant=True)
non_reentrant_checkpoint = partial(_checkpoint, use_reentrant=False)
_configured = False


def configure(mpu_: Any = None, deepspeed_config: Any = None, **options: Any) -> None:
    """Take note of it: torch's checkpointing has no settings, and partitions and offloads nothing."""
    global _configured
    _configured = True


def is_configured() -> bool:
    return _configured


def reset() -> None:
    """Nothing: nothing is kept between steps."""


class CheckpointFunction:
    """As Megatron calls it: ``CheckpointFunction.apply(function, outputs, *args)``."""

    @staticmethod
    def apply(function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        outputs = checkpoint(function, *args)
        all_outputs += outputs if isinstance(outputs, tuple) else [outputs]
        return outputs


class CudaRNGStatesTracker:
    """Random states by name; a fork draws from one of them."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Begin a state from a seed."""
        if name in self.states_:
            raise Exception(f"cuda rng state {name} already exists")
        before = _get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = _get_rng_state()
        _set_cuda_rng_state(before)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a state within this block."""
        if name not in self.states_:
            raise Exception(f"cuda rng state {name} is not added")
        before = _get_rng_state()
        _set_cuda_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = _get_rng_state()
            _set_cuda_rng_state(before)


def _get_rng_state() -> torch.Tensor:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_cuda_rng_state(state: torch.Tensor, device: int = -1) -> None:
    torch.cuda.set_rng_state(state) if torch.cuda.is_available() else torch.set_rng_state(state)


_CUDA_RNG_STATE_TRACKER = CudaRNGStatesTracker()
_MODEL_PARALLEL_RNG_TRACKER_NAME = "model-parallel-rng"


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    return _CUDA_RNG_STATE_TRACKER


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed this process and the tracker's default state."""
    _CUDA_RNG_STATE_TRACKER.reset()
    torch.manual_seed(seed)
    _CUDA_RNG_STATE_TRACKER.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, seed + 2718)


model_parallel_reconfigure_tp_seed = model_parallel_cuda_manual_seed
