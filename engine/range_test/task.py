"""What short runs train on: the user's model, data and loss, in the usual forms.

    # task.py                                        redline range-test task.py:digits --config config.json
    def digits():
        return model, train_dataset, loss_fn, validation_dataset      # the last two are optional

`data` is a dataset, a tuple or dict of tensors, or a loader. `loss` is called as ``loss(model, batch)``; a criterion,
which is recognized by a second parameter named target, targets, label, labels or y as in `torch.nn`, is called as
``loss(model(inputs), targets)``. Without one the model's output has the loss, as those of Hugging Face do. `validation`
is data, or a function ``metric(model)``.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, StackDataset, TensorDataset

from redline.data import Loader, build_loader
from redline.device import to_device
from redline.distributed.process_group import World
from redline.errors import RangeTestError

__all__ = [
    "LossFn", "Mode", "Task", "batches", "is_metric", "load_task", "loader_of", "loss_of", "parts_of", "repeated",
    "scalar_of",
]  # fmt: skip

LossFn = Callable[..., Tensor]
Mode = Literal["min", "max"]

_TARGET_NAMES = frozenset({"target", "targets", "label", "labels", "y"})


@dataclass(frozen=True)
class Task:
    """What a task function returns."""

    model: nn.Module
    data: Any
    loss: LossFn | None = None
    validation: Any = None
    mode: Mode = "min"


def load_task(address: str) -> Task:
    """Call the function that ``file.py:function`` names."""
    file, _, name = address.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or not file:
        raise RangeTestError(f'TASK: got "{address}"; expected file.py:function, such as task.py:digits')
    if not path.is_file():
        raise RangeTestError(f"TASK: there is no file {path}")
    function = getattr(_import_file(path), name, None)
    if not callable(function):
        raise RangeTestError(f"TASK: {path} has no function {name}")
    value = function()
    if isinstance(value, dict) and {"model", "data"} <= value.keys() <= {*Task.__dataclass_fields__}:
        task = Task(**value)
    elif isinstance(value, (tuple, list)) and len(value) in (2, 3, 4):
        task = Task(*value)
    elif isinstance(value, Task):
        task = value
    else:
        raise RangeTestError(f"{address}: returned {_described(value)}; expected model, data[, loss[, validation]]")
    if not isinstance(task.model, nn.Module):
        raise RangeTestError(f"{address}: the model is {_described(task.model)}; expected a torch.nn.Module")
    if task.loss is not None and not callable(task.loss):
        raise RangeTestError(f"{address}: the loss is {_described(task.loss)}; expected a function loss(model, batch)")
    return task


def _import_file(path: Path) -> Any:
    # Under its own name where that is free, so that loader workers can unpickle what it defines.
    name = path.stem if path.stem not in sys.modules else f"redline_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RangeTestError(f"TASK: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # it imports its neighbors, as a script would
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# -- losses --------------------------------------------------------------------------------------------


def loss_of(loss: LossFn | None) -> Callable[[nn.Module, Any], Tensor]:
    """A loss, a criterion, or None for the model's own loss as ``loss(model, batch)``."""
    if loss is None:
        return _loss_of_model
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [parameter.name for parameter in signature.parameters.values() if parameter.kind in positional]
    except (TypeError, ValueError):  # a builtin has no signature
        names = ["model", "batch"]
    if len(names) < 2:
        raise RangeTestError(f"loss: takes {names}; expected loss(model, batch), or a criterion loss(output, target)")
    if names[1] not in _TARGET_NAMES:
        return loss

    def apply(model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return loss(model(batch[0]), batch[1])
        targets = [name for name in batch if name in _TARGET_NAMES] if isinstance(batch, Mapping) else []
        if len(targets) != 1 or len(batch) < 2:
            raise RangeTestError(
                f"data: a batch is {_described(batch)}; the criterion expects (inputs, targets), or a dict with one of "
                f"{', '.join(sorted(_TARGET_NAMES))}; for other batches give a function loss(model, batch)"
            )
        inputs = {name: value for name, value in batch.items() if name != targets[0]}
        output = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
        return loss(output, batch[targets[0]])

    return apply


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """The loss in the output of a model that computes its own, as those of Hugging Face do for a batch with labels."""
    signature = inspect.signature(getattr(model, "module", model).forward)
    inputs: Sequence[Any] = ()
    named: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        named = _arguments(signature, batch)
    else:
        inputs = batch if isinstance(batch, (tuple, list)) else (batch,)
    try:
        signature.bind(*inputs, **named)
    except TypeError as error:
        raise RangeTestError(
            f"loss: none is given, so a batch, {_described(batch)}, is what the model is called with: {error}; give a "
            "criterion such as torch.nn.CrossEntropyLoss(), or a function loss(model, batch)"
        ) from None
    output = model(*inputs, **named)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        names = f" for a batch of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise RangeTestError(
            f"loss: none is given, and the model's output, {_described(output)}, has none{names}; give a criterion or "
            "a function loss(model, batch), or batches with what the model computes its loss from, such as labels"
        )
    return loss


def _arguments(signature: inspect.Signature, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a batch's columns that the model takes; a Hugging Face data set also has text, indices, and "label"."""
    parameters = signature.parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    columns = dict(batch)
    if "label" in columns and "label" not in parameters and "labels" in parameters:
        columns.setdefault("labels", columns.pop("label"))
    lists = {name: value for name, value in columns.items() if isinstance(value, (list, tuple))}
    texts = {name for name, value in lists.items() if any(isinstance(each, str) for each in value)}
    return {name: value for name, value in columns.items() if name not in texts and (takes_any or name in parameters)}


def scalar_of(loss: Any) -> Tensor:
    """A loss as a tensor of shape (), if it is one that `Engine.backward` accepts: a tensor with one element."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else _described(loss)
        raise RangeTestError(f"loss: returned {given}; expected a scalar tensor, such as loss.mean()")
    return loss.reshape(())


# -- data ----------------------------------------------------------------------------------------------


def is_metric(validation: Any) -> bool:
    """Whether validation is a function of the model, not data."""
    return callable(validation) and not hasattr(validation, "__iter__") and not hasattr(validation, "__getitem__")


def _as_dataset(data: Any, name: str) -> Any:
    """Tensors and arrays, in a tuple or by name, as a dataset; anything else as it is."""
    if not isinstance(data, (tuple, Mapping)) or not data:
        # Hugging Face's data sets give lists of Python's numbers unless they are asked for tensors.
        with_format = getattr(data, "with_format", None)
        is_plain = (getattr(data, "format", None) or {}).get("type") is None
        return data if with_format is None or not is_plain else with_format("torch")
    columns: dict[Any, Any] = dict(data) if isinstance(data, Mapping) else dict(enumerate(data))
    if not all(isinstance(each, Tensor) or hasattr(each, "__array__") for each in columns.values()):
        if isinstance(data, tuple):
            return data  # a loader: batches in a tuple
        raise RangeTestError(
            f"{name}: got {_described(data)}; a dict of data holds tensors or arrays of one length; of several splits "
            "give one"
        )
    tensors = {key: torch.as_tensor(each) for key, each in columns.items()}
    for key, tensor in tensors.items():
        if tensor is not columns[key] and tensor.dtype == torch.float64:  # NumPy's usual type, but not that of models
            tensors[key] = tensor.to(torch.get_default_dtype())
    if any(each.ndim == 0 for each in tensors.values()) or len({len(each) for each in tensors.values()}) != 1:
        shapes = ", ".join(f"{key}: {tuple(each.shape)}" for key, each in tensors.items())
        raise RangeTestError(f"{name}: got tensors of shapes {shapes}; expected one length of the first dimension")
    return TensorDataset(*tensors.values()) if isinstance(data, tuple) else StackDataset(**tensors)  # type: ignore[arg-type]


def loader_of(
    data: Any, world: World, *, micro_batch: int, seed: int = 0, for_validation: bool = False
) -> Iterable[Any]:
    """This rank's micro-batches: shuffled by the seed, or for a validation in order, each sample on exactly one rank.

    A loader is used unchanged. An iterator is refused: each run of the test starts from the same batch.
    """
    name = "validation" if for_validation else "data"
    data = _as_dataset(data, name)
    if isinstance(data, IterableDataset):
        return build_loader(data, world, micro_batch=micro_batch, seed=seed)
    is_map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, Dataset) or (is_map_style and not isinstance(data, (list, tuple, dict))):
        if len(data) == 0:  # type: ignore[arg-type]
            raise RangeTestError(f"{name}: the dataset is empty")
        shuffled = not for_validation
        return build_loader(data, world, micro_batch=micro_batch, seed=seed, shuffle=shuffled, even=shuffled)
    if isinstance(data, Iterator):
        raise RangeTestError(
            f"{name}: got {_described(data)}, which can be read only once; give a dataset or a loader, since each run "
            "of the test starts from the same batch"
        )
    if not isinstance(data, Iterable):
        raise RangeTestError(f"{name}: got {_described(data)}; expected a dataset, tensors, or a loader of batches")
    return data


def batches(source: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The source's batches on the device, from the beginning again when they end; it must have at least one."""
    for batch in _without_end(source):
        yield to_device(batch, device)


def _without_end(source: Iterable[Any]) -> Iterator[Any]:
    empty_passes = 0
    while empty_passes < 2:  # one may be empty: the rest of an epoch that was resumed at its end
        empty_passes += 1
        for batch in source:
            empty_passes = 0
            yield batch
    raise RangeTestError("data: it yields no batch; is it empty, or smaller than a batch with drop_last?")


def repeated(source: Iterable[Any], count: int, device: torch.device) -> Iterator[Any]:
    """The source's next `count` batches on the device, again and again.

    Samples of a dataset are read anew each time, so that their augmentation differs. Another loader might give others:
    what it gave is kept, in host memory, and each time a copy of it is given, which a loss may change.
    """
    if isinstance(source, Loader) and source.rereads:
        position = source.position
        while True:
            source.position = position
            yield from islice(batches(source, device), count)
    kept = [copy.deepcopy(batch) for batch in islice(_without_end(source), count)]
    while True:
        for batch in kept:
            yield to_device(copy.deepcopy(batch), device)


def parts_of(*data: Any) -> list[Any]:
    """What data are read through: loaders, samplers and datasets, each once, from the outside in."""
    found: dict[int, Any] = {}
    queue = [part for part in data if part is not None]
    while queue:
        part = queue.pop(0)
        if id(part) not in found:
            found[id(part)] = part
            inner = (getattr(part, name, None) for name in ("dataloader", "sampler", "batch_sampler", "dataset"))
            queue += [each for each in inner if each is not None]
            queue += part.datasets if isinstance(part, ConcatDataset) else []
    return list(found.values())


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)} ({', '.join(type(part).__name__ for part in value)})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(f'{key}: {type(part).__name__}' for key, part in value.items())}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
