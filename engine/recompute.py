"""Activation checkpointing: a block keeps its inputs only, and backward runs its forward again for the rest.

:func:`recompute` gives a block a subclass of its own class, whose forward runs under torch's non-reentrant checkpoint;
`fully_shard` extends a module the same way. torch's `CheckpointWrapper` would put a module around each block: names,
`isinstance`, attributes that are set, and the classes by which blocks are found would change. Its composable
`checkpoint` keeps them, but its hooks are closures, which cannot be pickled or compiled, and it runs the block's own
hooks twice. In a subclass the checkpoint is inside the hooks, so that a sharded block is unsharded once for its second
forward and its backward.

A second forward must not be seen outside the block: it finds the block's buffers and attributes, and arguments such as
a key-value cache, as the first forward found them, and leaves them as they are. Random numbers repeat. What a forward
changes elsewhere (class attributes, globals, in-place writes to tensors that are no buffers) it changes twice.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]

_SMALL = 2**20  # bytes; a larger buffer is copied before a forward only if forwards write to it
_OF_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, set, deque)
_PLAIN = {type(None), bool, int, float, str, Tensor, nn.Parameter, torch.dtype, torch.device}
_NOT_ENTERED = (Tensor, nn.Module, type, Enum, types.ModuleType, types.FunctionType, types.MethodType)
_STATELESS = {"torch", "builtins", "numpy", "functools", "collections"}  # packages of objects that are not entered
_MISSING = object()


def recompute(block: nn.Module) -> None:
    """Let backward recompute a block's activations; in place, and once however often it is called.

    The block keeps its names, parameters and hooks, and stays an instance of its class. Copies of it, by `copy` or
    `pickle`, recompute too.

    Args:
        block: a module with a forward; of one that `torch.compile` returned, the module inside is changed.
    """
    block = vars(block).get("_modules", {}).get("_orig_mod", block)  # so that the checkpoint is compiled, too
    if "forward" in vars(block):  # would hide the subclass's
        vars(block)["_recompute_forward"] = vars(block).pop("forward")
    _extend(block)


def _extend(block: Any) -> None:
    plain: Any = type(block)
    if not issubclass(plain, _Recomputed):
        block.__class__ = _recomputed(plain)


class _Recomputed:
    """A block with activation checkpointing; its class is made at run time, so that pickle has to be told how."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hide the subclass from a base that registers or changes its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        build, arguments, *state = reduced
        plain = tuple(
            vars(each).get("_recompute_plain", each) if isinstance(each, type) else each for each in arguments
        )
        return (_rebuild, (build, plain), *state)


def _rebuild(build: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    block = build(*arguments)
    _extend(block)
    return block


@functools.cache
def _recomputed(plain: Any) -> type[Any]:
    """The subclass of a block's class that recomputes; it has the same name."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = vars(self).get("_recompute_forward")
        run = functools.partial(plain.forward, self) if own is None else own
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        # As one flat list: a keyword of the block's may be one of checkpoint's, too.
        twice = _Forward(self, run, tuple(kwargs))
        return checkpoint(twice, *args, *kwargs.values(), use_reentrant=False)

    def fill(namespace: dict[str, Any]) -> None:
        namespace |= {name: vars(plain)[name] for name in ("__doc__", "__module__") if name in vars(plain)}
        namespace |= {"__qualname__": plain.__qualname__, "_recompute_plain": plain, "forward": forward}

    return types.new_class(plain.__name__, (_Recomputed, plain), exec_body=fill)


class _Forward:
    """One forward of a block, which backward calls again."""

    def __init__(self, block: nn.Module, run: Callable[..., Any], names: tuple[str, ...]) -> None:
        self._block, self._run, self._names = block, run, names
        self._before: _State | None = None

    def __call__(self, *flat: Any) -> Any:
        if torch.compiler.is_compiling():  # compiled code recomputes values only and writes once
            return self._call(flat)
        if self._before is None:
            self._before = _State(self._block, flat)
            result = self._call(flat)
            self._before.note_writes()
            return result
        with self._before.restored():
            return self._call(flat)

    def _call(self, flat: tuple[Any, ...]) -> Any:
        positional = len(flat) - len(self._names)
        return self._run(*flat[:positional], **dict(zip(self._names, flat[positional:], strict=True)))


@dataclass
class _Buffer:
    """A buffer before a forward, which may write to it or replace it."""

    owner: dict[str, Tensor | None]
    name: str
    key: tuple[int, str]
    tensor: Tensor
    version: int
    large: bool
    copy: Tensor | None


class _State:
    """What a forward may change, as it was before: a block's buffers and attributes, and arguments such as a cache."""

    def __init__(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._block = block
        self._containers: list[tuple[Any, Any]] = []  # with their contents; an object is the dict of its attributes
        self._buffers: list[_Buffer] = []
        seen: set[int] = set()
        self._note(arguments, seen, objects=True)
        written = vars(block).get("_recompute_buffers")  # large ones; None before the block's first forward
        copies: dict[int, Tensor] = {}
        for i, module in enumerate(block.modules()):
            self._containers.append((vars(module), dict(vars(module))))
            self._containers.append((module._buffers, dict(module._buffers)))
            # No objects: a block's own, such as its config, may lead anywhere.
            own = [value for name, value in vars(module).items() if name not in _OF_MODULES]
            self._note(own, seen, objects=False)
            for name, tensor in module._buffers.items():
                if tensor is None:
                    continue
                large = tensor.numel() * tensor.element_size() > _SMALL
                copied = not large or written is None or (i, name) in written
                if copied and not tensor.requires_grad and id(tensor) not in copies:
                    copies[id(tensor)] = tensor.clone()
                kept = copies.get(id(tensor))
                version = _version(tensor) if large else 0
                self._buffers.append(_Buffer(module._buffers, name, (i, name), tensor, version, large, kept))

    def _note(self, values: Iterable[Any], seen: set[int], *, objects: bool) -> None:
        """Note the contents of all containers in these values and, where wanted, of objects."""
        left = list(values)
        while left:
            value = left.pop()
            if type(value) in _PLAIN or isinstance(value, _NOT_ENTERED) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, tuple):
                left.extend(value)
            elif isinstance(value, _CONTAINERS):
                content = _content(value)
                self._containers.append((value, content))
                left.extend(content.values() if isinstance(content, dict) else content)
            if objects and type(value).__module__.partition(".")[0] not in _STATELESS:
                left.append(getattr(value, "__dict__", None))

    def note_writes(self) -> None:
        """After the forward: learn which large buffers it writes to, and free the copies of the others."""
        written: set[tuple[int, str]] = vars(self._block).setdefault("_recompute_buffers", set())
        for each in self._buffers:
            if not each.large:
                continue
            if _version(each.tensor) == each.version:
                each.copy = None
                continue
            written.add(each.key)
            if each.copy is None:  # a first write, late: what it held before is lost, but it is not written twice
                each.copy = each.tensor.detach().clone()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the state back for another forward; afterwards all is as it is now."""
        now = [(container, _content(container)) for container, _ in self._containers]
        # Copied again, because a graph that is retained goes backward, and so forward, more than once.
        copies: dict[int, Tensor] = {}
        try:
            for container, content in self._containers:
                _set_content(container, content)
            for each in self._buffers:
                if each.copy is not None:
                    if id(each.copy) not in copies:
                        copies[id(each.copy)] = each.copy.clone()
                    each.owner[each.name] = copies[id(each.copy)]
            yield
        finally:
            for container, content in now:
                _set_content(container, content)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors of inference mode have none


def _content(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(OrderedDict.items(container) if isinstance(container, OrderedDict) else dict.items(container))
    return set(container) if isinstance(container, set) else list(container)


def _set_content(container: Any, content: Any) -> None:
    """Through the built-in classes' own methods: those of a subclass may do more."""
    if isinstance(container, dict):
        now = _content(container)
        if len(now) != len(content) or any(content.get(key, _MISSING) is not value for key, value in now.items()):
            kind = OrderedDict if isinstance(container, OrderedDict) else dict
            kind.clear(container)
            for key, value in content.items():
                kind.__setitem__(container, key, value)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), content)
    elif isinstance(container, deque):
        deque.clear(container)
        deque.extend(container, content)
    else:
        set.clear(container)
        set.update(container, content)
