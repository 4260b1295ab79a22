"""ZeRO stage 3: a model under FSDP2, which shards its parameters and gathers them block by block.

Each parameter becomes a DTensor of which this rank has its rows, in fp32, and which the optimizer updates. A forward
gathers each block's parameters in the dtype of the computation and frees them, a backward gathers them again and gives
each rank its shard of the block's gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from engine.distributed import World
from engine.errors import EngineError
from engine.gradients import Reduction, norm_of, scale_by
from engine.log import log
from engine.master_params import TrainedParams
from engine.parallel import Expected, Reduced, all_reduce, step_on_shards
from engine.sharding import Show, make_mesh, unfuse_on_shards
from engine.transfer import numbers_on
from engine.zero.blank import Blank
from engine.zero.blocks import stays_whole
from engine.zero.carry import carry_optimizer_over
from engine.zero.memory import adds_up_whole, memory_of
from engine.zero.outputs import find_outputs
from engine.zero.torchs import (
    break_off_forward,
    clear_held_too,
    fill_held,
    follow_flags,
    forget,
    held_versions,
    let_methods_compute,
    reduce_unused,
    replaced_params,
    send_held,
    show_collectives,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from engine.config import EngineConfig
    from engine.precision import Formats

__all__ = ["FullyShard", "shard_model"]


def shard_model(
    model: nn.Module,
    world: World,
    config: EngineConfig,
    blocks: dict[str, nn.Module],
    formats: Formats,
    reduction: Reduction,
) -> FullyShard:
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
    mesh = make_mesh(world.device, world.size, zero.mics_shard_size)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": _after_forward(zero.zero_hpz_partition_size, world.size),
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
        find_outputs(unit)
        whole |= left
        done |= {id(each) for each in mine}
    if offloads and whole:
        raise EngineError(
            f"zero_optimization: {len(whole)} parameters cannot be shared out (scalars, batch norm, sparse embeddings) "
            "and would stay on the GPU, beside an optimizer on the CPU; leave offload_optimizer and offload_param out"
        )
    reduce_unused(units)
    for unit in units:
        # Memory for gathered parameters is allocated once: here, since tensors that are made in inference mode can't be
        # written to outside of it.
        unit.unshard()
        unit.reshard()
    let_methods_compute(model)
    clear_held_too(model, units)
    after: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    moved = {parameter: after[name] for name, parameter in before.items() if after[name] is not parameter}
    local = _add_up_whole(model, world, zero.stage, accumulate)
    log.info(
        "zero stage %d: %d ranks share %s; %s", zero.stage, world.size,
        f"the model and {len(blocks)} blocks of it" if blocks else "the model as one",
        "gradients are sent once an update" if local else "gradients are sent after every micro-batch",
    )  # fmt: skip
    return FullyShard(model, mesh, units, moved, reduction, whole=whole, local=local)


class FullyShard:
    """A model that is sharded itself, and what an optimizer step needs of it.

    Attributes:
        module: the model, sharded in place.
        moved: the sharded parameter in the place of each one that the model had.
        adds_up_whole: whether gradients of micro-batches stay whole, on each rank, until the last one.
    """

    reduces_in_backward = True
    always_reduces = False  # FSDP2 does

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        units: Sequence[Any],
        moved: dict[Tensor, Tensor],
        reduction: Reduction,
        *,
        whole: set[Tensor],
        local: bool,
    ) -> None:
        self.module, self.moved = module, moved
        self._units, self.reduction = units, reduction
        self._whole = whole  # parameters that every rank has all of
        self.adds_up_whole = local
        self._group = mesh.get_group(mesh.ndim - 1)  # of a mesh of two axes, the one that shards
        self._synced = True  # whether the next backward gives every rank its shard of the gradients
        self._held = False  # whether a backward has left whole gradients on this rank
        self._reached = False  # whether a backward has left a gradient
        self._num_sharded = 0  # of the gradients that were reduced last; whole ones follow them
        self._expected = Expected()
        self._held_expected: list[tuple[int, int]] = []
        self._show: Show = lambda op, size, run: run()
        # torch averages; the factor makes a sum of it where one is asked for.
        self._factor = 1.0 if reduction.is_mean else reduction.before * reduction.after * reduction.size

    params: TrainedParams

    def train(self, params: TrainedParams) -> None:
        """Take up what trains, before any forward."""
        self.params = params
        self._expected.note_none(params.model)

    def begin(self, *, last: bool, hold: bool) -> nn.Module:
        replaced = next(replaced_params(self._units), None)
        if replaced is not None:
            raise EngineError(
                f"{replaced}: the model has another parameter object than the optimizer's, which would never train; "
                "write into the old one, with load_state_dict(..., assign=False) or copy_() under torch.no_grad(), or "
                "call initialize again"
            )
        self._sync((last or not self.adds_up_whole) and not hold)
        return self.module

    def _sync(self, sync: bool) -> None:
        if sync is not self._synced:
            for unit in self._units:
                unit.set_requires_gradient_sync(sync, recurse=False)
            self._synced = sync
        if sync and self._held:
            # FSDP2 wants one dtype for all gradients of a block, also those that this backward is the first to make.
            untouched = held_versions(self._units) == self._held_expected
            fill_held(self._units)
            if untouched:
                self._held_expected = held_versions(self._units)

    def untouched(self) -> bool:
        return self._expected.hold() and held_versions(self._units) == self._held_expected

    def follow(self) -> None:
        for param in self.params.model:
            if not isinstance(param, DTensor) and param not in self._whole:
                raise EngineError(
                    f"optimizer: it was given a parameter of shape {tuple(param.shape)} that was not part of the model "
                    "when ZeRO stage 3 sharded it; add modules before initialize, or use zero_optimization.stage 2"
                )
        self._drop_frozen()
        follow_flags(self._units)

    def _drop_frozen(self) -> None:
        """Drop gradients of parameters that do not train, which FSDP2 may still have held."""
        trained = {id(param) for param in self.params.model}
        for param in self.params.all:
            if id(param) not in trained:
                param.grad = None

    def prepare(self) -> None: ...

    def collect(self) -> None:
        self._held = self._held or not self._synced
        self._held_expected = held_versions(self._units)
        if self._held_expected or self._expected.note(self.params.model):
            self._reached = True
        token = min(self.params.model, key=Tensor.numel, default=None)
        if self._held and token is not None and token.grad is None:
            # FSDP2 holds gradients where zero_grad() does not see them; this one, to which it adds, shows that it was
            # called.
            token.grad = torch.zeros_like(token, requires_grad=False)
        self._expected.note(self.params.model)

    def reached(self) -> bool:
        return self._reached

    def reduce(self, status: Sequence[float]) -> Reduced:
        if self._held:
            fill_held(self._units)
            send_held(self.module)
            self._synced, self._held = True, False
        self._drop_frozen()
        gradients: list[Tensor] = []
        whole: list[Tensor] = []
        for param in self.params.model:
            if not isinstance(param, DTensor):
                whole.append(param)
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param, requires_grad=False)
            gradients.append(param.grad._local_tensor)  # type: ignore[attr-defined]
        if self._factor != 1.0:
            scale_by(gradients, self._factor)
        self._num_sharded = len(gradients)
        numbers = numbers_on(self.params.model[0].device if self.params.model else None, status)
        totals, sums = all_reduce([param.grad for param in whole], whole, self.reduction, numbers)
        for param, total in zip(whole, totals):
            param.grad = total.to(param.dtype)
            gradients.append(param.grad)
        return Reduced(gradients, sums)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all ranks' gradients together, as a scalar tensor."""
        shards, whole = gradients[: self._num_sharded], gradients[self._num_sharded :]
        # In fp64, where the square of a large fp16 loss scale's norm is still finite.
        device = gradients[0].device
        square = norm_of(shards).double().square() if shards else torch.zeros((), dtype=torch.float64, device=device)
        self._show("all_reduce", square.nbytes, lambda: dist.all_reduce(square, group=self._group))
        if whole:
            square = square + norm_of(whole).double().square()
        return square.sqrt().float()

    def update(self, optimizer: Optimizer) -> None:
        step_on_shards(optimizer)

    def recover(self) -> None:
        break_off_forward(self.module, self._units)

    def reshard(self) -> None:
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

    def clear(self) -> None:
        forget(self.module, self._units)
        self._held = self._reached = False
        for param in self.params.all:
            param.grad = None
        self._expected.note_none(self.params.model)
        self._held_expected = []

    def carry_optimizer_over(self, optimizer: Optimizer) -> None:
        """Give an optimizer that was made of the model's own parameters the sharded ones, its state with them."""
        carry_optimizer_over(optimizer, self.moved, _share_of)
        unfuse_on_shards(optimizer)


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


def _after_forward(second_copy: int, world_size: int) -> bool | int:
    """FSDP2's `reshard_after_forward`: free what was gathered, or shard it among fewer ranks."""
    return second_copy if 1 < second_copy < world_size else True


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
