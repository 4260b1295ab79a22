"""The model of a running engine as one file, in the format that it computes in: DeepSpeed's `save_16bit_model`.

Every process takes part: a sharded parameter is put together for rank 0 and let go of, one at a time. After
`save_16bit_model` in `deepspeed/runtime/engine.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint.consolidate import save_tensors, writing
from engine.checkpoint.plain import pack
from engine.checkpoint.ranks import Ranks
from engine.checkpoint.safetensors import Entry, Writer, in_order
from engine.checkpoint.shares import is_sharded
from engine.checkpoint.state import aliases_of
from engine.compiled import plain_name
from engine.errors import EngineError
from engine.log import log

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["save_16bit_model"]

_DOING = "save_16bit_model"


def save_16bit_model(engine: Engine, save_dir: str | Path, save_filename: str, *, exclude_frozen: bool) -> bool:
    """See :meth:`engine.Engine.save_16bit_model`."""
    zero = engine.config.zero_optimization
    if zero is not None and zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
        log.warning(
            "save_16bit_model: nothing is saved: zero_optimization.stage3_gather_16bit_weights_on_model_save is false, "
            "as it is by default"
        )
        return False
    engine.put_away()
    ranks = Ranks(engine.global_rank, engine.world_size)
    target = Path(save_dir) / save_filename
    tensors, others = _model(engine, exclude_frozen)
    dtypes = {name: _dtype_of(engine, tensor) for name, tensor in tensors.items()}
    entries = [Entry(name, dtypes[name], tensor.shape) for name, tensor in tensors.items()]
    aliases = {alias: name for alias, name in aliases_of(engine.module).items() if name in tensors}
    if target.suffix == ".safetensors":
        entries = in_order(entries)
        if others:
            log.warning("save_16bit_model: %s are no tensors, and not in the file", ", ".join(others))
            others = {}

    def begin() -> None:
        if not str(save_dir).strip() or not target.name or target.is_dir():
            raise EngineError(f"got save_dir {str(save_dir)!r} and save_filename {save_filename!r}; expected a folder "
                              "and the name of a file in it")  # fmt: skip
        if ranks.rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            needed, free = sum(entry.bytes for entry in entries), shutil.disk_usage(target.parent).free
            if free < needed:
                raise EngineError(
                    f"{target}: it takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free on that disk; "
                    "nothing was written"
                )

    ranks.agree(_DOING, begin)
    whole = _gathered(tensors, entries, keep=ranks.rank == 0)
    # A process that fails on its way still has to take part in putting parameters together.
    ranks.agree(_DOING, lambda: _write(whole, target, entries, aliases, others) if ranks.rank == 0 else _drain(whole))
    return True


def _model(engine: Engine, exclude_frozen: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict without further names of tied tensors; and what in it is no tensor."""
    module = engine.module
    aliases = aliases_of(module)
    left_out = {
        plain_name(name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if exclude_frozen and not parameter.requires_grad
    }
    state = {plain_name(name): value for name, value in module.state_dict().items()}
    state = {name: value for name, value in state.items() if name not in aliases and name not in left_out}
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if name not in tensors:
            pack(value, name, {})  # refuses what torch.load(weights_only=True) could not read again
            others[name] = value
    return tensors, others


def _dtype_of(engine: Engine, tensor: Tensor) -> torch.dtype:
    """What a tensor is saved in: a share of an fp32 weight in what the model computes in, all else as it is."""
    return engine._precision.compute if is_sharded(tensor) and tensor.is_floating_point() else tensor.dtype


def _gathered(tensors: dict[str, Tensor], entries: list[Entry], *, keep: bool) -> Iterator[Tensor]:
    """Each tensor whole and on the CPU, in the entries' order and formats; empty where it is not kept. A collective."""
    for entry in entries:
        either: Any = tensors[entry.name]
        if is_sharded(either):
            # The shares travel in the format that is saved: half the bytes, and rounding is the same before and after.
            either = either.to(entry.dtype).full_tensor()
        if not keep:
            yield torch.empty(0)
            continue
        whole: Tensor = either.cpu()
        # torch.save writes all that a storage has, of which this may be a view.
        yield whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _drain(whole: Iterator[Tensor]) -> None:
    for _ in whole:
        pass


def _write(
    whole: Iterator[Tensor], target: Path, entries: list[Entry], aliases: dict[str, str], others: dict[str, Any]
) -> None:
    try:
        with writing(target) as file:
            if target.suffix == ".safetensors":
                writer = Writer(file, entries, {"format": "pt", **aliases})
                for tensor in whole:
                    writer.write(tensor)
            else:
                _save(file, dict(zip([entry.name for entry in entries], whole)), aliases, others)
    finally:
        _drain(whole)


def _save(file: IO[bytes], tensors: dict[str, Any], aliases: dict[str, str], others: dict[str, Any]) -> None:
    save_tensors({**tensors, **others}, aliases, file)
