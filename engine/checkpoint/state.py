"""All of a run that a checkpoint holds, taken from an engine: tensors, plain things, what is this process's own.

The name of a weight is its name in the model; the tensor behind it is the fp32 weight where the model's is in low
precision. So any engine over the same model can take it up, in another precision, on other processes, sharded or not.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.checkpoint.frames import memory_of
from engine.checkpoint.plain import pack
from engine.errors import EngineError
from engine.randomness import random_state
from engine.schedule_state import portable_state
from schedulers.registry import is_built_in

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = [
    "Captured", "aliases_of", "buffers_of", "capture", "checksum", "checksums", "extra_states_of", "model_tensors",
    "schedule_of", "set_setting", "settings_of", "weights_of",
]  # fmt: skip

# Settings of a parameter group that choose among implementations of one optimizer; the engine's own count.
_CHOICES = ("fused", "foreach", "capturable", "differentiable")


@dataclass
class Captured:
    """The state of one process at one moment.

    Attributes:
        tensors: by key, as they are in the engine; not copied.
        shared: plain things that are the same on all processes, as JSON has them.
        own: what is this process's alone.
        buffers: the keys of the model's buffers in `values`, by name: they may differ between processes.
        further: buffers of a process that is not rank 0, which `tensors` leaves out.
        params: checksums of the model's parameters that every rank has in full, by name; empty on a single rank.
    """

    tensors: dict[str, Tensor]
    shared: dict[str, Any]
    own: dict[str, Any]
    buffers: dict[str, str]
    further: dict[str, Tensor]
    params: dict[str, int]

    def values(self) -> dict[str, Tensor]:
        """What this process has of each tensor, by key; not copied."""
        return {key: _local(tensor) for key, tensor in (self.tensors | self.further).items()}


def capture(engine: Engine, client_state: Mapping[str, Any], *, exclude_frozen: bool) -> Captured:
    """What a checkpoint of the engine holds; as it was after the last update, if another is under way.

    Args:
        engine: its last update settled.
        client_state: the script's own.
        exclude_frozen: leave out parameters that do not require gradients.

    Raises:
        EngineError: something in it cannot be saved.
    """
    engine.put_away()
    module = engine.module
    tensors: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    weights = weights_of(engine)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    left_out = frozen if exclude_frozen else []
    tensors |= {f"model.{name}": weight for name, weight in weights.items() if name not in left_out}
    buffers = buffers_of(module)
    shared: dict[str, Any] = {
        "counters": _counters(engine),
        "batch": {
            "train_batch_size": engine.train_batch_size(),
            "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
            "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        },
        "weights": [name for name in weights if name not in left_out],
        "frozen": frozen,
        "left_out": left_out,
        "buffers": list(buffers),
        "aliases": aliases_of(module),
        "extra_state": {
            name: pack(each.get_extra_state(), f"{name or type(each).__name__}.get_extra_state()", tensors,
                       key=f"extra_state.{name}")
            for name, each in extra_states_of(module)
        },
        "optimizer": None if engine.optimizer is None else _optimizer(engine.optimizer, weights, tensors),
        "schedule": schedule_of(engine, tensors),
        "loss_scale": None if engine.scaler is None else pack(engine.scaler.state_dict(), "loss_scale", tensors),
        "data": pack(_data(engine), "training_dataloader.state_dict()", tensors, key="data"),
        "client_state": pack(dict(client_state), "client_state", own),
    }  # fmt: skip
    places = {name: f"model.{name}" for name in buffers}
    further = {places[name]: buffer for name, buffer in buffers.items()}
    if engine.global_rank == 0:  # of what may differ between processes, rank 0's counts
        tensors |= own | further
        further = {}
    params = checksums(dict(module.named_parameters())) if engine.world_size > 1 else {}
    return Captured(tensors, shared, {"random": random_state()}, places, further, params)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """What the optimizer updates, by the names of the model's parameters; of others the parameters themselves."""
    masters = {} if engine._masters is None else engine._masters.of
    return {name: masters.get(parameter, parameter) for name, parameter in engine.module.named_parameters()}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict has, by name, each once."""
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, each in module.named_modules()
        for name in each._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name not in passing}


def aliases_of(module: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that have several, with the one that counts."""
    first: dict[int, str] = {}
    aliases = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if first.setdefault(id(tensor), name) != name:
                aliases[name] = first[id(tensor)]
    return aliases


def extra_states_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have state of their own making."""
    for name, each in module.named_modules():
        if type(each).get_extra_state is not nn.Module.get_extra_state:
            yield name, each


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """Weights and buffers by name."""
    return {**weights_of(engine), **buffers_of(engine.module)}


def _counters(engine: Engine) -> dict[str, int]:
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "micro_steps": engine.micro_steps - engine._accumulation.micro_batches,
        "skipped_steps": engine.skipped_steps,
    }


def _data(engine: Engine) -> dict[str, Any] | None:
    """The place in the data after the last update; micro-batches of one under way come again."""
    loader = engine.training_dataloader
    if loader is None:
        return None
    state = loader.state_dict()
    if engine._accumulation.backwards and engine._settled_position is not None:
        # A dataset with a state of its own cannot be turned back; of its state these micro-batches are missing.
        state["epoch"], state["samples"], _ = engine._settled_position
    return state


def _optimizer(optimizer: Optimizer, weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(optimizer)
    names = {id(weight): name for name, weight in weights.items()}
    saved: dict[str, Any] = {
        "type": kind.__name__,
        "defaults": settings_of(optimizer.defaults, "defaults", tensors),
        "groups": [
            {
                "weights": [names[id(weight)] for weight in group["params"]],
                "settings": settings_of(group, f"settings.{index}", tensors),
            }
            for index, group in enumerate(optimizer.param_groups)
        ],
    }
    if kind.state_dict is not Optimizer.state_dict:  # more than a state for each weight, which only it understands
        return {
            **saved,
            "whole": pack(optimizer.state_dict(), f"the state of {kind.__name__}", tensors, key="optimizer"),
        }
    strange = [key for key in optimizer.state if id(key) not in names]
    if strange:
        raise EngineError(
            f"optimizer {kind.__name__}: its state has {len(strange)} entries that are of no weight of the model; "
            "it has to bring a state_dict() of its own to be saved"
        )
    saved["on_cpu"] = [
        f"optimizer.{name}.{key}"
        for name, weight in weights.items()
        if weight in optimizer.state and weight.device.type != "cpu"
        for key, value in optimizer.state[weight].items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    ]
    saved["state"] = {
        name: {
            key: pack(value, f"optimizer.state of {name}, {key}", tensors, key=f"optimizer.{name}.{key}")
            for key, value in optimizer.state[weight].items()
        }
        for name, weight in weights.items()
        if weight in optimizer.state
    }
    return saved


def settings_of(group: dict[str, Any], key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Those of a group's settings that are plain; what is not, such as a function, the script gives again."""
    settings = {}
    for name, value in group.items():
        if name == "params" or name in _CHOICES:
            continue
        try:
            settings[name] = pack(value, name, tensors, key=f"{key}.{name}")
        except EngineError:
            continue
    return settings


def schedule_of(engine: Engine, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """A schedule's type, its parameters as the config or torch's own state tells them, and its state.

    What is a parameter and what moves in the state of a script's own class, only that class knows.
    """
    schedule = engine.lr_scheduler
    if schedule is None:
        return None
    state = portable_state(schedule)
    name = type(schedule).__name__
    section = engine.config.scheduler
    by_config = section is not None and section.type == name
    if section is not None and by_config:
        parameters = {**_defaults(type(schedule)), **section.arguments()}
        if hasattr(schedule, "corrected"):
            parameters["redline.schedules"] = engine.config.redline.schedules
    elif is_built_in(schedule):
        parameters = {key: value for key, value in state.items() if not key.startswith("_") and key not in _MOVING}
    else:
        parameters = {}
    return {
        "type": name,
        "told_by": "config" if by_config else "state",
        "parameters": settings_of(parameters, "schedule.parameters", tensors),
        "state": pack(state, f"{name}.state_dict()", tensors, key="schedule"),
    }


def _defaults(cls: type) -> dict[str, Any]:
    """What a class takes where nothing is given."""
    given = {name: each.default for name, each in inspect.signature(cls).parameters.items()}
    numbers = {name: float(value) if isinstance(value, float) else value for name, value in given.items()}
    return {
        name: value for name, value in numbers.items() if value is not inspect.Parameter.empty and name != "corrected"
    }


# What torch's schedules count and find in their state, beside what they were given.
_MOVING = (
    "last_epoch",
    "last_batch_iteration",
    "T_cur",
    "T_i",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
    "lr_lambdas",
    "verbose",
)


def checksum(tensor: Tensor) -> int:
    """Of a tensor's values as they lie in memory; 0 for none."""
    whole = tensor.detach().cpu().contiguous()
    return zlib.crc32(memory_of(whole)) if whole.nbytes else 0


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of many tensors, on their device and read from it at once: the sum of their bits, taken as integers.

    Sharded tensors are left out.
    """
    whole = {name: each.detach() for name, each in tensors.items() if not hasattr(each, "_local_tensor")}
    if not whole:
        return {}
    sums = torch.stack([_bits(each).sum(dtype=torch.int64) for each in whole.values()])
    return dict(zip(whole, sums.tolist()))


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def set_setting(group: dict[str, Any], key: str, value: Any) -> None:
    """Set one setting of a parameter group; a tensor keeps its identity, a number stays one."""
    now = group.get(key)
    if isinstance(now, Tensor):
        now.fill_(float(value))
    else:
        group[key] = value.item() if isinstance(value, Tensor) and isinstance(now, float) else value
