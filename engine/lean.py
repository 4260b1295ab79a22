"""torch's fused Adam, AdamW, SGD and Adagrad with less Python around the kernel.

Same class names, same state, same numbers bit for bit: a step calls the kernel that torch's own step would call,
on lists that it gathers in a few lines. torch's way there (hooks, profiler range, grouping by device and dtype) takes
two thirds of a small model's step. Whatever these lines do not cover goes to torch's own step. What a kernel may be
given is in `engine.fused`. Sharded parameters (DTensors) are updated shard by shard: the kernels work on single
elements, and torch cannot run all of them otherwise. Source: `torch/optim/adam.py`, `sgd.py`, `adagrad.py`, 2.6 to
2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as _torchs

from engine.fused import FusedInputs, Inputs, by_kind, fuse_again, prepare_step, unfuse_where_needed

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "count_steps", "guard_fused", "lean"]


class _Call(NamedTuple):
    """One group's call of its kernel."""

    kernel: Callable[..., None]
    tensors: tuple[list[Tensor], ...]  # parameters, gradients, then their state
    options: dict[str, Any]
    steps: list[Tensor]  # step counts, one per parameter


class _Lean(Optimizer):
    """The step that the four share; the class after it in line is torch's."""

    _inputs: FusedInputs | None = None
    num_steps = 0  # calls of step(), for `count_steps`

    def step(self, closure: Any = None) -> Any:
        """As torch's. Without closure, hooks and profiler straight to the kernel."""
        self.num_steps += 1
        calls = self._calls() if closure is None and self._unobserved() else None
        if calls is None:
            return self._torchs_step(closure)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        grad_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # torch.no_grad() takes a microsecond longer
            for kernel, tensors, options, steps in calls:
                if grad_scale is not None or found_inf is not None:
                    device = tensors[0][0].device
                    grad_scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
                    found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)
                if steps:
                    torch._foreach_add_(steps, 1)
                kernel(*tensors, **options, grad_scale=grad_scale, found_inf=found_inf)
                if steps and found_inf is not None:  # a skipped step does not count
                    torch._foreach_sub_(steps, [found_inf] * len(steps))
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch's mark of a step that needs no wrapper for hooks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._inputs = None
        super().add_param_group(param_group)
        unfuse_where_needed(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._inputs = None
        super().__setstate__(state)

    def _call(self, group: dict[str, Any], inputs: Inputs) -> _Call | None:
        """The call that updates a group; None where torch's own step must do it."""
        raise NotImplementedError

    def _calls(self) -> list[_Call] | None:
        """All groups' calls; None where torch's own step must do it: then no parameter has been touched."""
        inputs = self._inputs = self._inputs or FusedInputs(self)
        calls = []
        for number, group in enumerate(self.param_groups):
            if not group["params"]:
                continue
            if not group["fused"] or group["differentiable"] or isinstance(group["lr"], Tensor):
                return None
            ready = inputs.of(self, number, group)
            if ready is None:
                return None
            if ready[0]:
                for each in by_kind(ready):
                    call = self._call(group, each)
                    if call is None:
                        return None
                    calls.append(call)
        return calls

    def _unobserved(self) -> bool:
        """Whether nobody waits for what torch's own step does besides the update."""
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return False
        if _torchs._global_optimizer_pre_hooks or _torchs._global_optimizer_post_hooks:
            return False
        if torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled():
            return False
        # torch refuses to have a step captured in a CUDA graph that would replay today's learning rate.
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return not (used and torch.cuda.is_current_stream_capturing())

    def _torchs_step(self, closure: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._really_torchs_step(closure)
        inputs = self._inputs = self._inputs or FusedInputs(self)
        unfused: list[dict[str, Any]] = []

        def closed() -> Any:
            loss = closure()
            unfused.extend(prepare_step(self, inputs))
            return loss

        if closure is None:
            unfused.extend(prepare_step(self, inputs))
        try:
            return self._really_torchs_step(None if closure is None else closed)
        finally:
            fuse_again(unfused)

    def _really_torchs_step(self, closure: Any) -> Any:
        step = super().step
        if getattr(step, "hooked", False):
            return step(closure)
        # torch wraps a class's step when it first makes one of that class, and may have made none.
        return Optimizer.profile_hook_step(step.__func__)(self, closure)  # type: ignore[attr-defined]


class Adam(_Lean, torch.optim.Adam):
    """`torch.optim.Adam`, lean when fused."""

    _decoupled = False

    def _call(self, group: dict[str, Any], inputs: Inputs) -> _Call | None:
        beta1, beta2 = group["betas"]
        if group["capturable"] or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
            return None
        params, grads, state, _ = inputs
        amsgrad, steps = group["amsgrad"], state[-1]
        tensors = (params, grads, state[0], state[1], state[2] if amsgrad else [], steps)
        options = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "amsgrad": amsgrad,
            "maximize": group["maximize"],
        }
        decoupled = group.get("decoupled_weight_decay", self._decoupled)  # torch 2.6 has no such key
        return _Call(torch._fused_adamw_ if decoupled else torch._fused_adam_, tensors, options, steps)


class AdamW(_Lean, torch.optim.AdamW):
    """`torch.optim.AdamW`, lean when fused."""

    _decoupled = True
    _call = Adam._call


class SGD(_Lean, torch.optim.SGD):
    """`torch.optim.SGD`, lean when fused."""

    def _call(self, group: dict[str, Any], inputs: Inputs) -> _Call | None:
        options = {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "is_first_step": False,  # buffers start as zeros, see engine.fused
        }
        params, grads, state, _ = inputs
        return _Call(torch._fused_sgd_, (params, grads, state[0] if state else []), options, [])


class Adagrad(_Lean, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, lean when fused."""

    def _call(self, group: dict[str, Any], inputs: Inputs) -> _Call | None:
        options = {
            "lr": group["lr"],
            "lr_decay": group["lr_decay"],
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "maximize": group["maximize"],
        }
        params, grads, (sums, steps), _ = inputs
        return _Call(torch._fused_adagrad_, (params, grads, sums, steps), options, steps)


_KERNELS: dict[type[Optimizer], tuple[type[Optimizer], str]] = {
    torch.optim.Adam: (Adam, "_fused_adam_"),
    torch.optim.AdamW: (AdamW, "_fused_adamw_"),
    torch.optim.SGD: (SGD, "_fused_sgd_"),
    torch.optim.Adagrad: (Adagrad, "_fused_adagrad_"),
}


def lean(cls: type[Optimizer]) -> type[Optimizer]:
    """The lean class for torch's, or the class itself where there is none or this torch lacks the kernel."""
    own, kernel = _KERNELS.get(cls, (cls, ""))
    return own if hasattr(torch, kernel) else cls


def count_steps(optimizer: Optimizer) -> Callable[[], int]:
    """Count an optimizer's calls of step() from here on; what is returned tells how many there were."""
    if isinstance(optimizer, _Lean):  # a hook would take it off its short way
        return lambda: optimizer.num_steps
    calls = 0

    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1

    optimizer.register_step_pre_hook(count)
    return lambda: calls


def guard_fused(optimizer: Optimizer) -> None:
    """Make the steps of a script's own fused optimizer right where torch's are not; lean ones are by themselves.

    By hooks: a schedule made before has kept torch's step. They give gradients and state the layout of their
    parameters, and SGD a momentum buffer for a parameter whose first gradient comes late.
    """
    if isinstance(optimizer, _Lean) or not isinstance(optimizer, tuple(_KERNELS)):
        return
    for group in optimizer.param_groups:
        unfuse_where_needed(group)
    inputs = FusedInputs(optimizer)
    unfused: list[dict[str, Any]] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        unfused.extend(prepare_step(optimizer, inputs))

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        fuse_again(unfused)
        unfused.clear()

    if any(group["fused"] for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
