"""The blocks of a model, whose parameters are unsharded and freed together, and models built on the meta device.

Parameters that are in no block are unsharded with the model itself, at the start of the forward.

A model on the meta device is materialized part by part, which takes the place of DeepSpeed's `zero.Init`: a model
larger than one host's memory is never unsharded anywhere. Each module's parameters are initialized when its part is
sharded, by the module's own code: `reset_parameters` and the like, or, in a Hugging Face model, its `_init_weights`.
What a constructor computed (a table of positions, a mask) is lost on the meta device; where no such code computes it
again, the model is refused, with the names of these tensors.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from redline.errors import EngineError

__all__ = ["MetaModel", "find_blocks", "unsharded_params"]

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (*_WITHOUT_FORWARD, nn.Sequential)

# Names of a module's own initialization code, called without arguments: two of torch's for parameters, another one, and
# those of timm and others for tables and masks.
_RESETS = ("reset_parameters", "_reset_parameters", "_init_weights", "reset_buffers", "init_non_persistent_buffers")


def find_blocks(module: nn.Module, names: Sequence[str] | None = None, smallest: int = 0) -> dict[str, nn.Module]:
    """The blocks of a model, by name, none inside another.

    Without `names` these are the classes that a model of Hugging Face says not to split, else what a list or a
    sequence of modules repeats: two or more of a class, not counting lists of such. A block that shares a parameter
    with the rest of the model is left to the model itself.

    Args:
        names: classes, or names in the model, with ``*`` and ``?``; an empty list for no blocks.
        smallest: unnamed blocks with fewer elements than this are left to the model itself.

    Raises:
        EngineError: a name that nothing in the model has.
    """
    if names is None:
        found = _named(module, getattr(module, "_no_split_modules", None) or ()) or _repeated(module)
        found = {
            name: each for name, each in found.items() if sum(param.numel() for param in each.parameters()) >= smallest
        }
    else:
        found = _named(module, names)
        for name in names:
            if not _named(module, [name]):
                known = list(dict.fromkeys(type(each).__name__ for each in module.modules() if each is not module))
                raise EngineError(
                    f"redline.zero.blocks: {name!r} is neither a class nor the name of a module in the model; "
                    f"known are {', '.join(known[:12]) or 'none'}{', ...' if len(known) > 12 else ''}"
                )
    inside = {each for block in found.values() for each in block.modules() if each is not block}

    def shares_params(block: nn.Module) -> bool:
        rest, own = set(module.modules()) - set(block.modules()), set(block.parameters())
        return any(param in own for each in rest for param in each._parameters.values())

    return {name: block for name, block in found.items() if block not in inside and not shares_params(block)}


def _named(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    return {
        name: each
        for name, each in module.named_modules()
        if each is not module
        and not isinstance(each, _WITHOUT_FORWARD)
        and any(fnmatch.fnmatchcase(name, wanted) or type(each).__name__ == wanted for wanted in names)
    }


def _repeated(module: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The modules that containers repeat; nested containers that repeat nothing count as modules."""
    found: dict[str, nn.Module] = {}
    members: dict[str, nn.Module] = {}
    for key, child in module.named_children():
        place = f"{name}.{key}" if name else key
        inner = _repeated(child, place) if isinstance(child, _CONTAINERS) else {}
        found |= inner
        if not inner and not isinstance(child, _WITHOUT_FORWARD):
            members[place] = child
    kinds = [type(member) for member in members.values()] if isinstance(module, _CONTAINERS) else []
    for place, member in members.items():
        if kinds.count(type(member)) > 1 and any(True for _ in member.parameters()):
            found[place] = member
        else:
            found |= _repeated(member, place)
    return found


def unsharded_params(module: nn.Module, *, low: bool) -> set[Tensor]:
    """The parameters that FSDP2 cannot shard, and every rank keeps in full.

    These are scalars, empty and non-floating-point parameters, embeddings with sparse gradients, and, where the model
    computes in low precision, those of batch norm, which stay fp32.
    """
    found: set[Tensor] = set()
    for each in module.modules():
        takes_all = getattr(each, "sparse", False) or (low and getattr(each, "running_mean", None) is not None)
        for param in each.parameters(recurse=False):
            if takes_all or param.ndim == 0 or param.numel() == 0 or not param.is_floating_point():
                found.add(param)
    return found


# -- the meta device ---------------------------------------------------------------------------------------------------


class MetaModel:
    """A full model of which some or all tensors are on the meta device, and the device where to materialize it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._blank: set[int] = set()  # modules without a tensor that has memory: their code may write to all of them
        self._initializers: dict[int, Callable[[nn.Module], Any]] = {}
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            self._look(model, None)

    def _look(self, module: nn.Module, initialize: Callable[[nn.Module], Any] | None) -> bool:
        """Record what initializes each module, and which have no memory at all; whether this one has none."""
        own = getattr(module, "_init_weights", None)
        if callable(own) and _num_arguments(own) == 1:  # Hugging Face's: of the nearest model around a module
            initialize = own
        if initialize is not None:
            self._initializers.setdefault(id(module), initialize)
        inside = [self._look(child, initialize) for child in module.children()]
        blank = all(inside) and all(tensor.is_meta for tensor in _own_tensors(module).values())
        if blank and any(True for _ in (*module.parameters(), *module.buffers())):
            self._blank.add(id(module))
        return blank

    @torch.no_grad()
    def fill(self, part: Iterable[tuple[str, nn.Module]]) -> dict[Tensor, Tensor]:
        """Allocate the modules of a part and initialize their parameters.

        A module comes after its children, as when a model is built, so that its code may overwrite their values.

        Args:
            part: names and modules, as `named_modules` orders them, whose own tensors are filled.

        Returns:
            The new tensor for each one on the meta device. A tensor that several modules share stays shared.

        Raises:
            EngineError: nothing initializes some tensors.
        """
        made: dict[Tensor, Tensor] = {}
        begun: dict[str, tuple[Tensor, int]] = {}  # by the names that an error tells, with their version
        for name, each in _children_first(part):
            own = {key: tensor for key, tensor in _own_tensors(each).items() if tensor.is_meta}
            shared: dict[Tensor, Tensor] = {}  # with a module before it, which has given them their values
            for key, tensor in own.items():
                if tensor in made:
                    shared[made[tensor]] = made[tensor].detach().clone()
                else:
                    made[tensor] = _allocate(tensor, self._device)
                    begun[f"{name}.{key}".lstrip(".")] = (made[tensor], made[tensor]._version)
                setattr(each, key, made[tensor])  # recurrent modules keep a list of their weights, too
            if own or id(each) in self._blank:
                self._initialize(name, each)
            for key, tensor in own.items():
                now = getattr(each, key)
                if now is not made[tensor]:  # its own code has made another, instead of writing into this
                    now.data = now.data.to(self._device)
                    made[tensor] = now
                    begun.pop(f"{name}.{key}".lstrip("."), None)
            for tensor, value in shared.items():
                tensor.data.copy_(value)  # by .data, so that it does not count as having been given a value
        lost = [name for name, (tensor, version) in begun.items() if not _is_filled(tensor, version)]
        if lost:
            names = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
            raise EngineError(
                f"model: on the meta device, and nothing gives {names} a value; give their modules a "
                'reset_parameters() that does, make such tensors with device="cpu", or build the model on the CPU'
            )
        return made

    def _initialize(self, name: str, module: nn.Module) -> None:
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


def _allocate(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor like one on the meta device, with numbers in it that show where nothing has filled it."""
    value = torch.full_like(tensor, _placeholder(tensor.dtype), device=device)
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, requires_grad=tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)
    return parameter


def _placeholder(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def _is_filled(tensor: Tensor, version: int) -> bool:
    """Whether something has been written into all of a floating-point tensor, or into any of another."""
    if tensor.is_floating_point() or tensor.is_complex():
        return not tensor.isnan().any()
    # Any number may be meant, so that the version counts. It does not move with what is written by way of .data.
    return tensor._version != version or tensor.numel() == 0 or not bool((tensor == _placeholder(tensor.dtype)).all())


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in own.items() if tensor is not None}


def _num_arguments(call: Callable[..., Any]) -> int | None:
    """How many arguments a function has to be given; None where it does not tell."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
               for each in parameters)  # fmt: skip
