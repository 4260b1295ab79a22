"""Writing a checkpoint: capture the run, write to a hidden directory, flush, list in a manifest, rename atomically."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan

from redline.checkpoint import storage
from redline.checkpoint.optimizer_state import capture_optimizer, capture_schedule
from redline.checkpoint.ranks import RankGroup
from redline.checkpoint.state import RANK_STATE, STATE, Checkpoint, listed, plain_copy
from redline.checkpoint.storage import Manifest, Records, fsync
from redline.checkpoint.tensors import TensorWriter, is_sharded, local_tensor, memory_of
from redline.compiled import plain_name
from redline.distributed.failure import name_ranks
from redline.errors import EngineError
from redline.log import log
from redline.master_params import sum_of_bits
from redline.random_state import random_state
from redline.run_state import Run, aliases_of, extra_state_modules, named_buffers, named_weights, progress_of

if TYPE_CHECKING:
    from redline.config import EngineConfig

__all__ = ["Save"]

_IN_ACCUMULATION = (
    "save_checkpoint: within an accumulation, after %d of its %d micro-batches: what is saved is the last complete "
    "optimizer step; save after the step() that ends an accumulation"
)
_UNEQUAL = (
    "save_checkpoint: %d of the model's parameters differ on %s: %s; write the same values on all ranks; nothing was "
    "repaired"
)
_UNEQUALLY_WRITTEN = (
    "save_checkpoint: a script has not written the same values into %d of the model's parameters on %s: %s; at ZeRO "
    "stages 1 and 2 each rank has kept the rows that it owns; write the same values on all ranks; nothing was repaired"
)
_UNTOUCHED = "what was written of it is removed; the checkpoints that were there have not changed"


class _Offer(NamedTuple):
    """What a rank sends to the others before anything is written; numbers are checksums."""

    tag: str
    directory: str
    plan: SavePlan
    buffers: dict[str, int]
    params: dict[str, int]
    writes: dict[str, tuple[int, int]]


class Save:
    """One checkpoint, on one rank: captured when training stops for it, and written then or later.

    Args:
        run: its pending step is resolved.
        group: the process group that `write` communicates in; None for the default one.
        latest: whether `latest` will name it.
        protected: a tag that is not removed.

    Attributes:
        error: why the run could not be captured; `write` raises it on all ranks.
        values: what this rank has of each tensor, by key; not copied, so nobody may change it before it is written.
    """

    def __init__(
        self, run: Run, config: EngineConfig, group: Any, save_dir: str | Path, tag: Any,
        client_state: Mapping[str, Any], *, latest: bool, exclude_frozen: bool, protected: str | None,
    ) -> None:  # fmt: skip
        self._ranks = RankGroup("save_checkpoint", run.global_rank, run.world_size, group)
        self._config, self._save_dir, self._latest, self._protected = config, save_dir, latest, protected
        # Absolute: with async_save the script may change its working directory before the thread writes.
        self._parent = Path(save_dir).absolute()
        self._step = run.counters()["global_steps"]
        self._tag = f"global_step{self._step}" if tag is None else str(tag)
        self.error: Exception | None = None
        self.values: dict[str, Tensor] = {}
        if run.accumulated_micro_batches:
            log.warning(_IN_ACCUMULATION, run.accumulated_micro_batches, run.gradient_accumulation_steps())
        try:
            run.reshard()
            self._capture(run, client_state, exclude_frozen)
        except Exception as error:  # the other ranks have to know, too
            self.error = error

    def _capture(self, run: Run, client_state: Mapping[str, Any], exclude_frozen: bool) -> None:
        """Capture the run as it was after its last complete optimizer step."""
        module, weights, buffers = run.module, named_weights(run), named_buffers(run.module)
        params = {plain_name(name): param for name, param in module.named_parameters()}
        frozen = [name for name, param in params.items() if not param.requires_grad]
        left_out = frozen if exclude_frozen else []
        saved = [name for name in weights if name not in left_out]
        tensors = {f"model.{name}": weights[name] for name in saved}
        self._shared = {
            **{
                key: plain_copy(value, "training_dataloader.state_dict()" if key == "data" else key)
                for key, value in progress_of(run).items()
            },
            "weights": saved,
            "frozen": frozen,
            "left_out": left_out,
            "buffers": list(buffers),
            "aliases": aliases_of(module),
            "extra_state": {
                name: plain_copy(each.get_extra_state(), f"{name or type(each).__name__}.get_extra_state()")
                for name, each in extra_state_modules(module)
            },
            "optimizer": None if run.optimizer is None else capture_optimizer(run.optimizer, weights, tensors),
            "schedule": capture_schedule(run, self._config),
            "client_state": plain_copy(dict(client_state), "client_state"),
        }
        self._rank_state: dict[str, Any] = {"random": random_state()}
        everything = tensors | {f"model.{name}": buffer for name, buffer in buffers.items()}
        # All ranks plan to write the same tensors; of buffers, in which they may differ, rank 0's.
        self._writer = TensorWriter(everything if run.global_rank == 0 else tensors, run.global_rank)
        self.values = {key: local_tensor(tensor) for key, tensor in everything.items()}
        self._params = _param_checksums(params) if run.world_size > 1 else {}
        written = {} if run.master_params is None else run.master_params.take_writes()
        self._writes = {name: written[param] for name, param in params.items() if param in written}

    def write(self) -> None:
        """Write it on all ranks, or on none: then every rank raises the same EngineError."""
        ranks = self._ranks
        with ExitStack() as cleanup:
            # Each step that can fail is a collective of its own: a rank that failed alone would leave the others
            # waiting in the next one.
            offers = ranks.run(lambda: self._offer(cleanup))
            self._check_tags([each.tag for each in offers])
            _compare_params(offers)
            self._tag, partial = offers[0].tag, self._parent / offers[0].directory
            size = self._writer.share([each.plan for each in offers])
            # Before anything is written: a disk that fills up halfway would be found out much later.
            ranks.run(lambda: self._check_directory(partial, size))
            # Running statistics, for example, which nobody averages.
            own, first = offers[ranks.rank].buffers, offers[0].buffers
            self._rank_state["buffers"] = {
                name: self.values[f"model.{name}"].cpu().clone()
                for name in self._shared["buffers"]
                if own.get(name) != first.get(name)
            }
            written = ranks.run(lambda: self._write_rank(partial))
            ranks.run(lambda: self._finish(partial, written, cleanup))

    def _offer(self, cleanup: ExitStack) -> _Offer:
        if not str(self._save_dir).strip():
            raise EngineError(f"save_dir: got {self._save_dir!r}; expected a directory")
        if self.error is not None:
            raise self.error
        storage.check_tag(self._tag)
        partial = storage.partial_path(self._parent, self._tag)
        if self._ranks.rank == 0:
            self._parent.mkdir(parents=True, exist_ok=True)
            if self._latest and (self._parent / storage.LATEST).is_dir():
                raise EngineError(
                    f"{self._parent / storage.LATEST}: it is a directory; expected the file that names the newest "
                    "checkpoint, or nothing; rename it, or save with save_latest=False"
                )
            cleanup.enter_context(storage.claim(self._parent))
            cleanup.callback(storage.remove, partial)  # once it is renamed, it is not there
            partial.mkdir()
        buffers = self._shared["buffers"] if self._ranks.world_size > 1 else []
        checksums = {name: _crc32(self.values[f"model.{name}"]) for name in buffers}
        return _Offer(self._tag, partial.name, self._writer.plan, checksums, self._params, self._writes)

    def _check_tags(self, tags: list[str]) -> None:
        section = self._config.checkpoint
        validation = (section.tag_validation if section is not None else "Warn").lower()
        if len(set(tags)) == 1 or validation == "ignore":
            return
        others = ", ".join(f"{tag!r} on rank {rank}" for rank, tag in enumerate(tags) if tag != tags[0])
        text = f"save_checkpoint: tag {tags[0]!r} on rank 0, {others}"
        if validation == "fail":
            raise EngineError(f"{text}; checkpoint.tag_validation is Fail; give the same tag on all ranks")
        log.warning("%s; everything is saved under rank 0's; give the same tag on all ranks", text)

    def _check_directory(self, partial: Path, size: int) -> None:
        if not partial.is_dir():
            raise EngineError(
                f"{partial}, which rank 0 has made, is not there; save_dir has to be one directory for all ranks"
            )
        remedy = "make room, or keep fewer checkpoints with redline.checkpoint.keep_last"
        storage.check_free_space(partial, size, f"{self._parent}: the checkpoint", remedy)

    def _write_rank(self, partial: Path) -> tuple[Records, Any]:
        """This rank's files; flushed to disk, except on rank 0, which has more to write."""
        name = RANK_STATE.format(self._ranks.rank)
        with self._disk_errors(f"while tag {self._tag} was written; {_UNTOUCHED}"):
            records, results = self._writer.write(partial, self.values)
            records[name] = storage.write_file(partial / name, lambda file: torch.save(self._rank_state, file))
            if self._ranks.rank != 0:
                fsync(partial / name for name in records)
        return records, results

    def _finish(self, partial: Path, written: list[tuple[Records, Any]], cleanup: ExitStack) -> None:
        """What only rank 0 does, after all have written."""
        if self._ranks.rank != 0:
            return
        parent, latest = self._parent, storage.partial_path(self._parent, storage.LATEST)
        with self._disk_errors(f"while tag {self._tag} was written; {_UNTOUCHED}"):
            own = written[0][0] | self._writer.finish(partial, [results for _, results in written])
            own[STATE] = storage.write_file(partial / STATE, lambda file: torch.save(self._shared, file))
            records = {name: record for files, _ in written for name, record in files.items()} | own
            # Last, since it makes the directory a checkpoint.
            manifest = Manifest(self._tag, self._step, len(written), self._latest, _time_after_latest(parent), records)
            storage.write_file(partial / storage.MANIFEST, lambda file: file.write(manifest.to_json().encode()))
            # All at once: nobody looks into the directory before it has its name.
            names = [*own, storage.MANIFEST, *self._write_deepspeed(partial, manifest)]
            flushed = [*(partial / name for name in names), partial]
            if self._latest:
                cleanup.callback(storage.remove, latest)
                latest.write_text(self._tag, encoding="utf-8")
                flushed.append(latest)
            fsync(flushed)
            storage.rename_into_place(partial, parent / self._tag)
        with self._disk_errors(f"after tag {self._tag} was written: it is complete, but `latest` may name another"):
            if self._latest:
                os.replace(latest, parent / storage.LATEST)
            fsync([parent])  # both names; a file system that orders renames cannot keep the second one alone
        # From here on the checkpoint is saved, whatever happens.
        storage.remove(storage.replaced_path(parent, self._tag))
        options = self._config.redline.checkpoint
        if options.keep_last is not None:
            kept = [self._tag, self._protected or ""]
            storage.remove_expired(parent, options.keep_last, options.keep_every, kept)

    def _write_deepspeed(self, partial: Path, manifest: Manifest) -> list[str]:
        """DeepSpeed's files, if they are asked for. They are in no manifest: the checkpoint is whole without them."""
        if self._config.redline.checkpoint.format != "deepspeed":
            return []
        from redline.checkpoint.deepspeed_writer import write_deepspeed  # here, not above: most runs never need it

        try:
            return write_deepspeed(partial, Checkpoint(partial, manifest), self._config)
        except EngineError as error:
            log.warning("save_checkpoint: the checkpoint is saved without DeepSpeed's files: %s", error)
            return []

    @contextmanager
    def _disk_errors(self, when: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise EngineError(f"{self._parent}: {error.strerror or error}{where}, {when}") from error


def _compare_params(offers: list[_Offer]) -> None:
    """Warn where the model's parameters, or what a script has written into them, are not the same on all ranks."""
    unequal = _differing([each.params for each in offers])
    sums = _differing([{name: total for name, (total, _) in each.writes.items()} for each in offers])
    changed = {name for each in offers for name, (_, elements) in each.writes.items() if elements}
    written = {name: ranks for name, ranks in sums.items() if name in changed and name not in unequal}
    for found, text in ((unequal, _UNEQUAL), (written, _UNEQUALLY_WRITTEN)):
        if found:
            log.warning(text, len(found), name_ranks(sorted(set().union(*found.values()))), listed(found, 8))


def _differing(checksums: list[dict[str, int]]) -> dict[str, list[int]]:
    """The names under which not all ranks have one number, with those that have another than most; else with all."""
    differing = {}
    for name in sorted(set().union(*checksums)):
        numbers = [own.get(name) for own in checksums]
        common, count = Counter(numbers).most_common(1)[0]
        if count < len(numbers):
            has_majority = 2 * count > len(numbers)
            differing[name] = [r for r, number in enumerate(numbers) if number != common or not has_majority]
    return differing


def _param_checksums(params: Mapping[str, Tensor]) -> dict[str, int]:
    """The sum of the bits of each full parameter, taken as integers; computed on the device, read from it at once."""
    sums = {name: sum_of_bits(param) for name, param in params.items() if not is_sharded(param)}
    return dict(zip(sums, torch.stack(list(sums.values())).tolist())) if sums else {}


def _crc32(tensor: Tensor) -> int:
    full = tensor.cpu().contiguous()
    return zlib.crc32(memory_of(full)) if full.nbytes else 0


def _time_after_latest(parent: Path) -> float:
    """Now, but after the latest checkpoint: a clock that goes back does not change the order of checkpoints."""
    try:
        before = storage.find(parent, storage.read_latest(parent) or "")[1].time
    except EngineError:
        before = max((each.time for each in storage.manifests(parent).values() if each is not None), default=0.0)
    return max(time.time(), before + 1e-3)
