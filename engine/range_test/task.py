"""What a range test trains on: the user's model, data and loss, in the forms people have them.

    # task.py                                        redline range-test task.py:digits --config config.json
    def digits():
        return model, train_dataset, loss_fn, validation_dataset      # the last is optional

`data` is a dataset, a pair of tensors, or anything that yields batches again and again (a DataLoader).
`loss` is called as ``loss(model, batch)``; a criterion, recognised by a second parameter named target,
targets, label, labels or y as in `torch.nn`, is called as ``loss(model(inputs), targets)``.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from engine.data import build_loader
from engine.device import to_device
from engine.distributed import World
from engine.errors import RangeTestError

__all__ = ["Task", "batches", "load_task", "loss_of", "scalar_of", "training_batches", "validation_batches"]

LossFn = Callable[..., Tensor]

_TARGET_NAMES = frozenset({"target", "targets", "label", "labels", "y"})


@dataclass(frozen=True)
class Task:
    """What a task function returns."""

    model: nn.Module
    data: Any
    loss: LossFn
    validation: Any = None


def load_task(address: str) -> Task:
    """Run the function that ``file.py:function`` names.

    Raises:
        RangeTestError: no such file or function, or it returns something else than a task.
    """
    file, colon, name = address.rpartition(":")
    if not colon or not name.isidentifier():
        raise RangeTestError(f'TASK: got "{address}"; expected file.py:function, such as task.py:digits')
    path = Path(file)
    if not path.is_file():
        raise RangeTestError(f"TASK: there is no file {path}")
    function = getattr(_import_file(path), name, None)
    if not callable(function):
        raise RangeTestError(f"TASK: {path} has no function {name}")
    return _as_task(function(), address)


def _as_task(value: Any, where: str) -> Task:
    if isinstance(value, Task):
        return value
    if isinstance(value, dict):
        unknown = value.keys() - {"model", "data", "loss", "validation"}
        if not unknown and {"model", "data", "loss"} <= value.keys():
            return _checked(Task(**value), where)
    elif isinstance(value, (tuple, list)) and len(value) in (3, 4):
        return _checked(Task(*value), where)
    raise RangeTestError(f"{where}: returned {_described(value)}; expected model, data, loss[, validation data]")


def _checked(task: Task, where: str) -> Task:
    if not isinstance(task.model, nn.Module):
        raise RangeTestError(f"{where}: the model is {_described(task.model)}; expected a torch.nn.Module")
    if not callable(task.loss):
        raise RangeTestError(f"{where}: the loss is {_described(task.loss)}; expected a function loss(model, batch)")
    return task


def _import_file(path: Path) -> Any:
    """The module in a file, importing its neighbours as a script would."""
    # Under its own name where that is free, so that worker processes can find what it defines.
    name = path.stem if path.stem not in sys.modules else f"redline_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RangeTestError(f"TASK: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def loss_of(loss: LossFn) -> Callable[[nn.Module, Any], Tensor]:
    """A loss in the form ``loss(model, batch)``, whichever form it was given in.

    Raises:
        RangeTestError: it takes other arguments than either form.
    """
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
        names = [
            p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):  # a builtin does not tell
        names = ["model", "batch"]
    if len(names) < 2:
        raise RangeTestError(f"loss: takes {names}; expected loss(model, batch), or a criterion loss(output, target)")
    if names[1] not in _TARGET_NAMES:
        return loss

    def apply(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise RangeTestError(
                f"data: a batch is {_described(batch)}; the criterion wants (inputs, targets); for other batches give "
                "a function loss(model, batch)"
            )
        inputs, targets = batch
        return loss(model(inputs), targets)

    return apply


def scalar_of(loss: Any) -> Tensor:
    """What a loss returned, as a tensor without dimensions; what training takes is taken, and nothing else.

    Raises:
        RangeTestError: it is no tensor with one element.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else _described(loss)
        raise RangeTestError(f"loss: returned {given}; expected a scalar tensor, such as loss.mean()")
    return loss.reshape(())


def training_batches(data: Any, world: World, *, micro_batch: int, name: str = "data") -> Iterable[Any]:
    """Something that yields this process's micro-batches, on its device, each time it is iterated.

    Args:
        data: in any of the forms people have it.
        world: the processes.
        micro_batch: samples of a forward on one process.
        name: of the argument, for messages.

    Raises:
        RangeTestError: data that can be read only once, or is no data at all.
    """
    data = _as_dataset(data)
    if _is_dataset(data):
        if not isinstance(data, IterableDataset) and len(data) == 0:
            raise RangeTestError(f"{name}: the dataset is empty")
        return build_loader(data, world, micro_batch=micro_batch)
    return _as_batches(data, name)


def validation_batches(data: Any, world: World, *, micro_batch: int) -> Iterable[Any]:
    """As `training_batches`, in order, each sample on exactly one process."""
    data = _as_dataset(data)
    if _is_dataset(data) and not isinstance(data, IterableDataset) and len(data) > 0:
        return build_loader(data, world, micro_batch=micro_batch, shuffle=False, even=False)
    return training_batches(data, world, micro_batch=micro_batch, name="validation")


def batches(source: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The source's batches on the device, from the beginning again when they end.

    Raises:
        RangeTestError: a source without any.
    """
    empty = False
    while True:
        count = 0
        for batch in source:
            count += 1
            yield to_device(batch, device)
        empty, was_empty = count == 0, empty
        if empty and was_empty:  # once may be: the rest of an epoch that was resumed at its end
            raise RangeTestError("data: it yields no batch; is it empty, or smaller than a batch with drop_last?")


def _is_dataset(data: Any) -> bool:
    return isinstance(data, Dataset) or (
        hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (list, tuple, dict))
    )


def _as_dataset(data: Any) -> Any:
    if isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data):
        return TensorDataset(*data)
    return data


def _as_batches(data: Any, name: str) -> Iterable[Any]:
    if isinstance(data, Iterator):
        raise RangeTestError(
            f"{name}: got {_described(data)}, which can be read only once; give a dataset or a loader, since each run "
            "of the test starts from the same batch"
        )
    if not isinstance(data, Iterable):
        raise RangeTestError(f"{name}: got {_described(data)}; expected a dataset, tensors, or a loader of batches")
    return data


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)} ({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__
