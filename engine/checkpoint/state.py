"""What a checkpoint contains: state of plain types, which loads without running code, and tensors in files.

Format 1, written until 0.1.0, has the shared state in ``state.json``, in which an object with one key that starts with
``$`` stands for what JSON does not have, and all of its tensors in DCP's files. Format 2 has it in ``state.pt``, and in
DCP's files only the tensors of the model and of the optimizer's state.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from redline.checkpoint.storage import CorruptCheckpoint, Manifest
from redline.checkpoint.tensors import load_plain, open_tensors
from redline.compiled import plain_names
from redline.errors import EngineError

__all__ = [
    "RANK_STATE", "STATE", "Checkpoint", "listed", "merge_tensors", "plain_copy", "split_tensors", "tensor_keys",
]  # fmt: skip

STATE = "state.pt"
RANK_STATE = "rank_{}.pt"
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset)
_MAPPINGS: tuple[type, ...] = (dict, OrderedDict, Counter)
_TENSOR = "$tensor"  # {"$tensor": KEY} stands for a tensor that is stored elsewhere
_SHARED = {
    "counters", "gradient_accumulation_steps", "loss_scale", "data", "weights", "frozen", "left_out", "buffers",
    "aliases", "extra_state", "optimizer", "schedule", "client_state",
}  # fmt: skip


def plain_copy(value: Any, name: str) -> Any:
    """A deep copy with tensors on the CPU and Python's numbers in place of NumPy's.

    Raises:
        EngineError: it contains anything that is not plain; says where in `name`, and of what type.
    """
    refused: list[str] = []
    try:
        copied = _copy(value, name, refused)
    except RecursionError:
        raise EngineError(f"{name}: it contains itself, or is nested too deeply to be saved; save its parts") from None
    if refused:
        raise EngineError(
            f"{listed(refused, separator='; ')}; expected None, numbers, strings, bytes, lists, tuples, sets, dicts "
            "and tensors, which load without running code; save what it is made of, such as vars(x) or x.state_dict()"
        )
    return copied


def _copy(value: Any, path: str, refused: list[str]) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind in _SEQUENCES:
        return kind(_copy(item, f"{path}[{index}]", refused) for index, item in enumerate(value))
    if kind in _MAPPINGS:
        return kind(
            {_copy(key, f"{path}[{key!r}]", refused): _copy(value[key], f"{path}[{key!r}]", refused) for key in value}
        )
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_meta and not value.is_quantized:
            # The copy also drops what else is in the storage of a view.
            return value.detach().to("cpu", copy=True)
        refused.append(f"{path} is a tensor that is {value.layout}, quantized or without values")
    elif "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
        return _copy(value.item(), path, refused)
    else:
        refused.append(f"{path} is of type {kind.__module__}.{kind.__qualname__}".replace("builtins.", ""))
    return None


def listed(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """The first of many names: ``a, b, c, d, e and 3 more``."""
    names = list(names)
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- tensors that are stored elsewhere ------------------------------------------------------------------


def split_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors, nested in lists, tuples and dicts, into `tensors`; what is left has their keys, from `key` on."""

    def split(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        names = (str(getattr(each, "key", getattr(each, "idx", each))) for each in path)
        place = ".".join([key, *names])
        tensors[place] = leaf.detach()
        return {_TENSOR: place}

    return pytree.tree_map_with_path(split, value)


def merge_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `split_tensors`."""
    return pytree.tree_map(lambda leaf: tensors[leaf[_TENSOR]] if _is_key(leaf) else leaf, value, is_leaf=_is_key)


def tensor_keys(value: Any) -> list[str]:
    """The keys of the tensors that `split_tensors` has moved."""
    return [leaf[_TENSOR] for leaf in pytree.tree_leaves(value, is_leaf=_is_key) if _is_key(leaf)]


def _is_key(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_TENSOR}


# -- a checkpoint, open for reading ---------------------------------------------------------------------


class Checkpoint:
    """A directory that Redline wrote, whose files have been verified; CorruptCheckpoint if they have other contents.

    Attributes:
        entries: every tensor by key: ``model.NAME``, ``optimizer.NAME.KEY``.
        shared: counters, schedule and so on, as `redline.checkpoint.save` captures them; None where there is nothing.
        aliases: further names of tied tensors, with the name under which each is saved.
        buffers, left_out: names of the tensors that are buffers, and of frozen parameters that were not saved.
        rank_state: what a rank saved for itself; rank 0's, if fewer ranks saved.
        has_own_state: whether it is this rank's.
        world_size: the number of ranks that saved.
        source, description: what it is, for messages.
    """

    def __init__(self, directory: Path, manifest: Manifest, rank: int = 0) -> None:
        self.directory, self.world_size, self._manifest = directory, manifest.world_size, manifest
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        self.source = f"of step {manifest.step}"
        self.description = f"after step {manifest.step}, saved by {ranks}"
        self.entries = open_tensors(directory)
        path = directory / ("state.json" if manifest.format == 1 else STATE)
        self.shared: dict[str, Any] = self._read_format_1(path) if manifest.format == 1 else load_plain(path)
        if missing := _SHARED - self.shared.keys():
            raise CorruptCheckpoint(f"{path}: it lacks {', '.join(sorted(missing))}")
        self.aliases: dict[str, str] = self.shared["aliases"]
        self.buffers: list[str] = self.shared["buffers"]
        self.left_out: list[str] = self.shared["left_out"]
        self.has_own_state = rank < self.world_size
        path = directory / RANK_STATE.format(rank if self.has_own_state else 0)
        if "random" not in (state := load_plain(path)):
            raise CorruptCheckpoint(f"{path}: it lacks random numbers")
        self.rank_state = {key: plain_names(value) if key == "buffers" else value for key, value in state.items()}

    def is_unchanged(self) -> bool:
        """Whether the directory is still this checkpoint; a run may save under the same tag while it is read."""
        return Manifest.read(self.directory) == self._manifest

    def optimizer_state(self, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> Any:
        """As it was saved."""
        return self.shared["optimizer"]

    def _read_format_1(self, path: Path) -> dict[str, Any]:
        try:
            # Checkpoints of a compiled model have the compiler's prefix in every name.
            shared: dict[str, Any] = {
                key: value if key in ("client_state", "data") else plain_names(value)
                for key, value in decode_json(path.read_text(encoding="utf-8")).items()
            }
            shared["gradient_accumulation_steps"] = shared["batch"]["gradient_accumulation_steps"]
            state = (shared["optimizer"] or {}).pop("state", None)  # its tensors are read later, sharded
            shared = merge_tensors(shared, {key: self.entries[key].read_full() for key in tensor_keys(shared)})
            if state is not None:
                shared["optimizer"]["state"] = state
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{path}: it is not a checkpoint's state: {error!r}") from error
        return shared


# -- format 1 -------------------------------------------------------------------------------------------


def decode_json(text: str) -> Any:
    """The state in a JSON file of format 1; its tensors are left out, as `split_tensors` leaves them out.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not such a file.
    """
    return json.loads(text, object_hook=_decode)


def _decode(value: dict[str, Any]) -> Any:
    mark = next(iter(value), "")
    is_marked = len(value) == 1 and mark.startswith("$") and mark != _TENSOR
    return _DECODERS[mark](value[mark]) if is_marked else value


def _decode_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: not a dtype")
    return dtype


_DECODERS: dict[str, Callable[[Any], Any]] = {
    **{f"${kind.__name__}": kind for kind in (tuple, set, frozenset, dict, OrderedDict, float, complex, torch.Size)},
    "$Counter": lambda pairs: Counter(dict(pairs)),
    "$bytes": base64.b64decode,
    "$dtype": _decode_dtype,
    "$device": torch.device,
}
