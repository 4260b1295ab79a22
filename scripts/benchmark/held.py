"""Count the bytes that a rank holds in parameters, gradients and optimizer state, from the tensors themselves.

Not what an allocator says: every storage that is reachable from the engine counts once, however many tensors look at
it, and one that is freed (resized to nothing, as FSDP2 does) counts nothing. Reads FSDP2's own attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Held", "held", "measure"]


class Held(NamedTuple):
    """Bytes on one rank, and the peak of their sum."""

    parameters: int = 0
    gradients: int = 0
    state: int = 0
    most: int = 0

    def at_most(self, other: Held) -> Held:
        """The larger of each."""
        return Held(*map(max, self, other))


def measure(engine: Any, batches: Iterable[Any], loss: Callable[[Tensor, Any], Tensor]) -> Held:
    """The largest of each in training; of gradients, those that there are when a backward is over.

    Args:
        engine: fresh.
        batches: pairs of inputs and targets; at least those of two steps, since the optimizer's state is made
            in the first.
        loss: of the model's output and the targets.
    """
    largest = Held()

    def look(*_: Any, within: bool = True) -> None:
        nonlocal largest
        now = held(engine)
        largest = largest.at_most(now._replace(gradients=0) if within else now)

    def look_first(then: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            look()
            return then(*arguments)

        return call

    def look_around(then: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            look()
            result = then(*arguments)
            look(within=False)  # the gradients that the optimizer gets
            return result

        return call

    # Before a forward FSDP2's own hook has run already, which gathers; after one it has freed already. When a block's
    # gradients, or up to stage 2 those of a backward, are about to be reduced, they are all there.
    handles = [each.register_forward_pre_hook(look) for each in engine.module.modules()]
    for group in _groups(engine.module):
        group.post_backward = look_first(group.post_backward)
    engine._strategy.reduce_gradients = look_around(engine._strategy.reduce_gradients)
    for inputs, targets in batches:
        out = engine(inputs)
        engine.backward(loss(out, targets))
        look(within=False)
        engine.step()
    for handle in handles:
        handle.remove()
    return largest


def held(engine: Any) -> Held:
    """What the engine holds at this moment."""
    model = [*engine.module.parameters()]
    updated = [each for group in engine.optimizer.param_groups for each in group["params"]]
    parameters, gradients = _of_fsdp(engine.module)
    gradients += [each.grad for each in updated]
    gradients += [each.grad for each in model]
    for apart in (getattr(engine._strategy, name, {}) for name in ("_sums", "_earlier")):
        gradients += apart.values()
    parts = (
        _bytes([*model, *updated, *parameters]),
        _bytes(gradients),
        _bytes(value for state in engine.optimizer.state.values() for value in state.values()),
    )
    return Held(*parts, sum(parts))


def _of_fsdp(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """What FSDP2 keeps of parameters and gradients where the module does not show it."""
    parameters: list[Any] = []
    gradients: list[Any] = []
    for group in _groups(module):
        under_way = group.comm_ctx.all_gather_state
        for result in (group._all_gather_result, under_way and under_way.all_gather_result):
            parameters.append(result and result.all_gather_output)
        for each in group.fsdp_params:
            gathered = getattr(each, "_unsharded_param", None)
            parameters += [each._sharded_param_data, *getattr(each, "all_gather_outputs", ()), gathered]
            parameters.append(getattr(each, "_sharded_post_forward_param_data", None))
            gradients += [each.unsharded_accumulated_grad, getattr(gathered, "grad", None)]
    return parameters, gradients


def _groups(module: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters."""
    found = []
    for each in module.modules():
        if hasattr(each, "_get_fsdp_state"):
            state = each._get_fsdp_state()
            several = hasattr(state, "_fsdp_param_groups")  # since torch 2.10 or so
            found += state._fsdp_param_groups if several else [state._fsdp_param_group]
    return [group for group in found if group is not None]


def _bytes(tensors: Iterable[Any]) -> int:
    storages = {}
    for each in tensors:
        if isinstance(each, Tensor):
            each = getattr(each, "_local_tensor", each)
            if each.layout is torch.strided:
                storage = each.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
