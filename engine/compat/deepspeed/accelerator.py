"""`deepspeed.accelerator`: the device of this process, CUDA where there is one, else the CPU."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch.cuda import nvtx

__all__ = ["DeepSpeedAccelerator", "get_accelerator", "is_current_accelerator_supported", "set_accelerator"]
__path__: list[str] = []  # a package in DeepSpeed: `_paths` finds what is in it


class DeepSpeedAccelerator:
    """DeepSpeed's abstract accelerator, over `torch.cuda` or the CPU; its methods are in tables below."""

    def __init__(self, name: str) -> None:
        self._name, self._is_cuda = name, name == "cuda"
        self._communication_backend_name = "nccl" if self._is_cuda else "gloo"

    def __getattr__(self, name: str) -> Any:
        if name in _RETURNS:
            value = _RETURNS[name]
            return lambda *args, **kwargs: value[not self._is_cuda] if isinstance(value, tuple) else value
        if name in _FUNCTIONS:
            return _FUNCTIONS[name][not self._is_cuda]
        # Memory, streams, events and random numbers: torch.cuda's own functions have DeepSpeed's names.
        if self._is_cuda and not name.startswith("__") and hasattr(torch.cuda, name):
            return getattr(torch.cuda, name)
        if name in _CPU:
            return _CPU[name] if callable(_CPU[name]) else lambda *args, **kwargs: _CPU[name]
        raise AttributeError(f"the {self._name} accelerator has no {name!r}")

    def device_name(self, device_index: int | None = None) -> str:
        return self._name if device_index is None or not self._is_cuda else f"{self._name}:{device_index}"

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name


def _host_memory(pages: str) -> int:
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", os.cpu_count() or 1)))


# What methods return; a pair on CUDA and on the CPU. Nothing is compiled, so that there are no op builders.
_RETURNS: dict[str, Any] = {
    "is_available": True, "is_fp16_supported": True, "random": torch.random, "amp": torch.amp,
    "supported_dtypes": [torch.float32, torch.float16, torch.bfloat16], "get_compile_backend": "inductor",
    "visible_devices_envs": ["CUDA_VISIBLE_DEVICES"], "op_builder_dir": "deepspeed.ops.op_builder",
    "create_op_builder": None, "get_op_builder": None, "communication_backend_name": ("nccl", "gloo"),
    "export_envs": (["NCCL"], []), "is_triton_supported": (True, False), "is_synchronized_device": (False, True),
    "use_host_timers": (False, True), "resolves_data_dependency": (False, True),
    "handles_memory_backpressure": (False, True),
}  # fmt: skip
# What methods do on CUDA and on the CPU.
_FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "device": (lambda device_index=None: torch.cuda.device(device_index), lambda device_index=None: nullcontext()),
    "set_device": (torch.cuda.set_device, lambda device_index: None),
    "current_device": (torch.cuda.current_device, lambda: int(os.environ.get("LOCAL_RANK", "0"))),
    "device_count": (torch.cuda.device_count, _ranks_here),
    "is_bf16_supported": (torch.cuda.is_bf16_supported, lambda: True),
    "pin_memory": (lambda tensor, align_bytes=1: tensor.pin_memory(), lambda tensor, align_bytes=1: tensor),
    "is_pinned": (lambda tensor: tensor.is_pinned(), lambda tensor: True),
    "range_push": (nvtx.range_push, lambda message: None),
    "range_pop": (nvtx.range_pop, lambda: None),
    "lazy_call": (torch.cuda._lazy_call, lambda callback: callback()),
    "available_memory": (
        lambda device_index=None: torch.cuda.mem_get_info(device_index)[0],
        lambda device_index=None: _host_memory("SC_AVPHYS_PAGES"),
    ),
    "total_memory": (
        lambda device_index=None: torch.cuda.mem_get_info(device_index)[1],
        lambda device_index=None: _host_memory("SC_PHYS_PAGES"),
    ),
}
# On the CPU, what `torch.cuda` has: functions, or what they return.
_CPU: dict[str, Any] = {
    "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "reset_max_memory_allocated": None,
    "Stream": None, "Event": None, "current_stream": None, "default_stream": None, "stream": nullcontext,
    "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
    "memory_cached": 0, "max_memory_cached": 0, "memory_stats": {},
    "seed": torch.seed, "initial_seed": torch.initial_seed,
    "manual_seed": torch.manual_seed, "manual_seed_all": torch.manual_seed,
    "get_rng_state": lambda device_index=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device_index=None: torch.set_rng_state(state),
    "default_generator": lambda device_index: torch.default_generator,
}  # fmt: skip

_accelerator: DeepSpeedAccelerator | None = None


def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator of this process; DS_ACCELERATOR=cpu chooses the CPU."""
    global _accelerator
    if _accelerator is None:
        chosen = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
        _accelerator = DeepSpeedAccelerator(chosen)
    return _accelerator


def set_accelerator(accelerator: DeepSpeedAccelerator) -> None:
    global _accelerator
    _accelerator = accelerator


def is_current_accelerator_supported() -> bool:
    return True
