"""How several processes train one model: what the engine needs of it, and torch's DistributedDataParallel.

Gradients are averaged over the processes while the last backward of an update runs; DDP is kept from sending anything
before that one. Models that are shared out are in `engine.zero`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from engine.distributed import World, release_at_exit
from engine.gradients import Reduction, communication_hook, norm_of
from engine.precision import Masters

__all__ = ["Alone", "Parallel", "Replicas"]


Show = Callable[[str, int, Callable[[], Any]], Any]  # a collective's name, the bytes given, and what runs it


class Parallel(Protocol):
    """One model on all processes, seen from one of them.

    Attributes:
        synced: whether the gradients of the last backward are already those of all processes.
        sums_every_backward: whether a second backward before a step is summed over the processes, too.
        reduction: how the gradients of all processes become one.
    """

    synced: bool
    sums_every_backward: bool
    reduction: Reduction

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        """What to call for a forward whose backward ends an update (`last`), or is to stay here (`hold`)."""

    def gradients(self, weights: Sequence[Tensor], *, reduced: bool) -> list[Tensor]:
        """What an update takes: plain tensors, of all processes; zeros for a weight without a gradient."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients together, over all processes' shares of them; a scalar tensor."""

    def update(self, optimizer: Optimizer) -> None:
        """Let the optimizer make its step."""

    def put_away(self) -> None:
        """Free whole parameters that are only a copy: they are about to be older than the weights."""

    def forget(self) -> None:
        """Drop gradients that are held where no parameter shows them."""

    def show_collectives(self, show: Show) -> None:
        """Let `show` run the collectives of parameters and gradients that are not the reduction's."""

    def compile(self, **options: Any) -> None:
        """Let the model run compiled from here on, parameters and names as they are; options as of torch.compile."""

    def renew(self) -> None:
        """Let the next forward be like the first: DDP orders its sums anew after one, which shows in the last bits."""

    def order(self) -> list[int] | None:
        """In which order gradients came in that first backward, by the parameters' places; None for no matter."""

    def rehearse(self, order: Sequence[int]) -> None:
        """Order sums as after a first backward in which gradients came so. A collective; leaves gradients behind."""


class Alone:
    """One process."""

    synced = True
    sums_every_backward = True

    def __init__(self, module: nn.Module, reduction: Reduction) -> None:
        self.module, self.reduction = module, reduction

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        return self.module

    def gradients(self, weights: Sequence[Tensor], *, reduced: bool) -> list[Tensor]:
        """Zeros for a weight without one, as in DeepSpeed."""
        gradients = []
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        return gradients

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return norm_of(gradients)

    def update(self, optimizer: Optimizer) -> None:
        optimizer.step()

    def compile(self, **options: Any) -> None:
        module = self.module

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        # What module.compile() does, but for the function above: the compiler passes over frames of torch's own, so
        # that module.compile() leaves an nn.Sequential as it is, without a word.
        module._compiled_call_impl = torch.compile(call, **options)

    def put_away(self) -> None: ...
    def forget(self) -> None: ...
    def show_collectives(self, show: Show) -> None: ...
    def renew(self) -> None: ...
    def order(self) -> list[int] | None: ...
    def rehearse(self, order: Sequence[int]) -> None: ...


class Replicas(Alone):
    """Every process has the whole model, under DDP; weights and buffers are made rank zero's.

    Args:
        module: already on `world.device`.
        world: the processes, more than one.
        reduction: how their gradients become one.
        masters: fp32 weights that the reduced gradients are for; None where they are the model's.
        find_unused_parameters: for models of which a forward uses only a part.
    """

    sums_every_backward = False

    def __init__(
        self,
        module: nn.Module,
        world: World,
        reduction: Reduction,
        masters: Masters | None,
        *,
        find_unused_parameters: bool,
    ) -> None:
        super().__init__(module, reduction)
        self._world, self._masters, self._find_unused = world, masters, find_unused_parameters
        for buffer in module.buffers():
            if not buffer.is_contiguous():  # one row seen as many, say: DDP cannot write into that
                buffer.data = buffer.data.contiguous()
        self.ddp: DistributedDataParallel | None = self._wrap()
        # Whether the order of sums shows: two numbers have the same sum in any order, and some DDPs keep theirs.
        self._orders = world.size > 2 and not find_unused_parameters
        self._order: list[int] = []  # of the gradients of the first backward that is sent
        self._watches: list[RemovableHandle] = []

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        if self.ddp is None:
            self.ddp = self._wrap()
        # DDP decides in the forward whether the backward will send anything.
        self.ddp.require_backward_grad_sync = self.synced = last and not hold
        if self._orders and (self._watches or not self._order):
            self._watch(self.synced)
        return self.ddp

    def gradients(self, weights: Sequence[Tensor], *, reduced: bool) -> list[Tensor]:
        gradients = super().gradients(weights, reduced=reduced)
        if not reduced:
            self.reduction.reduce(gradients)
        return gradients

    def forget(self) -> None:
        if self.order() is None:
            self._order = []

    def renew(self) -> None:
        # The new one is made by the next forward, and not here: making DDP is a collective, and a process may be
        # failing. The old one goes first, since both would hook the parameters.
        self.ddp = None
        self._order = []

    def order(self) -> list[int] | None:
        order = list(dict.fromkeys(self._order))
        return order if len(order) == len(self._trained()) else None  # a backward that broke off saw a part

    def rehearse(self, order: Sequence[int]) -> None:
        """DDP's first iteration, with gradients of zero."""
        trained = self._trained()
        if self._order or not self._orders or sorted(order) != list(range(len(trained))):  # others are trained now
            return
        self.ddp = self.ddp or self._wrap()
        self.ddp.require_backward_grad_sync = True
        self.ddp.reducer.prepare_for_forward()
        self.ddp.reducer.prepare_for_backward([])
        with torch.enable_grad():
            for index in order:
                (trained[index].flatten()[:1] * 0).sum().backward()  # type: ignore[no-untyped-call]
        self._order = list(order)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _watch(self, sent: bool) -> None:
        """Take down in which order gradients come, in one backward that is sent, and in no other."""
        for watch in self._watches:
            watch.remove()
        self._watches = []
        if sent and not self._order:

            def came(index: int) -> Callable[[Tensor], None]:
                return lambda _: self._order.append(index)

            self._watches = [
                parameter.register_post_accumulate_grad_hook(came(index))  # type: ignore[no-untyped-call]
                for index, parameter in enumerate(self._trained())
            ]

    def _wrap(self) -> DistributedDataParallel:
        parallel = DistributedDataParallel(
            self.module,
            device_ids=[self._world.device] if self._world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._find_unused,
        )
        # Buffers start as rank zero's and then stay each process's own, as in DeepSpeed: sending them would cost every
        # forward. Set here, since the argument has another name in each torch.
        parallel.broadcast_buffers = False
        if self._masters is not None or not self.reduction.is_ddps:
            parallel.register_comm_hook(None, communication_hook(self.reduction, self._masters))
        release_at_exit(parallel)
        return parallel
