"""Activation checkpointing: a block keeps its inputs only, and backward runs its forward again for the rest.

:func:`recompute` gives a block a subclass of its own class, whose forward runs under torch's non-reentrant checkpoint;
`fully_shard` extends a module the same way. torch's `CheckpointWrapper` would put a module around each block: names,
`isinstance` and the classes by which blocks are found would change. Hooks of its composable `checkpoint` cannot be
pickled or compiled, and the block's own would run twice. In a subclass the checkpoint is inside the hooks, so that a
sharded block is unsharded once for its second forward and its backward.

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
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]

_LARGE = 2**20  # bytes of a buffer whose copy is only kept if the forward wrote to it
_OF_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (OrderedDict, dict, list, set, deque)
_PLAIN = {type(None), bool, int, float, str, Tensor, nn.Parameter, torch.dtype, torch.device}
_NOT_ENTERED = (Tensor, nn.Module, type, Enum, types.ModuleType, types.FunctionType, types.MethodType)
_STATELESS = {"torch", "builtins", "numpy", "functools", "collections"}  # packages of objects that are not entered


def recompute(block: nn.Module) -> None:
    """Let backward recompute a block's activations; in place, and once however often it is called.

    The block keeps its names, parameters and hooks, and stays an instance of its class. Copies of it, by `copy` or
    `pickle`, recompute too. Of what `torch.compile` returned, the module inside is changed.
    """
    block = vars(block).get("_modules", {}).get("_orig_mod", block)  # so that the checkpoint is compiled, too
    if "forward" in vars(block):  # would hide the subclass's
        vars(block)["_recompute_forward"] = vars(block).pop("forward")
    _extend(block)


def _extend(block: Any) -> Any:
    plain: Any = type(block)
    if not issubclass(plain, _Recomputed):
        block.__class__ = _recomputed(plain)
    return block


class _Recomputed:
    """A block with activation checkpointing; its class is made at run time, so that pickle has to be told how."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hide the subclass from a base that registers or changes its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        build, arguments, *state = reduced
        plain = [vars(each).get("_recompute_plain", each) if isinstance(each, type) else each for each in arguments]
        return (_rebuild, (build, *plain), *state)


def _rebuild(build: Callable[..., Any], *arguments: Any) -> Any:
    return _extend(build(*arguments))


@functools.cache
def _recomputed(plain: Any) -> type[Any]:
    """The subclass of a block's class that recomputes; it has the same name."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = vars(self).get("_recompute_forward")
        run = functools.partial(plain.forward, self) if own is None else own
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        before: list[_State] = []

        def run_again(*flat: Any) -> Any:
            named = dict(zip(kwargs, flat[len(args) :], strict=True))
            if torch.compiler.is_compiling():  # compiled code recomputes values only and writes once
                return run(*flat[: len(args)], **named)
            if before:
                with before[0].restored():
                    return run(*flat[: len(args)], **named)
            before.append(_State(self, flat))
            result = run(*flat[: len(args)], **named)
            before[0].free_unwritten()
            return result

        # As one flat list: a keyword of the block's may be one of checkpoint's, too.
        return checkpoint(run_again, *args, *kwargs.values(), use_reentrant=False)

    def fill(namespace: dict[str, Any]) -> None:
        namespace |= {name: vars(plain)[name] for name in ("__doc__", "__module__") if name in vars(plain)}
        namespace |= {"__qualname__": plain.__qualname__, "_recompute_plain": plain, "forward": forward}

    return types.new_class(plain.__name__, (_Recomputed, plain), exec_body=fill)


class _State:
    """What a forward may change, as it was before: a block's buffers and attributes, and arguments such as a cache."""

    def __init__(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._containers: list[tuple[Any, Any]] = []  # with their contents; an object is the dict of its attributes
        # Each buffer with its version and a copy, which the second forward gets instead.
        self._copies: dict[Tensor, tuple[int, Tensor]] = {}
        seen: set[int] = set()
        self._note(arguments, seen, objects=True)
        for module in block.modules():
            # No objects: a block's own, such as its config, may lead anywhere.
            own = [value for name, value in vars(module).items() if name not in _OF_MODULES]
            self._note(own, seen, objects=False)
            self._containers += [(each, dict(each)) for each in (vars(module), module._buffers)]
            for buffer in module._buffers.values():
                if buffer is not None and not buffer.requires_grad and buffer not in self._copies:
                    self._copies[buffer] = (_version(buffer), buffer.clone())

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

    def free_unwritten(self) -> None:
        """After the forward: free copies of large buffers that it did not write to."""
        # Of small ones a write may go through `.data`, which changes no version.
        for buffer, (version, _) in list(self._copies.items()):
            if buffer.numel() * buffer.element_size() > _LARGE and _version(buffer) == version:
                del self._copies[buffer]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the state back for another forward; afterwards all is as it is now."""
        now = [(container, _content(container)) for container, _ in self._containers]
        # Copied again, because a graph that is retained goes backward, and so forward, more than once.
        copies = {buffer: saved.clone() for buffer, (_, saved) in self._copies.items()}
        try:
            for container, content in self._containers:
                if isinstance(content, dict):
                    content = {k: copies.get(v, v) if isinstance(v, Tensor) else v for k, v in content.items()}
                _set_content(container, content)
            yield
        finally:
            for container, content in now:
                _set_content(container, content)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # tensors of inference mode have none


def _builtin(container: Any) -> Any:
    """The built-in class of a container: a subclass's methods may do more."""
    return next(kind for kind in _CONTAINERS if isinstance(container, kind))


def _content(container: Any) -> Any:
    kind = _builtin(container)
    return dict(kind.items(container)) if issubclass(kind, dict) else list(kind.__iter__(container))


def _set_content(container: Any, content: Any) -> None:
    kind = _builtin(container)
    if isinstance(content, dict):
        now = _content(container)
        if now.keys() == content.keys() and all(now[key] is value for key, value in content.items()):
            return
    kind.clear(container)
    if isinstance(content, dict):
        for key, value in content.items():
            kind.__setitem__(container, key, value)
    elif kind is set:
        set.update(container, content)
    else:
        kind.extend(container, content)
