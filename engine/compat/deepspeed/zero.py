"""`deepspeed.zero`: full parameters of a model that ZeRO stage 3 has sharded, for as long as a block lasts."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import swap_tensors

from redline.errors import EngineError
from redline.optimizers.state import local_tensor

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus", "ZeroParamType", "mark_sharded"]


ZeroParamStatus = enum.Enum("ZeroParamStatus", "AVAILABLE NOT_AVAILABLE INFLIGHT")  # whether a parameter is full here
ZeroParamType = enum.Enum("ZeroParamType", "NORMAL PARTITIONED REMOTE")


class Init:
    """A context in which a script makes its model. Nothing is sharded in it: `deepspeed.initialize` does that."""

    def __init__(self, module: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def __call__(self, function: Any) -> Any:
        return function


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "_spec")


_ids = itertools.count()


def mark_sharded(module: nn.Module) -> None:
    """Give parameters the attributes by which scripts know those of ZeRO stage 3; one rank has them in full."""
    from redline.distributed.fsdp_state import gathered_params

    for param in module.parameters():
        if not hasattr(param, "ds_id"):
            is_full, marks = not is_sharded(param), vars(param)
            marks.update(ds_id=next(_ids), ds_numel=param.numel(), ds_shape=param.shape, ds_persist=is_full)
            marks["ds_status"] = ZeroParamStatus.AVAILABLE if is_full else ZeroParamStatus.NOT_AVAILABLE
            marks["ds_tensor"] = local_tensor(param).detach()
            marks["all_gather"] = marks["partition"] = _nothing
            marks["ds_active_sub_modules"] = set()
    for param, full in gathered_params(module):  # what a forward meets
        full.__dict__.update(vars(param), ds_status=ZeroParamStatus.AVAILABLE)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


class ParameterOffload:
    """DeepSpeed's hooks that gather parameters, which TRL takes away while a model generates. There are none here."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []
        module.ds_external_parameters = tuple  # which, called, is none

    def _register_deepspeed_module(self, module: nn.Module) -> None: ...


@cache
def _full_class() -> type[Tensor]:
    """A parameter in full, in the object of a sharded one: Python lets classes of the same slots take turns."""
    from torch.distributed.tensor import DTensor

    class Full(Tensor):
        __slots__ = DTensor.__slots__
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
        _is_param = True  # for nn.Parameter's isinstance

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))

        def __reduce_ex__(self, protocol: Any) -> Any:
            param: Any = nn.Parameter(self.detach(), self.requires_grad)
            return param.__reduce_ex__(protocol)

    return Full


class GatheredParameters:
    """Parameters of a sharded model in full, within a block; a collective. Others are left as they are.

    Args:
        params: a parameter, several, or a module.
        modifier_rank: the rank whose writes are kept, on all ranks; None where nothing is written.
        fwd_module: not used.
        enabled: False does nothing.
    """

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        if isinstance(params, nn.Module):
            params = params.parameters()
        elif isinstance(params, Tensor):
            params = [params]
        self.params: list[Any] = [each for each in dict.fromkeys(params) if is_sharded(each)] if enabled else []
        self._modifier = modifier_rank
        self._sharded: list[Any] = []

    def __enter__(self) -> list[Tensor]:
        # The objects are swapped, so that all who hold a parameter see it in full.
        for param in self.params:
            full: Any = param.full_tensor().detach().as_subclass(_full_class()).requires_grad_(param.requires_grad)
            full.__dict__.update(vars(param), ds_status=ZeroParamStatus.AVAILABLE)
            swap_tensors(param, full)  # type: ignore[no-untyped-call]
            param._local_tensor = full._local_tensor  # a forward in the block, such as of generate, gathers it
            self._sharded.append(full)
        return self.params

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        for param, sharded in zip(self.params, self._sharded):
            del param._local_tensor
            try:
                # `sharded` has the full values then.
                swap_tensors(param, sharded)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise EngineError(
                    "GatheredParameters: a forward in the block has left a graph that holds its parameters; use "
                    "torch.no_grad() there, or call the engine outside of the block"
                ) from error
            if self._modifier is not None:
                value = sharded.detach().contiguous()
                dist.broadcast(value, self._modifier)
                param.to_local().copy_(shard_like(value, param))
        self._sharded.clear()


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[nn.Module]:
    """The model with all its parameters in full, for `generate`."""
    module = getattr(model, "module", model)
    with GatheredParameters(module):
        yield module


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing: a parameter is gathered with the module that owns it."""


unregister_external_parameter = register_external_parameter


def full_tensor(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def shard_like(value: Tensor, target: Any) -> Tensor:
    """This rank's shard of a full value, as of a sharded tensor; the value itself for any other."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device, target.dtype).contiguous()
    return distribute_tensor(value, target.device_mesh, target.placements).to_local()


# -- how much memory a stage needs, for a model and for numbers of parameters ---------------------------------


def _print_needs(stage: int, elements: Any, num_gpus_per_node: int, num_nodes: int) -> None:
    from redline.distributed.memory_estimate import Bytes, estimate, shown

    ranks = num_gpus_per_node * num_nodes
    held = estimate(elements, Bytes(computed=2), ranks)[stage]
    print(f"ZeRO stage {stage} on {ranks} ranks, bf16 with Adam: {shown(held.most)} per rank, without activations")


def _live(stage: int, model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, *_: Any, **__: Any) -> None:
    from redline.distributed.blocks import find_blocks
    from redline.distributed.memory_estimate import count

    _print_needs(stage, count(model, find_blocks(model), low=True), num_gpus_per_node, num_nodes)


def _cold(
    stage: int, total_params: int, largest_layer_params: int = 0, num_gpus_per_node: int = 1, num_nodes: int = 1,
    *_: Any, **__: Any,
) -> None:  # fmt: skip
    from redline.distributed.memory_estimate import Elements

    elements = Elements(total_params, rest=largest_layer_params, largest=largest_layer_params)
    _print_needs(stage, elements, num_gpus_per_node, num_nodes)


estimate_zero2_model_states_mem_needs_all_live = partial(_live, 2)
estimate_zero2_model_states_mem_needs_all_cold = partial(_cold, 2)
estimate_zero3_model_states_mem_needs_all_live = partial(_live, 3)
estimate_zero3_model_states_mem_needs_all_cold = partial(_cold, 3)
