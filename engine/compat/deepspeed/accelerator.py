"""`deepspeed.accelerator`: the device of this process, CUDA where there is one, else the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

__all__ = ["Accelerator", "get_accelerator", "is_current_accelerator_supported", "set_accelerator"]


class Accelerator:
    """DeepSpeed's abstract accelerator, over `torch.cuda` or the CPU."""

    def __init__(self, name: str) -> None:
        self._name, self._is_cuda = name, name == "cuda"
        self._communication_backend_name = "nccl" if self._is_cuda else "gloo"

    def __getattr__(self, name: str) -> Any:
        if name in _VALUES:
            return lambda *args, **kwargs: _VALUES[name]
        if name in _IS_CUDA:
            return lambda *args, **kwargs: self._is_cuda is _IS_CUDA[name]
        # Memory, streams, events and random numbers: torch.cuda's own functions have DeepSpeed's names.
        if self._is_cuda and not name.startswith("__") and hasattr(torch.cuda, name):
            return getattr(torch.cuda, name)
        if name in _ON_CPU:
            return _ON_CPU[name]
        raise AttributeError(f"the {self._name} accelerator has no {name!r}")

    def device_name(self, device_index: int | None = None) -> str:
        return self._name if device_index is None or not self._is_cuda else f"{self._name}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return torch.cuda.device(device_index) if self._is_cuda else nullcontext()

    def set_device(self, device_index: int) -> None:
        if self._is_cuda:
            torch.cuda.set_device(device_index)

    def current_device(self) -> Any:
        """Index of the current device; DeepSpeed's CPU has LOCAL_RANK."""
        return torch.cuda.current_device() if self._is_cuda else int(os.environ.get("LOCAL_RANK", "0"))

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """Devices on this host; for the CPU the ranks on it."""
        if self._is_cuda:
            return torch.cuda.device_count()
        return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.cpu_count() or 1)))

    def communication_backend_name(self) -> str:
        return self._communication_backend_name

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported() if self._is_cuda else True

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor.pin_memory() if self._is_cuda else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned() if self._is_cuda else True

    def range_push(self, message: str) -> None:
        if self._is_cuda:
            torch.cuda.nvtx.range_push(message)

    def range_pop(self) -> None:
        if self._is_cuda:
            torch.cuda.nvtx.range_pop()

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call it now, or when CUDA is initialized."""
        return torch.cuda._lazy_call(callback) if self._is_cuda else callback()

    def available_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[0] if self._is_cuda else _host_memory("SC_AVPHYS_PAGES")

    def total_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[1] if self._is_cuda else _host_memory("SC_PHYS_PAGES")

    def export_envs(self) -> list[str]:
        """Prefixes of environment variables that a launcher hands on."""
        return ["NCCL"] if self._is_cuda else []


def _host_memory(name: str) -> int:
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


# What methods return on any device, and whether they are true of CUDA or of the CPU alone. Nothing is compiled, so that
# there are no op builders.
_VALUES: dict[str, Any] = {
    "is_available": True, "is_fp16_supported": True, "random": torch.random, "amp": torch.amp,
    "supported_dtypes": [torch.float32, torch.float16, torch.bfloat16], "get_compile_backend": "inductor",
    "visible_devices_envs": ["CUDA_VISIBLE_DEVICES"], "op_builder_dir": "deepspeed.ops.op_builder",
    "create_op_builder": None, "get_op_builder": None,
}  # fmt: skip
_IS_CUDA = {"is_triton_supported": True, "is_synchronized_device": False, "use_host_timers": False,
            "resolves_data_dependency": False, "handles_memory_backpressure": False}  # fmt: skip


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _no_bytes(*args: Any, **kwargs: Any) -> int:
    return 0


_ON_CPU: dict[str, Any] = {
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated"), _nothing),
    **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), _nothing),
    **dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_cached",
         "max_memory_cached"),
        _no_bytes,
    ),
    "memory_stats": lambda *args, **kwargs: {},
    "stream": lambda stream: nullcontext(),
    "manual_seed": torch.manual_seed,
    "manual_seed_all": torch.manual_seed,
    "seed": torch.seed,
    "initial_seed": torch.initial_seed,
    "get_rng_state": lambda device_index=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device_index=None: torch.set_rng_state(state),
    "default_generator": lambda device_index: torch.default_generator,
}  # fmt: skip

_accelerator: Accelerator | None = None


def get_accelerator() -> Accelerator:
    """The accelerator of this process; DS_ACCELERATOR=cpu chooses the CPU."""
    global _accelerator
    if _accelerator is None:
        chosen = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
        _accelerator = Accelerator(chosen)
    return _accelerator


def set_accelerator(accelerator: Accelerator) -> None:
    global _accelerator
    _accelerator = accelerator


def is_current_accelerator_supported() -> bool:
    return True
