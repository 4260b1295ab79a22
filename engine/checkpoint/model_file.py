"""The model as one file: of a checkpoint, by one process in little memory, or of a running engine.

It is in the safetensors format, or a state dict for `torch.load`. A safetensors file is eight bytes with the length of
a JSON header, the header, and the tensors' bytes without gaps (https://huggingface.co/docs/safetensors); the package of
that name needs all tensors in memory to write them. `save_16bit_model` is after DeepSpeed's of that name in
`deepspeed/runtime/engine.py`.
"""

from __future__ import annotations

import json
import mmap
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from redline.checkpoint import storage
from redline.checkpoint.deepspeed_files import is_deepspeed
from redline.checkpoint.load import AnyCheckpoint, open_checkpoint
from redline.checkpoint.ranks import RankGroup
from redline.checkpoint.state import plain_copy
from redline.checkpoint.storage import CorruptCheckpoint, check_free_space, fsync
from redline.checkpoint.tensors import is_sharded, memory_of
from redline.compiled import plain_name
from redline.console import ProgressBar
from redline.errors import EngineError
from redline.log import log
from redline.run_state import aliases_of

__all__ = ["Consolidated", "consolidate", "full_state_dict", "save_16bit_model"]

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


# -- the file -------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def sorted_entries(entries: Iterable[Entry]) -> list[Entry]:
    """The order to write in: wide dtypes first, so that each tensor starts at a multiple of its dtype's width."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # stable: else in the order that they come in


def write_safetensors(
    file: IO[bytes], entries: list[Entry], aliases: Mapping[str, str], values: Iterable[Iterable[Tensor]]
) -> None:
    """Write a safetensors file, a part of a tensor at a time.

    Args:
        entries: all tensors, in the order in which they are written.
        aliases: further names of tied tensors, with the one in `entries`; they go into the metadata, as
            `safetensors.torch.save_model` writes them.
        values: the parts of each tensor in order, in its dtype.

    Raises:
        EngineError: safetensors has no name for a dtype.
    """
    assert sys.byteorder == "little", "safetensors is little-endian"
    unknown = [f"{each.name} ({each.dtype})" for each in entries if each.dtype not in _SAFETENSORS]
    if unknown:
        raise EngineError(f"safetensors has no name for the dtype of {', '.join(unknown)}; write .pt instead")
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases}}  # transformers asks for the format
    start = 0
    for name, dtype, shape in entries:
        end = start + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors start at a multiple of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for parts in values:
        _write_parts(file, parts)


def save_state_dict(file: IO[bytes], tensors: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
    """Write a state dict for `torch.load`; a tied tensor is stored once and has each of its names."""
    torch.save({**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}, file)


def _map_tensors(directory: Path, entries: list[Entry], values: Iterable[Iterable[Tensor]]) -> dict[str, Tensor]:
    """Tensors in a file without a name that is mapped: `torch.save` needs all of them at once."""
    with tempfile.TemporaryFile(dir=directory) as raw:
        raw.write(b"\0")  # an empty file cannot be mapped
        raw.seek(8)
        for parts in values:
            _write_parts(raw, parts)
        raw.flush()
        # Copy on write: torch warns about memory that it must not write to.
        mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors, start = {}, 8
    for name, dtype, shape in entries:
        tensors[name] = torch.empty(shape, dtype=dtype)
        if count := shape.numel():
            tensors[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start).view(shape)
            start += count * dtype.itemsize
    return tensors


def _write_parts(file: IO[bytes], parts: Iterable[Tensor]) -> None:
    for part in parts:
        flat = part.detach().contiguous()
        if flat.nbytes:
            file.write(memory_of(flat))


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name once it is complete and on disk; one that fails is removed, with an EngineError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        fsync([partial])
        partial.replace(path)
        fsync([path.parent])  # the new name
    except OSError as error:
        raise EngineError(f"{path}: cannot be written: {error.strerror or error}; no partial file is left") from error
    finally:
        partial.unlink(missing_ok=True)


# -- of a checkpoint ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    path: Path
    bytes: int
    tensors: int  # how many
    source: str  # the checkpoint, as text
    aliases: Mapping[str, str]  # further names of tied tensors, with the one that is in the file


def consolidate(
    directory: str | Path,
    output: str | Path,
    *,
    tag: str | None = None,
    dtype: str = "keep",
    force: bool = False,
    progress: bool = True,
) -> Consolidated:
    """Write the model of a checkpoint as one file; at most one chunk of a tensor is in memory.

    Args:
        directory: where checkpoints were saved, by Redline or by DeepSpeed; or the directory of one tag.
        output: the file; ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` for `torch.load`.
        tag: which checkpoint; None takes the latest.
        dtype: of the parameters: "fp32", "bf16", "fp16", or "keep" for the dtype that they are saved in, which is fp32
            wherever training had fp32 master params. Buffers keep theirs.
        force: replace an existing file.
        progress: show a progress bar on a terminal.

    Raises:
        EngineError: there is no checkpoint, it is corrupt, or it does not fit on the disk; no file is left then.
    """
    target = Path(output)
    _check_target(target, force)
    try:
        checkpoint, source = _open(Path(directory), tag)
        return _write_checkpoint(checkpoint, source, target, DTYPES[dtype], progress=progress)
    except CorruptCheckpoint as error:
        others = ", ".join(storage.manifests(Path(directory)))
        hint = f"; the tags there are {others}: give another one with --tag" if tag is None and others else ""
        raise EngineError(f"{error}{hint}") from error


def _write_checkpoint(
    checkpoint: AnyCheckpoint, source: str, target: Path, dtype: torch.dtype | None, *, progress: bool
) -> Consolidated:
    tensors = {key.removeprefix("model."): each for key, each in checkpoint.entries.items() if key.startswith("model.")}
    kept = {name for name, each in tensors.items() if name in checkpoint.buffers or not each.dtype.is_floating_point}
    entries = sorted_entries(
        Entry(name, each.dtype if dtype is None or name in kept else dtype, each.shape)
        for name, each in tensors.items()
    )
    aliases = {alias: name for alias, name in checkpoint.aliases.items() if name in tensors}
    total = sum(entry.bytes for entry in entries)
    as_safetensors = target.suffix == ".safetensors"
    remedy = "make room, or give a file on another disk or a narrower --dtype"
    check_free_space(target.parent, total * (1 if as_safetensors else 2), str(target), remedy)
    show = None if progress else False
    with atomic_write(target) as file, ProgressBar(total, unit="B", show=show, log_lines=False) as bar:

        def parts(entry: Entry) -> Iterator[Tensor]:
            for part in tensors[entry.name].parts():
                yield _cast(part, entry.dtype, entry.name)
                bar.advance(part.numel() * entry.dtype.itemsize, target.name)

        if as_safetensors:
            write_safetensors(file, entries, aliases, map(parts, entries))
        else:
            save_state_dict(file, _map_tensors(target.parent, entries, map(parts, entries)), aliases)
        if not checkpoint.is_unchanged():
            raise CorruptCheckpoint(f"{checkpoint.directory}: it was replaced while it was read; run this again")
    return Consolidated(target, target.stat().st_size, len(entries), source, aliases)


def _check_target(target: Path, force: bool) -> None:
    if target.suffix not in SUFFIXES:
        raise EngineError(f"{target}: expected a name that ends in {', '.join(SUFFIXES)}")
    if target.is_dir():
        raise EngineError(f"{target}: it is a directory; give the name of a file")
    if target.exists() and not force:
        raise EngineError(f"{target}: it exists already; give another name, or --force to replace it")
    if not target.parent.is_dir():
        raise EngineError(f"{target}: the directory {target.parent} does not exist; make it first")


def _open(directory: Path, tag: str | None) -> tuple[AnyCheckpoint, str]:
    """The checkpoint, verified as far as that is possible, and what it is as text."""
    if not directory.is_dir():
        raise EngineError(f"{directory}: no such directory")
    parent = directory
    if tag is None and ((directory / storage.MANIFEST).is_file() or is_deepspeed(directory)):  # a tag's own directory
        parent, tag = directory.resolve().parent, directory.resolve().name
    tag = tag or storage.read_latest(parent)
    known = sorted({*storage.manifests(parent), *(path.name for path in parent.iterdir() if is_deepspeed(path))})
    choices = f"; there are the tags {', '.join(known)}: give one with --tag" if known else ""
    if tag is None:
        raise EngineError(f'{directory}: it has no checkpoint, or no file "latest"{choices}')
    path = parent / tag
    if not path.exists() and tag not in known:
        raise EngineError(f"{path}: no such checkpoint{choices}")
    checkpoint, _ = open_checkpoint(parent, tag)
    return checkpoint, f"{path}, {checkpoint.source}"


def _cast(part: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = part.to(dtype)
    if dtype is torch.float16 and part.dtype is not dtype and not torch.equal(part.isfinite(), cast.isfinite()):
        raise EngineError(f"{name}: a value is beyond 65504, the largest of fp16; write bf16 or fp32")
    return cast


# -- of a running engine --------------------------------------------------------------------------------


class _FullModel:
    """The model of a running engine: its state dict in the dtype that it computes with, tied tensors once."""

    def __init__(self, run: Any, exclude_frozen: bool) -> None:
        run.reshard()
        aliases = aliases_of(run.module)
        frozen = {
            plain_name(name)
            for name, parameter in run.module.named_parameters(remove_duplicate=False)
            if exclude_frozen and not parameter.requires_grad
        }
        state = {plain_name(name): value for name, value in run.module.state_dict().items()}
        state = {name: value for name, value in state.items() if name not in aliases and name not in frozen}
        self._tensors: dict[str, Any] = {
            name: each.detach() for name, each in state.items() if isinstance(each, Tensor)
        }
        # Refuses what torch.load(weights_only=True) could not read.
        self.others = {name: plain_copy(value, name) for name, value in state.items() if name not in self._tensors}
        self.aliases = {alias: name for alias, name in aliases.items() if name in self._tensors}
        # A sharded parameter is an fp32 shard of what the model computes with; all else has its own dtype.
        compute = run.precision.compute
        self.entries = [
            Entry(name, compute if is_sharded(each) and each.is_floating_point() else each.dtype, each.shape)
            for name, each in self._tensors.items()
        ]

    def gather(self, *, keep: bool) -> Iterator[Tensor]:
        """Each tensor in full on the CPU, in the order of the entries; empty if not kept. A collective."""
        for entry in self.entries:
            tensor = self._tensors[entry.name]
            if is_sharded(tensor):
                # Cast before it is gathered: half the bytes, and the same rounding.
                tensor = tensor.to(entry.dtype).full_tensor()
            full: Tensor = tensor.cpu() if keep else torch.empty(0)
            # torch.save writes all of a storage, of which this may be a view.
            yield full if full.untyped_storage().nbytes() == full.nbytes else full.clone()


def save_16bit_model(run: Any, save_dir: str | Path, filename: str, *, exclude_frozen: bool) -> None:
    """See :meth:`redline.Engine.save_16bit_model`; every rank takes part, and rank 0 writes."""
    ranks = RankGroup("save_16bit_model", run.global_rank, run.world_size)
    target, model = Path(save_dir) / filename, _FullModel(run, exclude_frozen)
    as_safetensors = target.suffix == ".safetensors"
    if as_safetensors:
        model.entries = sorted_entries(model.entries)
        if model.others:
            log.warning("save_16bit_model: %s are not tensors, and not in the file", ", ".join(model.others))

    def check() -> None:
        if not str(save_dir).strip() or not target.name or target.is_dir():
            raise EngineError(
                f"got save_dir {str(save_dir)!r} and save_filename {filename!r}; expected a directory and the name of "
                "a file in it"
            )
        if ranks.rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            check_free_space(target.parent, sum(entry.bytes for entry in model.entries), str(target), "make room")

    ranks.run(check)
    gathered = model.gather(keep=ranks.rank == 0)

    def write() -> None:
        try:
            if ranks.rank == 0:
                with atomic_write(target) as file:
                    if as_safetensors:
                        write_safetensors(file, model.entries, model.aliases, ([tensor] for tensor in gathered))
                    else:
                        tensors = dict(zip([entry.name for entry in model.entries], gathered))
                        save_state_dict(file, {**tensors, **model.others}, model.aliases)
        finally:  # a rank that fails still has to take part in the rest of the collectives
            for _ in gathered:
                pass

    ranks.run(write)


def full_state_dict(run: Any, *, exclude_frozen: bool = False) -> dict[str, Any]:
    """See :meth:`redline.Engine.full_state_dict`."""
    model = _FullModel(run, exclude_frozen)
    gathered = list(model.gather(keep=run.global_rank == 0))
    if run.global_rank != 0:
        return {}
    state = dict(zip([entry.name for entry in model.entries], gathered))
    return {**state, **model.others, **{alias: state[name] for alias, name in model.aliases.items()}}
