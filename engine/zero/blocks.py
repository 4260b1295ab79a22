"""Which parts of a model are gathered and freed as one: its blocks.

Pure: looks at modules and changes none. What is in no block is gathered with the model itself, at the start of
the forward.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from engine.errors import EngineError

__all__ = ["find_blocks", "stays_whole"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_blocks(module: nn.Module, names: Sequence[str] | None = None, smallest: int = 0) -> dict[str, nn.Module]:
    """The blocks of a model, by name, none inside another.

    Without `names` these are the classes that a model of Hugging Face says not to split, else what a list or a
    sequence of modules repeats: two or more of a class, not counting lists of such. A block that shares a parameter
    with the rest of the model is left to the model itself.

    Args:
        names: classes, or names in the model, with ``*`` and ``?``; an empty list for no blocks.
        smallest: blocks with fewer elements than this are left to the model itself; not those that are named.

    Raises:
        EngineError: a name that nothing in the model has.
    """
    if names is None:
        found = _named(module, getattr(module, "_no_split_modules", None) or ()) or _repeated(module)
        found = {name: block for name, block in found.items() if _elements(block) >= smallest}
    else:
        found = _named(module, names)
        for name in names:
            if not _named(module, [name]):
                raise EngineError(
                    f"redline.zero.blocks: {name!r} is neither a class nor the name of a module in the model; "
                    f"known are {_known(module)}"
                )
    return {name: block for name, block in _outermost(found).items() if not _shares(module, block)}


def _named(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    names = list(names)
    return {
        name: each
        for name, each in module.named_modules()
        if each is not module
        and not isinstance(each, (nn.ModuleList, nn.ModuleDict))  # they have no forward
        and any(fnmatch.fnmatchcase(name, wanted) or type(each).__name__ == wanted for wanted in names)
    }


def _repeated(module: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """What lists and sequences repeat; one that stands in another and repeats nothing itself is repeated, or not."""
    found: dict[str, nn.Module] = {}
    members: dict[str, nn.Module] = {}
    for key, child in module.named_children():
        place = f"{name}.{key}" if name else key
        inner = _repeated(child, place) if isinstance(child, _CONTAINERS) else {}
        found |= inner
        if not inner and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            members[place] = child
    kinds = [type(member) for member in members.values()] if isinstance(module, _CONTAINERS) else []
    for place, member in members.items():
        if kinds.count(type(member)) > 1 and any(True for _ in member.parameters()):
            found[place] = member
        else:
            found |= _repeated(member, place)
    return found


def _outermost(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = {id(each) for block in found.values() for each in block.modules() if each is not block}
    return {name: block for name, block in found.items() if id(block) not in inside}


def _shares(module: nn.Module, block: nn.Module) -> bool:
    """Whether a parameter of the block is also one of the rest of the model."""
    own, within = {id(each) for each in block.modules()}, {id(each) for each in block.parameters()}
    return any(
        id(parameter) in within
        for each in module.modules()
        if id(each) not in own
        for parameter in each.parameters(recurse=False)
    )


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _known(module: nn.Module) -> str:
    classes = dict.fromkeys(type(each).__name__ for each in module.modules() if each is not module)
    names = list(classes)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"


def stays_whole(module: nn.Module, *, low: bool) -> set[Tensor]:
    """The parameters of which every process keeps all: FSDP2 cannot share them out.

    Scalars; parameters without elements; whatever is no floating-point number; embeddings with sparse gradients; and,
    where the model computes in low precision, batch norm, which takes low inputs with fp32 weights and no low weights
    with fp32 statistics.
    """
    whole: set[Tensor] = set()
    for each in module.modules():
        takes_all = getattr(each, "sparse", False) or (low and getattr(each, "running_mean", None) is not None)
        for parameter in each.parameters(recurse=False):
            if takes_all or parameter.ndim == 0 or parameter.numel() == 0 or not parameter.is_floating_point():
                whole.add(parameter)
    return whole
