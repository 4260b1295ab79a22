"""Models that were built on the meta device: without memory, to be filled part by part.

What DeepSpeed's `zero.Init` is for: a model larger than one host's memory is never whole anywhere. Each module's
weights are made when its part is sharded, by the module's own code: `reset_parameters` and the like, or, in a model of
Hugging Face, the model's `_init_weights`. What a constructor computed (a table of positions, a mask) is lost on the
meta device; where no such code computes it again, the model is refused by the names of these tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import EngineError

__all__ = ["Blank", "fill", "is_blank"]

# What a module's own code is called, without arguments: torch's two names for parameters, another, and those of timm
# and of others for tables and masks.
_RESETS = ("reset_parameters", "_reset_parameters", "_init_weights", "reset_buffers", "init_non_persistent_buffers")


def is_blank(module: nn.Module) -> bool:
    """Whether some of the model's parameters or buffers have no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def fill(model: nn.Module, part: Iterable[tuple[str, nn.Module]], device: torch.device) -> dict[Tensor, Tensor]:
    """Fill one part of a model; see :meth:`Blank.fill`."""
    return Blank(model, device).fill(part)


class Blank:
    """A model of which some or all tensors have no memory yet.

    Args:
        model: the whole model, before any part of it is filled.
        device: where to fill it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._whole: set[int] = set()  # modules without a tensor that has memory: their code may write to all of them
        self._initializers: dict[int, Callable[[nn.Module], Any]] = {}
        if is_blank(model):
            self._look(model, None)

    @torch.no_grad()
    def fill(self, part: Iterable[tuple[str, nn.Module]]) -> dict[Tensor, Tensor]:
        """Give the modules of a part memory and their initial weights.

        A module comes after those within it, as when a model is built: what it says about their weights counts.

        Args:
            part: names and modules, as `named_modules` orders them; what is in them by themselves is filled, not what
                is in modules within them.

        Returns:
            The tensor behind each one that had no memory. One that several modules share stays one.

        Raises:
            EngineError: nothing gives some tensors their values.
        """
        made: dict[Tensor, Tensor] = {}
        begun: dict[str, tuple[Tensor, int]] = {}  # by the names that an error tells, with their version
        for name, each in _children_first(part):
            own = _own(each)
            shared: dict[Tensor, Tensor] = {}  # with a module before it, which has given them their values
            for key, tensor in own.items():
                if tensor in made:
                    shared[made[tensor]] = made[tensor].detach().clone()
                else:
                    made[tensor] = _memory_for(tensor, self._device)
                    begun[_joined(name, key)] = (made[tensor], made[tensor]._version)
                setattr(each, key, made[tensor])  # recurrent modules keep a list of their weights, too
            if own or id(each) in self._whole:
                self._reset(name, each)
            for key, tensor in own.items():
                now = getattr(each, key)
                if now is not made[tensor]:  # its own code has made another, instead of writing into this
                    now.data = now.data.to(self._device)
                    made[tensor] = now
                    begun.pop(_joined(name, key), None)
            for tensor, value in shared.items():
                tensor.data.copy_(value)  # by .data, so that it does not count as having been given a value
        lost = [name for name, (tensor, version) in begun.items() if not _is_filled(tensor, version)]
        if lost:
            raise EngineError(
                f"model: on the meta device, and nothing gives {_listed(lost)} a value; give their modules a "
                'reset_parameters() that does, make such tensors with device="cpu", or build the model on the CPU'
            )
        return made

    def _look(self, module: nn.Module, initialize: Callable[[nn.Module], Any] | None) -> bool:
        """Note what initializes each module, and which have no memory at all; whether this one has none, or nothing."""
        own = getattr(module, "_init_weights", None)
        if callable(own) and _num_arguments(own) == 1:  # Hugging Face's: of the nearest model around a module
            initialize = own
        if initialize is not None:
            self._initializers.setdefault(id(module), initialize)
        inside = [self._look(child, initialize) for child in module.children()]
        blank = all(inside) and all(tensor.is_meta for tensor in _tensors(module).values())
        if blank and any(True for _ in (*module.parameters(), *module.buffers())):
            self._whole.add(id(module))
        return blank

    def _reset(self, name: str, module: nn.Module) -> None:
        """Let the module's own code and the model's give values."""
        own = [getattr(module, key, None) for key in _RESETS]
        calls: list[Callable[[], Any]] = [call for call in own if callable(call) and _num_arguments(call) == 0]
        if initialize := self._initializers.get(id(module)):  # last, as when a model is built
            calls.append(functools.partial(initialize, module))
        sharded: Any = next((each for each in module.parameters() if hasattr(each, "placements")), None)
        try:
            with _random_numbers_for(sharded):
                for call in calls:
                    call()
        except (NotImplementedError, RuntimeError) as error:
            if sharded is None:
                raise
            raise EngineError(
                f"model: on the meta device, and {name or type(module).__name__} gives blocks within it their weights, "
                f"which are sharded already ({str(error).splitlines()[0]}); name it in redline.zero.blocks instead of "
                "what is in it, or build the model on the CPU"
            ) from error


@contextmanager
def _random_numbers_for(sharded: Any) -> Iterator[None]:
    """Give each shard of a parameter random numbers of its own, and those of all replicas the same.

    On CUDA torch does so. On the CPU an initializer draws for each shard from the rank's own generator: ranks with one
    seed would get equal shards.
    """
    if sharded is None or sharded.device.type != "cpu":
        yield
        return
    seed = torch.randint(1 << 48, ())
    dist.broadcast(seed, 0)
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(int(seed) + sharded.device_mesh.get_local_rank(-1))
        yield
    finally:
        torch.set_rng_state(state)


def _children_first(part: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order in which a model is built; `named_modules` has each before those within it."""
    around: list[tuple[str, nn.Module]] = []
    for name, each in part:
        while around and around[-1][0] and not name.startswith(f"{around[-1][0]}."):
            yield around.pop()
        around.append((name, each))
    yield from reversed(around)


def _memory_for(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor like one on the meta device, with numbers in it that show where nothing has filled it."""
    value = torch.full_like(tensor, _nothing(tensor.dtype), device=device)
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, requires_grad=tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)
    return parameter


def _nothing(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def _is_filled(tensor: Tensor, version: int) -> bool:
    """Whether something has been written into all of a floating-point tensor, or into any of another."""
    if tensor.is_floating_point() or tensor.is_complex():
        return not tensor.isnan().any()
    # Any number may be meant, so that the version counts. It does not move with what is written by way of .data.
    return tensor._version != version or tensor.numel() == 0 or not bool((tensor == _nothing(tensor.dtype)).all())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    own = [*module._parameters.items(), *module._buffers.items()]
    return {key: tensor for key, tensor in own if tensor is not None}


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Those of them without memory."""
    return {key: tensor for key, tensor in _tensors(module).items() if tensor.is_meta}


def _num_arguments(call: Callable[..., Any]) -> int | None:
    """How many arguments a function has to be given; None where it does not tell."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
               for each in parameters)  # fmt: skip


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
