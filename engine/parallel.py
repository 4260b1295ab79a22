"""How one model is trained by several processes: torch's DistributedDataParallel.

Gradients are averaged over the processes while the last backward of an update runs; the engine keeps
DDP from sending anything before that one.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.distributed import World, release_at_exit
from engine.gradients import Reduction, communication_hook
from engine.precision import Masters

__all__ = ["wrap_model"]


def wrap_model(
    module: nn.Module,
    world: World,
    reduction: Reduction,
    masters: Masters | None,
    *,
    find_unused_parameters: bool,
) -> DistributedDataParallel | None:
    """The model under DDP, its weights and buffers made rank zero's; None where there is nothing to share.

    Args:
        module: already on `world.device`.
        world: the processes.
        reduction: how their gradients become one.
        masters: fp32 weights that the reduced gradients are for; None where they are the model's.
        find_unused_parameters: for models of which a forward uses only a part.
    """
    if world.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    parallel = DistributedDataParallel(
        module,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )
    # Buffers start as rank zero's and then stay each process's own, as in DeepSpeed: sending them would cost every
    # forward. Set here, since the argument has another name in each torch.
    parallel.broadcast_buffers = False
    if masters is not None or not reduction.is_ddps:
        parallel.register_comm_hook(None, communication_hook(reduction, masters))
    release_at_exit(parallel)
    return parallel
