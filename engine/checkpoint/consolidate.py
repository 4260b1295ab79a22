"""A model out of a checkpoint, in one file: by one process, without a GPU, in little memory.

The checkpoint is one of ours or one that DeepSpeed wrote. Tensors go from its files into the new one a part at a time,
so that the largest tensor is the most that is in memory, and is less than that where it was saved in parts.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from engine.checkpoint import layout
from engine.checkpoint.deepspeed import DeepSpeedCheckpoint
from engine.checkpoint.deepspeed_files import is_deepspeeds
from engine.checkpoint.files import flush
from engine.checkpoint.manifest import NAME, Broken, faults
from engine.checkpoint.progress import Progress
from engine.checkpoint.safetensors import Entry, Writer, in_order, offsets_of
from engine.checkpoint.saved import SavedCheckpoint
from engine.checkpoint.stored import Stored
from engine.errors import EngineError

__all__ = ["DTYPES", "SUFFIXES", "Consolidated", "consolidate", "lowered", "save_tensors", "writing"]

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Consolidated:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        tensors: how many.
        source: the checkpoint, in words.
        aliases: further names of tied tensors, with the one that is in the file.
    """

    path: Path
    bytes: int
    tensors: int
    source: str
    aliases: Mapping[str, str]


def consolidate(
    directory: str | Path,
    output: str | Path,
    *,
    tag: str | None = None,
    dtype: str = "keep",
    force: bool = False,
    progress: bool = True,
) -> Consolidated:
    """Write the model of a checkpoint as one file.

    Args:
        directory: where checkpoints were saved, by this engine or by DeepSpeed; or the folder of one tag.
        output: the file; ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` for torch.load.
        tag: which checkpoint; None takes the latest.
        dtype: number format of parameters: "fp32", "bf16", "fp16", or "keep" for the one that they are saved in, which
            is fp32 wherever training had fp32 weights. Buffers keep theirs.
        force: replace a file that is there.
        progress: show a bar on a terminal.

    Raises:
        EngineError: there is no checkpoint, it is broken, or there is no room; no file is left then.
    """
    target = Path(output)
    _check_target(target, force)
    try:
        source, name = _open(Path(directory), tag)
        tensors = source.tensors()
    except Broken as error:
        raise EngineError(f"{error}{_whole_ones(Path(directory))}") from error
    low = DTYPES[dtype]
    formats = {
        key: low if low is not None and stored.dtype.is_floating_point and key not in source.buffers else stored.dtype
        for key, stored in tensors.items()
    }
    entries = in_order(Entry(key, formats[key], stored.shape) for key, stored in tensors.items())
    aliases = {alias: key for alias, key in source.aliases.items() if key in tensors}
    total = sum(entry.bytes for entry in entries)
    as_pickle = target.suffix != ".safetensors"
    _check_room(target, total * (2 if as_pickle else 1))
    with writing(target) as file, Progress(total, target.name, progress) as bar:
        if as_pickle:
            beside = target.with_name(f".{target.name}.safetensors.partial")
            try:
                with open(beside, "wb") as raw:
                    begin = _write(raw, entries, tensors, aliases, bar)
                _pickle(beside, begin, entries, aliases, file)
            finally:
                beside.unlink(missing_ok=True)
        else:
            _write(file, entries, tensors, aliases, bar)
    return Consolidated(target, target.stat().st_size, len(entries), name, aliases)


# -- the checkpoint ------------------------------------------------------------------------------------


def _open(directory: Path, tag: str | None) -> tuple[DeepSpeedCheckpoint | SavedCheckpoint, str]:
    """The checkpoint, whole as far as it can tell, and what it is in words."""
    if not directory.is_dir():
        raise EngineError(f"{directory}: there is no such folder")
    parent, tag = _resolve(directory, tag)
    folder = parent / tag
    if not folder.exists() and tag not in layout.tags(parent):
        tags = _tags(parent)
        raise EngineError(f"{folder}: there is no such checkpoint{_which(tags)}")
    if is_deepspeeds(folder):
        deepspeeds = DeepSpeedCheckpoint(folder)
        processes = "1 process" if deepspeeds.processes == 1 else f"{deepspeeds.processes} processes"
        return deepspeeds, f"{folder}, DeepSpeed's, of ZeRO stage {deepspeeds.stage} on {processes}"
    found = layout.find(parent, tag)
    wrong = list(faults(found.folder, found.manifest))
    if wrong:
        raise Broken("; ".join(wrong))
    return SavedCheckpoint(found), f"{folder}, of step {found.manifest.step}"


def _resolve(directory: Path, tag: str | None) -> tuple[Path, str]:
    if tag is not None:
        return directory, tag
    if (directory / NAME).is_file() or is_deepspeeds(directory):
        whole = directory.resolve()
        return whole.parent, whole.name
    try:
        return directory, (directory / layout.LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise EngineError(
            f'{directory}: it has no checkpoint, or none named in the file "latest"{_which(_tags(directory))}'
        ) from None


def _tags(directory: Path) -> list[str]:
    return sorted({*layout.tags(directory), *(path.name for path in directory.iterdir() if is_deepspeeds(path))})


def _which(tags: list[str]) -> str:
    return f"; there are the tags {', '.join(tags)}: give one with --tag" if tags else ""


def _whole_ones(directory: Path) -> str:
    """The tags that could be taken instead."""
    whole = []
    for tag in layout.tags(directory) if directory.is_dir() else ():
        try:
            found = layout.find(directory, tag)
        except Broken:
            continue
        if not any(faults(found.folder, found.manifest)):
            whole.append(tag)
    return f"; whole are the tags {', '.join(whole)}: give one with --tag" if whole else ""


# -- the file ------------------------------------------------------------------------------------------


def _check_target(target: Path, force: bool) -> None:
    if target.suffix not in SUFFIXES:
        raise EngineError(f"{target}: expected a name that ends in {', '.join(SUFFIXES)}")
    if target.is_dir():
        raise EngineError(f"{target}: it is a folder; give a file's name")
    if target.exists() and not force:
        raise EngineError(f"{target}: it is there already; give another name, or --force to replace it")
    if not target.parent.is_dir():
        raise EngineError(f"{target}: the folder {target.parent} is not there; make it first")


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise EngineError(
            f"{target}: it takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free on that disk; nothing "
            "was written; make room, or give a file on another disk or a narrower --dtype"
        )


@contextmanager
def writing(target: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is whole and on the disk; one that fails leaves nothing.

    Raises:
        EngineError: it cannot be written.
    """
    beside = target.with_name(f".{target.name}.partial")
    try:
        with open(beside, "wb") as file:
            yield file
        flush([beside])
        beside.replace(target)
        flush([target.parent])
    except OSError as error:
        raise EngineError(f"{target}: it could not be written: {error.strerror or error}; nothing was left") from error
    finally:
        beside.unlink(missing_ok=True)


def _write(
    file: IO[bytes], entries: list[Entry], tensors: Mapping[str, Stored], aliases: Mapping[str, str], bar: Progress
) -> int:
    """The file in safetensors' format; how many bytes stand before the first tensor."""
    # "format" is what transformers asks for; further names of a tensor stand as safetensors.torch.save_model has them.
    writer = Writer(file, entries, {"format": "pt", **aliases})
    for entry in entries:
        for part in tensors[entry.name].parts():
            writer.write(lowered(part, entry.dtype, entry.name))
            bar.update(part.numel() * entry.dtype.itemsize)
    return writer.header_bytes


def lowered(part: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in another format.

    Raises:
        EngineError: fp16 has no room for one of them.
    """
    converted = part.to(dtype)
    if dtype is torch.float16 and part.dtype is not dtype and not torch.equal(part.isfinite(), converted.isfinite()):
        raise EngineError(f"{name}: fp16 ends at 65504, and a value is beyond; write bf16 or fp32")
    return converted


def _pickle(raw: Path, begin: int, entries: list[Entry], aliases: Mapping[str, str], file: IO[bytes]) -> None:
    """The file for torch.load, from one of safetensors' format, whose pages are read as they are written."""
    tensors: dict[str, Tensor] = {}
    with open(raw, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of memory it must not write to
    for entry, offset in zip(entries, offsets_of(entries)):
        if entry.bytes:
            flat = torch.frombuffer(mapped, dtype=entry.dtype, count=entry.shape.numel(), offset=begin + offset)
            tensors[entry.name] = flat.view(entry.shape)
        else:
            tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
    save_tensors(tensors, aliases, file)


def save_tensors(tensors: dict[str, Any], aliases: Mapping[str, str], file: IO[bytes]) -> None:
    """A state dict for torch.load; a tied tensor is in it once, under each of its names."""
    torch.save({**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}, file)
