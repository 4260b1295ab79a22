"""What trains: the optimizer's parameters that require gradients now, and the tensors that the optimizer updates.

In fp32 at ZeRO stage 0 the optimizer updates the model's own parameters. In low precision, and at stages 1 and 2, it
has master params instead: fp32 copies, full or one shard per rank. This file owns that correspondence, and follows what
a script does to the optimizer's groups, to `requires_grad` and to the weights.
"""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.distributed.sharding import Sharding
from redline.optimizers.state import move_state

__all__ = ["MasterParams", "TrainedParams", "broadcast_from_rank_0", "is_expanded", "sum_of_bits"]

# Read for every parameter at every step: `map` over a getter takes half the time of a list comprehension.
_requires_grad = attrgetter("requires_grad")


class MasterParams:
    """The tensors that an optimizer updates instead of the model's parameters.

    Args:
        dtype: of the master params; None for each parameter's own.
        sharding: how they are divided among the ranks; None for full ones.
        rounded: round them to the model's dtype after every step: DeepSpeed's `bf16_master_weights_and_grads` with
            fp32 optimizer states.
    """

    def __init__(self, dtype: torch.dtype | None, sharding: Sharding | None, *, rounded: bool) -> None:
        self.of: dict[Tensor, Tensor] = {}  # the master param of each model parameter that has one, or had when frozen
        self.sharding = sharding
        self._dtype, self._rounded = dtype, rounded
        # Versions and addresses of the model's parameters when they were last equal to their master params.
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._compare_values = False
        self._writes: dict[Tensor, Tensor] = {}  # shape (2,): see take_writes

    def take_over(self, param: Tensor, optimizer: Optimizer) -> Tensor:
        """A model parameter's master param, made from its value where there is none; it gets the optimizer's state.

        :meth:`adopt_writes` must come before, and :meth:`record_marks` after it.
        """
        shard = self.sharding.shard_of if self.sharding is not None and self.sharding.divides(param) else None
        if param not in self.of:
            value = param.detach().to(self._dtype or param.dtype)
            self.of[param] = nn.Parameter(value.clone() if shard is None else shard(value))
        move_state(optimizer, param, self.of[param], shard=shard)
        return self.of[param]

    def compare_values(self) -> None:
        """Let the next :meth:`adopt_writes` compare values, since some writes do not change a tensor's version."""
        self._compare_values = True

    def adopt_writes(self) -> None:
        """Copy to the master params what a script has written into the model since :meth:`copy_to_model`.

        Only elements that differ from the rounded master param are copied, so that the others keep their precision.
        Most writes change a tensor's version, and an assignment to ``.data`` its address. A write into ``.data``, or
        one of a fused optimizer, changes neither. It is found when values are compared: at `train()`, at `eval()`, and
        when a checkpoint is saved.
        """
        versions = [param._version for param in self.of]
        addresses = [param.data_ptr() for param in self.of]
        compares, self._compare_values = self._compare_values, False
        if versions == self._versions and addresses == self._addresses and not compares:
            return
        marks = zip(versions, self._versions, addresses, self._addresses)
        for (version, old_version, address, old_address), param in zip(marks, self.of):
            changed = version != old_version or address != old_address
            if changed or compares:
                self._adopt(param, changed=changed)
        self.record_marks()

    @torch.no_grad()
    def _adopt(self, param: Tensor, *, changed: bool) -> None:
        master = self.of[param]
        local, value = self._local(master, param)
        value = value.to(local.device)
        same = local.to(value.dtype) == value
        if local is not master and changed:
            self._record_write(param, same)
        torch.where(same, local, value.to(local.dtype), out=local)

    def _local(self, master: Any, param: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of a master param, and the same part of its model parameter."""
        if self.sharding is not None and hasattr(master, "_local_tensor"):
            return master._local_tensor, self.sharding.rows_of(param)
        return master, param

    def _record_write(self, param: Tensor, same: Tensor) -> None:
        """Record a write into a full parameter, of which only this rank's rows will reach the other ranks.

        The ranks compare these records when they save; until then nothing waits for the device.
        """
        changed = same.logical_not().sum().to(param.device)
        earlier = self._writes.get(param, torch.zeros(2, dtype=torch.int64, device=param.device))
        # The factor makes the order of writes count; integers wrap around.
        self._writes[param] = torch.stack((earlier[0] * 1_000_003 + sum_of_bits(param), earlier[1] + changed))

    def take_writes(self) -> dict[Tensor, tuple[int, int]]:
        """The writes into full parameters since the last call, of which only this rank's rows were kept.

        Writes that a tensor's version does not show are not among them.

        Returns:
            For each parameter a checksum of its values after every write, and how many elements of this rank's rows
            were changed: none by a write that was undone before the next step.
        """
        writes, self._writes = self._writes, {}
        if not writes:
            return {}
        found: list[list[int]] = torch.stack(list(writes.values())).tolist()  # read from the device at once
        return {param: (total, changed) for param, (total, changed) in zip(writes, found)}

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Copy the master params to the model; with sharded ones, gather them from all ranks."""
        targets, sources = list(self.of), list(self.of.values())
        if self.sharding is not None:
            targets, sources = self.sharding.gather(targets, sources)
        if targets:
            torch._foreach_copy_(targets, sources)
        if self._rounded:
            self.copy_from_model()
        else:
            self._versions = [param._version for param in self.of]  # a copy in place changes no address

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Copy the model's parameters to the master params."""
        for param, master in self.of.items():
            local, value = self._local(master, param)
            local.copy_(value)
        self.record_marks()

    def record_marks(self) -> None:
        """Take the model's parameters as equal to their master params."""
        self._versions = [param._version for param in self.of]
        self._addresses = [param.data_ptr() for param in self.of]


class _StateByParam(defaultdict[Tensor, Any]):
    """An optimizer's state, by master param or by its model parameter."""

    def __init__(self, masters: dict[Tensor, Tensor], state: Any) -> None:
        super().__init__(dict, state)
        self._masters = masters

    def __missing__(self, key: Tensor) -> Any:
        return self[self._masters[key]] if key in self._masters else super().__missing__(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or super().__contains__(self._masters.get(key))  # type: ignore[call-overload]


class TrainedParams:
    """The parameters that train now: those of the optimizer's groups that require gradients.

    Args:
        module: the model.
        optimizer: its groups get master params instead of the model's own, where there are some; None for a model that
            is only evaluated.
        masters: makes them; None where the optimizer updates the model's own.
        world_size: ranks that hold the same parameters; new ones become rank 0's.
        round_to: without `masters`: the dtype that the optimizer's parameters are rounded to after every step.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        masters: MasterParams | None,
        *,
        world_size: int = 1,
        round_to: torch.dtype | None = None,
    ) -> None:
        self.masters = masters
        self.model: list[Tensor] = []  # the model's parameters that train now, in the order of the groups
        self.updated: list[Tensor] = []  # what the optimizer updates for each: the master param, or the parameter
        self.others: list[Tensor] = []  # the model's that require gradients and that the optimizer does not have
        self.all: list[Tensor] = []  # every parameter that can hold a gradient
        self._module, self._optimizer = module, optimizer
        self._world_size, self._round_to = world_size, round_to
        self._grouped: list[Tensor] = []  # the model's parameters in the order of the groups
        self._sizes: list[int] | None = None  # of the groups
        self._followed: list[Tensor] = []  # all parameters of the model and of the groups
        self._flags: list[bool] = []  # requires_grad of each
        self._known: set[int] = set()
        self.refresh()
        if optimizer is not None:
            self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        """Let a script use the optimizer with the model's parameters, as if there were no master params.

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

    def copy_to_model(self) -> None:
        """Give the model what the optimizer has updated; with sharded master params a collective."""
        if self.masters is not None:
            self.masters.copy_to_model()
        elif self._round_to is not None:
            with torch.no_grad():
                for group in self._groups:
                    for param in group["params"]:
                        if param.is_floating_point():
                            param.copy_(param.to(self._round_to))

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self._optimizer is None else self._optimizer.param_groups

    def groups_changed(self) -> bool:
        """Whether the optimizer was given parameters since the last :meth:`refresh`; costs next to nothing."""
        return [len(group["params"]) for group in self._groups] != self._sizes

    def refresh(self) -> bool:
        """Follow the groups and `requires_grad`; returns whether something has changed.

        Raises:
            EngineError: a group has a parameter that cannot be trained here.
        """
        groups_changed = self.groups_changed()
        if groups_changed:
            self._read_groups()
        flags = list(map(_requires_grad, self._followed))
        if flags == self._flags and not groups_changed:
            return False
        self.model = self.updated = [param for param in self._grouped if param.requires_grad]
        if self.masters is not None and self._optimizer is not None:
            self._make_masters(self.masters, self._optimizer)
            self.updated = [self.masters.of[param] for param in self.model]
        grouped = {id(param) for param in self._grouped}
        self.others = [param for param in self._followed if param.requires_grad and id(param) not in grouped]
        self._flags = flags  # last, so that an interrupted refresh is made again
        return True

    def _read_groups(self) -> None:
        groups = self._groups
        model_of = {} if self.masters is None else {id(master): param for param, master in self.masters.of.items()}
        self._sizes = [len(group["params"]) for group in groups]
        self._grouped = [model_of.get(id(each), each) for group in groups for each in group["params"]]
        self._followed = list({id(each): each for each in (*self._module.parameters(), *self._grouped)}.values())
        self.all = [*self._followed, *(() if self.masters is None else self.masters.of.values())]
        new = [param for param in self._followed if id(param) not in self._known]
        if self._known:  # the first ones are rank 0's already
            broadcast_from_rank_0(new, self._world_size)
        self._known |= {id(param) for param in new}

    def _make_masters(self, masters: MasterParams, optimizer: Optimizer) -> None:
        """Put master params into the groups, in the place of the model's parameters that train."""
        masters.adopt_writes()
        for group in optimizer.param_groups:
            for index, param in enumerate(group["params"]):
                # A frozen parameter has no master param, and costs no memory, until it is unfrozen.
                if id(param) in self._known and param.requires_grad:
                    group["params"][index] = masters.take_over(param, optimizer)
                    self.all.append(group["params"][index])
        masters.record_marks()


def sum_of_bits(tensor: Tensor) -> Tensor:
    """A checksum on the tensor's device: its bits, taken as integers, added up; int64, shape ()."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def broadcast_from_rank_0(tensors: list[Tensor], world_size: int) -> None:
    """Give every rank rank 0's values, in place; a collective."""
    if world_size == 1:
        return
    for tensor in tensors:
        data = tensor.detach().contiguous()  # gloo ignores strides
        dist.broadcast(torch.view_as_real(data) if data.is_complex() else data, 0)
        if is_expanded(tensor):
            tensor.data = data
        elif data.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(data)


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that torch cannot write to the tensor."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
