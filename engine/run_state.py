"""The state of a training run: captured once, restored any number of times.

:class:`RunState` is a copy in memory, which range tests and tuning restore bit for bit. Checkpoints write the same
parts to disk; they use the functions below, which name the model's tensors and capture what is neither model, optimizer
nor schedule. Nothing here knows the Engine class: it is one implementation of :class:`Run`.

A copy has state that no `state_dict` has, too: a module may count its calls in an int, bind a moving average to a new
tensor at every forward, or draw from a generator of its own. Objects keep their identity and get their content back.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.compiled import plain_name
from redline.data import Loader
from redline.master_params import MasterParams
from redline.precision import LossScale
from redline.random_state import capture_generator, is_generator, random_state, set_random_state
from redline.schedule_state import ScheduleStart, ScheduleState

__all__ = [
    "Run", "RunState", "aliases_of", "capture_generators", "capture_module", "extra_state_modules", "load_progress",
    "named_buffers", "named_tensors", "named_weights", "progress_of",
]  # fmt: skip

_SCALARS = (int, float, complex, bool, str, bytes, type(None))
_SEQUENCES = (list, deque, tuple, set)
_MAPPINGS = (dict, OrderedDict, defaultdict)
# What every nn.Module has: parameters, submodules, hooks, and the flag `training`; others restore these.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


class Run(Protocol):
    """What has the state: the attributes of an engine that are saved and restored."""

    module: nn.Module
    optimizer: Optimizer | None
    lr_scheduler: Any
    scaler: LossScale | None
    training_dataloader: Loader | None
    global_rank: int
    world_size: int

    @property
    def master_params(self) -> MasterParams | None: ...
    @property
    def schedule_start(self) -> ScheduleStart | None: ...  # None without an optimizer
    @property
    def resume_position(self) -> tuple[int, int, bool] | None: ...  # of the data; None between two optimizer steps
    def resolve_pending_step(self) -> None: ...
    def reshard(self) -> None: ...
    def drop_update(self) -> None: ...
    def copy_master_to_model(self) -> None: ...
    @property
    def accumulated_micro_batches(self) -> int: ...
    def gradient_accumulation_steps(self) -> int: ...
    def counters(self) -> dict[str, int]: ...
    def load_counters(self, counters: Mapping[str, int]) -> None: ...
    def loop_state(self) -> dict[str, Any]: ...
    def load_loop_state(self, state: Mapping[str, Any]) -> None: ...


# -- the tensors of a model by name -------------------------------------------------------------------


def named_weights(run: Run) -> dict[str, Tensor]:
    """The model's parameters by name; the fp32 master param in place of each parameter that has one."""
    masters = {} if run.master_params is None else run.master_params.of
    named = run.module.named_parameters()
    return {plain_name(name): masters.get(parameter, parameter) for name, parameter in named}


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers by name, each once."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, each in module.named_modules()
        for name in each._non_persistent_buffers_set
    }
    return {plain_name(name): buffer for name, buffer in module.named_buffers() if name not in transient}


def named_tensors(run: Run) -> dict[str, Tensor]:
    """Weights and persistent buffers by name."""
    return {**named_weights(run), **named_buffers(run.module)}


def aliases_of(module: nn.Module) -> dict[str, str]:
    """The further names of tied parameters and buffers, with the name under which each is saved."""
    first: dict[int, str] = {}
    aliases = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if first.setdefault(id(tensor), name) != name:
                aliases[plain_name(name)] = plain_name(first[id(tensor)])
    return aliases


def extra_state_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that define `get_extra_state`, by name."""
    for name, each in module.named_modules():
        if type(each).get_extra_state is not nn.Module.get_extra_state:
            yield plain_name(name), each


# -- neither model, nor optimizer, nor schedule ---------------------------------------------------------


def progress_of(run: Run) -> dict[str, Any]:
    """Counters, loss scale and position in the data after the last complete optimizer step."""
    data = None
    if run.training_dataloader is not None:
        data = run.training_dataloader.state_dict()
        if run.resume_position is not None:
            # A dataset with a state of its own cannot be rewound: its state is ahead by these micro-batches.
            data["epoch"], data["samples"], _ = run.resume_position
    return {
        "counters": run.counters(),
        "gradient_accumulation_steps": run.gradient_accumulation_steps(),
        "loss_scale": None if run.scaler is None else run.scaler.state_dict(),
        "data": data,
    }


def load_progress(run: Run, saved: Mapping[str, Any]) -> None:
    """Continue from what `progress_of` returned; parts that are None stay as they are."""
    counters, steps = dict(saved["counters"]), run.gradient_accumulation_steps()
    if saved["gradient_accumulation_steps"] != steps:
        counters["micro_steps"] = counters["global_steps"] * steps  # scripts divide one by the other
    if run.training_dataloader is not None and saved["data"] is not None:
        run.training_dataloader.load_state_dict(saved["data"])
    run.load_counters(counters)
    scaler = run.scaler
    if scaler is not None and saved["loss_scale"] is not None:
        now = scaler.state_dict()
        static = {} if scaler.dynamic else {"value": now["value"]}  # a static scale is the config's
        scaler.load_state_dict({**now, **saved["loss_scale"], **static})


# -- all of a run, in memory ----------------------------------------------------------------------------


class RunState:
    """A copy of all that training changes: model, optimizer, schedule, counters, data and random numbers.

    Args:
        run: between two optimizer steps; its pending step is resolved.
        data: loaders that will be iterated, as the caller holds them; None is skipped.
        parts: these loaders, and the samplers and datasets in them: their generators, seeds and epochs are captured.
        modules: further modules with state, such as a loss.
        model: False where nobody changes the model, or writes into tensors of the optimizer's state: none is copied.
    """

    def __init__(
        self,
        run: Run,
        *,
        data: Iterable[Any] = (),
        parts: Iterable[Any] = (),
        modules: Iterable[nn.Module] = (),
        model: bool = True,
    ) -> None:
        run.resolve_pending_step()
        run.reshard()
        self._run, optimizer = run, run.optimizer
        grouped = [] if optimizer is None else [each for group in optimizer.param_groups for each in group["params"]]
        params = dict.fromkeys([*run.module.parameters(), *grouped])  # the groups have the master params
        self._params = [(param, param.detach().clone()) for param in params] if model else []
        everything = dict.fromkeys([*run.module.modules(), *(each for one in modules for each in one.modules())])
        self._modules = [capture_module(module) for module in everything] if model else []
        flagged = [*everything, *([run] if isinstance(run, nn.Module) else [])]
        self._training = [(module, module.training) for module in flagged]
        self._schedule = run.lr_scheduler
        if optimizer is not None:
            copy_state: Any = _copy if model else dict
            self._optimizer_state = {param: copy_state(state) for param, state in optimizer.state.items()}
            self._schedule_state = ScheduleState(run.lr_scheduler, optimizer)  # parameter groups included
        self._scale = None if run.scaler is None else run.scaler.state_dict()
        self._loop = run.loop_state()
        self._data = [capture_generators(part) for part in parts] + [_capture_order(part) for part in parts]
        self._data += [_capture_position(loader) for loader in data if hasattr(loader, "load_state_dict")]
        self._random = random_state()

    def restore(self) -> None:
        """Restore everything, in place; may be called any number of times."""
        run = self._run
        run.reshard()
        with torch.no_grad():
            for param, saved in self._params:
                param.copy_(saved)
        run.drop_update()
        for restore_module in self._modules:
            restore_module()
        for module, training in self._training:
            module.training = training
        run.lr_scheduler = self._schedule
        if run.optimizer is not None:
            run.optimizer.state.clear()
            for param, state in self._optimizer_state.items():
                run.optimizer.state[param] = _copy(state)
            self._schedule_state.restore()
        run.load_loop_state(self._loop)
        if run.scaler is not None and self._scale is not None:
            run.scaler.load_state_dict(self._scale)
        for restore_data in self._data:
            restore_data()
        set_random_state(self._random)


def _copy(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}


def _capture_order(part: Any) -> Callable[[], None]:
    """The seed and epoch of the engine's loader, or of a DistributedSampler."""
    ordered = isinstance(part, Loader) or hasattr(part, "set_epoch")
    numbers = {name: getattr(part, name, None) for name in ("seed", "epoch")} if ordered else {}

    def restore() -> None:
        for name, number in numbers.items():
            if name == "epoch" and isinstance(number, int) and hasattr(part, "set_epoch"):
                part.set_epoch(number)  # the only way for Hugging Face's iterable datasets, where it is a property
            elif isinstance(number, int):
                setattr(part, name, number)

    return restore


def _capture_position(loader: Any) -> Callable[[], None]:
    state = copy.deepcopy(loader.state_dict())
    position = loader.position if isinstance(loader, Loader) else None

    def restore() -> None:
        loader.load_state_dict(copy.deepcopy(state))
        if position is not None:
            loader.position = position  # a loaded state would resume a pass that was broken off

    return restore


# -- what no state_dict has -----------------------------------------------------------------------------


def capture_module(module: nn.Module) -> Callable[[], None]:
    """Capture a module's buffers, plain attributes, generators and extra state; submodules are not included.

    Returns:
        What restores them. Plain attributes and buffers that were added in between are removed.
    """
    attributes = {k: v for k, v in vars(module).items() if k not in _TORCH_ATTRIBUTES and _is_plain(v)}
    buffer_content, content = _content_of(dict(module._buffers)), _content_of(attributes)
    names = set(vars(module))  # of attributes that are not plain, too: these are not removed
    has_extra_state = type(module).get_extra_state is not nn.Module.get_extra_state
    extra_state = copy.deepcopy(module.get_extra_state()) if has_extra_state else None

    def restore() -> None:
        for name in module._buffers.keys() - buffer_content.keys():
            del module._buffers[name]
        for name in [name for name, value in vars(module).items() if name not in names and _is_plain(value)]:
            del vars(module)[name]
        module._buffers.update({name: _restored(*item) for name, item in buffer_content.items()})
        vars(module).update({name: _restored(*item) for name, item in content.items()})
        if has_extra_state:
            module.set_extra_state(copy.deepcopy(extra_state))

    return restore


def capture_generators(owner: Any) -> Callable[[], None]:
    """Capture the random number generators among an object's attributes; returns what restores them."""
    restores = [capture_generator(value) for value in getattr(owner, "__dict__", {}).values() if is_generator(value)]

    def restore() -> None:
        for restore_generator in restores:
            restore_generator()

    return restore


def _is_plain(value: Any) -> bool:
    if isinstance(value, nn.Parameter):  # an RNN keeps a list of its own
        return False
    if isinstance(value, (*_SCALARS, Tensor)) or is_generator(value):
        return True
    if type(value) in _MAPPINGS:
        return all(map(_is_plain, value.values()))
    return type(value) in _SEQUENCES and all(map(_is_plain, value))


def _content_of(value: Any) -> Any:
    """What can change in a value while it stays the same object: items come with their own content."""
    if isinstance(value, Tensor):
        # A tensor with a history was made by a forward, and nobody writes into it.
        return None if value.grad_fn is not None else value.detach().clone()
    if is_generator(value):
        return capture_generator(value)
    if type(value) in _MAPPINGS:
        return {key: (item, _content_of(item)) for key, item in value.items()}
    return [(item, _content_of(item)) for item in value] if type(value) in _SEQUENCES else None


def _restored(value: Any, content: Any) -> Any:
    """The same object, with the content that it had."""
    if content is None:
        return value
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(content)
    elif is_generator(value):
        content()
    elif isinstance(content, dict):
        items = {key: _restored(*item) for key, item in content.items()}
        value.clear()
        value.update(items)
    else:
        restored = [_restored(*item) for item in content]
        if type(value) is not tuple:
            value.clear()
            (value.update if type(value) is set else value.extend)(restored)
    return value
