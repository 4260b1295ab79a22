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
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from redline.device import numbers_on
from redline.distributed import fsdp_state
from redline.distributed.blocks import MetaModel, unsharded_params
from redline.distributed.call_order import CallOrder
from redline.distributed.memory_estimate import accumulates_unsharded, memory_of
from redline.distributed.process_group import World
from redline.distributed.sharding import RunCollective, all_reduce, make_mesh
from redline.distributed.strategy import ExpectedGradients, Reduced, Strategy, refuse_replaced
from redline.errors import EngineError
from redline.gradients import Reduction, scale_by
from redline.log import log
from redline.master_params import TrainedParams
from redline.optimizers import unfuse_on_shards
from redline.optimizers.state import replace_params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from redline.config import EngineConfig
    from redline.config.zero import ZeroConfig
    from redline.precision import Precision

__all__ = ["FSDPStrategy", "shard_model"]


def shard_model(
    model: nn.Module,
    world: World,
    config: EngineConfig,
    blocks: dict[str, nn.Module],
    dtypes: Precision,
    reduction: Reduction,
) -> FSDPStrategy:
    """Shard a model in place, block by block, so that at most one block is unsharded on the device at any time.

    Parameters and buffers of all ranks become rank 0's. A model on the meta device is materialized block by block. One
    that an earlier engine has sharded, such as for an evaluation after the training, stays as it is.

    Raises:
        EngineError: the model cannot be sharded; the message names the reason.
    """
    zero = config.zero_optimization
    assert zero is not None
    mesh = make_mesh(world.device, world.size, zero.mics_shard_size)
    policy = MixedPrecisionPolicy(
        # None keeps the dtypes of the model: fp64 stays fp64, as without sharding.
        param_dtype=None if dtypes.stored in (None, dtypes.compute) else dtypes.compute,
        reduce_dtype=None if dtypes.stored is None and reduction.dtype is torch.float32 else reduction.dtype,
        cast_forward_inputs=False,  # the engine's forward has cast them, as without sharding
    )
    before: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    sharded_before = isinstance(model, FSDPModule)
    if not sharded_before:
        _shard(model, world, zero, blocks, dtypes, mesh, policy)
    elif fsdp_state.policy_of(model) != policy:
        raise EngineError(
            "zero_optimization.stage 3: an earlier engine has sharded this model for another precision or reduction; "
            "give this engine the same, or a new model"
        )
    after: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    moved = {parameter: after[name] for name, parameter in before.items() if after[name] is not parameter}
    for parameter, sharded in moved.items():
        hooks: Any = sharded
        hooks._backward_hooks = parameter._backward_hooks
        hooks._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
    local = _agree_on_accumulation(model, world, config)
    if not sharded_before:
        log.info(
            "zero stage %d: %d ranks share %s; %s", zero.stage, world.size,
            f"the model and {len(blocks)} blocks of it" if blocks else "the model as one",
            "gradients are reduced once per step" if local else "gradients are reduced after every micro-batch",
        )  # fmt: skip
    # Of a mesh of two axes, the second one shards.
    return FSDPStrategy(model, reduction, mesh.get_group(mesh.ndim - 1), moved, local=local)


def _shard(
    model: nn.Module,
    world: World,
    zero: ZeroConfig,
    blocks: dict[str, nn.Module],
    dtypes: Precision,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
) -> None:
    offloads = world.device.type == "cuda" and zero.offloads
    second_copy = zero.zero_hpz_partition_size
    low = dtypes.compute is not torch.float32 and dtypes.buffers is None
    unsharded: set[Any] = set()
    done: set[int] = set()
    meta = MetaModel(model, world.device)
    for name, unit in (*blocks.items(), ("", model)):
        part = [(f"{name}.{key}".strip("."), each) for key, each in unit.named_modules() if id(each) not in done]
        meta.fill(part)
        left: set[Any] = unsharded_params(unit, low=low)
        _place(name, [each for _, each in part], world, dtypes.stored, left)
        fully_shard(
            unit,
            mesh=mesh,
            # True frees unsharded parameters; a number shards them among fewer ranks.
            reshard_after_forward=second_copy if 1 < second_copy < world.size else True,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy(zero.pins_memory) if offloads else OffloadPolicy(),
            ignored_params=left,
        )
        unsharded |= left
        done |= {id(each) for _, each in part}
    if offloads and unsharded:
        raise EngineError(
            f"zero_optimization: {len(unsharded)} parameters cannot be sharded (scalars, batch norm, sparse embeddings)"
            " and would stay on the GPU, with the optimizer on the CPU; leave offload_optimizer and offload_param out"
        )
    units: list[Any] = [*blocks.values(), model]
    for each in units:
        # Memory for gathered parameters is allocated once: here, since tensors that are made in inference mode can't be
        # written to outside of it.
        each.unshard()
        each.reshard()
    fsdp_state.adapt(model, list(blocks.values()))


def _place(block: str, modules: Iterable[nn.Module], world: World, stored: torch.dtype | None, left: set[Any]) -> None:
    """Move a block's own tensors to the device, in their final dtype, with rank 0's values."""
    dtypes = set()
    for each in modules:
        for tensor in (*each.parameters(recurse=False), *each.buffers(recurse=False)):
            if isinstance(tensor, DTensor):  # shared with another module, and sharded there
                continue
            to_shard = isinstance(tensor, nn.Parameter) and tensor not in left
            # Contiguous: gloo ignores strides, and FSDP2 shards nothing else.
            data = tensor.data.to(world.device, stored if stored and to_shard else tensor.dtype).contiguous()
            dist.broadcast(data, 0)
            tensor.data = data
            if to_shard:
                dtypes.add(str(data.dtype))
    if len(dtypes) > 1:
        raise EngineError(
            f"zero_optimization.stage 3: {block or 'the model'} has parameters of {' and '.join(sorted(dtypes))}, and "
            "those of a block are gathered as one tensor; give them one dtype, name blocks of one dtype each in "
            "redline.zero.blocks, or use stage 2"
        )


def _agree_on_accumulation(model: nn.Module, world: World, config: EngineConfig) -> bool:
    """Whether gradients accumulate unsharded; the same on all ranks, whose memory may differ."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    answer = accumulates_unsharded(3, config.redline.zero.accumulate, trained, memory_of(world.device))
    answers = torch.tensor(float(answer)).to(world.device)
    dist.all_reduce(answers, dist.ReduceOp.MIN)
    return bool(answers)


class FSDPStrategy(Strategy):
    """A model that is sharded itself.

    `group` are the ranks that share one model; `moved` has the sharded parameter for each original one; `local` says
    whether gradients accumulate unsharded, on each rank, until the last micro-batch.
    """

    reduces_in_backward = True  # and FSDP2 always reduces

    def __init__(
        self,
        module: nn.Module,
        reduction: Reduction,
        group: Any,
        moved: dict[Tensor, Tensor],
        *,
        local: bool,
    ) -> None:
        super().__init__(module, reduction, group, ExpectedGradients(sharded=True))
        self.moved, self.accumulates_unsharded = moved, local
        root, *blocks = (each for each in module.modules() if isinstance(each, FSDPModule))
        self._units: list[Any] = [*blocks, root]
        self._unsharded = {param for param in module.parameters() if not isinstance(param, DTensor)}
        self._synced = True  # whether the next backward gives every rank its shard of the gradients
        for unit in self._units:  # an earlier engine may have left it otherwise
            unit.set_requires_gradient_sync(True, recurse=False)
        self._held = False  # whether a backward has left unsharded gradients on this rank
        self._held_expected: list[tuple[int, int]] = []
        # With several groups of ranks that share a model each may go its own way.
        self._calls = CallOrder() if 1 < dist.get_world_size(group) == dist.get_world_size() else None
        fsdp_state.see_gradients(self._units, reduction.own.add)
        # torch averages; the factor makes a sum of it where one is asked for.
        self._factor = 1.0 if reduction.is_mean else reduction.before * reduction.after * reduction.size

    def train(self, params: TrainedParams) -> None:
        """Set the parameters that train, before any forward."""
        self.params = params
        self._expected.record_none(params.model)

    def carry_optimizer_over(self, optimizer: Optimizer) -> None:
        """Replace the original parameters of an optimizer, and their state, by the sharded ones."""

        def shard(parameter: Any, value: Tensor) -> Tensor:
            if not isinstance(parameter, DTensor):
                return value
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

        replace_params(optimizer, self.moved, shard)
        unfuse_on_shards(optimizer)

    def begin_call(self, call: str) -> None:
        if self._calls is not None:
            self._calls.begin(call)

    def prepare_forward(self, *, is_last: bool, no_sync: bool) -> nn.Module:
        replaced = next(fsdp_state.replaced_params(self._units), None)
        if replaced is not None:
            refuse_replaced(replaced)
        fsdp_state.share_hooks(self._units)
        # Another engine's loss may pass through this model while it is frozen, as in a GAN: held gradients stay held.
        trains = any(param.requires_grad for param in self.params.model)
        sync = (is_last or not self.accumulates_unsharded) and not no_sync and trains
        if sync is not self._synced:
            for unit in self._units:
                unit.set_requires_gradient_sync(sync, recurse=False)
            self._synced = sync
        if sync and self._held:
            # FSDP2 needs one dtype for all gradients of a block, including those that this backward creates.
            untouched = fsdp_state.held_versions(self._units) == self._held_expected
            fsdp_state.fill_held(self._units)
            if untouched:
                self._held_expected = fsdp_state.held_versions(self._units)
        return self.module

    def gradients_unchanged(self) -> bool:
        return self._expected.unchanged() and fsdp_state.held_versions(self._units) == self._held_expected

    def refresh_params(self) -> None:
        for param in self.params.model:
            if not isinstance(param, DTensor) and param not in self._unsharded:
                raise EngineError(
                    f"optimizer: it was given a parameter of shape {tuple(param.shape)} that was not part of the model "
                    "when ZeRO stage 3 sharded it; add modules before initialize, or use zero_optimization.stage 2"
                )
        intact = self._expected.unchanged()
        self._drop_frozen()
        fsdp_state.sync_requires_grad(self._units)
        if not self._expected.grads:
            self._expected.record_none(self.params.model)
        elif intact:  # otherwise the next check is to notice that gradients were changed
            self._expected.record(self.params.model)

    def _drop_frozen(self) -> None:
        """Drop gradients of parameters that do not train, which FSDP2 may still have held."""
        trained = {id(param) for param in self.params.model}
        for param in self.params.all:
            if id(param) not in trained:
                param.grad = None

    def collect_gradients(self) -> None:
        self._held = self._held or not self._synced
        self._held_expected = fsdp_state.held_versions(self._units)
        if self._held_expected or self._expected.record(self.params.model):
            self._reached = True
        token = min(self.params.model, key=Tensor.numel, default=None)
        if self._held and token is not None and token.grad is None:
            # FSDP2 holds gradients where zero_grad() does not see them; this one, to which it adds, shows that it was
            # called.
            token.grad = torch.zeros_like(token, requires_grad=False)
        self._expected.record(self.params.model)

    def reduce_gradients(self, status: Sequence[float]) -> Reduced:
        if self._held:
            fsdp_state.fill_held(self._units)
            fsdp_state.reduce_held(self.module)
            self._synced, self._held = True, False
        self._drop_frozen()
        gradients: list[Tensor] = []
        unsharded: list[Tensor] = []
        for param in self.params.model:
            if not isinstance(param, DTensor):
                unsharded.append(param)
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param, requires_grad=False)
            gradients.append(param.grad._local_tensor)  # type: ignore[attr-defined]
        if self._factor != 1.0:
            scale_by(gradients, self._factor)
        self._num_sharded = len(gradients)
        numbers = numbers_on(self.params.model[0].device if self.params.model else None, status)
        totals, sums = all_reduce([param.grad for param in unsharded], unsharded, self.reduction, numbers)
        for param, total in zip(unsharded, totals):
            param.grad = total.to(param.dtype)
            gradients.append(param.grad)
        return gradients, sums

    def clear_gradients(self) -> None:
        fsdp_state.reset(self.module, self._units, clear=True)
        self._held = self._reached = False
        for param in self.params.all:
            param.grad = None
        self._expected.record_none(self.params.model)
        self._held_expected = []

    def reset_forward(self) -> None:
        fsdp_state.reset(self.module, self._units, clear=False)

    def reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def observe_collectives(self, run_collective: RunCollective) -> None:
        super().observe_collectives(run_collective)
        fsdp_state.observe_collectives(self._units, run_collective)

    def compile(self, **options: Any) -> None:
        """Compile each block by itself, since there are collectives between them."""
        for unit in self._units[:-1] or self._units:
            unit.forward = torch.compile(unit.forward, **options)
