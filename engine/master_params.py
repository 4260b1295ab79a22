"""What trains: the optimizer's parameters that require gradients now, and the tensors that the optimizer updates.

In fp32 at ZeRO stage 0 the optimizer updates the model's own parameters. In low precision, and at stages 1 and 2, it
has master params in their place: fp32 copies, whole or one shard per rank. This file owns that correspondence. It
follows whatever a script does to the optimizer's groups, to `requires_grad` and to the weights themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.fused import move_state
from engine.sharding import Sharding

__all__ = ["MasterParams", "TrainedParams", "broadcast_from_rank_0"]


class MasterParams:
    """The tensors that an optimizer updates in the place of the model's parameters.

    Args:
        dtype: of the master params; None for each parameter's own.
        sharding: how they are divided between the ranks; None for whole ones.
        rounded: round them to the model's dtype after every step: DeepSpeed's `bf16_master_weights_and_grads` with
            fp32 optimizer states.

    Attributes:
        of: the master param of each model parameter that has one.
    """

    def __init__(self, dtype: torch.dtype | None, sharding: Sharding | None, *, rounded: bool) -> None:
        self.of: dict[Tensor, Tensor] = {}
        self.sharding = sharding
        self._dtype, self._rounded = dtype, rounded
        self._model: list[Tensor] = []  # those of `of`, frozen ones included, and their master params
        self._masters: list[Tensor] = []
        self._versions: list[int] = []
        self._compare_values = False

    def add(self, param: Tensor) -> Tensor:
        """Make the master param of a model parameter, from its value."""
        value = param.detach().to(self._dtype or param.dtype)
        if self.sharding is not None and self.sharding.divides(param):
            master = nn.Parameter(self.sharding.shard_of(value), requires_grad=True)
        else:
            master = nn.Parameter(value.clone(), requires_grad=True)
        self.of[param] = master
        return master

    def shard_of(self, master: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What makes a full tensor one that is sharded as a master param; None for a master param that is whole."""
        return self.sharding.shard_of if self.sharding is not None and hasattr(master, "_local_tensor") else None

    def follow(self) -> None:
        """Take up master params that were added."""
        self.adopt_writes()  # with the lists of before
        self._model, self._masters = list(self.of), list(self.of.values())
        self._note_versions()

    def compare_values(self) -> None:
        """Have the next look for writes compare values, since some writes leave no trace in a tensor's version."""
        self._compare_values = True

    @torch.no_grad()
    def adopt_writes(self) -> None:
        """Take over what has been written into the model's parameters since :meth:`copy_to_model`.

        Only the elements that differ from the rounded master param are taken, so that the others keep their precision.
        A write through ``.data`` or by a fused optimizer does not change a tensor's version; it is found when values
        are compared: at `train()`, `eval()`, and when a checkpoint is saved.
        """
        if self._compare_values:
            self._compare_values = False
            written = list(range(len(self._model)))
        else:
            versions = [param._version for param in self._model]
            if versions == self._versions:
                return
            written = [index for index, (now, then) in enumerate(zip(versions, self._versions)) if now != then]
        for index in written:
            self._adopt(self._model[index], self._masters[index])
        self._note_versions()

    def _adopt(self, param: Tensor, master: Tensor) -> None:
        local, value = master, param
        if self.sharding is not None and hasattr(master, "_local_tensor"):
            local, value = master._local_tensor, self.sharding.rows_of(param)
        value = value.to(local.device)
        torch.where(local.to(value.dtype) == value, local, value.to(local.dtype), out=local)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Write the master params into the model; with sharded ones, gather them from all ranks."""
        whole = self._model, self._masters
        if self.sharding is not None:
            whole = self.sharding.gather(self._model, self._masters)
        if whole[0]:
            torch._foreach_copy_(*whole)
        if self._rounded:
            for param, master in zip(self._model, self._masters):
                if self.sharding is not None and hasattr(master, "_local_tensor"):
                    master._local_tensor.copy_(self.sharding.rows_of(param))
                else:
                    master.copy_(param)
        self._note_versions()

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Write the model's parameters into the master params."""
        for param, master in self.of.items():
            if self.sharding is not None and hasattr(master, "_local_tensor"):
                master._local_tensor.copy_(self.sharding.rows_of(param))
            else:
                master.copy_(param)
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [param._version for param in self._model]


class _StateByParam(defaultdict[Tensor, Any]):
    """An optimizer's state, found under a master param or under the model parameter behind it."""

    def __init__(self, masters: dict[Tensor, Tensor], state: Any) -> None:
        super().__init__(dict, state)
        self._masters = masters

    def __missing__(self, key: Tensor) -> Any:
        return self[self._masters[key]] if key in self._masters else super().__missing__(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or super().__contains__(self._masters.get(key))  # type: ignore[call-overload]


class TrainedParams:
    """The parameters that train now, as the optimizer's groups and `requires_grad` say.

    Args:
        module: the model.
        optimizer: its groups get master params in the place of the model's own, where there are some; None for a model
            that is only evaluated.
        masters: makes them; None where the optimizer updates the model's own.
        world_size: ranks that hold the same parameters; new ones become rank 0's.

    Attributes:
        model: the model's parameters that train now, in the order of the groups.
        updated: what the optimizer updates for each of them: the master param, or the parameter itself.
        others: parameters of the model that require gradients and that the optimizer does not have.
        all: every parameter that can hold a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        masters: MasterParams | None,
        *,
        world_size: int = 1,
    ) -> None:
        self.masters = masters
        self.model: list[Tensor] = []
        self.updated: list[Tensor] = []
        self.others: list[Tensor] = []
        self.all: list[Tensor] = []
        self._module, self._optimizer = module, optimizer
        self._world_size = world_size
        self._grouped: list[Tensor] = []  # the model's parameters in the order of the groups
        self._sizes: list[int] | None = None  # of the groups
        self._flags: list[bool] = []  # requires_grad of each parameter in `_followed`
        self._followed: list[Tensor] = []
        self._known: set[int] = set()
        self.refresh()
        if optimizer is not None:
            self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        """Let the optimizer answer for the model's parameters, which a script knows, and not for master params alone.

        Its `state` is found under either, and its `zero_grad` clears the whole model.
        """
        if self.masters is not None:
            optimizer.state = _StateByParam(self.masters.of, optimizer.state)
        zero_grad = optimizer.zero_grad

        def zero_all(set_to_none: bool = True) -> None:
            zero_grad(set_to_none)
            self._module.zero_grad(set_to_none)

        # An attribute of this optimizer alone: torch has no hook for it.
        optimizer.zero_grad = zero_all  # type: ignore[method-assign]

    def regrouped(self) -> bool:
        """Whether the optimizer was given parameters since the last :meth:`refresh`; costs next to nothing."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return [len(each["params"]) for each in groups] != self._sizes

    def refresh(self) -> bool:
        """Follow the groups and the flags; whether something has changed.

        Raises:
            EngineError: a group has a parameter that can't be trained here.
        """
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        regrouped = sizes != self._sizes
        if regrouped:
            self._read_groups(groups)
            self._sizes = sizes
        flags = [param.requires_grad for param in self._followed]
        if not regrouped and flags == self._flags:
            return False
        self._flags = flags
        if self.masters is not None:
            self._make_masters(self.masters, groups)
        of = {} if self.masters is None else self.masters.of
        self.model = [param for param in self._grouped if param.requires_grad]
        self.updated = [of.get(param, param) for param in self.model]
        own = {id(param) for param in self._grouped}
        self.others = [param for param in self._followed if param.requires_grad and id(param) not in own]
        if self.masters is not None:
            self.masters.follow()
        return True

    def _read_groups(self, groups: list[dict[str, Any]]) -> None:
        model_of = {} if self.masters is None else {id(master): param for param, master in self.masters.of.items()}
        self._grouped = [model_of.get(id(each), each) for group in groups for each in group["params"]]
        self._followed = list({id(each): each for each in (*self._module.parameters(), *self._grouped)}.values())
        self.all = [*self._followed, *(() if self.masters is None else self.masters.of.values())]
        new = [param for param in self._followed if id(param) not in self._known]
        if self._known:  # the first ones are rank 0's already
            broadcast_from_rank_0(new, self._world_size)
        self._known |= {id(param) for param in new}

    def _make_masters(self, masters: MasterParams, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for index, param in enumerate(group["params"]):
                # A frozen parameter has no master param, and costs nothing, until it is thawed.
                if id(param) in self._known and param.requires_grad:
                    master = masters.of[param] if param in masters.of else masters.add(param)
                    group["params"][index] = master
                    assert self._optimizer is not None
                    move_state(self._optimizer, param, master, shard=masters.shard_of(master))
                    self.all.append(master)


@torch.no_grad()
def broadcast_from_rank_0(tensors: list[Tensor], world_size: int) -> None:
    """Give every rank rank 0's values, in place; a collective."""
    if world_size == 1:
        return
    for tensor in tensors:
        # gloo takes no notice of strides, and an expanded tensor can't be written to.
        data = tensor.detach().contiguous()
        dist.broadcast(torch.view_as_real(data) if data.is_complex() else data, 0)
        if data.data_ptr() != tensor.data_ptr() or not tensor.is_contiguous():
            if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
                tensor.data = data
            else:
                tensor.detach().copy_(data)
