"""A model under FSDP2: which process has which part of it, and when the parts are put together.

Each parameter becomes a DTensor of which this process has its share of the rows, in fp32, and which the optimizer
updates. A forward gathers each block's parameters in the format that the model computes in, a backward gives each
process its share of the block's gradients. Stages 1 and 2 keep what a forward has gathered for the backward; stage 3
frees it and gathers it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from engine.distributed import World
from engine.errors import EngineError
from engine.gradients import Reduction, norm_of, scale_by
from engine.log import log
from engine.zero.blank import Blank
from engine.zero.blocks import stays_whole
from engine.zero.carry import carry_optimizer_over
from engine.zero.memory import adds_up_whole, memory_of
from engine.zero.torchs import Show, forget, reduce_unused, send_held, show_collectives

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from engine.config import EngineConfig
    from engine.precision import Formats

__all__ = ["Shards", "shard_model"]


def shard_model(
    model: nn.Module,
    world: World,
    config: EngineConfig,
    blocks: dict[str, nn.Module],
    formats: Formats,
    reduction: Reduction,
) -> Shards:
    """Share a model out in place, block by block: at no time is more than one block of it whole on the device.

    Every process's weights and buffers become rank zero's.

    Args:
        model: on any device; on the meta device its blocks are filled one by one.
        world: the processes.
        config: with a zero_optimization of stage 1 to 3.
        blocks: the parts of the model that are gathered as one, by name.
        formats: of parameters and computation.
        reduction: how the gradients of all processes become one.

    Raises:
        EngineError: the model cannot be shared out so; the message says why.
    """
    zero, accumulate = config.zero_optimization, config.redline.zero.accumulate
    assert zero is not None
    before: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    offloads = world.device.type == "cuda" and zero.offloads
    mesh = _mesh(world, zero.mics_shard_size)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": _after_forward(zero.stage, zero.zero_hpz_partition_size, world.size),
        "mp_policy": MixedPrecisionPolicy(
            # None for what the model brings: fp64 stays fp64, as without sharding.
            param_dtype=None if formats.stored in (None, formats.compute) else formats.compute,
            reduce_dtype=None if formats.stored is None and reduction.dtype is torch.float32 else reduction.dtype,
            cast_forward_inputs=False,  # the engine's forward has cast them, as without sharding
        ),
        "offload_policy": CPUOffloadPolicy(zero.pins_memory) if offloads else OffloadPolicy(),
    }
    low = formats.compute is not torch.float32
    units: list[Any] = []
    whole: set[Tensor] = set()
    done: set[int] = set()
    blank = Blank(model, world.device)
    for name, unit in (*blocks.items(), ("", model)):
        part = [(f"{name}.{key}".strip("."), each) for key, each in unit.named_modules() if id(each) not in done]
        blank.fill(part)
        mine = [each for _, each in part]
        left: set[Any] = stays_whole(unit, low=low and formats.buffers is None)
        _place(mine, world, formats.stored, left)
        units.append(_share(unit, left, options))
        whole |= left
        done |= {id(each) for each in mine}
    if offloads and whole:
        raise EngineError(
            f"zero_optimization: {len(whole)} parameters cannot be shared out (scalars, batch norm, sparse embeddings) "
            "and would stay on the GPU, beside an optimizer on the CPU; leave offload_optimizer and offload_param out"
        )
    if config.redline.find_unused_parameters:
        reduce_unused(units)  # ranks may use different ones
    after: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    moved = {parameter: after[name] for name, parameter in before.items() if after[name] is not parameter}
    local = _add_up_whole(model, world, zero.stage, accumulate)
    log.info(
        "zero stage %d: %d processes share %s; %s", zero.stage, world.size,
        f"the model and {len(blocks)} blocks of it" if blocks else "the model as one",
        "gradients are sent once an update" if local else "gradients are sent after every micro-batch",
    )  # fmt: skip
    return Shards(model, mesh, units, moved, reduction, keeps=zero.stage < 3, local=local)


class Shards:
    """A model that is shared out, and what an update needs of it.

    Attributes:
        module: the model, sharded in place.
        moved: the sharded parameter in the place of each one that the model had.
        synced: whether the last backward has given every process its share of the gradients.
        adds_up_whole: whether gradients of micro-batches stay whole, on each process, until the last one.
    """

    sums_every_backward = True  # also of two before one step

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        units: Sequence[Any],
        moved: dict[Tensor, Tensor],
        reduction: Reduction,
        *,
        keeps: bool,
        local: bool,
    ) -> None:
        self.module, self.moved = module, moved
        self._units, self.reduction = units, reduction
        self._num_shares = 0  # of the gradients that were given out last; whole ones follow them
        self._keeps, self.adds_up_whole = keeps, local
        self._group = mesh.get_group(mesh.ndim - 1)  # of a mesh of two axes, the one that shares out
        self.synced = True
        self._show: Show = lambda op, size, run: run()
        # torch averages; the factor makes a sum of it where one is asked for.
        self._factor = 1.0 if reduction.is_mean else reduction.before * reduction.after * reduction.size

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        """What to call for a forward whose backward is to come.

        Args:
            last: whether that backward ends an update.
            hold: whether its gradients stay with this process in any case.
        """
        sync = (last or not self.adds_up_whole) and not hold
        if sync is not self.synced:
            for unit in self._units:
                unit.set_requires_gradient_sync(sync, recurse=False)
                if self._keeps:
                    unit.set_reshard_after_backward(sync, recurse=False)
            self.synced = sync
        return self.module

    def gradients(self, weights: Sequence[Tensor], *, reduced: bool) -> list[Tensor]:
        """This process's share of all processes' gradients, as plain tensors; zeros for a weight without one."""
        if not reduced:
            self._send_what_was_held()
        gradients: list[Tensor] = []
        whole: list[Tensor] = []
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradient = weight.grad
            if isinstance(gradient, DTensor):
                gradients.append(gradient._local_tensor)
            else:
                whole.append(gradient)
        if self._factor != 1.0:
            scale_by(gradients, self._factor)
        if whole:
            self.reduction.reduce(whole)
        self._num_shares = len(gradients)
        return gradients + whole

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all processes' gradients together, as a scalar tensor."""
        shares, whole = gradients[: self._num_shares], gradients[self._num_shares :]
        # In fp64, where the square of a large fp16 loss scale's norm is still finite.
        square = norm_of(shares).double().square()
        self._show("all_reduce", square.nbytes, lambda: dist.all_reduce(square, group=self._group))
        if whole:
            square = square + norm_of(whole).double().square()
        return square.sqrt().float()

    def update(self, optimizer: Optimizer) -> None:
        """Let the optimizer make its step, each process on its share.

        Raises:
            EngineError: torch cannot do on shares what this optimizer does.
        """
        try:
            optimizer.step()
        except (NotImplementedError, RuntimeError) as error:
            if "aten." not in str(error):  # no operation of torch's
                raise
            raise EngineError(
                f"optimizer {type(optimizer).__name__}: torch cannot run it on parameters that are shared out "
                f"({str(error).splitlines()[0]}); use zero_optimization.stage 0, or an optimizer such as AdamW"
            ) from error

    def put_away(self) -> None:
        """Free what a forward has gathered and no backward has freed: it may be older than the weights."""
        for unit in self._units:
            unit.reshard()

    def show_collectives(self, show: Show) -> None:
        """Let `show` run every collective of parameters and gradients, which it is told the name and the bytes of."""
        self._show = show
        show_collectives(self._units, show)

    def compile(self, **options: Any) -> None:
        """Compile the blocks, each for itself: between them the compiler would meet with collectives."""
        for unit in self._units[:-1] or self._units:
            unit.forward = torch.compile(unit.forward, **options)

    def forget(self) -> None:
        """Drop gradients that were held, and what a forward or backward that broke off has left."""
        forget(self.module, self._units)

    def renew(self) -> None:
        """Nothing here depends on what has been trained before."""

    def order(self) -> list[int] | None:
        """See `renew`."""
        return None

    def rehearse(self, order: Sequence[int]) -> None:
        """See `renew`."""

    def carry_optimizer_over(self, optimizer: Optimizer) -> None:
        """Give an optimizer that was made of the model's own parameters the sharded ones, its state with them."""
        carry_optimizer_over(optimizer, self.moved, _share_of)
        if isinstance(optimizer, _FUSED_ON_SHARDS):
            return
        for group in optimizer.param_groups:
            if group.get("fused"):
                name = type(optimizer).__name__
                log.info("%s: torch's fused kernel takes no shares of parameters; the plain one is used", name)
                group["fused"] = None

    def _send_what_was_held(self) -> None:
        send_held(self.module)
        self.synced = True
        if self._keeps:
            for unit in self._units:
                unit.set_reshard_after_backward(True, recurse=False)


_FUSED_ON_SHARDS = (torch.optim.Adam, torch.optim.AdamW)


def _share_of(value: Any, parameter: Tensor, sharded: Tensor) -> Any:
    """This process's share of a tensor of the parameter's shape; anything else as it is."""
    if not (isinstance(value, Tensor) and value.shape == parameter.shape and isinstance(sharded, DTensor)):
        return value
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)


def _share(unit: nn.Module, whole: set[Any], options: dict[str, Any]) -> Any:
    """Share a block out, but for some of its parameters."""
    if not whole:
        return fully_shard(unit, **options)
    try:
        return fully_shard(unit, ignored_params=whole, **options)
    except TypeError as error:
        raise EngineError(
            f"zero_optimization: torch {torch.__version__} cannot leave parameters out of sharding, as scalars, sparse "
            "embeddings and low-precision batch norm have to be; use torch 2.7 or newer, or stage 0"
        ) from error


def _mesh(world: World, size: int) -> DeviceMesh:
    """All processes in a row; or, with groups of `size` that each share out a whole model, in rows of that size."""
    if 0 < size < world.size:
        return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(world.device.type, (world.size,))


def _after_forward(stage: int, second_copy: int, processes: int) -> bool | int:
    """FSDP2's `reshard_after_forward`: free what was gathered, keep it, or share it out among fewer processes."""
    if stage < 3:
        return False
    return second_copy if 1 < second_copy < processes else True


def _place(modules: Iterable[nn.Module], world: World, stored: torch.dtype | None, whole: set[Tensor]) -> None:
    """Bring the modules' own weights and buffers to the device, in the format they are stored in, as rank zero's."""
    for each in modules:
        for tensor in (*each.parameters(recurse=False), *each.buffers(recurse=False)):
            if isinstance(tensor, DTensor):  # of another module, too, and shared out with that
                continue
            cast = stored is not None and isinstance(tensor, nn.Parameter) and tensor not in whole
            # Contiguous: gloo takes no notice of strides, and FSDP2 shares out nothing else.
            data = tensor.data.to(world.device, stored if cast else tensor.dtype).contiguous()
            dist.broadcast(data, 0)
            tensor.data = data


def _add_up_whole(model: nn.Module, world: World, stage: int, accumulate: str | None) -> bool:
    """Whether gradients of micro-batches add up whole; one answer for all processes, whose hosts may differ."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    answer = torch.tensor(float(adds_up_whole(stage, accumulate, trained, memory_of(world.device))))
    answer = answer.to(world.device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)
