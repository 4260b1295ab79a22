"""The files of a checkpoint that DeepSpeed wrote: found by their names, read without running what is in them.

DeepSpeed pickles objects of its own beside the tensors: the loss scaler, an enum, addresses in flat buffers. Their
names are on a short list, found by looking into what 0.19.8 writes; they are read as inert objects with the same
attributes. Everything else that is no tensor or plain type is refused by name. Files are mapped: what is read of them
is paged in.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.compiled import plain_names
from engine.errors import EngineError

__all__ = ["Files", "Mapped", "files_of", "is_deepspeeds"]

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
_OF_OTHERS = {  # what else DeepSpeed writes
    "layer_*_model_states.pt": "the layers of a PipelineModule or the experts of an MoE model",
    "expp_rank_*_optim_states.pt": "the experts of an MoE model",
    "expert_*_model_states.pt": "the experts of an MoE model",
    "zero": "a model in DeepSpeed's universal format",
    "offloaded_tensors": "tensors that were offloaded to NVMe",
}


class _Inert:
    """Stands for an object of DeepSpeed's: what it was made with, and its attributes; it can do nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _stand_in(name: str) -> type[_Inert]:
    # Named as what it stands for: the tuples that say so beside the class are not in every torch.
    module, _, name = name.rpartition(".")
    return type(name, (_Inert,), {"__module__": module, "__qualname__": name})


_STAND_INS: list[Any] = [
    _stand_in(name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
]


def _zero_stage(kind: Any, name: Any) -> Any:
    """Stands for ``getattr(cls, name)``, as which early releases of Python 3.11 (Debian 12's 3.11.2) pickle an enum.

    Raises:
        UnpicklingError: it asks for anything but a stage of ZeRO.
    """
    if getattr(kind, "__qualname__", None) != "ZeroStageEnum" or name not in _STAGES:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr, of {kind!r} and {name!r}")
    return kind(_STAGES[name])


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
_zero_stage.__module__, _zero_stage.__qualname__ = "builtins", "getattr"  # by which torch's unpickler finds it
_STAND_INS.append(_zero_stage)


class Mapped:
    """One file, read when something in it is wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content: dict[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """What was saved; its tensors are in the file until they are touched.

        Raises:
            EngineError: it cannot be read, or asks for code.
        """
        if self._content is None:
            self._content = _load(self.path)
        return self._content

    def tensor(self, *keys: Any) -> Tensor:
        """A tensor in it.

        Raises:
            EngineError: it is not there.
        """
        value: Any = self.content()
        try:
            for key in keys:
                value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
        if not isinstance(value, Tensor):
            raise EngineError(f"{self.path}: no tensor at {'.'.join(map(str, keys))}; it is not as DeepSpeed writes it")
        return value.detach()

    def release(self) -> None:
        """Give the memory back; what is wanted later is read anew."""
        self._content = None


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise EngineError(_why_refused(path, str(error))) from None
    except (FileNotFoundError, PermissionError) as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # of a broken file: RuntimeError, OSError, EOFError, KeyError, ...
        reason = str(error).partition("\n")[0]
        raise EngineError(f"{path}: it is broken, or no file of DeepSpeed's: {reason}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path}: it holds {type(content).__name__}, not what DeepSpeed writes")
    return {key: plain_names(value) if key in _NAMED else value for key, value in content.items()}


# Where the names of parameters and buffers are: DeepSpeed writes those of a compiled module with its wrapper in them.
_NAMED = ("module", "buffer_names", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments")


def _why_refused(path: Path, message: str) -> str:
    """torch tells how to load it all the same; here it should be clear what is refused and why."""
    match = re.search(r"GLOBAL ([\w.]+)", message)
    asked = f"it asks for {match[1]}" if match else "it holds more than tensors and plain types"
    return (
        f"{path}: refused: {asked}, which DeepSpeed does not write and which could run anything; nothing of it was "
        "run. If it is in the client_state of a script of yours, save again without it"
    )


@dataclass
class Files:
    """The files of one checkpoint.

    Attributes:
        folder: where they are.
        model: `mp_rank_00_model_states.pt`, or one of each process at stage 3.
        optimizer: one of each process at stages 1 to 3; none at stage 0.
        most: bytes that may be read until the memory is given back.
    """

    folder: Path
    model: list[Mapped]
    optimizer: list[Mapped]
    most: int = 16 << 20
    _read: int = 0

    def has_read(self, count: int) -> None:
        """That many bytes more were read: now and then map anew, so that the pages of what was read can go."""
        self._read += count
        if self._read >= self.most:
            self.release()

    def release(self) -> None:
        """Give the memory of all back; what is wanted later is read anew."""
        self._read = 0
        for file in (*self.model, *self.optimizer):
            file.release()


def is_deepspeeds(folder: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed's, by the names in it."""
    return folder.is_dir() and any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def files_of(folder: Path) -> Files:
    """The files of a checkpoint, each process's in its place.

    Raises:
        EngineError: some are missing, or of a kind that is not read.
    """
    for pattern, what in _OF_OTHERS.items():
        if any(folder.glob(pattern)):
            raise EngineError(f"{folder}: it has {what} ({pattern}), which are not read here")
    model, optimizer = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIMIZER)
    return Files(folder, model, optimizer)


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Mapped]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if int(match["mp"]) != 0:
            raise EngineError(
                f"{path}: it is of a model that was split by tensor parallelism, which is not read here; join it in "
                "DeepSpeed first"
            )
        found[int(match["rank"] or 0)] = path
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        name = found[max(found)].name.replace(f"rank_{max(found)}_", f"rank_{missing[0]}_")
        raise EngineError(f"{folder}: {name} is missing, and with it the part of process {missing[0]}")
    return [Mapped(found[rank]) for rank in sorted(found)]
