"""Models, and modules in them, that ``torch.compile(module)`` has wrapped.

The wrapper puts ``_orig_mod.`` into the names of all that is in it, and so into every file. Here the module takes the
wrapper's place and is called as the wrapper would call it, which is what ``module.compile()`` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["plain_name", "plain_names", "unwrap_compiled"]

_WRAPPED = "_orig_mod"  # the wrapper's name for the module in it


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The model with every compiled module in the place of its wrapper; it still runs compiled. Changed in place."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing has been compiled
        return model
    wrapper: type[nn.Module] = dynamo.OptimizedModule
    while isinstance(model, wrapper):
        model = _unwrap(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            while isinstance(child, wrapper):
                module._modules[name] = child = _unwrap(child)
    return model


def plain_name(name: str) -> str:
    """A parameter's, buffer's or module's name without the wrappers that it is in."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def plain_names(value: Any) -> Any:
    """The same with plain names, for lists and dicts of names, nested; everything else as it is."""
    if isinstance(value, str):
        return plain_name(value) if _WRAPPED in value else value
    if isinstance(value, list):
        return [plain_names(each) for each in value]
    if isinstance(value, dict):
        return {plain_names(key): plain_names(each) for key, each in value.items()}
    return value


def _unwrap(wrapper: Any) -> nn.Module:
    module: nn.Module = wrapper._modules[_WRAPPED]
    module._compiled_call_impl = _compiled_call(module, wrapper.dynamo_ctx)
    for name, hooks in vars(wrapper).items():  # those that were registered with the wrapper
        if "hooks" in name and isinstance(hooks, dict) and hooks:
            own = getattr(module, name)
            setattr(module, name, hooks)  # the dict itself, by which handles remove them
            hooks.update(own)
    return module


def _compiled_call(module: nn.Module, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """What calls the module: its hooks as they are, its `forward` compiled."""
    if not type(module).forward.__module__.startswith("torch."):
        # The compiler passes over the frame of _call_impl, and takes up that of forward().
        compiled: Callable[..., Any] = compiler(module._call_impl)
        return compiled

    # It passes over the frames of all that is torch's, forward() of an nn.Sequential as well: so one of ours.
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    compiled_forward = compiler(forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        own = vars(module)
        if torch.compiler.is_compiling() or "forward" in own:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        own["forward"] = compiled_forward  # for this call only: a copy of the module would call this one's
        try:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            del own["forward"]

    return call
