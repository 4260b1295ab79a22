"""torch's fused Adam, AdamW, SGD and Adagrad with less Python around the kernel.

Same class names, same state, same numbers bit for bit: a step calls the kernel that torch's own step would call,
on lists that it gathers in a few lines. torch's way there (hooks, profiler range, grouping by device and type) takes
two thirds of a small model's step. Whatever these lines do not cover goes to torch's own step, each time anew, so
nothing is kept between steps that could grow stale. Parameters that are shared out among processes (DTensors) are
updated share by share: the kernels work on single elements, and torch cannot run all of them otherwise. Source:
`torch/optim/adam.py`, `sgd.py`, `adagrad.py`, 2.6 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as _torchs

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "lean"]


class _Call(NamedTuple):
    """One group's call of its kernel."""

    kernel: Callable[..., None]
    tensors: tuple[list[Tensor], ...]  # parameters, gradients, then what the kernel keeps of them
    options: dict[str, Any]
    steps: list[Tensor]  # counts of updates, one a parameter


class _Lean(Optimizer):
    """The step that the four share; the class after it in line is torch's."""

    _one_kind: bool | None = None  # whether each group is of one device and type; None: not known yet
    _shared: bool | None = None  # whether some parameters are shared out among processes; None: not known yet
    _fused_on_shares = False  # whether torch can run its fused kernel on those

    def step(self, closure: Any = None) -> Any:
        """As torch's. Without closure, hooks and profiler, and once the state is there, straight to the kernel."""
        calls = self._calls() if closure is None and self._unobserved() else None
        if calls is None:
            return self._torchs_step(closure)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # torch.no_grad() takes a microsecond longer
        try:
            for kernel, tensors, options, steps in calls:
                if grad_scale is not None or found_inf is not None:
                    device = tensors[0][0].device
                    grad_scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
                    found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)
                if steps:
                    torch._foreach_add_(steps, 1)
                kernel(*tensors, **options, grad_scale=grad_scale, found_inf=found_inf)
                if steps and found_inf is not None:  # an update that overflowed does not count
                    torch._foreach_sub_(steps, [found_inf] * len(steps))
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch's mark of a step that needs no wrapper for hooks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._one_kind = self._shared = None
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._one_kind = self._shared = None
        super().__setstate__(state)

    def _call(self, group: dict[str, Any], grads: list[Tensor]) -> _Call | None:
        """The call that updates a group; None where torch's own step must do it.

        Raises:
            KeyError: the state is not made yet.
        """
        raise NotImplementedError

    def _calls(self) -> list[_Call] | None:
        """All groups' calls; None where torch's own step must do it: then nothing has been touched."""
        calls = []
        for group in self.param_groups:
            if not group["params"]:
                continue
            if not group["fused"] or group["differentiable"] or isinstance(group["lr"], Tensor):
                return None
            grads = [parameter.grad for parameter in group["params"]]
            for grad in grads:
                if grad is None:  # of a frozen parameter, say, which torch's own step passes over, too
                    group = {**group, "params": [each for each in group["params"] if each.grad is not None]}
                    grads = [parameter.grad for parameter in group["params"]]
                    break
            if not grads:
                continue
            try:
                call = self._call(group, grads)
            except KeyError:
                if not self._is_shared():
                    return None
                self._make_state(group)
                call = self._call(group, grads)
            if call is None:
                return None
            if self._is_shared():
                call = call._replace(tensors=tuple([_own_share(each) for each in tensors] for tensors in call.tensors))
            calls.append(call)
        return calls

    def _make_state(self, group: dict[str, Any]) -> None:
        """What torch's own first step would make, for parameters that it cannot update."""
        raise NotImplementedError

    def _own(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The state of each parameter."""
        state = self.state
        return [state[parameter] for parameter in group["params"]]

    def _unobserved(self) -> bool:
        """Whether nobody waits for what torch's own step does besides the update."""
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return False
        if _torchs._global_optimizer_pre_hooks or _torchs._global_optimizer_post_hooks:
            return False
        if torch._C._autograd._profiler_enabled() or torch.compiler.is_compiling():
            return False
        if self._one_kind is None:
            self._one_kind = all(map(_is_of_one_kind, self.param_groups))
        if not self._one_kind:
            return False
        # torch refuses to have a step captured in a CUDA graph that would replay today's learning rate.
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return not (used and torch.cuda.is_current_stream_capturing())

    def _is_shared(self) -> bool:
        if self._shared is None:
            self._shared = any(_is_share(each) for group in self.param_groups for each in group["params"])
        return self._shared

    def _torchs_step(self, closure: Any) -> Any:
        if self._fused_on_shares or not self._is_shared():
            return self._really_torchs_step(closure)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:  # torch's plain step takes no such word
            self.found_inf = None
            if found_inf.item():
                return None
        fused = [group["fused"] for group in self.param_groups]
        for group in self.param_groups:
            group["fused"] = None
        try:
            return self._really_torchs_step(closure)
        finally:
            for group, each in zip(self.param_groups, fused):
                group["fused"] = each

    def _really_torchs_step(self, closure: Any) -> Any:
        step = super().step
        if getattr(step, "hooked", False):
            return step(closure)
        # torch wraps a class's step when it first makes one of that class, and may have made none.
        return Optimizer.profile_hook_step(step.__func__)(self, closure)  # type: ignore[attr-defined]


class Adam(_Lean, torch.optim.Adam):
    """`torch.optim.Adam`, lean when fused."""

    _decoupled = False
    _fused_on_shares = True

    def _call(self, group: dict[str, Any], grads: list[Tensor]) -> _Call | None:
        beta1, beta2 = group["betas"]
        if group["capturable"] or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
            return None
        own, amsgrad = self._own(group), group["amsgrad"]
        steps = [each["step"] for each in own]
        tensors = (
            group["params"],
            grads,
            [each["exp_avg"] for each in own],
            [each["exp_avg_sq"] for each in own],
            [each["max_exp_avg_sq"] for each in own] if amsgrad else [],
            steps,
        )
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

    def _make_state(self, group: dict[str, Any]) -> None:
        self._init_group(group, [], [], [], [], [], [])  # type: ignore[no-untyped-call]


class AdamW(_Lean, torch.optim.AdamW):
    """`torch.optim.AdamW`, lean when fused."""

    _decoupled = True
    _fused_on_shares = True
    _call = Adam._call
    _make_state = Adam._make_state


class SGD(_Lean, torch.optim.SGD):
    """`torch.optim.SGD`, lean when fused."""

    def _call(self, group: dict[str, Any], grads: list[Tensor]) -> _Call | None:
        buffers = []
        if group["momentum"] != 0:
            buffers = [each["momentum_buffer"] for each in self._own(group)]
            for buffer in buffers:
                if buffer is None:
                    return None
        first, self._first = self._first, False
        options = {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "dampening": group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "is_first_step": first,
        }
        return _Call(torch._fused_sgd_, (group["params"], grads, buffers), options, [])

    _first = False  # whether the buffers have just been made: dampening does not count then

    def _make_state(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._first = True


class Adagrad(_Lean, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, lean when fused."""

    def _call(self, group: dict[str, Any], grads: list[Tensor]) -> _Call | None:
        own = self._own(group)
        steps = [each["step"] for each in own]
        options = {
            "lr": group["lr"],
            "lr_decay": group["lr_decay"],
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
            "maximize": group["maximize"],
        }
        return _Call(
            torch._fused_adagrad_, (group["params"], grads, [each["sum"] for each in own], steps), options, steps
        )


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


def _is_share(tensor: Tensor) -> bool:
    return hasattr(tensor, "_local_tensor")


def _own_share(tensor: Any) -> Tensor:
    """This process's share of a tensor that is shared out; one that is not, as it is."""
    share: Tensor = getattr(tensor, "_local_tensor", tensor)
    return share


def _is_of_one_kind(group: dict[str, Any]) -> bool:
    """Whether one call can take all parameters of a group."""
    kinds = {(each.device, each.dtype) for each in group["params"]}
    return len(kinds) <= 1 and all(each.is_floating_point() for each in group["params"])
