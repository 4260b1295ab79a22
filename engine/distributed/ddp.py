"""A model whose parameters are full on every rank: ZeRO stages 0 to 2, and a single rank."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from redline.device import numbers_on
from redline.distributed.sharding import RunCollective, Sharding, all_reduce, sparse_zeros
from redline.distributed.strategy import ExpectedGradients, Reduced, Strategy, refuse_replaced
from redline.gradients import Reduction
from redline.master_params import TrainedParams
from redline.optimizers.state import local_tensor

__all__ = ["DDPStrategy"]


class DDPStrategy(Strategy):
    """Full parameters on every rank: ZeRO stages 0 to 2, and a single rank.

    Args:
        module: the model, on its device, with equal weights on all ranks.
        accumulate: the dtype of gradient accumulation, where that is not the model's: gradients are then summed
            outside of the model's ``.grad``. None where ``.grad`` itself accumulates.
        counts_all: whether gradients of parameters that the optimizer does not have count in the norm and are clipped,
            as DeepSpeed's are at stage 0 in fp32.
        always_reduces: whether gradients are reduced after every backward, so that only shards accumulate.
        keeps_sparse: whether the optimizer takes sparse gradients only.
    """

    def __init__(
        self,
        module: nn.Module,
        reduction: Reduction,
        params: TrainedParams,
        *,
        accumulate: torch.dtype | None,
        counts_all: bool = False,
        always_reduces: bool = False,
        keeps_sparse: bool = False,
    ) -> None:
        self._sharding: Sharding | None = None if params.masters is None else params.masters.sharding
        group = None if self._sharding is None else self._sharding.group
        super().__init__(module, reduction, group, ExpectedGradients())
        self.params, self.always_reduces = params, always_reduces
        sparse = (each for each in module.modules() if getattr(each, "sparse", False))
        self._sparse = {param for each in sparse for param in each.parameters(recurse=False)}
        self._accumulate, self._counts_all, self._keeps_sparse = accumulate, counts_all, keeps_sparse
        self._sums: dict[int, Tensor] = {}  # gradients apart from .grad, by the id of their parameter
        self._collected = False  # whether there was a backward since the last clear_gradients()
        self._reduced: list[Tensor] | None = None  # the gradients, where there are no others on this rank
        self._earlier: dict[Tensor, Tensor] = {}  # reduced before further backwards
        self._shards: dict[Tensor, Any] = {}  # the DTensor that is the gradient of each sharded master param
        # The smallest target and the gradient that the reduction gave it: whether the optimizer's were cleared.
        self._given: tuple[Tensor, Tensor | None] | None = None
        self.refresh_params()
        self.clear_gradients()

    def prepare_forward(self, *, is_last: bool, no_sync: bool) -> nn.Module:
        places, keys, params, names = self._slots
        if not all(map(is_, map(dict.get, places, keys, params), params)):  # three times as fast as a loop
            for place, key, param, name in zip(places, keys, params, names):
                if place.get(key, param) is not param and place[key] is not None:
                    refuse_replaced(name)
        return self.module

    def gradients_unchanged(self) -> bool:
        if self._given is not None and self._given[0].grad is not self._given[1]:
            return False
        return self._expected.unchanged()

    def refresh_params(self) -> None:
        intact = self.gradients_unchanged()
        if self._reduced is not None:
            self._set_aside()
        model = self.params.model
        # Where gradients come from, and the tensors that get the reduced ones.
        self._sources = model + self.params.others if self._counts_all else model
        self._targets = self._sources if self.params.masters is None else self.params.updated
        grouped = {id(param) for param in model}
        self._sums = {key: total for key, total in self._sums.items() if key in grouped}
        trained = grouped | {id(param) for param in self.params.others}
        for param in self.params.all:
            if id(param) not in trained:
                param.grad = None
        slots = [
            (module._parameters, key, param, f"{name}.{key}".lstrip("."))
            for name, module in self.module.named_modules()
            for key, param in module._parameters.items()
            if id(param) in grouped
        ]
        self._slots: list[Any] = [list(each) for each in zip(*slots)] or [[], [], [], []]
        # Its gradient shows whether the model's zero_grad() is called, once the master params have all others.
        self._token = min(model, key=Tensor.numel, default=None) if self.params.masters is not None else None
        self._shards = {}
        if not self._collected:
            self._expected.record_none(self._sources)
        elif intact:  # otherwise the next check is to notice that gradients were changed
            self.collect_gradients()

    def prepare_backward(self) -> None:
        if self._reduced is not None:
            self._set_aside()
        elif self._accumulate is not None and self._collected:
            self._add_up(self._accumulate)

    def _set_aside(self) -> None:
        """Keep what is reduced already apart from the gradients that a further backward leaves on this rank."""
        for target in self._targets:
            if target.grad is not None:  # one that was thawed since has none
                self._earlier[target] = local_tensor(target.grad)
                target.grad = None
        if self._token is not None:
            self._token.grad = None
        self._reduced = self._given = None

    def collect_gradients(self) -> None:
        self._collected = True
        self._reached = self._expected.record(self._sources) or self._reached

    def accept_changes(self) -> None:
        """Take gradients that others have written into, such as by clipping, as this engine's."""
        if self._reduced is None:
            self.collect_gradients()
            return
        self._expected.record(self._sources)
        if self._given is not None:
            self._given = self._given[0], self._given[0].grad

    def _add_up(self, dtype: torch.dtype) -> None:
        """Add the model's gradients to the sums, and free them."""
        sums = self._sums
        first: tuple[list[Tensor], list[Tensor]] = [], []  # all at once: one kernel where torch has it
        later: tuple[list[Tensor], list[Tensor]] = [], []
        for param in self.params.model:
            grad, total = param.grad, sums.get(id(param))
            if grad is None:
                continue
            param.grad = None
            if grad.is_sparse and self._keeps_sparse:
                grad = grad.to(dtype)
                sums[id(param)] = grad if total is None else total + grad
                continue
            added = later
            if total is None:
                sums[id(param)] = total = torch.empty_like(param, dtype=dtype, requires_grad=False)
                added = first
            added[0].append(total)
            added[1].append(grad.to_dense() if grad.is_sparse else grad)
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)

    def has_gradients(self) -> bool:
        if not self._reached or not self.params.others:
            return self._reached
        return bool(self._sums) or any(param.grad is not None for param in self.params.model)

    def gradient_of(self, param: Tensor) -> Tensor | None:
        if self._reduced is not None:
            place = next((index for index, each in enumerate(self._sources) if each is param), None)
            return param.grad if place is None else self._targets[place].grad  # None of a frozen one
        total = self._sums.get(id(param))
        if total is None or param.grad is None:
            return param.grad if total is None else total
        # The gradient of the last micro-batch joins the earlier ones now; what is expected of it is written nowhere.
        total.add_(param.grad)
        param.grad.data.zero_()
        return total

    def reduce_gradients(self, status: Sequence[float]) -> Reduced:
        if self._reduced is not None:
            return self._reduced, None
        gradients, sums = self._reduce(status)
        for target in self._targets if self._earlier else ():
            if target in self._earlier:
                local_tensor(target.grad).add_(self._earlier[target])
        self._earlier, self._sums, self._reduced = {}, {}, gradients
        if self.reduction.size > 1:
            if self._token is not None:
                self._token.grad = torch.zeros_like(self._token)
                target = min(self._targets, key=Tensor.numel)
                self._given = target, target.grad
            self._expected.record(self._sources)
        return gradients, sums

    def _reduce(self, status: Sequence[float]) -> Reduced:
        local: list[Tensor | None]
        if self._sums and self._accumulate is not None:
            self._add_up(self._accumulate)
            local = [self._sums.get(id(param)) for param in self._sources]
        else:  # as `collect_gradients` has recorded them, and `gradients_unchanged` has found them again
            local = self._expected.grads or [param.grad for param in self._sources]
        if self.reduction.size > 1 or self._sharding is not None:
            return self._reduce_over_ranks(local, status)
        if self.params.masters is not None:
            return self._give_masters(local), None
        if self._expected.complete:
            return list(self._expected.grads), None
        for param in self.params.model:  # one that the optimizer does not have needs no zeros
            if param.grad is None:
                param.grad = self._zeros(param)
        return [param.grad for param in self._sources if param.grad is not None], None

    def _give_masters(self, local: Sequence[Tensor | None]) -> list[Tensor]:
        """Make one rank's gradients those of full master params, in their dtype."""
        gradients: list[Tensor] = []
        cast: tuple[list[Tensor], list[Tensor]] = [], []  # all at once: one kernel where torch has it
        for param, master, grad in zip(self._sources, self._targets, local):
            if grad is None:
                given = self._zeros(master)
            elif grad.is_sparse and not self._keeps_sparse:
                given = grad.to_dense().to(master)
            elif grad.is_sparse or grad.dtype == master.dtype:
                given = grad.to(master.dtype)
            else:
                given = torch.empty_like(master, requires_grad=False)
                cast[0].append(given)
                cast[1].append(grad)
            param.grad = None
            master.grad = given
            gradients.append(given)
        if cast[0]:
            torch._foreach_copy_(*cast)
        return gradients

    def _zeros(self, param: Tensor) -> Tensor:
        return sparse_zeros(param) if self._keeps_sparse else torch.zeros_like(param, requires_grad=False)

    def _reduce_over_ranks(self, local: list[Tensor | None], status: Sequence[float]) -> Reduced:
        params, targets, masters = self._sources, self._targets, self.params.masters
        sharded = [index for index, target in enumerate(targets) if hasattr(target, "_local_tensor")]
        full = [index for index, target in enumerate(targets) if not hasattr(target, "_local_tensor")]
        gradients: list[Tensor] = []
        numbers = numbers_on(params[0].device if params else None, status)
        sums: Tensor | None = None
        if sharded:
            assert self._sharding is not None
            given, owners, updated = (pick(each, sharded) for each in (local, params, targets))
            gradients, sums = self._sharding.reduce_scatter(given, owners, updated, self.reduction, numbers)
            for master, rows in zip(updated, gradients):
                if master not in self._shards:
                    self._shards[master] = self._sharding.as_dtensor(rows, master)
                self._shards[master]._local_tensor = rows
                master.grad = self._shards[master]
        if full or not sharded:
            sparse = self._sparse if masters is None or self._keeps_sparse else set()
            totals, other = all_reduce(pick(local, full), pick(params, full), self.reduction, numbers, sparse)
            sums = other if sums is None else sums
            for index, total in zip(full, totals):
                if masters is not None:
                    params[index].grad = None
                target = targets[index]
                target.grad = total if total.dtype == target.dtype else total.to(target.dtype)
                gradients.append(target.grad)
        self._num_sharded = len(sharded)
        return gradients, sums

    def clear_gradients(self) -> None:
        for param in self.params.all:
            param.grad = None
        self._collected = self._reached = False
        self._reduced, self._given, self._earlier, self._sums = None, None, {}, {}
        for master, shard in self._shards.items():
            shard._local_tensor = master._local_tensor  # type: ignore[attr-defined]  # frees the gradient
        self._expected.record_none(self._sources)

    def compile(self, **options: Any) -> None:
        module = self.module

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        # What module.compile() does, but for the function above: the compiler passes over frames of torch's own, so
        # that module.compile() leaves an nn.Sequential as it is, without a word.
        module._compiled_call_impl = torch.compile(call, **options)

    def observe_collectives(self, run_collective: RunCollective) -> None:
        super().observe_collectives(run_collective)
        if self._sharding is not None:
            self._sharding.run_collective = run_collective


def pick(items: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """The items at these indices."""
    return [items[index] for index in indices]
