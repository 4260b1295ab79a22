"""What objects keep in plain attributes, taken down and put back in place: the state that no state dict has.

A module may count its calls in a number, bind its moving average to a new tensor at every forward, or draw from a
generator of its own; so may a dataset.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_generators", "keep_module"]

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_LISTS = (list, deque)
_DICTS = (dict, OrderedDict, defaultdict)
_TORCHS = frozenset(vars(nn.Module()))  # parameters, submodules, hooks, and the flag `training`, which others put back


def keep_module(module: nn.Module) -> Callable[[], None]:
    """What puts a module's buffers, plain attributes, generators and extra state back as they are now.

    Buffers and tensors are put back as the objects that they were. Attributes that came later go, if they are plain.
    """
    buffers = {name: _keep(buffer) for name, buffer in module._buffers.items()}
    kept = {name: _keep(value) for name, value in vars(module).items() if name not in _TORCHS and _can_keep(value)}
    names = set(vars(module))
    has_extra = type(module).get_extra_state is not nn.Module.get_extra_state
    extra = copy.deepcopy(module.get_extra_state()) if has_extra else None

    def put_back() -> None:
        for name in module._buffers.keys() - buffers.keys():
            del module._buffers[name]
        module._buffers.update({name: back() for name, back in buffers.items()})
        for name in [name for name, value in vars(module).items() if name not in names and _can_keep(value)]:
            del module.__dict__[name]
        module.__dict__.update({name: back() for name, back in kept.items()})
        if has_extra:
            module.set_extra_state(copy.deepcopy(extra))

    return put_back


def keep_generators(of: Any) -> Callable[[], None]:
    """What puts back the random generators that an object has as attributes."""
    backs = [_keep(value) for value in getattr(of, "__dict__", {}).values() if _is_generator(value)]

    def put_back() -> None:
        for back in backs:
            back()

    return put_back


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random)) or _is_numpys(value)


def _is_numpys(value: Any) -> bool:
    """Whether it is NumPy's new generator or its old one; NumPy is the user's, and not imported for this."""
    return type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("Generator", "RandomState")


def _can_keep(value: Any) -> bool:
    if isinstance(value, nn.Parameter):  # an RNN lists its own
        return False
    if isinstance(value, (*_PLAIN, Tensor)) or _is_generator(value):
        return True
    if type(value) in _DICTS:
        return all(map(_can_keep, value.values()))
    return type(value) in (*_LISTS, tuple, set) and all(map(_can_keep, value))


def _keep(value: Any) -> Callable[[], Any]:
    """What gives a value back, with the content that it has now."""
    if isinstance(value, Tensor):
        return _keep_tensor(value)
    if _is_generator(value):
        return _keep_generator(value)
    if type(value) in (*_LISTS, tuple, set):
        return _keep_items(value)
    if type(value) in _DICTS:
        items = {key: _keep(item) for key, item in value.items()}

        def refill() -> Any:
            value.clear()
            value.update({key: back() for key, back in items.items()})
            return value

        return refill
    return lambda: value


def _keep_items(value: Any) -> Callable[[], Any]:
    backs = [_keep(item) for item in value]

    def refill() -> Any:
        items = [back() for back in backs]
        if type(value) is not tuple:
            value.clear()
            (value.update if type(value) is set else value.extend)(items)
        return value

    return refill


def _keep_generator(value: Any) -> Callable[[], Any]:
    """Python's, NumPy's and torch's each have their own words for it."""
    state: Any
    put: Callable[[Any], Any]
    if isinstance(value, random.Random):
        state, put = value.getstate(), value.setstate
    elif isinstance(value, torch.Generator):
        state, put = value.get_state(), value.set_state
    elif type(value).__name__ == "RandomState":
        state, put = value.get_state(legacy=False), value.set_state
    else:
        state, put = value.bit_generator.state, lambda state: setattr(value.bit_generator, "state", state)

    def put_back() -> Any:
        put(copy.deepcopy(state))
        return value

    return put_back


def _keep_tensor(value: Tensor) -> Callable[[], Tensor]:
    saved, graph = value.detach().clone(), value.grad_fn

    def copy_back() -> Tensor:
        if graph is None:  # one with a history was made by a forward, and is not written into
            with torch.no_grad():
                value.copy_(saved)
        return value

    return copy_back
