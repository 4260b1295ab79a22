"""`deepspeed.zero`: full parameters of a model that ZeRO stage 3 has sharded, for as long as a block lasts."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import swap_tensors

from redline.errors import EngineError

__all__ = [
    "GatheredParameters", "Init", "ZeroParamStatus", "ZeroParamType", "mark_sharded", "register_external_parameter",
    "unregister_external_parameter",
]  # fmt: skip


class ZeroParamStatus(enum.Enum):
    """Whether a parameter is full on this rank."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(enum.Enum):
    """How a parameter is divided."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class Init:
    """A context in which a script makes its model. Nothing is sharded in it: `deepspeed.initialize` does that.

    With a `module` it is left as it is.
    """

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
            marks: Any = param
            marks.ds_id, marks.ds_numel, marks.ds_shape = next(_ids), param.numel(), param.shape
            marks.ds_persist = not is_sharded(param)
            marks.ds_status = ZeroParamStatus.AVAILABLE if marks.ds_persist else ZeroParamStatus.NOT_AVAILABLE
            marks.ds_tensor = getattr(param, "_local_tensor", param).detach()
            marks.all_gather = marks.partition = _nothing
            marks.ds_active_sub_modules = set()
    for param, full in gathered_params(module):  # what a forward meets
        full.__dict__.update(vars(param), ds_status=ZeroParamStatus.AVAILABLE)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _no_params() -> tuple[Tensor, ...]:
    return ()


class ParameterOffload:
    """DeepSpeed's hooks that gather parameters, which TRL takes away while a model generates. There are none here."""

    def __init__(self, module: Any) -> None:
        self.module, self.forward_hooks, self.backward_hooks = module, [], []
        module.ds_external_parameters = _no_params

    def _register_deepspeed_module(self, module: nn.Module) -> None: ...


@cache
def _full_class() -> type[Tensor]:
    """A parameter in full, in the object of a sharded one: Python lets classes of the same slots take turns."""
    from torch.distributed.tensor import DTensor

    class Full(Tensor):
        __slots__ = DTensor.__slots__
        __torch_function__ = torch._C._disabled_torch_function_impl
        _is_param = True  # for nn.Parameter's isinstance

        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
            return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))

        def __reduce_ex__(self, protocol: Any) -> Any:
            return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

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
        self.params = [each for each in dict.fromkeys(params) if is_sharded(each)] if enabled else []
        self._modifier = modifier_rank
        self._sharded: list[Any] = []

    def __enter__(self) -> list[Tensor]:
        # The objects are swapped, so that all who hold a parameter see it in full.
        for param in self.params:
            full: Any = param.full_tensor().detach().as_subclass(_full_class()).requires_grad_(param.requires_grad)
            full.__dict__.update(vars(param), ds_status=ZeroParamStatus.AVAILABLE)
            swap_tensors(param, full)
            full_param: Any = param
            full_param._local_tensor = full._local_tensor  # a forward in the block, such as of generate, gathers it
            self._sharded.append(full)
        return self.params

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        for param, sharded in zip(self.params, self._sharded):
            del param._local_tensor
            try:
                swap_tensors(param, sharded)  # `sharded` has the full values now
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


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Nothing, as :func:`register_external_parameter`."""


def full_tensor(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, target: Any) -> Tensor:
    """This rank's shard of a full value, as of a sharded tensor; the value itself for any other."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device, target.dtype).contiguous()
    return distribute_tensor(value, target.device_mesh, target.placements).to_local()
