"""One model on all ranks: what the engine needs of it, and the models that every rank has in full.

Gradients add up on each rank, and are reduced once per optimizer step, by :meth:`Parallel.reduce`. How many collectives
that takes depends on which parameters train, never on which of them a loss has reached or on the way the forward took,
so that ranks whose losses reach different parameters stay together. A model that is sharded itself is in `engine.zero`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import EngineError
from engine.gradients import Reduction, norm_of
from engine.master_params import TrainedParams
from engine.sharding import Show, buckets_of
from engine.transfer import numbers_on

__all__ = ["DataParallel", "Expected", "Parallel", "Reduced", "all_reduce"]


class Reduced(NamedTuple):
    """The gradients of all ranks, as an optimizer step takes them.

    Attributes:
        gradients: plain tensors, whole ones or this rank's rows; they count in the norm and are clipped.
        status: the sums over the ranks of what each rank gave, on the device; None where there is one rank.
    """

    gradients: list[Tensor]
    status: Tensor | None


class Parallel(Protocol):
    """One model on all ranks, seen from one of them.

    Attributes:
        reduction: how the gradients of all ranks become one.
        params: what trains.
        reduces_in_backward: whether every backward is a collective already.
        always_reduces: whether gradients are to be reduced after every backward, and not at the boundary alone.
    """

    reduction: Reduction
    params: TrainedParams
    reduces_in_backward: bool
    always_reduces: bool

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        """What to call for a forward whose backward ends an accumulation (`last`), or stays on this rank (`hold`)."""

    def untouched(self) -> bool:
        """Whether the gradients are as the last :meth:`collect`, or :meth:`clear`, left them."""

    def follow(self) -> None:
        """Take up which parameters train now; gradients of those that no longer do are dropped."""

    def prepare(self) -> None:
        """Make room for the gradients of a backward."""

    def collect(self) -> None:
        """Take up the gradients of a backward."""

    def reached(self) -> bool:
        """Whether some gradient has been collected on this rank."""

    def reduce(self, status: Sequence[float]) -> Reduced:
        """Reduce the collected gradients over the ranks and give them to the optimizer; a collective.

        A parameter that no loss has reached gets zeros, as in DeepSpeed. What was reduced before, since the last
        :meth:`clear`, is added.

        Args:
            status: numbers of this rank that are summed with the gradients.
        """

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients of all ranks together; a scalar tensor."""

    def update(self, optimizer: Optimizer) -> None:
        """Let the optimizer make its step."""

    def clear(self) -> None:
        """Drop all gradients, and what a forward or backward that broke off has left."""

    def recover(self) -> None:
        """Undo what a forward that has raised left unfinished; gradients stay."""

    def reshard(self) -> None:
        """Free full parameters that are only a copy: they are about to be older than the shards."""

    def show_collectives(self, show: Show) -> None:
        """Let `show` run the collectives of parameters and gradients that are not the reduction's."""

    def compile(self, **options: Any) -> None:
        """Let the model run compiled from here on, parameters and names as they are; options as of torch.compile."""


class Expected:
    """The gradients that the engine has left behind, by which it notices what others do to them.

    A plain ``loss.backward()`` adds to a gradient in place, or makes one; `zero_grad` removes it, or writes zeros.
    """

    def __init__(self) -> None:
        self._holders: list[Any] = []
        self._grads: list[Tensor | None] = []
        self._versions: list[int] | None = None  # None: no gradient is expected

    def note(self, holders: list[Any]) -> bool:
        """Take the gradients of these tensors, as they are now, for right; whether there are any."""
        self._holders = holders
        self._grads = grads = [holder.grad for holder in holders]
        self._versions = _versions_of(grads)
        return bool(self._versions)

    def note_none(self, holders: list[Any]) -> None:
        """Expect no gradient on any of these tensors."""
        self._holders, self._versions = holders, None

    def hold(self) -> bool:
        """Whether they still are what was noted."""
        if self._versions is None:
            for holder in self._holders:  # noqa: SIM110  any() takes twice as long
                if holder.grad is not None:
                    return False
            return True
        grads = [holder.grad for holder in self._holders]
        return all(map(operator.is_, grads, self._grads)) and _versions_of(grads) == self._versions


def _local(tensor: Any) -> Any:
    """A DTensor's shard; a plain tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def _versions_of(grads: list[Tensor | None]) -> list[int]:
    """How often each gradient was written to; of a DTensor its shard tells, since its own version stays 0."""
    if grads and hasattr(grads[0], "_local_tensor"):
        return [getattr(grad, "_local_tensor", grad)._version for grad in grads if grad is not None]
    return [grad._version for grad in grads if grad is not None]


class DataParallel:
    """Every rank has all parameters: ZeRO stages 0 to 2, and a single process.

    Args:
        module: the model, on its device, with equal weights on all ranks.
        reduction: how the gradients of all ranks become one.
        params: what trains.
        accumulate: the dtype in which the gradients of micro-batches add up, where that is not the model's: they are
            then kept apart from the model's ``.grad``. None where ``.grad`` itself adds up.
        counts_all: whether gradients of parameters that the optimizer does not have count in the norm and are clipped,
            as DeepSpeed's are at stage 0 in fp32.
        always_reduces: whether gradients are reduced after every backward, so that none add up in full.
        keeps_sparse: whether the optimizer takes sparse gradients only.
    """

    reduces_in_backward = False

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
        sparse = (each for each in module.modules() if getattr(each, "sparse", False))
        self._sparse = {param for each in sparse for param in each.parameters(recurse=False)}
        self.module, self.reduction, self.params = module, reduction, params
        self._accumulate, self._counts_all, self._keeps_sparse = accumulate, counts_all, keeps_sparse
        self.always_reduces = always_reduces
        self._sharding = None if params.masters is None else params.masters.sharding
        self._sums: list[Tensor | None] = []  # apart from .grad, in the order of params.model
        self._summed: list[Tensor] = []  # params.model when they were
        self._collected = False  # whether there was a backward since the last clear()
        self._reduced: list[Tensor] | None = None  # the gradients, where there are no others on this rank
        self._earlier: dict[Tensor, Tensor] = {}  # those that were reduced before others came
        self._reached = False  # whether one of them left a gradient
        self._apart = False  # whether gradients of earlier backwards are in `_sums`
        # The smallest master param, and a gradient that only shows whether the optimizer's zero_grad() was called.
        self._master_token: tuple[Tensor, Tensor] | None = None
        self._on_master: Tensor | None = None  # the gradient that it has now
        # The same for the model's zero_grad(), once the gradients have gone to the master params.
        self._token: Tensor | None = None
        self._shards: dict[Tensor, Any] = {}  # the DTensor that is the gradient of each sharded master param
        self._expected = Expected()
        self._slots: list[tuple[dict[str, Any], str, Tensor, nn.Module]] = []
        self.follow()
        self.clear()

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        for place, key, param, owner in self._slots:
            if place.get(key, param) is not param:
                self._refuse_replaced(place, key, owner)
        return self.module

    def _refuse_replaced(self, place: dict[str, Any], key: str, owner: nn.Module) -> None:
        if place[key] is None:
            return
        name = next((name for name, each in self.module.named_modules() if each is owner), "")
        raise EngineError(
            f"{name + '.' if name else ''}{key}: the model has another parameter object than the optimizer's, which "
            "would never train; write into the old one, with load_state_dict(..., assign=False) or copy_() under "
            "torch.no_grad(), or call initialize again"
        )

    def untouched(self) -> bool:
        if self._master_token is not None and self._master_token[0].grad is not self._on_master:
            return False
        return self._expected.hold()

    def follow(self) -> None:
        if self._reduced is not None:
            self._set_aside()
        model = self.params.model
        self._reduced_params = model + self.params.others if self._counts_all else model
        kept = {id(param): total for param, total in zip(self._summed, self._sums)}
        self._sums = [kept.get(id(param)) for param in model]
        self._summed = model
        trained = {id(param) for param in (*model, *self.params.others)}
        for param in self.params.all:
            if id(param) not in trained:
                param.grad = None
        grouped = {id(param) for param in model}
        self._slots = [
            (each._parameters, key, param, each)
            for each in self.module.modules()
            for key, param in each._parameters.items()
            if param is not None and id(param) in grouped
        ]
        masters = self.params.masters
        self._master_token = self._token = None
        if masters is not None and model:
            self._token = min(model, key=Tensor.numel)
            master = min(self.params.updated, key=Tensor.numel)
            self._master_token = master, torch.zeros_like(master, requires_grad=False)
        self._shards = {}
        if self._collected:
            self.collect()

    def prepare(self) -> None:
        if self._reduced is not None:
            self._set_aside()
        elif self._accumulate is not None and self._collected:
            self._add_up(self._accumulate)

    def _set_aside(self) -> None:
        """Keep what is reduced already apart from the gradients that a further backward leaves on this rank."""
        for target in self._targets:
            if target.grad is not None:  # one that was thawed since has none
                self._earlier[target] = _local(target.grad)
                target.grad = None
        if self._token is not None:
            self._token.grad = None
        self._reduced = self._on_master = None

    def collect(self) -> None:
        self._collected = True
        if self._master_token is not None:
            master, token = self._master_token
            master.grad = self._on_master = token
        self._reached = self._expected.note(self._reduced_params) or self._reached

    def _add_up(self, dtype: torch.dtype) -> None:
        """Add the model's gradients to the sums, and free them."""
        self._apart = True
        sums = self._sums
        first: tuple[list[Tensor], list[Tensor]] = [], []  # all at once: one kernel where torch has it
        later: tuple[list[Tensor], list[Tensor]] = [], []
        for index, param in enumerate(self.params.model):
            grad = param.grad
            if grad is None:
                continue
            param.grad = None
            total = sums[index]
            if grad.is_sparse:
                if self._keeps_sparse:
                    grad = grad.to(dtype)
                    sums[index] = grad if total is None else total + grad
                    continue
                grad = grad.to_dense()
            if total is None:
                sums[index] = total = torch.empty_like(param, dtype=dtype)
                first[0].append(total)
                first[1].append(grad)
            else:
                later[0].append(total)
                later[1].append(grad)
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)

    def reached(self) -> bool:
        if not self._reached or not self.params.others:
            return self._reached
        return any(total is not None for total in self._sums) or any(p.grad is not None for p in self.params.model)

    @property
    def _targets(self) -> list[Tensor]:
        """What gets the reduced gradients."""
        return self._reduced_params if self.params.masters is None else self.params.updated

    def reduce(self, status: Sequence[float]) -> Reduced:
        if self._reduced is not None:
            return Reduced(self._reduced, None)
        reduced = self._reduce(status)
        if self._earlier:
            self._add_earlier(reduced.gradients)
        if self._apart:
            self._apart, self._sums = False, [None] * len(self._sums)
        self._reduced = reduced.gradients
        if self.reduction.size > 1:
            if self._token is not None:
                self._token.grad = torch.zeros_like(self._token)
            self._expected.note(self._reduced_params)
        if self._master_token is not None:
            self._on_master = self._master_token[0].grad
        return reduced

    def _add_earlier(self, gradients: list[Tensor]) -> None:
        """Add the reduced gradients of earlier backwards, in place."""
        for target in self._targets:
            if target in self._earlier:
                _local(target.grad).add_(self._earlier[target])
        self._earlier = {}

    def _reduce(self, status: Sequence[float]) -> Reduced:
        params = self._reduced_params
        if self._apart and self._accumulate is not None:
            self._add_up(self._accumulate)
        local = self._sums if self._apart else [param.grad for param in params]
        if self.reduction.size == 1 and self._sharding is None:
            return Reduced(self._give_alone(params, local), None)
        return self._give_reduced(params, local, status)

    def _give_alone(self, params: list[Tensor], local: Sequence[Tensor | None]) -> list[Tensor]:
        if self.params.masters is not None:
            return self._give_masters(params, local)
        gradients: list[Tensor] = []
        for index, (param, grad) in enumerate(zip(params, local)):
            if grad is None:
                if index >= len(self.params.model):
                    continue  # the optimizer does not have it
                param.grad = grad = self._zeros(param)
            gradients.append(grad)
        return gradients

    def _give_masters(self, params: list[Tensor], local: Sequence[Tensor | None]) -> list[Tensor]:
        gradients: list[Tensor] = []
        cast: tuple[list[Tensor], list[Tensor]] = [], []  # all at once: one kernel where torch has it
        for param, master, grad in zip(params, self.params.updated, local):
            if grad is None:
                given = self._zeros(master)
            elif grad.dtype == master.dtype or grad.is_sparse:
                given = (
                    grad.to(master.dtype) if self._keeps_sparse or not grad.is_sparse else grad.to_dense().to(master)
                )
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
        if self._keeps_sparse:
            return torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.long), param.new_empty(0, *param.shape[1:]),
                                           param.shape, device=param.device)  # fmt: skip
        return torch.zeros_like(param, requires_grad=False)

    def _give_reduced(self, params: list[Tensor], local: list[Tensor | None], status: Sequence[float]) -> Reduced:
        masters = self.params.masters
        targets = self._targets
        sharded = [index for index, target in enumerate(targets) if hasattr(target, "_local_tensor")]
        divided = set(sharded)
        whole = [index for index in range(len(params)) if index not in divided]
        gradients: list[Tensor] = []
        numbers = numbers_on(params[0].device if params else None, status)
        sums: Tensor | None = None
        if sharded:
            sums = self._scatter(params, targets, [(index, local[index]) for index in sharded], numbers, gradients)
        if whole or not sharded:
            shapes = [params[index] for index in whole]
            sparse = self._sparse if masters is None or self._keeps_sparse else set()
            totals, other = all_reduce([local[index] for index in whole], shapes, self.reduction, numbers, sparse)
            sums = other if sums is None else sums
            for index, total in zip(whole, totals):
                target = targets[index]
                if masters is not None:
                    params[index].grad = None
                target.grad = total if total.dtype == target.dtype else total.to(target.dtype)
                gradients.append(target.grad)
        assert sums is not None
        self._num_sharded = len(sharded)
        return Reduced(gradients, sums)

    _num_sharded = 0

    def _scatter(
        self,
        params: list[Any],
        masters: list[Any],
        local: list[tuple[int, Tensor | None]],
        numbers: Tensor,
        gradients: list[Tensor],
    ) -> Tensor:
        """Reduce-scatter gradients into the sharded master params' own, and free them; the sums of `numbers`."""
        assert self._sharding is not None
        size = self.reduction.dtype.itemsize
        # What is sent together depends on the parameters alone, and not on what a loss has reached.
        buckets = list(buckets_of(local, lambda pair: (params[pair[0]].dtype, params[pair[0]].numel() * size)))
        local.clear()
        sums = numbers
        finish: Callable[[], None] = lambda: None  # noqa: E731
        for number, bucket in enumerate(buckets):
            dense: list[Tensor] = []
            for index, grad in bucket:
                if grad is None:
                    grad = torch.zeros_like(params[index], dtype=self._accumulate if self._apart else None)
                dense.append(grad.to_dense() if grad.is_sparse else grad)
            extra = numbers if number == len(buckets) - 1 else numbers[:0]
            wait, rows, sums = self._sharding.reduce_scatter(dense, extra, self.reduction)
            for index, _ in bucket:
                params[index].grad = None
            owners = [masters[index] for index, _ in bucket]
            bucket.clear()
            finish()  # of the bucket before: two are under way at a time, and their full copies take memory
            finish = partial(self._give_rows, wait, owners, rows, gradients)
        finish()
        return sums / (self.reduction.before * self.reduction.after)

    def _give_rows(
        self, wait: Callable[[], None], masters: list[Any], rows: list[Tensor], gradients: list[Tensor]
    ) -> None:
        """Wait for a bucket, and make its rows the gradients of the master params."""
        assert self._sharding is not None
        wait()
        for master, own in zip(masters, rows):
            local = own.to(self._sharding.device, master.dtype)
            shard: Any = self._shards.get(master)
            if shard is None:
                shard = self._shards[master] = self._sharding.as_dtensor(local, master)
            shard._local_tensor = local
            master.grad = shard
            gradients.append(local)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        count = self._num_sharded
        if count == 0 or self._sharding is None:
            return norm_of(gradients)
        # In fp64, where the square of a large fp16 loss scale's norm is still finite.
        square = norm_of(gradients[:count]).double().square()
        square = square.to(self.params.model[0].device)  # offloaded gradients are in the CPU's memory
        group = self._sharding.group
        self._sharding.show("all_reduce", square.nbytes, lambda: dist.all_reduce(square, group=group))
        if len(gradients) > count:
            square = square + norm_of(gradients[count:]).double().square()
        return square.sqrt().float()

    def update(self, optimizer: Optimizer) -> None:
        """Let the optimizer make its step, each rank on its shards.

        Raises:
            EngineError: torch can't do on DTensors what this optimizer does.
        """
        if self._sharding is None:
            optimizer.step()
        else:
            step_on_shards(optimizer)

    def clear(self) -> None:
        for param in self.params.all:
            param.grad = None
        self._collected = self._reached = False
        self._on_master = None
        self._reduced, self._earlier = None, {}
        if self._apart:
            self._apart, self._sums = False, [None] * len(self._sums)
        for master, shard in self._shards.items():
            shard._local_tensor = master._local_tensor  # type: ignore[attr-defined]  # frees the gradient
        self._expected.note_none(self._reduced_params)

    def compile(self, **options: Any) -> None:
        module = self.module

        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        # What module.compile() does, but for the function above: the compiler passes over frames of torch's own, so
        # that module.compile() leaves an nn.Sequential as it is, without a word.
        module._compiled_call_impl = torch.compile(call, **options)

    def recover(self) -> None: ...

    def reshard(self) -> None: ...

    def show_collectives(self, show: Show) -> None:
        if self._sharding is not None:
            self._sharding.show = show


def all_reduce(
    gradients: Sequence[Tensor | None],
    params: Sequence[Tensor],
    reduction: Reduction,
    status: Tensor,
    sparse_params: Container[Tensor] = frozenset(),
) -> tuple[list[Tensor], Tensor]:
    """Reduce whole gradients over the ranks, in buckets; a collective.

    Args:
        gradients: of this rank; None for zeros.
        params: to which they belong: the result has their memory layout.
        reduction: how the ranks' gradients become one.
        status: numbers that are summed with them, shape (n,).
        sparse_params: those whose gradients are sparse on every rank.

    Returns:
        The reduced gradients, in the dtype of the collective, and the sums of `status`.
    """
    sparse = [index for index, param in enumerate(params) if param in sparse_params] if sparse_params else []
    rest = [index for index in range(len(params)) if index not in set(sparse)]
    reduced: list[Any] = [None] * len(params)
    started: list[tuple[Any, list[int], list[Tensor]]] = []

    def start(indices: list[int], extra: Tensor) -> Tensor:
        dtype = _wire(params[indices[0]], reduction) if indices else reduction.dtype
        sizes = [params[index].numel() for index in indices]
        flat = torch.empty(sum(sizes) + len(extra), dtype=dtype, device=status.device)
        views = [
            part.as_strided(params[index].shape, _dense_strides(params[index]), part.storage_offset())
            for index, part in zip(indices, torch.split(flat[: sum(sizes)], sizes))
        ]
        given = [(view, gradients[index]) for view, index in zip(views, indices)]
        torch._foreach_zero_([view for view, gradient in given if gradient is None] or [flat[:0]])
        dense = [(view, each.to_dense() if each.is_sparse else each) for view, each in given if each is not None]
        if dense:
            torch._foreach_copy_([view for view, _ in dense], [gradient for _, gradient in dense])
        tail = flat[sum(sizes) :]
        if dtype.is_complex:
            tail.copy_(extra)
            started.append((reduction.start(torch.view_as_real(flat)), indices, views))
        else:
            tail.copy_(extra)
            started.append((reduction.start(flat), indices, views))
        return tail

    # Backward makes gradients in about the reverse of the order of the parameters.
    buckets = list(buckets_of(rest[::-1], lambda i: (_wire(params[i], reduction), params[i].nbytes)))
    tail = status[:0]
    for number, bucket in enumerate(buckets or [[]]):
        last = number == max(len(buckets) - 1, 0)
        tail = start(bucket, status if last else status[:0])
    for future, indices, views in started:
        future.wait()
        for index, view in zip(indices, views):
            reduced[index] = view
    for index in sparse:
        gradient = gradients[index]
        if gradient is None:
            gradient = params[index].new_zeros(params[index].shape).to_sparse(1)
        reduced[index] = reduction.reduce_sparse(gradient)
    sums = (tail.real if tail.is_complex() else tail) / (reduction.before * reduction.after)
    return reduced, sums


def _wire(param: Tensor, reduction: Reduction) -> torch.dtype:
    """What a gradient travels in: the config's dtype, where the parameter has no more digits than fp32."""
    wider = param.is_complex() or param.dtype is torch.float64
    return param.dtype if wider and reduction.dtype is torch.float32 else reduction.dtype


def _dense_strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's strides where its elements fill their memory, one each; else those of a contiguous tensor."""
    return param.stride() if param.is_contiguous() else torch.empty_like(param, device="meta").stride()


def step_on_shards(optimizer: Optimizer) -> None:
    """An optimizer's step on DTensors.

    Raises:
        EngineError: torch can't do on DTensors what this optimizer does.
    """
    try:
        optimizer.step()
    except (NotImplementedError, RuntimeError) as error:
        if "aten." not in str(error):  # no operation of torch's
            raise
        raise EngineError(
            f"optimizer {type(optimizer).__name__}: torch can't run it on sharded parameters "
            f"({str(error).splitlines()[0]}); use zero_optimization.stage 0, or an optimizer such as AdamW"
        ) from error
