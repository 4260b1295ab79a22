"""`deepspeed.comm`: torch.distributed's functions, which also work where there is no process group, as for one rank."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from deepspeed._not_built import not_built

__path__: list[str] = []  # a package in DeepSpeed: `_paths` finds what is in it

DEFAULT_TIMEOUT = timedelta(minutes=10)


def init_distributed(
    dist_backend: str | None = None, auto_mpi_discovery: bool = True, distributed_port: int = 29500,
    verbose: bool = True, timeout: timedelta = DEFAULT_TIMEOUT, init_method: str | None = None,
    dist_init_required: bool | None = None, config: Any = None, rank: int = -1, world_size: int = -1,
) -> None:  # fmt: skip
    """Join the process group of the launcher; without a launcher, one of a single rank.

    Args as DeepSpeed's. `dist_backend` is taken for GPUs only: numbers about a run travel over gloo.
    """
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise AssertionError("Distributed backend is not initialized. Please set dist_init_required to True")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist_backend != "gloo" else "gloo"
    if rank < 0 and "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(distributed_port))
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)


def is_available() -> bool:
    return dist.is_available()


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank(group: Any = None) -> int:
    return dist.get_rank(group) if is_initialized() else int(os.environ.get("RANK", "0"))


def get_world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world_group() -> Any:
    return dist.group.WORLD


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def configure(*args: Any, **kwargs: Any) -> None:
    """Nothing: a config's section `comms_logger` has its settings."""


log_summary = configure  # a config's section `comms_logger` logs collectives
comms_logger = SimpleNamespace(enabled=False, comms_dict={})

# Collectives, which without a group are those of one rank: nothing, or a copy of the input to the first output.
_IN_PLACE = {"all_reduce", "reduce", "broadcast", "barrier", "monitored_barrier", "broadcast_object_list"}
_COPIES = {"all_gather", "all_gather_object", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
           "all_to_all_single", "scatter"}  # fmt: skip
_ALIASES = {"allgather_fn": "all_gather_into_tensor", "reduce_scatter_fn": "reduce_scatter_tensor",
            "inference_all_reduce": "all_reduce"}  # fmt: skip
# True of every torch that Redline runs on.
_TRUE = {"has_all_gather_into_tensor", "has_reduce_scatter_tensor", "has_coalescing_manager",
         "has_all_reduce_coalesced"}  # fmt: skip
_NOT_BUILT = {"TorchBackend", "CCLBackend", "mpi_discovery", "patch_aml_env_for_torch_nccl_backend",
              "initialize_mesh_device", "timed_op"}  # fmt: skip


def _collective(name: str, *args: Any, prof: Any = None, log_name: Any = None, debug: Any = None, **kwargs: Any) -> Any:
    if is_initialized():
        return getattr(dist, name)(*args, **kwargs)
    return _copy(*args, **kwargs) if name in _COPIES else None


def _copy(output: Any, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, list):
        value = value[0]
    if not isinstance(output, list):
        output.copy_(value.view_as(output))
    elif isinstance(value, torch.Tensor):
        output[0].copy_(value)
    else:
        output[0] = value


def __getattr__(name: str) -> Any:
    name = _ALIASES.get(name, name)
    if name in _IN_PLACE or name in _COPIES:
        return partial(_collective, name)
    if name in _TRUE:
        return lambda: True
    if name in _NOT_BUILT:
        return not_built(f"deepspeed.comm.{name}", "use torch.distributed")
    if not name.startswith("__") and hasattr(dist, name):
        return getattr(dist, name)
    raise AttributeError(f"module 'deepspeed.comm' has no attribute {name!r}")
